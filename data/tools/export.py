"""Write rankings as tasks for people, in Label Studio or Argilla: `rlhf data export`.

People see the prompt and the responses in an order that says nothing about where they come from.
Ranks, scores, labelers and metadata stay here. What people then say is read by the forms of
`data/forms`, Label Studio's buckets with `tiers`.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO
from xml.sax.saxutils import quoteattr

from data.check.command import Context
from data.check.config import Input
from data.check.guess import without_tiers
from data.check.judgments import hash64
from data.error_lines import shorten
from data.progress import Watch, unwatched
from data.records import Ranking, as_messages, prompt_key
from data.streams import derive_seed
from data.tools.inputs import Opened, open_inputs
from pipeline.errors import UserError

TIERS = ("best", "good", "fair", "poor", "worst")
"""The buckets of Label Studio where the command names none."""
UNPLACED = "_"
"""What Label Studio calls the answers that are in no bucket."""
GUIDELINES = "Rank the responses to the prompt, the best first. Equally good responses may share a place."


@dataclass(frozen=True)
class Request:
    """Say what is written."""

    tool: str
    """labelstudio or argilla."""
    output: Path
    """The folder."""
    seed: int = 0
    """What gives the order of responses."""


@dataclass(frozen=True)
class Task:
    """Hold what a person is asked."""

    id: str
    """A hash of prompt and responses; ids of data often name models."""
    prompt: str | tuple[dict, ...]
    """The prompt."""
    responses: tuple[str, ...]
    """The responses in the order in which they are shown."""


def run(
    inputs: Sequence[Input],
    kind: str | None,
    request: Request,
    experiment: Any,
    artifacts: str = "artifacts",
    watch: Watch = unwatched,
) -> int:
    """Write the tasks of all inputs, and print how many there are and how they are read back.

    Args:
        inputs: The files and data sets, all of rankings.
        kind: The kind that the command line names, or None.
        request: What is written.
        experiment: The validated config, or None.
        artifacts: The folder of all experiments.
        watch: Shows how far reading is.

    Returns:
        The exit code, 0.

    Raises:
        UserError: With a line for every mistake; nothing is written then.
    """
    found, counts, tiers = write(inputs, kind, request, Context.of(experiment, artifacts, tokenizer=False, watch=watch))
    for reason, number in found.left_out.most_common():
        print(f"left out  {number:,}: {reason}")
    for name, number in counts.items():
        print(f"{request.output / name}: {number:,} tasks")
    if request.tool == "labelstudio":
        print(f"{request.output / 'config.xml'}: the labeling interface, with the tiers {', '.join(tiers)}")
        print(f"read back: rlhf data check EXPORT.json 'tiers={','.join(tiers)}'")
    else:
        print("read back: rlhf data check RECORDS.json")
    return 0


def write(
    inputs: Sequence[Input], kind: str | None, request: Request, context: Context
) -> tuple[Tasks, dict[str, int], tuple[str, ...]]:
    """Write the tasks of all inputs into a folder.

    Args:
        inputs: The files and data sets, all of rankings.
        kind: The kind that the command line names, or None.
        request: What is written.
        context: What inputs are read with.

    Returns:
        The tasks, with what was left out; {file of tasks: how many it has}; the tiers.

    Raises:
        UserError: With a line for every mistake; nothing is written then.
    """
    opened = open_inputs(inputs, kind, context)
    for one in opened:
        if one.kind != "rankings":
            problem = f"holds {one.kind}; people compare responses"
            raise UserError(f"{one.source.name}: {problem}, so give rankings (ranks: [null, null] if nobody judged)")
    tiers = check_tiers(opened[0].source.tiers or TIERS)
    # of other tools' files they name only the buckets to write
    opened = [replace(one, source=without_tiers(one.source)) for one in opened]
    found = Tasks(request.seed)
    return found, write_folder(found.of(opened), request, tiers), tiers


def check_tiers(tiers: Sequence[str]) -> tuple[str, ...]:
    """Return the names of tiers if Label Studio can have them as buckets.

    Raises:
        UserError: It cannot.
    """
    for tier in tiers:
        if not tier or tier == UNPLACED or tier.startswith("$") or "," in tier:
            raise UserError(f"tiers: {tier!r} cannot be a bucket of Label Studio; give plain words, the best first")
    if len(tiers) < 2 or len(set(tiers)) < len(tiers):
        raise UserError(f"tiers: {', '.join(tiers)}; give at least two different names, the best first")
    return tuple(tiers)


@dataclass
class Tasks:
    """Make tasks of rankings, each set of responses once."""

    seed: int
    """What gives the order of responses."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason → what was left out."""
    _seen: set[int] = field(default_factory=set)
    """The hashes of prompts with their responses."""

    def of(self, opened: Iterable[Opened]) -> Iterator[Task]:
        """Yield the tasks.

        Raises:
            UserError: There are mistakes in the data, or no task is left.
        """
        errors: list[str] = []
        written = 0
        for one in opened:
            for _, record in one.records():
                assert isinstance(record, Ranking)
                task = self._task(record)
                if task is not None:
                    written += 1
                    yield task
            errors += one.loaded.errors
            self.left_out += one.loaded.left_out
        if errors:
            raise UserError(shorten(errors))
        if not written:
            reasons = "; ".join(f"{number:,} left out: {reason}" for reason, number in self.left_out.items())
            raise UserError(f"{opened_names(opened)}: no task is left ({reasons}); nothing was written")

    def _task(self, ranking: Ranking) -> Task | None:
        """Return the task of a ranking; None if there is nothing to compare, or it came before."""
        responses = sorted({text for text in ranking.responses if text.strip()})
        self.left_out["responses that are blank or repeated"] += len(ranking.responses) - len(responses)
        if len(responses) < 2:
            self.left_out["rankings without two different responses"] += 1
            return None
        key = prompt_key(ranking.prompt)
        digest = hash64(json.dumps([key, responses]))
        if digest in self._seen:
            self.left_out["the same responses to the same prompt came before"] += 1
            return None
        self._seen.add(digest)
        # The order depends on the texts only, and not on who was ranked first.
        random.Random(derive_seed("export", self.seed, key)).shuffle(responses)
        return Task(f"{digest % 2**64:016x}", ranking.prompt, tuple(responses))


def opened_names(opened: Iterable[Opened]) -> str:
    """Return the names of inputs, for error lines."""
    return ", ".join(one.source.name for one in opened)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def write_folder(tasks: Iterable[Task], request: Request, tiers: Sequence[str]) -> dict[str, int]:
    """Write all files into the folder; none is there half written.

    Args:
        tasks: The tasks.
        request: What is written.
        tiers: The buckets.

    Returns:
        {file of tasks: how many it has}.
    """
    folder = request.output
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    writer = Writer(folder)
    try:
        texts = writer.label_studio(tasks, tiers) if request.tool == "labelstudio" else writer.argilla(tasks)
        for name, text in texts.items():
            writer.open(name).write(text)
        return writer.publish()
    except BaseException:
        writer.discard()
        if is_new:
            folder.rmdir()
        raise


class Writer:
    """Write files under temporary names, and rename all of them in the end."""

    def __init__(self, folder: Path) -> None:
        """Build the writer of a folder."""
        self.folder = folder
        self.stack = ExitStack()
        self.files: dict[str, TextIO] = {}  # final name → the open file
        self.counts: dict[str, int] = {}  # final name → the tasks in it

    def open(self, name: str) -> TextIO:
        """Open a file for writing."""
        path = self.folder / f".tmp-{os.getpid()}-{name}"
        self.files[name] = self.stack.enter_context(path.open("w", encoding="utf-8"))
        return self.files[name]

    def add(self, name: str, row: dict) -> None:
        """Write an object into a JSON array."""
        before = "," if name in self.counts else "["
        file = self.files[name] if name in self.counts else self.open(name)
        file.write(f"{before}\n{json.dumps(row, ensure_ascii=False, allow_nan=False)}")
        self.counts[name] = self.counts.get(name, 0) + 1

    def label_studio(self, tasks: Iterable[Task], tiers: Sequence[str]) -> dict[str, str]:
        """Write tasks.json, and return the other files: the labeling interface."""
        has_turns = False
        for task in tasks:
            has_turns = has_turns or not isinstance(task.prompt, str)
            items = [
                {"id": str(number), "title": f"Response {number}", "body": text}
                for number, text in enumerate(task.responses, 1)
            ]
            prompt = task.prompt if isinstance(task.prompt, str) else list(task.prompt)
            self.add("tasks.json", {"data": {"task_id": task.id, "prompt": prompt, "items": items}})
        if has_turns:  # one interface shows all prompts, so all of them become conversations
            self._as_conversations()
        return {"config.xml": interface(tiers, has_turns)}

    def _as_conversations(self) -> None:
        """Write tasks.json again, with every prompt as a list of messages."""
        file = self.files["tasks.json"]
        file.close()
        first = Path(file.name).with_suffix(".first")
        os.replace(file.name, first)
        self.counts.clear()
        try:
            with first.open(encoding="utf-8") as lines:
                next(lines)  # the bracket
                for line in lines:
                    row = json.loads(line.rstrip().removesuffix(","))
                    row["data"]["prompt"] = as_messages(row["data"]["prompt"])
                    self.add("tasks.json", row)
        finally:
            first.unlink()

    def argilla(self, tasks: Iterable[Task]) -> dict[str, str]:
        """Write the records, and return the other files: the settings of each data set.

        A ranking question has a fixed number of responses, so that each K is a data set of its own.
        """
        settings: dict[str, str] = {}
        for task in tasks:
            is_chat = not isinstance(task.prompt, str)
            names = [f"response_{number}" for number in range(1, len(task.responses) + 1)]
            prompt = list(task.prompt) if is_chat else task.prompt
            row = {
                "id": task.id,
                "fields": {"prompt": prompt, **dict(zip(names, task.responses, strict=True))},
                "metadata": {},
                "suggestions": {},
                "responses": {},
                "vectors": {},
                "status": "pending",
            }
            part = f"k{len(names)}{'_chat' if is_chat else ''}"
            self.add(f"records_{part}.json", row)
            settings[f"settings_{part}.json"] = json.dumps(argilla_settings(names, is_chat), indent=1) + "\n"
        return settings

    def publish(self) -> dict[str, int]:
        """Close all files, rename them into place, and return {file of tasks: how many it has}."""
        for name in self.counts:
            self.files[name].write("\n]\n")
        self.stack.close()
        for name, file in self.files.items():
            os.replace(file.name, self.folder / name)
        return self.counts

    def discard(self) -> None:
        """Remove what was written."""
        self.stack.close()
        for file in self.files.values():
            Path(file.name).unlink(missing_ok=True)


def interface(tiers: Sequence[str], has_turns: bool) -> str:
    """Return Label Studio's labeling interface: the prompt, the responses, and a bucket a tier.

    Args:
        tiers: The buckets, the best first.
        has_turns: Whether prompts are lists of messages.
    """
    prompt = '<Text name="prompt" value="$prompt" valueType="text"/>'
    if has_turns:
        prompt = '<Paragraphs name="prompt" value="$prompt" layout="dialogue" nameKey="role" textKey="content"/>'
    buckets = "\n".join(f"    <Bucket name={quoteattr(tier)} title={quoteattr(tier)}/>" for tier in tiers)
    return f"""\
<View>
  <Style>.htx-ranker-item {{ white-space: pre-wrap }}</Style>
  <Header value="Sort the responses, the best first. Equally good ones share a bucket."/>
  {prompt}
  <List name="responses" value="$items" title="Responses"/>
  <Ranker name="rank" toName="responses">
{buckets}
  </Ranker>
</View>
"""


def argilla_settings(names: Sequence[str], is_chat: bool) -> dict:
    """Return the settings of an Argilla data set, as `rg.Settings.from_json` reads them.

    Args:
        names: The fields of the responses.
        is_chat: Whether the prompts are lists of messages.
    """

    def text_field(name: str, kind: str) -> dict:
        title = re.sub("_", " ", name).capitalize()
        return {"name": name, "title": title, "required": True, "settings": {"type": kind, "use_markdown": False}}

    options = [{"value": name, "text": re.sub("_", " ", name).capitalize()} for name in names]
    ranking = {
        "name": "ranking",
        "title": "Which responses are better?",
        "description": GUIDELINES,
        "required": True,
        "settings": {"type": "ranking", "options": options},
    }
    return {
        "guidelines": GUIDELINES,
        "fields": [text_field("prompt", "chat" if is_chat else "text"), *(text_field(name, "text") for name in names)],
        "questions": [ranking],
        "vectors": [],
        "metadata": [],
        "allow_extra_metadata": False,
    }

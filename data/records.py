"""Define the four records that every data file is turned into, and write them as JSONL.

    Demonstration {prompt, completion, learnt?, row_text?}
    Ranking {id, prompt, responses, ranks, labeler?, margin?, finished?, scores?, labels?, source?}
    Document {text}
    Prompt {prompt, row_text?}

Each may also have `user_id` (who wrote the prompt), `kind` (what sort of prompt or use it is) and
`meta` (anything; kept, never read).

A `prompt` is a string or a list of {role, content} that ends with the user's message.
`data/parsing.py` checks a row and makes a record of it.
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

OPTIONAL = (
    "learnt",
    "labeler",
    "margin",
    "finished",
    "scores",
    "labels",
    "source",
    "user_id",
    "kind",
    "meta",
    "row_text",
)
"""Fields that are left out of a record's JSON where they are None or empty."""

# ── the records ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Demonstration:
    """Hold a prompt and the completion that SFT teaches."""

    prompt: str | tuple[dict, ...]
    """A string (one user message), or messages {role, content} that end with the user's."""
    completion: str
    """The assistant's answer, without EOS."""
    learnt: tuple[int, ...] = ()
    """Indices (from 0) of assistant messages inside the prompt that are answers to teach too."""
    user_id: str | None = None
    """Who wrote the prompt; None if that is not known."""
    kind: str | None = None
    """What sort of prompt or use it is, as the data name it."""
    meta: dict | None = None
    """Whatever else the row says; kept, never read."""
    row_text: str | None = None
    """What the row of a task says, without its wording and the rows that are shown before it; rows
    that say the same are never split. None: the prompt is not worded (`data/tasks`)."""
    extra: dict | None = field(default=None, compare=False)
    """The row of the task, with its final answer under `answer`; see `Prompt.extra`."""


@dataclass(frozen=True)
class Ranking:
    """Hold K ≥ 2 responses to one prompt and how one labeler ranked them.

    A labeler may also have said of each response alone whether it is good (`labels`); then K ≥ 1.
    """

    id: str
    """Unique in its file."""
    prompt: str | tuple[dict, ...]
    """As in `Demonstration`."""
    responses: tuple[str, ...]
    """The K responses; a response may be blank, since a policy can answer nothing at all."""
    ranks: tuple[int | None, ...]
    """The rank of each response: 1 is best, equal ranks are a tie, None was not judged."""
    labeler: str | None = None
    """The name of the labeler."""
    margin: float | None = None
    """How sure the labeler is: the smallest score difference of a pair (Llama 2, equation 2)."""
    finished: tuple[bool, ...] | None = None
    """Whether each response ended by itself; False for one that was cut off at the length limit, so
    that no model is trained to end there. None: all of them ended by themselves."""
    scores: tuple[float | None, ...] | None = None
    """The score of each response that the ranks were made from, higher being better; None was not
    scored. None: the row was ranked, not scored."""
    labels: tuple[bool | None, ...] | None = None
    """Whether each response is good by itself, as a thumb says; None was not judged. None: no
    labels."""
    source: str | None = None
    """The data set that it comes from: the row's own word, or which source of a mixture it was in.
    The reward model's accuracy is also given for each."""
    user_id: str | None = None
    """Who wrote the prompt; None if that is not known."""
    kind: str | None = None
    """What sort of prompt or use it is, as the data name it."""
    meta: dict | None = None
    """Whatever else the row says; kept, never read."""

    @property
    def answers(self) -> tuple[tuple[str, bool], ...]:
        """Return (text, whether it is finished) of each response: the identity of a response."""
        return tuple(zip(self.responses, self.finished or (True,) * len(self.responses), strict=True))


@dataclass(frozen=True)
class Document:
    """Hold a text for language-model training."""

    text: str
    """The text, without special tokens."""
    user_id: str | None = None
    """Who wrote the prompt; None if that is not known."""
    kind: str | None = None
    """What sort of prompt or use it is, as the data name it."""
    meta: dict | None = None
    """Whatever else the row says; kept, never read."""


@dataclass(frozen=True)
class Prompt:
    """Hold a prompt for which a policy samples responses."""

    prompt: str | tuple[dict, ...]
    """As in `Demonstration`."""
    user_id: str | None = None
    """Who wrote the prompt; None if that is not known."""
    kind: str | None = None
    """What sort of prompt or use it is, as the data name it."""
    meta: dict | None = None
    """Whatever else the row says; kept, never read."""
    row_text: str | None = None
    """As in `Demonstration`."""
    extra: dict | None = field(default=None, compare=False)
    """The other keys of the row that was read (`answer`, `constraints`, …), for scorers that know
    what a right response is. Not written by `to_json`, and prompts that differ in it alone are
    equal."""

    def row(self) -> dict:
        """Return the prompt and all other keys that are known, as scorers get them."""
        about = {"user_id": self.user_id, "kind": self.kind, "meta": self.meta, "row_text": self.row_text}
        prompt = self.prompt if isinstance(self.prompt, str) else as_messages(self.prompt)
        return {**(self.extra or {}), **{key: x for key, x in about.items() if x is not None}, "prompt": prompt}


CANONICAL = json.JSONEncoder(sort_keys=True)
LINES = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
"""What writes the JSON of digests, and of lines of files; one for all, as making it takes time."""

Record = Demonstration | Ranking | Document | Prompt


def own_text(record: Record) -> str | tuple[dict, ...]:
    """Return what tells a prompt from others: what its row says if it is worded, or the prompt."""
    assert not isinstance(record, Document)
    text = getattr(record, "row_text", None)
    return record.prompt if text is None else text


# ── prompts and pairs ────────────────────────────────────────────────────────────────────────────


def as_messages(prompt: str | Iterable[dict]) -> list[dict]:
    """Return a prompt as a list of {role, content}; a string is one user message."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def prompt_key(prompt: str | Iterable[dict]) -> str:
    """Return a key that is equal for prompts with the same roles and words.

    White space and the Unicode form of letters make no difference.
    """
    if isinstance(prompt, str):  # of one user message the same as below, without making a list of it
        return f'[["user", {json.dumps(_words(prompt), ensure_ascii=False)}]]'
    turns = [[message["role"], _words(message["content"])] for message in as_messages(prompt)]
    return json.dumps(turns, ensure_ascii=False)


def _words(text: str) -> str:
    """Return the words of a text with one blank between them, their letters in one Unicode form."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def judged_pairs(ranking: Ranking) -> Iterator[tuple[int, int, str]]:
    """Yield all C(K, 2) pairs of a ranking's responses, each with a verdict.

    Yields:
        (i, j, verdict) with the verdict "usable" (response i is better than j), "tie", "unjudged"
        or
        "identical". The same text once finished and once cut off counts as two different responses.
    """
    ranks, answers = ranking.ranks, ranking.answers
    for i, j in combinations(range(len(answers)), 2):
        first, second = ranks[i], ranks[j]
        if first is None or second is None:
            yield i, j, "unjudged"
        elif answers[i] == answers[j]:
            yield i, j, "identical"
        elif first == second:
            yield i, j, "tie"
        elif first < second:
            yield i, j, "usable"
        else:
            yield j, i, "usable"


def ranks_of_labels(labels: Sequence[bool | None]) -> list[int | None]:
    """Return the ranks that labels stand for: good responses tie on rank 1, bad ones behind them.

    Where all labels are alike nothing is preferred, and no response has a rank.

    Args:
        labels: Whether each response is good; None was not judged.
    """
    good = sum(label is True for label in labels)
    if not good or not sum(label is False for label in labels):
        return [None] * len(labels)
    return [None if label is None else 1 if label else good + 1 for label in labels]


def is_usable(ranking: Ranking) -> bool:
    """Return whether a loss can learn from a ranking: it has a usable pair, or a label."""
    return has_label(ranking) or any(verdict == "usable" for *_, verdict in judged_pairs(ranking))


def content_id(ranking: Ranking) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of everything in a ranking except its id."""
    return id_of_content(vars(ranking))


def has_label(ranking: Ranking) -> bool:
    """Return whether any response of a ranking was judged by itself."""
    return any(label is not None for label in ranking.labels or ())


def id_of_content(fields: Mapping[str, Any]) -> str:
    """Return what `content_id` does, of the fields that a ranking will have."""
    content = [as_messages(fields["prompt"]), fields["responses"], fields["ranks"], fields["labeler"]]
    # Optional fields enter only where they say something, so that ids stay the same without them.
    if fields["margin"] is not None:
        content.append(fields["margin"])
    if fields["finished"] and not all(fields["finished"]):
        content.append(fields["finished"])
    if fields["scores"] is not None:
        content.append(["scores", fields["scores"]])
    if fields["labels"] is not None:
        content.append(["labels", fields["labels"]])
    return hashlib.sha256(CANONICAL.encode(content).encode()).hexdigest()[:16]


# ── JSONL ────────────────────────────────────────────────────────────────────────────────────────


def to_json(record: Record) -> dict:
    """Return the JSON object that reads back as an equal record, without a prompt's extra keys."""
    row = {}
    for key, value in vars(record).items():
        if isinstance(value, tuple):
            value = list(value)
        if key != "extra" and not (value in (None, []) and key in OPTIONAL):
            row[key] = value
    return row


def write_jsonl(path: str | Path, records: Iterable[Record | dict]) -> None:
    """Write records as UTF-8 JSONL, one object a line; the file appears whole or not at all.

    Args:
        path: The file to write.
        records: Records, or objects that are written as they are.
    """
    with jsonl_writer(path) as write:
        for record in records:
            write(record)


@contextmanager
def jsonl_writer(path: str | Path) -> Iterator[Callable[[Record | dict], None]]:
    """Give a function that writes a record, or an object as it is, as the next line of a file.

    Args:
        path: The file to write. It appears when the block ends, and not at all if that fails.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as handle:

            def write(record: Record | dict) -> None:
                row = record if isinstance(record, dict) else to_json(record)
                handle.write(LINES.encode(row) + "\n")

            yield write
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        # The rename itself is durable only after the folder has been synced.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)

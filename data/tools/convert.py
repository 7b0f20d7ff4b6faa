"""Write data of any form as our records, and say what was left out and why: `rlhf data convert`.

Rows that can be read as the kind that is wanted are read as that. Otherwise they are read as what
they are, and give what they hold of it: a ranking its best responses as demonstrations, and every
row with a prompt its prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from data.check.command import Context
from data.check.config import Input
from data.check.guess import GUESSED_ROWS, all_rows
from data.check.inspect_file import add_rows
from data.check.report import Report
from data.error_lines import shorten
from data.files.reading import Reading
from data.forms import recognise
from data.progress import Watch, unwatched
from data.records import Demonstration, Document, Prompt, Ranking, Record, is_usable, prompt_key, write_jsonl
from data.tools.inputs import Opened, open_inputs
from pipeline.errors import UserError

CONVERSIONS = {
    "rankings": ("rankings",),
    "demonstrations": ("demonstrations", "rankings"),
    "prompts": ("prompts", "evaluation_prompts", "demonstrations", "rankings"),
    "documents": ("documents",),
}
"""Kind that is written → the kinds that it can be made of."""


def run(
    inputs: Sequence[Input],
    kind: str | None,
    to: str,
    output: Path,
    experiment: Any,
    artifacts: str = "artifacts",
    watch: Watch = unwatched,
) -> int:
    """Write the records of all inputs into one file, and print what was read and left out.

    Args:
        inputs: The files and data sets.
        kind: The kind of data that they are read as; None: the best one that gives `to`.
        to: The kind of records to write.
        output: The file to write; it appears whole or not at all.
        experiment: The validated config, or None.
        artifacts: The folder of all experiments.
        watch: Shows how far reading is.

    Returns:
        The exit code, 0.

    Raises:
        UserError: With a line for every mistake in the data; nothing is written then.
    """
    context = Context.of(experiment, artifacts, tokenizer=False, watch=watch)
    opened = [open_inputs([given], kind or kind_to_read(given, to, context), context)[0] for given in inputs]
    for one in opened:
        if one.kind not in CONVERSIONS[to]:
            known = " or ".join(CONVERSIONS[to])
            raise UserError(f"{one.source.name}: {one.kind} hold no {to}; these are made of {known}")
    writing = Writing(to)
    write_jsonl(output, writing.records(opened))
    for one in opened:
        report = Report(one.source.name, one.kind)
        add_rows(report, one.loaded, one.source)
        if one.loaded.duplicates:
            report.add("duplicates", f"{one.loaded.duplicates:,} prompts that came before")
        for line in report.lines()[:-1]:  # without the number of errors, as there are none
            print(line)
    for reason, number in writing.left_out.most_common():
        print(f"left out  {number:,}: {reason}")
    print(f"{output}: {writing.written:,} {to}")
    return 0


def kind_to_read(given: Input, to: str, context: Context) -> str | None:
    """Return the kind that rows are read as: `to` if they can be, otherwise what they are.

    Args:
        given: The input.
        to: The kind that is wanted.
        context: What the config says.

    Returns:
        The kind; None if the rows are of no known kind.
    """
    source, named = context.resolve(given, None)
    if to == "prompts" and named not in (None, "documents"):
        return "prompts"  # a row of any other kind gives its prompt
    rows = islice(all_rows(source, Reading()), GUESSED_ROWS)
    return to if any(has_form(to, value) for _, value in rows) else named


def has_form(kind: str, value: object) -> bool:
    """Return whether a row has a form of a kind."""
    try:
        recognise(kind, value)
    except ValueError:
        return False
    return True


@dataclass
class Writing:
    """Turn records into those that are written, and keep what must be known across files."""

    to: str
    """The kind of records to write."""
    written: int = 0
    """Records so far."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason → what was left out of records, beside what reading has left out."""
    _seen: set[str] = field(default_factory=set)
    """Ids of rankings, or keys of prompts, or of prompts with their best responses."""

    def records(self, opened: Iterable[Opened]) -> Iterator[Record]:
        """Yield the records to write.

        Args:
            opened: The inputs.

        Raises:
            UserError: There are mistakes in the data, or nothing is left to write.
        """
        errors: list[str] = []
        usable = False
        for one in opened:
            for _, record in one.records():
                for converted in self._converted(record):
                    self.written += 1
                    if isinstance(converted, Ranking) and not usable:
                        usable = is_usable(converted)
                    yield converted
            errors += one.loaded.errors
        if errors:
            raise UserError(shorten(errors))
        if not self.written or (self.to == "rankings" and not usable):
            what = "no usable pair" if self.written else f"no {self.to}"
            reasons = "; ".join(f"{number:,} left out: {reason}" for reason, number in self.left_out.items())
            raise UserError(f"the data hold {what}{f' ({reasons})' if reasons else ''}; nothing was written")

    def _converted(self, record: Record) -> Iterator[Record]:
        """Yield what a record becomes."""
        if self.to == "demonstrations" and isinstance(record, Ranking):
            yield from self._best(record)
        elif self.to == "prompts":
            assert not isinstance(record, Document)
            key = prompt_key(record.prompt)
            if key in self._seen:
                self.left_out["the prompt came before"] += 1
                return
            self._seen.add(key)
            row_text = getattr(record, "row_text", None)
            yield Prompt(record.prompt, record.user_id, record.kind, record.meta, row_text)
        elif isinstance(record, Ranking):
            identifier = record.id
            if identifier in self._seen:  # of another file
                identifier = next(name for n in count(2) if (name := f"{record.id}-{n}") not in self._seen)
            self._seen.add(identifier)
            yield replace(record, id=identifier)
        else:
            yield record

    def _best(self, ranking: Ranking) -> Iterator[Demonstration]:
        """Yield a demonstration for each best response of a ranking."""
        judged = [rank for rank in ranking.ranks if rank is not None]
        if len(set(judged)) < 2:
            self.left_out["no response of the ranking is better than another"] += 1
            return
        for rank, (text, finished) in zip(ranking.ranks, ranking.answers, strict=True):
            if rank != min(judged):
                self.left_out["responses that are not the best ones"] += 1
            elif not text.strip():
                self.left_out["best responses that are blank"] += 1
            elif not finished:
                self.left_out["best responses that were cut off"] += 1
            elif (key := f"{prompt_key(ranking.prompt)}{text}") in self._seen:
                self.left_out["best responses that came before, after the same prompt"] += 1
            else:
                self._seen.add(key)
                yield Demonstration(ranking.prompt, text, (), ranking.user_id, ranking.kind, ranking.meta)

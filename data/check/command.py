"""Run `rlhf data check`: print the report on one file, or on all data that a config names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from data.check.config import HUB_ROWS, RANKED, Input, limits_of, sources_of, tokenizer_of
from data.check.guess import guess_kind
from data.check.inspect_file import check
from data.check.report import Limits, OtherData, Report
from data.error_lines import shorten
from data.progress import Watch, unwatched
from data.source import Source
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(
    inputs: Sequence[Input],
    kind: str | None,
    experiment: Any,
    console: Any = None,
    artifacts: str | Path = "artifacts",
    errors: Sequence[str] = (),
    watch: Watch = unwatched,
) -> int:
    """Print the report on files.

    With a config, the limits of its sections hold, its evaluation prompts may occur in no other of
    its files, and lengths are in tokens if the tokenizer is on this machine.

    Args:
        inputs: The files, or data sets on the Hub.
        kind: The kind of data; None: what the config or the file's keys say.
        experiment: The validated config, or None.
        console: A rich console to print to; None for standard output.
        artifacts: The folder of all experiments.
        errors: Mistakes of the config that are known already.
        watch: Shows how far reading is.

    Returns:
        The exit code: 2 if there are errors, otherwise 0.
    """
    out = output_of(console)
    context = Context.of(experiment, artifacts, watch=watch)
    failed = bool(errors)
    for number, given in enumerate(inputs):
        print("\n" if number else "", end="", file=out)
        report = report_on(given, kind, context)
        print_report(report, out)
        failed = failed or bool(report.errors)
    print_errors(errors)
    return 2 if failed else 0


@dataclass(frozen=True)
class Context:
    """Hold what a config says about data: nothing at all without a config."""

    experiment: Any = None
    """The validated config, or None."""
    sources: dict[str, Source] = field(default_factory=dict)
    """Kind → where its records come from."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """The tokenizer, if it is on this machine."""
    note: str = ""
    """Which tokenizer it is, or why there is none."""
    watch: Watch = unwatched
    """Shows how far a long pass is."""

    @classmethod
    def of(cls, experiment: Any, artifacts: str | Path, tokenizer: bool = True, watch: Watch = unwatched) -> Context:
        """Return what a config says.

        Args:
            experiment: The validated config, or None.
            artifacts: The folder of all experiments.
            tokenizer: Whether the tokenizer is needed, which takes seconds to load.
            watch: Shows how far a long pass is.
        """
        if experiment is None:
            return cls(watch=watch)
        home = Path(artifacts) / experiment.name
        sources = sources_of(experiment, home)
        found, note = tokenizer_of(experiment, home) if tokenizer else (None, "")
        return cls(experiment, sources, found, note, watch)

    def limits(self, kind: str | None) -> Limits:
        """Return the limits that hold for a kind of data."""
        return Limits() if self.experiment is None else limits_of(self.experiment, kind, self.tokenizer)

    def resolve(self, given: Input, kind: str | None) -> tuple[Source, str | None]:
        """Return how an input is read and its kind, as the config and the command line say.

        Args:
            given: The input.
            kind: The kind that the command line names, or None.

        Returns:
            The source and the kind, which is guessed if nobody names it; None if it is not known.
        """
        source = given.source
        for name, other in self.sources.items():
            part = next((part for part in other.parts or (other,) if same_data(source, part)), None)
            if part is not None and kind in (None, name):  # the config says how it is read
                own = {setting: getattr(source, setting) for setting in given.given}
                if given.max_rows is not None and part.limit is None:
                    own["limit"] = source.limit
                source, kind = replace(part, **own), name
        return source, kind or guess_kind(source)


def report_on(given: Input, kind: str | None, context: Context) -> Report:
    """Return the report on an input of the command line.

    Args:
        given: The input.
        kind: The kind that the command line names, or None.
        context: What the config says.
    """
    source, kind = context.resolve(given, kind)
    others = others_than(kind, context.sources)
    report = check(source, kind, context.limits(kind), others, given.max_rows, context.watch)
    if context.note:
        report.add("tokenizer", context.note)
    if given.max_rows is not None:
        report.add("on the Hub", f"at most {given.max_rows:,} rows were read; limit=N reads others")
    return report


def run_all(
    experiment: Any,
    console: Any = None,
    artifacts: str | Path = "artifacts",
    errors: Sequence[str] = (),
    watch: Watch = unwatched,
) -> int:
    """Print a report on each kind of data that a config names, and a summary.

    Args:
        experiment: The validated config.
        console: A rich console to print to; None for standard output.
        artifacts: The folder of all experiments, where the embedded world's data and the tokenizer
            are.
        errors: Mistakes of the config that are known already.
        watch: Shows how far reading is.

    Returns:
        The exit code: 2 if there are errors in any, otherwise 0.

    Raises:
        UserError: The config names no data.
    """
    out = output_of(console)
    context = Context.of(experiment, artifacts, watch=watch)
    print(f"tokenizer: {context.note}", file=out)
    if not context.sources:
        problem = "no file and no Hub id is set, so the stages have nothing to read"
        raise UserError([f"data: {problem}; set data.demonstrations, and the other data that your stages need"])
    counts = {"config": len(errors)} if errors else {}
    for kind, source in context.sources.items():
        print(f"\n-- data.{kind}", file=out)
        if getattr(experiment.data, kind) == "world" and not Path(source.name).exists():
            print("written by the stage world, which has not run yet", file=out)
            continue
        if getattr(experiment.data, kind) == RANKED and not Path(source.name).exists():
            print("what people rank (`rlhf rank`); there is no snapshot of it yet", file=out)
            continue
        found = 0
        for number, part in enumerate(source.parts, 1):
            print(f"part {number} of {len(source.parts)}", file=out)
            report = look(part, kind, context, [])
            print_report(report, out)
            found += len(report.errors)
            print("", file=out)
        if source.parts:
            print("the mixture", file=out)
        if not found:  # a mixture has the errors of its parts
            report = look(source, kind, context, others_than(kind, context.sources))
            print_report(report, out)
            found = len(report.errors)
        if found:
            counts[kind] = found
    print_errors(errors)
    number = len(context.sources)
    summary = "1 kind of data" if number == 1 else f"{number} kinds of data"
    if counts:
        print(f"\n{summary}, errors: {', '.join(f'{kind} {count:,}' for kind, count in counts.items())}", file=out)
        return 2
    print(f"\n{summary}, no errors", file=out)
    return 0


def look(source: Source, kind: str, context: Context, others: Sequence[OtherData]) -> Report:
    """Return the report on data of a config: on files as a whole, on data sets by their first rows.

    Args:
        source: The data.
        kind: Their kind.
        context: What the config says.
        others: Data that must not share prompts with these.
    """
    parts = tuple(first_rows(part) for part in source.parts)
    short = replace(source, parts=parts) if parts else first_rows(source)
    max_rows = None if parts or short == source else source.skip + HUB_ROWS
    report = check(short, kind, context.limits(kind), others, max_rows, context.watch)
    if short != source:
        report.add("on the Hub", f"at most {HUB_ROWS:,} rows of a data set were read; a limit in the config reads more")
    return report


def first_rows(source: Source) -> Source:
    """Return a data set on the Hub without a limit with one; any other source unchanged."""
    if source.hub is None or source.limit is not None:
        return source
    return replace(source, limit=HUB_ROWS)


def others_than(kind: str | None, sources: dict[str, Source]) -> list[OtherData]:
    """Return the config's data of other kinds that are on this machine.

    Args:
        kind: The kind that is left out.
        sources: Kind → where its records come from.
    """
    return [OtherData(name, source) for name, source in sources.items() if name != kind and is_local(source)]


def is_local(source: Source) -> bool:
    """Return whether all of a source is on this machine."""
    parts = source.parts or (source,)
    return all(part.path is not None and (has_magic(str(part.path)) or Path(part.path).exists()) for part in parts)


def same_data(source: Source, other: Source) -> bool:
    """Return whether two sources are the same file, or the same data set on the Hub."""
    if source.hub is not None:
        return source.hub == other.hub
    return same_file(source, other)


def same_file(source: Source, other: Source) -> bool:
    """Return whether two sources are the same file."""
    if source.path is None or other.path is None:
        return False
    first, second = Path(source.path), Path(other.path)
    return first.exists() and second.exists() and first.samefile(second)


def output_of(console: Any) -> TextIO:
    """Return the file of a console, or standard output; reports have no markup."""
    return console.file if console is not None else sys.stdout


def print_report(report: Report, out: TextIO) -> None:
    """Print a report to `out`, and its errors to standard error."""
    for line in report.lines():
        print(line, file=out, flush=True)
    print_errors(report.errors)


def print_errors(errors: Sequence[str]) -> None:
    """Print error lines to standard error, equal ones as one line."""
    for line in shorten(errors):
        print(f"error: {line}", file=sys.stderr)

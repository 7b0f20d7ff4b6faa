"""Run `rlhf data check`: print the report on one file, or on all data that a config names."""

import sys
from glob import has_magic
from pathlib import Path
from typing import Any, TextIO

from data.check.config import limits_of, sources_of, tokenizer_of
from data.check.inspect_file import check, guess_kind
from data.check.report import OtherData, Report
from data.error_lines import shorten
from data.sources import Source
from pipeline.errors import UserError


def run(
    path: str | Path, kind: str | None, experiment: Any, console: Any = None, artifacts: str | Path = "artifacts"
) -> int:
    """Print the report on a file.

    With a config, the limits of its sections hold, its evaluation prompts may occur in no other of
    its files, and lengths are in tokens if the tokenizer is on this machine.

    Args:
        path: The file.
        kind: The kind of data; None: what the config or the file's keys say.
        experiment: The validated config, or None.
        console: A rich console to print to; None for standard output.
        artifacts: The folder of all experiments.

    Returns:
        The exit code: 2 if there are errors, otherwise 0.
    """
    source = Source(path=Path(path).expanduser())
    limits: dict[str, Any] = {}
    note = None
    if experiment is not None:
        home = Path(artifacts) / experiment.name
        sources = sources_of(experiment, home)
        for name, other in sources.items():
            if same_file(source, other):  # the config says how it is read
                kind, source = kind or name, other if kind in (None, name) else source
        kind = kind or guess_kind(source)
        limits = limits_of(experiment, kind)
        limits["against"] = others_than(kind, sources)
        limits["tokenizer"], note = tokenizer_of(experiment, home)
    report = check(source, kind, **limits)
    if note:
        report.add("tokenizer", note)
    print_report(report, output_of(console))
    return 2 if report.errors else 0


def run_all(experiment: Any, console: Any = None, artifacts: str | Path = "artifacts") -> int:
    """Print a report on each kind of data that a config names, and a summary.

    Args:
        experiment: The validated config.
        console: A rich console to print to; None for standard output.
        artifacts: The folder of all experiments, where the embedded world's data and the tokenizer
            are.

    Returns:
        The exit code: 2 if there are errors in any, otherwise 0.

    Raises:
        UserError: The config names no data.
    """
    out = output_of(console)
    home = Path(artifacts) / experiment.name
    sources = sources_of(experiment, home)
    tokenizer, note = tokenizer_of(experiment, home)
    print(f"tokenizer: {note}", file=out)
    if not sources:
        problem = "no file and no Hub id is set, so the stages have nothing to read"
        raise UserError([f"data: {problem}; set data.demonstrations, and the other data that your stages need"])
    errors: dict[str, int] = {}
    for kind, source in sources.items():
        print(f"\n-- data.{kind}", file=out)
        if getattr(experiment.data, kind) == "world" and not Path(source.name).exists():
            print("written by the stage world, which has not run yet", file=out)
            continue
        report = check(source, kind, tokenizer, against=others_than(kind, sources), **limits_of(experiment, kind))
        print_report(report, out)
        if report.errors:
            errors[kind] = len(report.errors)
    summary = "1 kind of data" if len(sources) == 1 else f"{len(sources)} kinds of data"
    if errors:
        counts = ", ".join(f"{kind} {count:,}" for kind, count in errors.items())
        print(f"\n{summary}, errors: {counts}", file=out)
        return 2
    print(f"\n{summary}, no errors", file=out)
    return 0


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
    for line in shorten(report.errors):
        print(f"error: {line}", file=sys.stderr)

"""Run `rlhf data check`: print the report on one file, or on all data that a config names."""

import sys
from pathlib import Path
from typing import Any, TextIO

from data.check.config import files_of, limits_of, parts_of, source_name, tokenizer_of
from data.check.inspect_file import check, guess_kind
from data.check.report import OtherFile, Part, Report
from data.error_lines import shorten
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
    path = Path(path).expanduser()
    limits: dict[str, Any] = {}
    note = None
    if experiment is not None:
        home = Path(artifacts) / experiment.name
        files, parts = files_of(experiment, home), parts_of(experiment)
        same = [name for name, file in files.items() if path.exists() and file.samefile(path)]
        kind = kind or (same[0] if same else guess_kind(path))
        limits = limits_of(experiment, kind)
        limits["against"] = others_than(kind, files, parts)
        limits["part"] = parts[kind] if kind in same else None
        limits["tokenizer"], note = tokenizer_of(experiment, home)
    report = check(path, kind, **limits)
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
    files, parts = files_of(experiment, home), parts_of(experiment)
    tokenizer, note = tokenizer_of(experiment, home)
    print(f"tokenizer: {note}", file=out)
    if not parts:
        problem = "no file and no Hub id is set, so the stages have nothing to read"
        raise UserError([f"data: {problem}; set data.demonstrations, and the other data that your stages need"])
    errors: dict[str, int] = {}
    for kind, part in parts.items():
        print(f"\n-- data.{kind}", file=out)
        name = source_name(experiment, kind)
        assert name is not None
        if name == "world" and kind not in files:
            print("written by the stage world, which has not run yet", file=out)
            continue
        report = check(
            files.get(kind, Path(name).expanduser()),
            kind,
            tokenizer,
            against=others_than(kind, files, parts),
            part=part,
            **limits_of(experiment, kind),
        )
        print_report(report, out)
        if report.errors:
            errors[kind] = len(report.errors)
    summary = "1 kind of data" if len(parts) == 1 else f"{len(parts)} kinds of data"
    if errors:
        counts = ", ".join(f"{kind} {count:,}" for kind, count in errors.items())
        print(f"\n{summary}, errors: {counts}", file=out)
        return 2
    print(f"\n{summary}, no errors", file=out)
    return 0


def others_than(kind: str | None, files: dict[str, Path], parts: dict[str, Part]) -> list[OtherFile]:
    """Return the config's files of other kinds.

    Args:
        kind: The kind that is left out.
        files: Kind → file.
        parts: Kind → the part of it that is read.
    """
    return [OtherFile(name, file, parts[name]) for name, file in files.items() if name != kind]


def output_of(console: Any) -> TextIO:
    """Return the file of a console, or standard output; reports have no markup."""
    return console.file if console is not None else sys.stdout


def print_report(report: Report, out: TextIO) -> None:
    """Print a report to `out`, and its errors to standard error."""
    for line in report.lines():
        print(line, file=out, flush=True)
    for line in shorten(report.errors):
        print(f"error: {line}", file=sys.stderr)

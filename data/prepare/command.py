"""Run `rlhf data prepare`: read, sift, split, write, and print what became of the rows."""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from data.error_lines import shorten
from data.prepare import settings as asked
from data.prepare.folder import whole_folder
from data.prepare.near_rows import NearRows
from data.prepare.personal import need_packages
from data.prepare.reading import Input, configured_sources, fill, inputs_of, protected_sources
from data.prepare.settings import DOCUMENTS, PARTS, Settings
from data.prepare.sift import Sift
from data.prepare.spool import UNREAD, Spool
from data.prepare.writing import Outcome, Writer, data_section, manifest_of
from data.progress import Watch, unwatched, watched
from data.source import Source
from pipeline.errors import UserError


def run(
    names: list[str],
    output: str | Path,
    settings: Settings,
    kind: str | None = None,
    experiment: Any = None,
    artifacts: str | Path = "artifacts",
    force: bool = False,
    reading: dict[str, Any] | None = None,
    watch: Watch = unwatched,
) -> int:
    """Prepare data and print a table.

    Args:
        names: Files, folders, globs and Hub ids.
        output: The folder to write.
        settings: What to leave out, and how to split.
        kind: The kind of all input; None: what the config or the keys say.
        experiment: The validated config, or None.
        artifacts: The folder of all experiments, where the embedded world's files are.
        force: Whether to replace the folder.
        reading: Settings of a source that hold for every input, whatever the config says.
        watch: Shows how far a long pass is.

    Returns:
        The exit code, 0.

    Raises:
        UserError: A source has errors, or training data holds evaluation prompts.
    """
    asked.check(settings)
    if settings.personal != "off":
        need_packages(settings.region)
    folder = Path(output).expanduser()
    home = Path(artifacts) / experiment.name if experiment is not None else Path(artifacts)
    configured = configured_sources(experiment, home)
    inputs = [
        replace(given, source=replace(given.source, **(reading or {}))) for given in inputs_of(names, kind, configured)
    ]
    check_apart(inputs, folder)
    protected = protected_sources(configured, inputs)
    refuse_wordings([*(given.source for given in inputs), *protected])
    with whole_folder(folder, force) as temporary:
        outcome = sift(temporary, inputs, protected, settings, watch)
        evaluation = configured["evaluation_prompts"] if protected else None
        (temporary / "prepared.yaml").write_text(data_section(folder, outcome, evaluation), encoding="utf-8")
        manifest = manifest_of(temporary, inputs, protected, settings, outcome)
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (temporary / "manifest.json").write_text(text, encoding="utf-8")
    print_outcome(folder, outcome, settings, sys.stdout)
    return 0


def refuse_wordings(sources: Iterable[Source]) -> None:
    """Raise UserError where a source has wordings: parts are of whole rows, not of wordings.

    Args:
        sources: What is read.
    """
    for source in sources:
        for part in source.parts or (source,):
            if part.wordings is not None:
                raise UserError(
                    f"{part.name}: wordings would be split like different prompts; prepare the rows without them "
                    f"(or let sft hold rows out, which keeps the wordings of a row together)"
                )


def check_apart(inputs: list[Input], folder: Path) -> None:
    """Check that no input lies in the folder that is written, which replaces it.

    Args:
        inputs: The input.
        folder: The folder to write.

    Raises:
        UserError: One does.
    """
    for item in inputs:
        for source in item.source.parts or (item.source,):
            path = source.path and Path(source.path).resolve()
            if path and (folder.resolve() == path or folder.resolve() in path.parents):
                raise UserError([f"{source.path}: lies in {folder}, which is written; choose another folder with -o"])


def sift(
    folder: Path, inputs: list[Input], protected: list[Source], settings: Settings, watch: Watch = unwatched
) -> Outcome:
    """Read the input, write the parts and the ledger into a folder, and return what became of it.

    Args:
        folder: The folder.
        inputs: The input.
        protected: Evaluation prompts that training must not hold.
        settings: What to leave out, and how to split.
        watch: Shows how far a long pass is.

    Raises:
        UserError: A source has errors, or training data holds evaluation prompts.
    """
    work = folder / "work"
    work.mkdir()
    spool = Spool(work / "rows.jsonl")
    writer = Writer(folder, settings)
    try:
        fill(spool, inputs, protected, watch)
        near = None
        if settings.near:
            near = NearRows(work, settings.near, lambda number: spool[number].text)
            rows = watched(spool, len(spool), "prepare: sketching rows, to find near copies", watch)
            near.sketch((row.number, row.text) for row in rows if row.kind != UNREAD)
        sifter = Sift(settings, spool, near)
        for decision in watched(sifter.decisions(), len(spool), "prepare: sifting", watch):
            writer.write(decision)
    finally:
        writer.close()
        spool.close()
    if sifter.leaks:
        raise UserError(shorten(sifter.leaks))
    for file in work.iterdir():
        file.unlink()
    work.rmdir()
    return writer.outcome


def print_outcome(folder: Path, outcome: Outcome, settings: Settings, out: TextIO) -> None:
    """Print the table.

    Args:
        folder: The folder that was written.
        outcome: What became of the rows.
        settings: What was asked for.
        out: Where to print.
    """
    lines = [("rows in", f"{outcome.rows:,}")]
    lines += [("left out", f"{number:,} · {reason}") for reason, number in outcome.left_out.most_common()]
    for part in (DOCUMENTS, *PARTS):
        counts = outcome.parts.get(part)
        if counts is None:
            if part != DOCUMENTS and settings.shares[part]:
                lines.append((part, "no rows"))
            continue
        text = " · ".join(f"{number:,} {kind.replace('_', ' ')}" for kind, number in sorted(counts.kinds.items()))
        if part != DOCUMENTS:
            text += f" · {number_of(len(counts.prompts), 'prompt')} of {number_of(len(counts.users), 'user')}"
        lines.append((part, text))
    labels: Counter[str] = Counter()
    for counts in outcome.parts.values():
        labels += counts.labels
    lines += [("kind", f"{label}: {number:,} rows") for label, number in sorted(labels.items())]
    if settings.personal != "off":
        found = ", ".join(f"{what} {number:,}" for what, number in sorted(outcome.personal.items()))
        lines.append(("personal data", f"{found} ({PERSONAL[settings.personal]})" if found else "none found"))
    lines.append(("written", f"{folder}/prepared.yaml, ledger.jsonl, personal_data.jsonl, manifest.json"))
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f"{label:<{width}}  {text}", file=out, flush=True)


PERSONAL = {
    "list": "rows that hold it; listed, and kept",
    "drop": "rows that hold it; left out of the training parts",
    "mask": "rows that hold it; masked in the training parts",
}
"""Setting → what is said beside the counts."""


def number_of(number: int, noun: str) -> str:
    """Return "1 user", "2 users"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

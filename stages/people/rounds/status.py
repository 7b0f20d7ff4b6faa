"""Say in `rlhf status` which round an experiment is, and which one follows."""

import json
import re
from pathlib import Path
from typing import Any

from stages.settings.rounds import FOLDER, artifact


def status_lines(base: Path, experiment: Any) -> list[str]:
    """Return what `rlhf status` shows of rounds.

    Args:
        base: The experiment's folder.
        experiment: The validated experiment.
    """
    number, lines = 1, []
    if experiment.round is not None:
        number = experiment.round.number
        before = Path(experiment.round.earlier[-1]).name
        line = f"round {number}, after {before}"
        if (record := record_of(Path(experiment.round.folder).expanduser())) is not None:
            counts = {row["kind"]: row for row in record["taken"]}
            parts = [f"{kind} {row['new']:,}" for kind, row in counts.items() if row["new"]]
            line += f": taken of people ({', '.join(parts)})" if parts else ": its labels are those of its own page"
            line += f"; {counts['rankings']['old']:,} rankings of earlier rounds stay"
        lines += [line, *changed(experiment.round)]
    following = re.sub(rf"-r{number}$", "", base.name) + f"-r{number + 1}"
    if record_of(base.with_name(following) / FOLDER) is not None:
        lines.append(f"round {number + 1} follows: {following}")
    return lines


def changed(section: Any) -> list[str]:
    """Return a line for each earlier round that is not what it was when this round was made.

    Args:
        section: The section `round`.
    """
    lines = []
    bases = [Path(name).expanduser() for name in section.earlier]
    for number, base in enumerate(bases, 1):
        if not base.is_dir():
            lines.append(f"round {number}: {base} is not there, so the figures of this round are missing")
    other = []
    for stage, digest in section.digests.items() if bases[-1].is_dir() else ():
        folder = artifact(bases[-1], stage)
        if folder is None or json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["digest"] != digest:
            other.append(stage)
    if other:
        lines.append(f"round {len(bases)}: {', '.join(other)} changed or went away since this round was made")
    return lines


def record_of(folder: Path) -> dict[str, Any] | None:
    """Return round.json of a round's folder; None without one."""
    path = folder / "round.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

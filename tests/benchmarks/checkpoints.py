"""Measure the cost of checkpoints: the share of each stage's time spent on saving.

    python tests/benchmarks/checkpoints.py [-c FILE] [--stages base sft rm ppo dpo] [key=value …]

Runs the chain in a temporary folder. `checkpoints.every` is null unless a setting says otherwise: a
save every 50 steps, fewer if saving would take more than 3.5 % of the time. Prints one JSON line
for each stage and keeps it in results/checkpoints.jsonl. Takes five minutes for configs/tiny.yaml
on two cores.
"""

import argparse
import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from pairs import save_row, stamp

from pipeline import cli, running
from pipeline.store.checkpoints import CheckpointStore

HERE = Path(__file__).resolve().parent

STAGES = ("base", "sft", "rm", "ppo", "dpo")


class Watched(CheckpointStore):
    """Count the saves of a checkpoint store and their bytes."""

    stores: ClassVar[list["Watched"]] = []
    """Every store made so far."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.saves, self.bytes = 0, 0
        self.stores.append(self)

    def _write(self, *args: Any) -> Path:
        folder = super()._write(*args)
        self.saves += 1
        self.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return folder


def main(argv: list[str]) -> int:
    """Run the chain, save one row for each stage and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", default="configs/tiny.yaml", help="the experiment's YAML")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES, help="stages to measure")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", metavar="DIR", help="folder of the results files"
    )
    args = parser.parse_args([word for word in argv if not cli.is_setting(word)])
    settings = ["checkpoints.every=null", *(word for word in argv if cli.is_setting(word))]
    running.checkpoints.CheckpointStore = Watched
    with tempfile.TemporaryDirectory(prefix="bench_checkpoints_") as root:
        for stage in args.stages:
            code = cli.main(["run", stage, "-c", args.config, "--artifacts", root, *settings])
            if code:
                return code
        for store in Watched.stores:
            folder = store.folder.parent if store.folder.parent.name != ".redo" else store.folder.parent.parent
            if folder.name not in args.stages:
                continue
            manifest = json.loads((folder / "manifest.json").read_text())
            start, end = (datetime.fromisoformat(manifest[key]) for key in ("started_at", "finished_at"))
            seconds = (end - start).total_seconds()
            row = {
                "bench": "checkpoints",
                "config": Path(args.config).stem,
                "settings": settings[1:],
                "stage": folder.name,
                "seconds": seconds,
                "saves": store.saves,
                "saving_s": round(store._seconds, 3),
                "share": round(store._seconds / seconds, 4),
                "bytes_of_the_last": store.bytes,
                **stamp(),
            }
            save_row(row, ("bench", "config", "settings", "stage"), args.results / "checkpoints.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

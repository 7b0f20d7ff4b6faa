"""What checkpoints cost: the share of each stage's time that saving takes, and what one save takes.

    python tests/benchmarks/checkpoints.py [-c configs/tiny.yaml] [--stages base sft rm ppo dpo] [key=value …]

Runs the chain in a folder that is removed afterwards, with checkpoints.every: null (every 50 steps, fewer where that
would take more than 3.5 % of the time) unless a setting says otherwise. A JSON line a stage, printed and kept in
results/checkpoints.jsonl. On configs/tiny.yaml and two cores: five minutes.
"""

import argparse
import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the code beside this file, wherever another copy is installed

from pairs import keep, stamp  # noqa: E402

from pipeline import cli, running  # noqa: E402
from pipeline.store.checkpoints import CheckpointStore  # noqa: E402

STAGES = ("base", "sft", "rm", "ppo", "dpo")


class Watched(CheckpointStore):
    """A store that counts its saves and their bytes."""

    seen: list[CheckpointStore] = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.saves, self.bytes = 0, 0
        self.seen.append(self)

    def _write(self, *args):
        folder = super()._write(*args)
        self.saves += 1
        self.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return folder


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", default="configs/tiny.yaml")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    asked = parser.parse_args([word for word in argv if not cli.is_setting(word)])
    settings = ["checkpoints.every=null", *(word for word in argv if cli.is_setting(word))]
    running.checkpoints.CheckpointStore = Watched
    with tempfile.TemporaryDirectory(prefix="bench_checkpoints_") as root:
        for stage in asked.stages:
            code = cli.main(["run", stage, "-c", asked.config, "--artifacts", root, *settings])
            if code:
                return code
        for store in Watched.seen:
            folder = store.folder.parent if store.folder.parent.name != ".redo" else store.folder.parent.parent
            if folder.name not in asked.stages:
                continue
            manifest = json.loads((folder / "manifest.json").read_text())
            start, end = (datetime.fromisoformat(manifest[key]) for key in ("started_at", "finished_at"))
            seconds = (end - start).total_seconds()
            row = {
                "bench": "checkpoints",
                "config": Path(asked.config).stem,
                "settings": settings[1:],
                "stage": folder.name,
                "seconds": seconds,
                "saves": store.saves,
                "saving_s": round(store._seconds, 3),
                "share": round(store._seconds / seconds, 4),
                "bytes_of_the_last": store.bytes,
                **stamp(),
            }
            keep(row, ("bench", "config", "settings", "stage"), HERE / "results" / "checkpoints.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

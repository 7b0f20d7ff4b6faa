"""Measure how long commands take before they work: status, --help, nothing to do, first steps.

    python tests/benchmarks/starts.py [-c FILE] [--gigabytes 4] [--stages base sft] [key=value …]

`status`, a run with nothing to do and `--help` are timed on artifacts with a file of random bytes
of the size asked for: after its digest was remembered, and as `status --verify`, which reads it.
Of each of `--stages` two times are measured: from the start of `rlhf run` to the first row of its
journal, and, after a SIGTERM, from the start of the run that resumes to its next row. What it needs
is made first, so settings that shorten that save time (`base.max_steps=20`). Every command is a
process of its own; seconds of the wall and of the CPU are those of the fastest of several. Prints
one JSON line and keeps it in results/starts.jsonl.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from pairs import save_row, stamp

from pipeline import api, cli
from pipeline.fingerprints import all_needs
from pipeline.store import integrity
from pipeline.store.digests import TIMESTAMP_STEP

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PADDING = "padding.bin"
"""The large file in the stage that is measured."""
BLOCK = 2**24


def main(argv: list[str]) -> int:
    """Measure, save one row and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", default="configs/tiny.yaml", help="the experiment's YAML")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the large artifact")
    parser.add_argument("--stages", nargs="*", default=["sft", "rm", "ppo", "dpo"], help="stages whose start is timed")
    parser.add_argument("--repeat", type=int, default=3, help="how often a command is timed")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "starts.jsonl", help="file of the row")
    args = parser.parse_args([word for word in argv if not cli.is_setting(word)])
    settings = [word for word in argv if cli.is_setting(word)]
    with tempfile.TemporaryDirectory(prefix="bench_starts_") as folder:
        bench = Bench(Path(folder), Path(args.config).resolve(), settings)
        row: dict[str, Any] = {
            "bench": "starts",
            "config": Path(args.config).stem,
            "settings": settings,
            "gigabytes": args.gigabytes,
            "stages": {stage: bench.first_steps(stage) for stage in args.stages},  # before `world` grows
            "commands": bench.commands(int(args.gigabytes * 1e9), args.repeat),
        }
    save_row(row | stamp(), ("bench", "config", "settings", "gigabytes"), args.results)
    return 0


class Bench:
    """Time commands on the artifacts of one experiment."""

    def __init__(self, folder: Path, config: Path, settings: list[str]):
        """Say what is measured; nothing is made yet.

        Args:
            folder: An empty folder for artifacts.
            config: The experiment's YAML.
            settings: Settings on the command line.
        """
        self.folder, self.config, self.settings = folder, config, settings
        self.options = ["-c", str(config), "--artifacts", str(folder), *settings]

    def start(self, *words: str) -> subprocess.Popen:
        """Start a command in a process of its own."""
        command = [sys.executable, "-m", "pipeline.cli", *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
        )

    def timed(self, *words: str) -> tuple[float, float]:
        """Run a command; return its seconds of the wall and of the CPU."""
        began, cpu = time.perf_counter(), cpu_of_children()
        if code := self.start(*words).wait():
            sys.exit(code)
        return time.perf_counter() - began, cpu_of_children() - cpu

    def commands(self, size: int, repeat: int) -> dict[str, dict[str, float]]:
        """Time the commands that should take no longer with a large artifact.

        Args:
            size: Bytes of the artifact's large file.
            repeat: How often each is timed.
        """
        self.timed("run", "world", *self.options)
        grow(self.experiment() / "world", size)
        time.sleep(TIMESTAMP_STEP + 0.1)  # a file that is younger is read again by the next command
        kinds = {
            "help": ("--help",),
            "status_verify": ("status", "--verify", *self.options),
            "status": ("status", *self.options),
            "nothing_to_do": ("run", "world", *self.options),
        }
        found = {}
        for name, words in kinds.items():
            wall, cpu = zip(*(self.timed(*words) for _ in range(repeat)), strict=True)
            found[name] = {"wall_s": round(min(wall), 2), "cpu_s": round(min(cpu), 2)}
        return found

    def experiment(self) -> Path:
        """Return the folder of the experiment's artifacts."""
        [manifest] = self.folder.glob("*/world/manifest.json")
        return manifest.parents[1]

    def first_steps(self, stage: str) -> dict[str, float]:
        """Time a stage from its start to its first step, and from a resume to its next step."""
        experiment = api.load_experiment(self.config, *self.settings)
        for need in all_needs(api.stages()[stage], experiment):
            self.timed("run", need, *self.options)
        first = self.until_row(stage, 0)
        resumed = self.until_row(stage, self.rows(stage))
        return {"first_step_s": round(first, 2), "resumed_step_s": round(resumed, 2)}

    def until_row(self, stage: str, rows: int) -> float:
        """Run a stage until its journal has more rows and stop it; return the seconds to there."""
        began, process = time.perf_counter(), self.start("run", stage, *self.options)
        while self.rows(stage) <= rows:
            if process.poll() is not None:
                sys.exit(f"{stage} ended with {process.returncode} and {rows} steps; give it more of them")
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        process.send_signal(signal.SIGTERM)
        if process.wait() not in (0, 75):
            sys.exit(process.returncode)
        return seconds

    def rows(self, stage: str) -> int:
        """Return the number of rows in a stage's journal."""
        journal = self.experiment() / stage / "metrics.jsonl"
        return journal.read_bytes().count(b"\n") if journal.exists() else 0


def grow(folder: Path, size: int) -> None:
    """Publish one more file in a finished stage, of random bytes."""
    with open(folder / PADDING, "wb") as file:
        for start in range(0, size, BLOCK):
            file.write(os.urandom(min(BLOCK, size - start)))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["outputs"] |= integrity.describe_files(folder, [PADDING])
    (folder / "manifest.json").write_text(json.dumps(integrity.seal(manifest)), encoding="utf-8")


def cpu_of_children() -> float:
    """Return the CPU seconds of all ended child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

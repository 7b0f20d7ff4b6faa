"""Measure the time of an undisturbed run over that of a run that is killed repeatedly.

    python tests/resume/goodput.py [-c configs/tiny.yaml] [--stage ppo] [--every 12] [key=value …]

Runs everything that the stage needs in a folder of its own, then the stage once without kills, then
again with SIGKILL at random moments (exponential, on average every 20 save intervals) and immediate
restarts, imports included. Both must publish the same bytes. --every sets the steps between saves:
choose it so that an interval is 30 seconds or more, and the run long enough for some kills. Prints
a JSON line, which is kept in results/goodput.jsonl. For configs/tiny.yaml on two cores,
ppo.total_episodes=32000 gives a run of about a quarter of an hour.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT), str(HERE.parent / "benchmarks")]

from faults import published  # noqa: E402
from pairs import save_row, stamp  # noqa: E402

from pipeline.cli import is_setting  # noqa: E402

LAST_NEEDED = {"sft": "base", "rm": "rankings", "ppo": "rm", "dpo": "rankings"}  # which needs all the others


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", default="configs/tiny.yaml")
    parser.add_argument("--stage", default="ppo", choices=LAST_NEEDED)
    parser.add_argument("--every", type=int, default=12, help="steps between saves")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    asked = parser.parse_args([word for word in argv if not is_setting(word)])
    settings = [word for word in argv if is_setting(word)] + [f"checkpoints.every={asked.every}"]
    with tempfile.TemporaryDirectory(prefix="goodput_") as root:

        def command(stage: str, *more: str) -> list[str]:
            place = ["-c", asked.config, "--artifacts", root]
            return [sys.executable, "-m", "pipeline.cli", "run", stage, *place, *settings, *more]

        subprocess.run(command(LAST_NEEDED[asked.stage]), cwd=ROOT, check=True)
        seconds, _ = timed(command(asked.stage, "--only"), [])
        folder = next(path.parent for path in Path(root).glob(f"*/{asked.stage}/manifest.json"))
        right = published(folder)
        steps = len((folder / "metrics.jsonl").read_text().splitlines())
        interval = seconds / steps * asked.every
        draw = random.Random(asked.seed)
        instants = [draw.expovariate(1 / (20 * interval)) for _ in range(1000)]
        killed, kills = timed(command(asked.stage, "--only", "--force"), instants)
        assert published(folder) == right, "the killed run ends in other bytes"
    row = {
        "bench": "goodput",
        "config": Path(asked.config).stem,
        "stage": asked.stage,
        "settings": settings,
        "interval_s": round(interval, 1),
        "mean_time_between_failures_s": round(20 * interval),
        "uninterrupted_s": round(seconds, 1),
        "killed_s": round(killed, 1),
        "kills": kills,
        "effective": round(seconds / killed, 4),
        **stamp(),
    }
    save_row(row, ("bench", "config", "stage", "settings"), HERE.parent / "benchmarks" / "results" / "goodput.jsonl")
    return 0


def timed(command: list[str], instants: list[float]) -> tuple[float, int]:
    """Return the seconds until the command has succeeded, and the number of kills on the way."""
    began, kills = time.monotonic(), 0
    waiting = iter(instants)
    while True:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            code = process.wait(next(waiting, None))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        if code:
            raise RuntimeError(f"exit code {code}")
        return time.monotonic() - began, kills


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

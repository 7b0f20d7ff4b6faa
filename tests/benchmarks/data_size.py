"""Measure what a million rankings take: to be checked, split, and encoded for rm.

    python tests/benchmarks/data_size.py [--rows N] [--folder DIR]

Each step runs in a process of its own, which prints its seconds, its processor seconds and its peak
memory, and one row is kept in results/data_size.jsonl. The rankings are random words, two responses
each, 560 MB for a million. Takes ten minutes on two cores.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout, not an installed copy

from pairs import save_row, stamp  # noqa: E402

STEPS = ("check", "split", "first_start", "second_start")
"""The steps, in order; each needs the files of those before."""
RESULTS = Path(__file__).parent / "results" / "data_size.jsonl"
WORDS = [f"w{i:04d}" for i in range(3000)]


def write_rankings(path: Path, rows: int) -> None:
    """Write random rankings of two responses.

    Args:
        path: The file to write.
        rows: How many.
    """
    rng = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            row = {"prompt": text(8, 40), "responses": [text(10, 50), text(10, 50)], "ranks": [1, 2]}
            file.write(json.dumps(row) + "\n")


def quiet(folder: Path) -> SimpleNamespace:
    """Return what stands in for a session: it shows and writes nothing."""
    progress = nullcontext(SimpleNamespace(update=lambda *given: None))
    return SimpleNamespace(
        tracker=SimpleNamespace(stage="rm", progress=lambda *given: progress),
        notes=SimpleNamespace(take_down=lambda *given: None, figures={}),
        leave_if_requested=lambda *given: None,
        folder=folder,
    )


def check(folder: Path) -> None:
    """Read the file as `rlhf run` does before anything runs."""
    from data.source import Source
    from data.sources import scan

    assert scan("rankings", Source(folder / "rankings.jsonl")).errors == []


def split(folder: Path) -> None:
    """Split the rankings as the stage rankings does."""
    from pipeline.stage import Source
    from stages.rankings import Shares, split_given

    (folder / "split").mkdir(exist_ok=True)
    split_given(Source(path=folder / "rankings.jsonl"), Shares(0.05, 0.0, False), folder / "split", quiet(folder), None)


def start(folder: Path) -> None:
    """Load the training rankings as rm does, and draw a thousand batches of 32."""
    from data.group_rows import count_pairs, tokens_of
    from data.streams import grouped_by_length
    from pipeline.store.cache import Cache
    from stages.models.loading import load_tokenizer
    from stages.shared.inputs import LengthLimit, load_groups
    from stages.shared.row_cache import RowCache

    tokenizer = load_tokenizer(folder / "model")
    cache: Any = RowCache(Cache(folder / ".cache"), folder / "model", quiet(folder).tracker)
    groups, _ = load_groups(folder / "split" / "train.jsonl", tokenizer, LengthLimit(1024, "drop", "rm"), cache)
    order = grouped_by_length(tokens_of(groups), 32, 32_000, seed=0)
    assert count_pairs(groups) == len(groups) and all(groups[i].prompt for i in order)


def measure(step: str, folder: Path) -> None:
    """Run a step in this process, and print what it took as JSON."""
    began = time.monotonic()
    {"check": check, "split": split, "first_start": start, "second_start": start}[step](folder)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "seconds": round(time.monotonic() - began, 1),
                "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
                "peak_mb": used.ru_maxrss // 1024,
            }
        )
    )


def main() -> None:
    """Write the rankings and a tokenizer, and run the steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of rankings")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where files are put; default: a folder that is removed")
    arguments = parser.parse_args()
    if arguments.step:
        measure(arguments.step, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        file = folder / "rankings.jsonl"
        if not file.exists():
            write_rankings(file, arguments.rows)
        from data.tokenizer import train_tokenizer

        rng = random.Random(1)
        texts = (" ".join(rng.choices(WORDS, k=60)) for _ in range(2000))
        train_tokenizer(texts, 4000).save_pretrained(folder / "model")
        result: dict[str, Any] = {"rows": arguments.rows, "mb": file.stat().st_size // 10**6}
        for step in STEPS:
            command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result[step] = json.loads(done.stdout.splitlines()[-1])
            print(step, result[step], flush=True)
    save_row({"bench": "data_size", **stamp(), **result}, ("bench", "rows"), RESULTS)


if __name__ == "__main__":
    main()

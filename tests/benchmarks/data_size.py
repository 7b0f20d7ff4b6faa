"""Measure what a million rankings, prompts and documents take: checked, encoded, used again.

    python tests/benchmarks/data_size.py [--rows N] [--folder DIR]

Each step runs in a process of its own, which prints its seconds, its processor seconds (both
without the import of the libraries) and its peak memory, with them. One row is kept in
results/data_size.jsonl. All texts are random words: rankings of two responses (560 MB for a
million), prompts (160 MB), documents of 200 tokens (620 MB).
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this checkout, not an installed copy

from pairs import save_row, stamp  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "data_size.jsonl"
WORDS = [f"w{i:04d}" for i in range(3000)]


def write_rows(folder: Path, rows: int) -> None:
    """Write rankings of two responses, prompts and documents, all of random words.

    Args:
        folder: Where the files are put; those that are there stay.
        rows: How many of each.
    """
    rng = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    makers: dict[str, Callable[[], dict]] = {
        "rankings": lambda: {"prompt": text(8, 40), "responses": [text(10, 50), text(10, 50)], "ranks": [1, 2]},
        "prompts": lambda: {"prompt": text(8, 40)},
        "documents": lambda: {"text": text(40, 160)},
    }
    for kind, make in makers.items():
        path = folder / f"{kind}.jsonl"
        if not path.exists():
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(make()) + "\n" for _ in range(rows))


def write_tokenizer(folder: Path) -> None:
    """Train a tokenizer of 4,000 ids on the same words, and save it."""
    from data.tokenizer import train_tokenizer

    rng = random.Random(1)
    texts = (" ".join(rng.choices(WORDS, k=60)) for _ in range(2000))
    train_tokenizer(texts, 4000).save_pretrained(folder / "model")


def quiet(folder: Path) -> SimpleNamespace:
    """Return what stands in for a session: it shows and writes nothing."""
    progress = nullcontext(SimpleNamespace(update=lambda *given: None))
    return SimpleNamespace(
        stage="ppo",
        say=lambda line: None,
        tracker=SimpleNamespace(stage="ppo", progress=lambda *given: progress),
        notes=SimpleNamespace(take_down=lambda *given: None, write_down=lambda *given: None, figures={}),
        leave_if_requested=lambda *given: None,
        folder=folder,
    )


def check(folder: Path, kind: str) -> None:
    """Read a file as `rlhf run` does before anything runs."""
    from data.source import Source
    from data.sources import scan

    assert scan(kind, Source(folder / f"{kind}.jsonl")).errors == []


def split(folder: Path) -> None:
    """Split the rankings as the stage rankings does."""
    from pipeline.stage import Source
    from stages.rankings import Shares, split_given

    (folder / "split").mkdir(exist_ok=True)
    shares = Shares(validation=0.05, judge=0.0, is_set=True)
    session: Any = quiet(folder)
    split_given(Source(path=folder / "rankings.jsonl"), shares, folder / "split", session, None)


def cache_of(folder: Path) -> Any:
    """Return where encoded rows are kept."""
    from pipeline.store.cache import Cache
    from stages.shared.row_cache import RowCache

    return RowCache(Cache(folder / ".cache"), folder / "model", quiet(folder).tracker)


def start_rankings(folder: Path) -> None:
    """Load the training rankings as rm does, and draw a thousand batches of 32."""
    from data.group_rows import count_pairs, tokens_of
    from data.streams import grouped_by_length
    from stages.models.loading import load_tokenizer
    from stages.shared.inputs import LengthLimit, load_groups

    tokenizer, limit = load_tokenizer(folder / "model"), LengthLimit(1024, "drop", "rm")
    groups, _ = load_groups(folder / "split" / "train.jsonl", tokenizer, limit, cache_of(folder))
    order = grouped_by_length(tokens_of(groups), 32, 32_000, seed=0)
    assert count_pairs(groups) == len(groups) and all(groups[i].prompt for i in order)


def start_prompts(folder: Path) -> None:
    """Load the prompts as ppo does, with their digest, and draw a thousand batches of 32."""
    from data.streams import Stream
    from stages.models.loading import load_tokenizer
    from stages.ppo.prompts import load_prompts
    from stages.ppo.state import Drawn, refuse_other_prompts
    from stages.settings.ppo import PPOSettings

    settings = PPOSettings(max_length=1024, response_length=64)
    session: Any = quiet(folder)
    tokenizer = load_tokenizer(folder / "model")
    train, _ = load_prompts(session, settings, tokenizer, given(folder, "prompts"), cache_of(folder))
    refuse_other_prompts(Drawn(), train)
    assert all(train[i].ids for i in Stream(len(train), seed=0).take(32_000))


def start_documents(folder: Path) -> None:
    """Load the documents that train as ppo's ptx does, and draw a thousand batches of 32."""
    from data.streams import Stream
    from stages.models.loading import load_tokenizer
    from stages.shared.encoded_documents import load_training_text

    documents, tokenizer = given(folder, "documents"), load_tokenizer(folder / "model")
    rows = load_training_text(documents, 0.05, tokenizer, cache_of(folder), 64)
    assert all(len(rows[i]) == 64 for i in Stream(len(rows), seed=0).take(32_000))


def given(folder: Path, kind: str) -> Any:
    """Return a file as a stage gets it, with its digest."""
    from pipeline.stage import Source
    from pipeline.store import integrity
    from stages.shared.inputs import GivenText

    path = folder / f"{kind}.jsonl"
    return GivenText(Source(path=path, sha256=integrity.sha256_file(path)), None)


STEPS: dict[str, Callable[[Path], None]] = {
    "check": lambda folder: check(folder, "rankings"),
    "split": split,
    "first_start": start_rankings,
    "second_start": start_rankings,
    "check_prompts": lambda folder: check(folder, "prompts"),
    "first_start_prompts": start_prompts,
    "second_start_prompts": start_prompts,
    "first_start_documents": start_documents,
    "second_start_documents": start_documents,
}
"""The steps in order; each needs the files of those before. Where no kind is named: rankings."""


def measure(step: str, folder: Path) -> dict[str, float]:
    """Run a step in this process, and return what it took."""
    import stages.ppo.prompts
    import stages.ppo.state
    import stages.rankings  # noqa: F401 (not counted: every stage imports these libraries)

    began, before = time.monotonic(), time.process_time()
    STEPS[step](folder)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(time.process_time() - before, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    """Write the rows and a tokenizer, and run the steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of rankings, prompts and documents")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where files are put; default: a folder that is removed")
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(measure(arguments.step, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        write_rows(folder, arguments.rows)
        write_tokenizer(folder)
        result: dict[str, Any] = {"rows": arguments.rows}
        for step in STEPS:
            command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result[step] = json.loads(done.stdout.splitlines()[-1])
            print(step, result[step], flush=True)
    save_row({"bench": "data_size", **stamp(), **result}, ("bench", "rows"), RESULTS)


if __name__ == "__main__":
    main()

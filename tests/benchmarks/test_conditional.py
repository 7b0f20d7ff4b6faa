"""Test the comparison of conditional training: its table by hand, its sizes, and a quick run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # benchmarks import sweeps from their own folder


def load(name: str) -> ModuleType:
    """Load a benchmark as a module, without leaving its name in sys.modules."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


conditional = load("conditional")


def row(way: str, seed: int, gold: float) -> dict:
    """Return an invented row."""
    kl = None if way == "best_of_n" else 1.5
    return {"way": way, "seed": seed, "gold": gold, "gold_held_out_tasks": gold, "score": 1.0, "kl_to_sft": kl}


def test_differences_are_paired_by_seed():
    golds = {
        "sft": (0.6, 0.7, 0.4),
        "ppo": (0.7, 0.8, 0.6),
        "best_of_n": (0.8, 0.8, 0.8),
        "hindsight": (0.6, 0.75, 0.45),
    }
    rows = [row(way, seed, gold) for way, own in golds.items() for seed, gold in zip((5, 3, 4), own, strict=True)]
    lines = {line.split("|")[1].strip(): line for line in conditional.table(rows, (3, 4, 5)).splitlines()}
    # differences −0.1, −0.05, −0.15: mean −0.1, t(2) · 0.05 / √3 = 0.124
    assert "−0.100 (−0.224 to 0.024)" in lines["hindsight"]
    assert lines["PPO"].split("|")[7].strip() == "–" and lines["best of n"].split("|")[8].strip() == "–"
    assert lines["hindsight"].split("|")[6].strip().startswith("0.033 (")


@pytest.mark.parametrize("sizes", [conditional.FULL, conditional.QUICK])
def test_every_way_has_the_same_number_of_samples(sizes):
    store = conditional.ArtifactStore("artifacts", "x")
    assert conditional.best_of(sizes) * sizes["evaluation_prompts"] == pytest.approx(sizes["samples"], rel=0.3)
    for way in ("conditional", "hindsight"):
        settings = dict(option.split("=", 1) for option in conditional.settings_of(sizes, store, way))
        counts = [
            int(settings[f"sft.conditional.{key}"]) for key in ("samples_per_prompt", "prompts_per_round", "rounds")
        ]
        assert counts[0] * counts[1] * counts[2] == sizes["samples"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_whole_comparison_with_a_tiny_model(tmp_path):
    """Every way is run and measured; a second run only prints the same lines."""
    words = [sys.executable, str(HERE / "conditional.py"), "--quick", "--seeds", "0"]
    words += ["--artifacts", str(tmp_path), "--results", str(tmp_path / "results")]
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        rows = [json.loads(line) for line in (tmp_path / "results" / "conditional.jsonl").open()]
        assert {row["way"] for row in rows} == {"sft", "ppo", "best_of_n", *conditional.WAYS}
        samples = {row["way"]: row.get("samples") for row in rows}
        assert samples["conditional"] == samples["hindsight"] == 32 and samples["demonstrations"] == 0
        assert all(row["kl_to_sft"] is None or row["kl_to_sft"] > -1 for row in rows)

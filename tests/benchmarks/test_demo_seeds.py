"""Test the demo's table over seeds on invented results, with intervals computed by hand."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # benchmarks import each other from their own folder


def load(name: str) -> ModuleType:
    """Load a benchmark as a module, without leaving its name in sys.modules."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


demo_seeds = load("demo_seeds")
T_2 = 4.3027
"""The 0.975 quantile of Student's t with 2 degrees of freedom."""
GOLD = {"base": 0.4, "sft": 0.6, "ppo": 0.8, "dpo": 0.7, "best_of_n": 0.85}
GAIN = {3: 0.20, 4: 0.22, 5: 0.24}
"""Gold of PPO less that of SFT on each seed."""


def results(seed: int) -> dict:
    """Return results.json of a seed: worlds differ by 0.1 in gold, PPO's gain by 0.02."""
    policies = {}
    for name, gold in GOLD.items():
        gold = gold + 0.1 * (seed - 4) + (GAIN[seed] - 0.2 if name == "ppo" else 0.0)
        policies[name] = {
            "asked": "plain" if name == "base" else "chat",
            "gold": {"overall": gold},
            "gold_held_out_tasks": {"overall": gold - 0.05},
            "win_rate_vs_sft": {"value": 0.5 + 0.01 * seed},
            "pretrain_perplexity": None if name == "best_of_n" else 2.0 + 0.1 * seed,
            "kl_to_sft": None if name == "best_of_n" else 1.5,
        }
    orders = {"known_tasks": {"value": 0.8}, "held_out_tasks": {"value": 0.7}}
    reward_model = {"accuracy": 0.72, "accuracy_ceiling": 0.75 + 0.01 * seed, "labeler_agreement": 0.72}
    return {
        "judge": "gold", "prompts": 240, "samples_per_prompt": 4, "clusters": 120, "leaked": 120,
        "policies": policies, "reward_model": reward_model | {"orders_as_gold": orders},
    }  # fmt: skip


class Store:
    """Stand in for the artifacts of a seed: results.json, and stages that took 7 seconds each."""

    def __init__(self, folder: Path, seed: int, **changes: object):
        self.base = folder / f"seed{seed}"
        (self.base / "evaluate").mkdir(parents=True)
        (self.base / "evaluate" / "results.json").write_text(json.dumps(results(seed) | changes))

    def folder(self, stage: str) -> Path:
        return self.base / stage

    def manifest(self, stage: str) -> dict:
        return {
            "started_at": "2026-11-29T10:00:00+00:00", "finished_at": "2026-11-29T10:00:07+00:00",
            "git": {"commit": "0123456789", "dirty": False}, "versions": {}, "threads": 2,
            "config": {"evaluate": {"best_of": 16}},
        }  # fmt: skip


ARGS = SimpleNamespace(name="tiny", config="tiny.yaml", overrides=[])


def row_of(folder: Path, seed: int, **changes: object) -> dict:
    """Return the row of a seed with changes to its results.json."""
    return demo_seeds.line(Store(folder, seed, **changes), ARGS, seed)


@pytest.fixture
def rows(tmp_path):
    return [row_of(tmp_path, seed) for seed in (3, 4, 5)]


def cells(rows: list[dict], name: str) -> list[str]:
    """Return the cells of one line of the table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in demo_seeds.table(rows).splitlines()]
    (matching,) = [line[1:] for line in lines if line[0] == name]
    return matching


def test_a_column_for_each_seed_and_the_mean_with_its_interval(rows):
    """Perplexities 2.3, 2.4, 2.5: 2.4 ± t · 0.1/√3."""
    half = T_2 * 0.1 / math.sqrt(3)
    assert cells(rows, "pretraining perplexity: SFT") == [
        "2.30", "2.40", "2.50", f"2.40 ({2.4 - half:.2f} to {2.4 + half:.2f})",
    ]  # fmt: skip
    assert "| seed 3" in demo_seeds.table(rows) and "mean (95 % interval over seeds)" in demo_seeds.table(rows)


def test_differences_are_paired_by_seed(rows):
    """Worlds differ by 0.1 in gold, gains only by 0.02: 0.22 ± t · 0.02/√3, far from 0."""
    half = T_2 * 0.02 / math.sqrt(3)
    expected = ["0.200", "0.220", "0.240", f"0.220 ({0.22 - half:.3f} to {0.22 + half:.3f})"]
    assert cells(rows, "gold, all prompts: PPO-ptx − SFT") == expected
    assert cells(rows, "gold, held-out tasks: PPO-ptx − SFT") == expected
    assert cells(rows, "gold, all prompts: SFT − base")[:3] == ["0.200"] * 3
    assert cells(rows, "gold, all prompts: DPO − SFT")[:3] == ["0.100"] * 3


def test_both_halves_are_shown_and_how_base_was_prompted(rows):
    assert cells(rows, "gold, all prompts: base (prompted in plain text)")[:3] == ["0.300", "0.400", "0.500"]
    assert cells(rows, "gold, held-out tasks: best of 16")[:3] == ["0.700", "0.800", "0.900"]


def test_the_reward_model_beside_its_ceiling(rows):
    shares = [0.72 / ceiling for ceiling in (0.78, 0.79, 0.80)]
    assert cells(rows, "reward model: accuracy as a share of that")[:3] == [f"{share:.3f}" for share in shares]
    assert cells(rows, "reward model: orders two SFT answers as gold does, held-out tasks")[0] == "0.700"


def test_no_ratio_of_small_differences_is_printed(rows):
    """Omit the share of the way from SFT to the best of n: −35 % of the way means nothing."""
    assert "of the way" not in demo_seeds.table(rows) and "of_the_way" not in json.dumps(rows)


def test_seconds_are_those_of_all_stages(rows):
    assert cells(rows, "seconds, all stages")[:3] == [str(7 * len(demo_seeds.STAGES))] * 3
    assert rows[0]["commit"] == "0123456" and rows[0]["date"] == "2026-11-29"


def test_one_seed_has_no_interval(tmp_path):
    assert cells([row_of(tmp_path, 4)], "gold, all prompts: PPO-ptx − SFT") == ["0.220", "0.220"]


def test_the_reported_seeds_are_not_those_that_settings_were_chosen_on():
    assert not {0, 1, 2} & set(demo_seeds.parse([]).seeds)


@pytest.mark.parametrize(
    "changes, message",
    [({"judge": "reward_model"}, "needs the embedded world's gold"), ({"samples_per_prompt": 1}, "use 2 or more")],
)
def test_unsuitable_results_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        row_of(tmp_path, 4, **changes)


def test_a_failing_chain_ends_the_run(tmp_path, monkeypatch, capsys):
    """Each seed is a run of `rlhf` with the seed, its own name and the given settings."""
    commands = []
    monkeypatch.setattr(
        "subprocess.run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=3)
    )
    argv = ["-c", str(HERE.parent / "resume" / "micro.yaml"), "--artifacts", str(tmp_path), "ppo.kl_coef=1"]
    assert demo_seeds.run_command(demo_seeds.run, argv) == 2
    assert "error: seed 3: ended with exit code 3" in capsys.readouterr().err
    (command,) = commands
    assert command[3:5] == ["run", "report"] and command[-3:] == ["name=micro-seed3", "seed=3", "ppo.kl_coef=1"]


def test_a_missing_config_is_an_error(capsys):
    assert demo_seeds.run_command(demo_seeds.run, ["-c", "none.yaml"]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err

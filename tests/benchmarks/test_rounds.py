"""Test the tables of rounds on invented results, with intervals computed by hand, and --quick."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # benchmarks import each other from their own folder
spec = importlib.util.spec_from_file_location("benchmark_rounds", HERE / "rounds.py")
rounds = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = rounds  # dataclasses look up their module
spec.loader.exec_module(rounds)

T_2 = 4.3027
"""The 0.975 quantile of Student's t with 2 degrees of freedom."""


def figures(gold: float, labels: int) -> dict:
    """Return the figures of a round; only gold and labels matter."""
    return {
        "labels": labels, "sft_gold": 0.5, "ppo_gold": gold, "ppo_gold_held_out_tasks": gold - 0.1, "kl_to_sft": 1.5,
        "orders_as_gold": 0.7, "agreement": 0.72,
    }  # fmt: skip


def row(seed: int, gain: float) -> dict:
    """Return a seed's row: worlds differ by 0.1 in gold, the gain over "at once" by 0.02."""
    once = 0.6 + 0.1 * (seed - 4)
    accuracy = [
        {"reward_model": model, "labels": labels, "accuracy": 0.6 + 0.1 * model, "n_pairs": 50}
        for model in (1, 2) for labels in (1, 2)
    ]  # fmt: skip
    made = [figures(once - 0.2, 200), figures(once + gain, 190)]
    return {"seed": seed, "rounds": made, "once": figures(once, 400), "accuracy": accuracy}


ROWS = [row(3, 0.10), row(4, 0.12), row(5, 0.14)]


def cells(table: str, name: str) -> list[str]:
    """Return the cells of one line of a table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (matching,) = [line[1:] for line in lines if line[0] == name]
    return matching


def test_differences_are_paired_by_seed():
    """Worlds differ by 0.1 in gold, gains only by 0.02: 0.12 ± t · 0.02/√3."""
    half = T_2 * 0.02 / math.sqrt(3)
    found = cells(rounds.main_table(ROWS), "gold of PPO, all prompts")
    assert [cell[:5] for cell in found] == ["0.400", "0.720", "0.600", "0.120", "0.320"]
    assert found[3] == f"0.120 ({0.12 - half:.3f} to {0.12 + half:.3f})"


def test_labels_add_up():
    assert cells(rounds.main_table(ROWS), "labels so far")[:3] == ["200", "390", "400"]


def test_each_reward_model_is_measured_on_the_labels_of_each_round():
    table = rounds.accuracy_table(ROWS)
    assert [cell[:5] for cell in cells(table, "reward model of round 1")] == ["0.700", "0.700"]
    assert [cell[:5] for cell in cells(table, "reward model of round 2")] == ["0.800", "0.800"]


def test_one_seed_has_no_interval():
    assert cells(rounds.main_table(ROWS[:1]), "gold of PPO, all prompts") == [
        "0.300",
        "0.600",
        "0.500",
        "0.100",
        "0.300",
    ]


def test_a_seed_is_not_run_again_with_the_same_settings(tmp_path):
    file = tmp_path / "rounds.jsonl"
    assert rounds.kept_row(file, 3, "abc") is None
    file.write_text(json.dumps({"seed": 3, "settings": "abc"}) + "\n")
    assert rounds.kept_row(file, 3, "abc") == {"seed": 3, "settings": "abc"}
    assert rounds.kept_row(file, 3, "other") is None and rounds.kept_row(file, 4, "abc") is None


def test_the_reported_seeds_are_not_the_one_that_settings_were_chosen_on():
    assert not {0, 1, 2} & set(rounds.parse([]).seeds)


@pytest.mark.parametrize("argv, message", [(["--rounds", "1"], "use 2 or more"), (["-c", "none.yaml"], "no such file")])
def test_mistakes_are_refused(argv, message, capsys):
    assert rounds.run_command(rounds.run, argv) == 2
    assert message in capsys.readouterr().err


def test_another_config_in_the_folder_is_refused(tmp_path):
    rounds.write_config(tmp_path / "a.yaml", {"name": "a"})
    rounds.write_config(tmp_path / "a.yaml", {"name": "a"})
    with pytest.raises(ValueError, match="is there with other settings"):
        rounds.write_config(tmp_path / "a.yaml", {"name": "b"})


@pytest.mark.slow
def test_two_rounds_and_the_other_side_run(tmp_path):
    command = [sys.executable, str(HERE / "rounds.py"), "--quick", "--rounds", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert len(found["rounds"]) == 2 and found["once"]["labels"] == sum(one["labels"] for one in found["rounds"])
    assert {(one["reward_model"], one["labels"]) for one in found["accuracy"]} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert "gold of PPO, all prompts" in done.stdout and "reward model of round 2" in done.stdout
    assert not list(tmp_path.iterdir()), "everything lies in a temporary folder"

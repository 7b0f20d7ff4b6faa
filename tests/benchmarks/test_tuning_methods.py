"""Test the comparison of tuning methods: its list, its choice of rates, a tiny run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import tuning_methods as bench  # noqa: E402

from stages.settings.peft import PeftChanges  # noqa: E402


def test_every_method_is_a_setting_and_every_setting_is_a_method():
    """A method that PeftSettings learns has to be in the table."""
    import yaml

    listed = {yaml.safe_load(peft)["method"] for _, peft in bench.METHODS.values() if peft != "full"}
    known = {name for part in PeftChanges.model_fields["method"].annotation.__args__ for name in names_of(part)}
    assert known <= listed


def names_of(annotation):
    """Return the values of a Literal; none of other types."""
    return getattr(annotation, "__args__", ())


def test_methods_whose_tokens_base_adds_are_those_of_the_project():
    from stages.models.soft_prompts import SOFT_METHODS

    assert bench.SOFT_PROMPTS == SOFT_METHODS


def test_rates_are_of_the_family_and_the_lowest_loss_wins():
    assert bench.rates_of("sft", "low rank") == [1e-4, 3e-4, 1e-3]
    assert bench.rates_of("dpo", "all weights") == [1e-6, 3e-6, 1e-5]
    lines = [{"rate": rate, "held_out": {"loss": loss}} for rate, loss in ((1, 2.0), (2, 1.5), (3, float("nan")))]
    assert bench.best(lines) == 2
    assert bench.best(lines[2:] + lines[:1]) == 1


def test_every_family_has_methods_and_three_rates():
    assert {family for family, _ in bench.METHODS.values()} == set(bench.FAMILIES)
    assert all(len(rates) == 3 and sorted(rates) == list(rates) for rates in bench.FAMILIES.values())


def test_a_family_takes_the_rate_of_its_first_method_that_trains(tmp_path, monkeypatch):
    """Of vectors in dpo, soft prompts are not compared; ia3 is refused here, so bitfit chooses."""
    args = bench.parse(["--steps", "8", "--results", str(tmp_path)])
    tried = []

    def line_of(args, stop, trial):
        tried.append((trial.method, trial.rate, trial.steps, trial.seed, trial.kind))
        return {"refused": "no"} if trial.method == "ia3" else {"rate": trial.rate, "held_out": {"loss": trial.rate}}

    monkeypatch.setattr(bench, "line_of", line_of)
    assert bench.chosen_rate(args, None, "dpo", "vectors") == 1e-4
    assert tried == [("ia3", 1e-4, 4, 0, "choice"), *(("bitfit", rate, 4, 0, "choice") for rate in (1e-4, 1e-3, 3e-3))]
    middle = bench.parse(["--middle", "--results", str(tmp_path)])
    assert bench.rate_for(middle, None, "sft", "vectors") == 1e-2
    with pytest.raises(bench.UserError, match="networks: no method"):
        monkeypatch.setattr(bench, "line_of", lambda *_: {"refused": "no"})
        bench.chosen_rate(args, None, "dpo", "networks")


def test_the_table_shows_refusals_and_means_over_seeds(tmp_path):
    args = bench.parse(["--methods", "lora", "bitfit", "p_tuning", "--steps", "4", "--results", str(tmp_path)])
    common = {"stage": "sft", "steps": 4, "kind": "report"}
    rows = [
        {**common, "method": "lora", "seed": seed, "rate": 1e-3, "trained": 1200, "parameters": 480_000,
         "cpu_seconds_a_step": 1.25, "before": {"step": 0, "loss": 4.5}, "peak_gb": 1.5, "seconds_a_step": 2.0,
         "held_out": {"loss": loss}, "key": [args.name, *bench.Trial("lora", "sft", seed, 4, 1e-3, "report").key()]}
        for seed, loss in ((1, 2.0), (2, 3.0))
    ]  # fmt: skip
    rows += [{**common, "method": "bitfit", "seed": 0, "refused": "model.peft.method: none",
              "key": [args.name, *bench.Trial("bitfit", "sft", 0, 4, 1e-3, "choice").key()]}]  # fmt: skip
    text = bench.table(args, rows, "sft")
    assert (
        "| 1,200 " in text
        and "| 0.25 % " in text
        and "| 0.001 * " in text
        and "| 4.5000 " in text
        and "| 1.25 " in text
    )
    assert "2.5000 (" in text and "refused: model.peft" in text and "own" not in text
    assert "needs an sft model with its tokens" in bench.table(args, rows, "dpo")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_tiny_run_is_kept_and_not_repeated(tmp_path):
    """Three methods, one of them refused, at a given rate; the second command only prints."""
    config = ROOT / "tests" / "resume" / "micro.yaml"
    words = ["-c", str(config), "--artifacts", str(tmp_path / "a"), "--results", str(tmp_path)]
    words += [
        "--methods",
        "lora",
        "bitfit",
        "prompt_tuning",
        "--stages",
        "sft",
        "--seeds",
        "1",
        "--steps",
        "2",
        "--rate",
        "1e-3",
    ]
    words += ["sft.ppo_init=null", "sft.max_length=96"]  # the tokens of the soft prompt need room
    for _ in range(2):
        done = subprocess.run([sys.executable, bench.__file__, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(row) for row in (tmp_path / bench.RESULTS).read_text().splitlines()]
    assert {row["method"]: "refused" in row for row in rows} == {"lora": False, "bitfit": True, "prompt_tuning": False}
    (lora,) = [row for row in rows if row["method"] == "lora"]
    assert lora["trained"] > 0 and lora["held_out"]["loss"] > 0 and lora["peak_gb"] > 0
    (soft,) = [row for row in rows if row["method"] == "prompt_tuning"]
    assert 0 < soft["trained"] < lora["trained"] < lora["parameters"] < soft["parameters"]
    assert lora["cpu_seconds_a_step"] > 0 and soft["cpu_seconds_a_step"] > 0
    assert lora["before"]["step"] == soft["before"]["step"] == 0
    again = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["method"] for row in again] == ["bitfit"], "what could not train is tried again, and nothing else"
    assert f"| {lora['trained']:,}" in done.stdout
    assert not list((tmp_path / "a").glob("*report*"))


@pytest.mark.parametrize(("stage", "digits"), [("sft", 3), ("dpo", 4)])
def test_the_tables_of_the_stages_have_the_figures_of_the_lines(stage, digits):
    """Compare each row of stages/README.md with its line in results/."""
    section = (ROOT / "stages" / "README.md").read_text(encoding="utf-8").partition("### The methods compared")[2]
    text = section.partition("\n## ")[0].partition(f"\nIn {stage}: ")[2].partition("\nIn ")[0]
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    shown = {cells[0].strip("`"): cells[1:] for cells in shown[2:]}
    file = Path(bench.__file__).parent / "results" / bench.RESULTS
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    reported = [row for row in lines if row["stage"] == stage and row["kind"] == "report" and "refused" not in row]
    made = {row["method"]: row for row in reported}
    assert shown and shown.keys() == made.keys() and len(made) == len(reported)
    for name, (trained, share, memory, seconds, rate, loss) in shown.items():
        line = made[name]
        assert trained == f"{line['trained']:,}" and share == f"{100 * line['trained'] / line['parameters']:.3g} %"
        assert (memory, rate) == (f"{line['peak_gb']:.2f}", f"{line['rate']:g}")
        assert seconds == f"{line['cpu_seconds_a_step']:.1f}"
        assert loss == f"{line['before']['loss']:.{digits}f} → {line['held_out']['loss']:.{digits}f}"
        assert (line.get("timed") or line)["commit"][:7] in text

"""Test sweeps: what is swept, how variants are named, who makes what, and how they are run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import sweep, sweep_commands
from pipeline.config.checks import NAME
from pipeline.config.validation import load_experiment
from pipeline.errors import UserError
from tests.pipeline import fakes
from tests.pipeline.test_cli import rlhf  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Give tables room, or their words are on several lines."""
    monkeypatch.setenv("COLUMNS", "200")


def find(*overrides, text=fakes.CONFIG):
    Path("small.yaml").write_text(text)
    return sweep.find_sweep("small.yaml", overrides, fakes.experiment_class(fakes.stages()))


def members(target, *overrides, text=fakes.CONFIG, reads=None):
    """Return name → member of the sweep of a config."""
    stages = fakes.stages(reads)
    found = find(*overrides, text=text)

    def load(words):
        return load_experiment("small.yaml", words, fakes.experiment_class(stages))

    return {member.name: member for member in sweep.expand(found, target, load, stages)}


# -- what is swept -------------------------------------------------------------------------------


def test_a_list_is_a_sweep_only_where_the_setting_takes_none():
    assert find("fit.steps=[1,2]").axes == {"fit.steps": [1, 2]}
    assert find("fit.steps=1") is None and find() is None
    assert find("launch.slurm.setup=[a,b]") is None and find("model.peft.target_modules=[q]") is None
    assert find("data.prompts=[a.jsonl,b.jsonl]") is None  # a mixture
    assert find("fit.stepz=[1,2]") is None  # an unknown key: validation says so


def test_the_yaml_names_axes_dotted_or_nested_and_the_command_line_fixes_them():
    text = fakes.CONFIG + "sweep:\n  fit.steps: [1, 2]\n  fit: {keep: [best]}\n  seed: [0, 1]\n"
    found = find(text=text)
    assert found.axes == {"fit.keep": ["best"], "fit.steps": [1, 2], "seed": [0, 1]}
    assert found.overrides == ("sweep=null",)
    assert find("fit.steps=4", text=text).axes == {"fit.keep": ["best"], "seed": [0, 1]}
    assert find("fit.steps=[5]", text=text).axes["fit.steps"] == [5]
    assert find("sweep=null", text=text) is None
    assert find("sweep.data.prompts=[[a,b],c]").axes == {"data.prompts": [["a", "b"], "c"]}


@pytest.mark.parametrize(
    "words, problem",
    [
        (["fit.steps=[]"], "fit.steps: the list is empty"),
        (["fit.steps=[1,2,1]"], "fit.steps: a value is listed twice"),
        (["fit.learning_rate=[1,1.0]"], "a value is listed twice"),
        (["name=[a,b]"], "name: no finished stage depends on it"),
        (["launch.threads=[1,2]"], "launch.threads: no finished stage depends on it"),
        (["sweep.fit.steps=3"], "sweep.fit.steps: should be a list"),
        ([f"seed={list(range(300))}"], "makes 300 experiments; at most 256"),
    ],
)
def test_mistakes_in_a_sweep(words, problem):
    with pytest.raises(UserError, match=problem.replace("(", "\\(")):
        find(*words)


# -- names ---------------------------------------------------------------------------------------


def test_names_are_readable_and_valid():
    assert sweep.name_of("tiny", {"ppo.kl_coef": 0.1}) == "tiny--ppo.kl_coef-0.1"
    assert sweep.name_of("tiny", {"seed": 3, "ppo.kl_coef": 1e-05}) == "tiny--ppo.kl_coef-1e-05--seed-3"
    assert sweep.value_text(-0.5) == "minus0.5" and sweep.value_text(None) == "null"
    assert sweep.value_text("bfloat16") == "bfloat16"


def test_different_values_have_different_names():
    values = [0.1, -0.1, 0, 1, True, False, None, "null", "true", "minus0.1", "a b", "a_b", "a/b", "a--b", "", [1, 2],
              [1, [2]], {"a": 1}, {"a": "1"}, "x" * 50, "x" * 51, 1e16, 1e-16, "ü", "é"]  # fmt: skip
    names = [sweep.name_of("tiny", {"key": value}) for value in values]
    assert len(set(names)) == len(values)
    assert all(NAME.fullmatch(name) and len(name) < 255 for name in names)
    long = [sweep.name_of("t" * 100, {f"section.key_{i}": 0.123456789 + j for i in range(12)}) for j in range(2)]
    assert len(set(long)) == 2 and all(len(name) < 255 and NAME.fullmatch(name) for name in long)


# -- who makes what ------------------------------------------------------------------------------


def test_what_no_axis_changes_is_made_once_by_the_experiment_itself():
    found = members("page", "fit.steps=[1,2]")
    assert {name: member.made for name, member in found.items()} == {
        "small": ("text",),
        "small--fit.steps-1": ("fit", "page"),
        "small--fit.steps-2": ("fit", "page"),
    }
    assert found["small"].overrides == () and found["small"].targets == ("text",)
    assert found["small--fit.steps-2"].overrides == (
        "fit.steps=2",
        "name=small--fit.steps-2",
        'from=[{"experiment": "small", "stages": ["text"]}]',
    )


def test_each_combination_shares_what_only_some_axes_change():
    found = members("page", "fit.steps=[1,2]", "text.words=[1,2]")
    assert found["small--text.words-1"].made == ("text",)
    assert found["small--fit.steps-2--text.words-1"].taken == {"text": "small--text.words-1"}
    assert list(found)[:2] == ["small--text.words-1", "small--text.words-2"] and len(found) == 6


def test_the_seed_changes_everything():
    found = members("page", "seed=[1,2]")
    assert all(member.is_variant and not member.taken for member in found.values()) and len(found) == 2


def test_one_value_is_a_variant_too():
    assert list(members("fit", "fit.steps=[3]")) == ["small", "small--fit.steps-3"]


def test_a_stage_that_would_be_another_one_is_not_shared():
    """A first file of the user's own sets the other kinds of data to none, so that `fit` reads
    other data than under the YAML alone."""
    Path("a.jsonl").write_text("{}")
    Path("b.jsonl").write_text("{}")
    found = members("page", "sweep.data.demonstrations=[a.jsonl,b.jsonl]", "fit.steps=[1,2]", reads=["prompts"])
    variants = [member for member in found.values() if member.is_variant]
    assert len(variants) == 4 and all({"fit", "page"} <= set(member.made) for member in variants)
    assert all(member.taken == {"text": "small"} for member in variants) and found["small"].made == ("text",)


def test_a_target_must_depend_on_every_axis():
    with pytest.raises(UserError, match=r"fit\.steps: text does not depend on it.*run fit or page"):
        members("text", "fit.steps=[1,2]")


def test_own_from_entries_stay():
    text = fakes.CONFIG + "from: {experiment: origin, stages: [text]}\n"
    found = members("page", "fit.steps=[1,2]", text=text)
    assert set(found) == {"small--fit.steps-1", "small--fit.steps-2"}
    assert found["small--fit.steps-1"].taken == {"text": "origin"}


# -- run and status ------------------------------------------------------------------------------


@pytest.fixture
def swept(rlhf, monkeypatch):  # noqa: F811
    """Return `rlhf` that runs the experiments of a sweep in this process."""
    from pipeline import cli

    monkeypatch.setattr(sweep_commands, "run_process", lambda argv, words, received: cli.main(words))
    return rlhf


def made(name, stage="fit"):
    return json.loads(Path("artifacts", name, stage, "manifest.json").read_text())


def test_run_all_then_nothing_to_do(swept):
    code, out, err = swept("run", "page", "fit.learning_rate=[0.01,0.1]", "fit.steps=3")
    assert (code, err) == (0, ""), err
    names = ["small--fit.learning_rate-0.01", "small--fit.learning_rate-0.1"]
    assert [made(name)["config"]["fit"]["learning_rate"] for name in names] == [0.01, 0.1]
    assert all(made(name)["config"]["fit"]["steps"] == 3 for name in names)
    assert sorted(p.name for p in Path("artifacts").iterdir()) == ["small", *names]
    assert not any(Path("artifacts", name, "text").exists() for name in names)
    before = {name: made(name) for name in names}
    code, out, _ = swept("run", "page", "fit.learning_rate=[0.01,0.1]", "fit.steps=3")
    assert code == 0 and "done in" not in out and {name: made(name) for name in names} == before


def test_a_failing_variant_loses_no_other(swept):
    code, out, err = swept("run", "page", "fit.fail_at=[2,null]", "fit.steps=3")
    assert code == 3 and "the loss at step 2 is not finite" in err
    assert "small--fit.fail_at-2: page ended with 3" in out and "small--fit.fail_at-null: done" in out
    assert made("small--fit.fail_at-null", "page")
    assert not Path("artifacts/small--fit.fail_at-2/fit/manifest.json").exists()


def test_variants_of_a_failed_one_are_not_run(swept, monkeypatch):
    def run(ctx):
        raise UserError("text: cannot; stop")

    fakes.change(swept.stages, "text", run=run)
    code, out, _ = swept("run", "fit", "fit.steps=[1,2]")
    assert code == 2 and out.count("not run, because small failed") == 4


def test_exit_codes_are_ordered_from_the_worst():
    def worst(*codes):
        return sweep_commands.Progress(codes=dict(enumerate(codes))).worst()

    assert (worst(), worst(0, 0), worst(0, 3), worst(3, 2), worst(2, 1), worst(0, 75, 1)) == (0, 0, 3, 2, 1, 75)
    assert worst(0, 42) == 1


def test_nothing_runs_if_a_variant_is_no_valid_experiment(swept):
    code, _, err = swept("run", "fit", "fit.steps=[1,0]")
    assert code == 2 and "fit.steps: 0; should be greater" in err and not Path("artifacts").exists()


def test_flags_go_to_the_variants(swept):
    assert swept("run", "fit", "fit.steps=[1,2]")[0] == 0
    text = made("small", "text")
    assert swept("run", "fit", "fit.steps=[1,2]", "--force")[1].count("forced, running") == 2
    assert made("small", "text") == text
    code, _, err = swept("run", "fit", "fit.steps=[3]", "--only", "text.words=9")
    assert code == 2 and "text: is from small: stale" in err and made("small", "text") == text


def test_status_lists_the_variants(swept):
    assert swept("run", "fit", "fit.steps=[1,2]")[0] == 0
    code, out, _ = swept("status", "fit.steps=[1,2,3]")
    assert code == 0 and out.count("fit: done") == 2 and "fit: missing" in out and "text from small" in out
    word = next(line for line in out.splitlines() if line.startswith("small--fit.steps-1: "))
    assert word.endswith("""fit.steps=1 name=small--fit.steps-1 'from=[{"experiment": "small", "stages": ["text"]}]'""")


def test_other_commands_take_one_experiment(swept):
    Path("swept.yaml").write_text(fakes.CONFIG + "sweep: {fit.steps: [1, 2]}\n")
    assert swept("status", "sweep=null", config="swept.yaml")[1].startswith("small in artifacts/small")
    code, _, err = swept("run", "fit", "--submit", "slurm", config="swept.yaml")
    assert code == 2 and "--submit takes one experiment" in err


def test_torchrun_is_refused(swept, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, _, err = swept("run", "fit", "fit.steps=[1,2]")
    assert code == 2 and "without torchrun" in err


def test_a_signal_stops_the_sweep_and_it_resumes(tmp_path):
    Path("small.yaml").write_text(fakes.CONFIG)
    words = ["run", "fit", "-c", "small.yaml", "fit.pause=[0.2,0.21]"]
    command = [sys.executable, str(ROOT / "tests/pipeline/fakes.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("step 2"):
            running.send_signal(signal.SIGTERM)
            break
    rest = running.communicate(timeout=60)[0]
    assert running.returncode == 75, rest
    assert not Path("artifacts/small--fit.pause-0.21/fit").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "resuming from step" in done.stdout, done.stderr
    assert made("small--fit.pause-0.21")["metrics"]["steps"] == 12

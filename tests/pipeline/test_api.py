"""The Python entry point: what `rlhf run` does, with its errors as exceptions."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import parse
from pipeline.errors import Interrupted, TrainingStopped, UserError
from pipeline.state import Flags
from tests.pipeline import fakes
from tests.pipeline.conftest import Lines

ROOT = Path(__file__).resolve().parents[2]
README_LINES = """\
from pipeline import load_experiment, run

experiment = load_experiment("tests/resume/micro.yaml", "world.prompts=20")
folder = run("world", experiment, artifacts=ARTIFACTS)
print(sorted(path.name for path in folder.iterdir() if path.suffix == ".jsonl"))
"""


@pytest.fixture
def api(tmp_path, monkeypatch):
    """pipeline.api with the fake stages, beside small.yaml; `api.made` are the stages."""
    from pipeline import api

    (tmp_path / "small.yaml").write_text(fakes.CONFIG)
    made = fakes.stages()
    monkeypatch.setattr(api, "stages", lambda: made)
    monkeypatch.setattr(api, "STAGES", tuple(made))
    monkeypatch.setattr(api, "TESTS", ())
    monkeypatch.setattr(api, "experiment_class", lambda: fakes.experiment_class(made))
    monkeypatch.setattr(api, "made", made, raising=False)
    return api


def test_importing_the_package_imports_next_to_nothing():
    code = "import sys, pipeline; sys.exit('pydantic' in sys.modules or 'pipeline.api' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    with pytest.raises(ImportError):
        from pipeline import nothing_of_this_name  # noqa: F401


def test_the_lines_of_the_readme(tmp_path):
    code = f"ARTIFACTS = {str(tmp_path)!r}\n{README_LINES}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["demonstrations.jsonl", "documents.jsonl", "evaluation_prompts.jsonl", "prompts.jsonl"]
    assert done.stdout.splitlines()[-1] == str(names)
    command = ["-m", "pipeline.cli", "run", "world", "-c", "tests/resume/micro.yaml", "--artifacts", str(tmp_path)]
    again = subprocess.run([sys.executable, *command, "world.prompts=20"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.startswith("world: up to date"), "the command says the same"


def test_it_runs_what_is_needed_and_nothing_twice(api, tmp_path):
    experiment, console = api.load_experiment("small.yaml", "fit.steps=3"), Lines()
    folder = api.run("fit", experiment, console=console)
    assert folder == Path("artifacts/small/fit") and "fit: done in" in console.text
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["config"]["command_line"] == ["fit.steps=3"]
    assert manifest["config"]["file"]["path"] == os.path.realpath("small.yaml")
    again = Lines()
    api.run("fit", experiment, console=again)
    assert again.text.count("up to date") == 2
    forced = Lines()
    api.run("fit", experiment, flags=Flags(force=True), console=forced)
    assert "fit: forced, running" in forced.text


def test_what_was_changed_after_loading_is_refused(api):
    """Neither a copy that was never validated runs, nor a file that was edited in the meantime."""
    experiment = api.load_experiment("small.yaml", "fit.steps=3")
    changed = experiment.model_copy(update={"fit": experiment.fit.model_copy(update={"steps": -1})})
    with pytest.raises(UserError, match=r"^experiment: was changed after it was loaded.*; load it again, and pass"):
        api.run("fit", changed, console=Lines())
    Path("small.yaml").write_text(fakes.CONFIG.replace("words: 3", "words: 4"))
    with pytest.raises(UserError, match=r"or its file was"):
        api.run("fit", experiment, console=Lines())
    assert not Path("artifacts").exists()


def test_the_manifest_has_the_command_that_does_the_same(api):
    experiment = api.load_experiment("small.yaml", "fit.steps=3")
    folder = api.run("fit", experiment, "my place", Flags(force=True), Lines())
    command = json.loads((folder / "manifest.json").read_text())["command"]
    assert command == "rlhf run fit -c small.yaml --artifacts 'my place' --force fit.steps=3"
    arguments = parse(shlex.split(command)[1:])
    assert (arguments.stage, arguments.overrides, arguments.force) == ("fit", ["fit.steps=3"], True)
    with pytest.raises(UserError) as caught:
        api.run("fit", api.load_experiment("small.yaml"), "my place", console=Lines())
    assert "`rlhf run fit -c small.yaml --artifacts 'my place' fit.steps=3` keeps what is there" in str(caught.value)
    assert "CONFIG" not in str(caught.value)


def test_printed_commands_are_filled_in(api, capsys):
    def show(folder, console):
        console.print("see `rlhf run fit -c CONFIG --force`", soft_wrap=True)

    fakes.change(api.made, "text", show=show)
    api.run("text", api.load_experiment("small.yaml", "text.words=2"), artifacts="elsewhere")
    assert "`rlhf run fit -c small.yaml --artifacts elsewhere --force text.words=2`" in capsys.readouterr().out


def test_what_a_stage_shows_is_shown(api):
    shown = []
    fakes.change(api.made, "text", show=lambda folder, console: shown.append(folder))
    api.run("text", api.load_experiment("small.yaml"), artifacts="elsewhere", console=Lines())
    assert shown == [Path("elsewhere/small/text")]


def test_errors_are_exceptions(api):
    with pytest.raises(UserError, match=r"small\.yaml:3: text.words: 0; should be greater than or equal to 1"):
        Path("small.yaml").write_text("name: small\ntext:\n  words: 0\n")
        api.load_experiment("small.yaml")
    Path("small.yaml").write_text(fakes.CONFIG)
    with pytest.raises(UserError, match="stage: 'fitt' is not a stage; choose from text, fit, page"):
        api.run("fitt", api.load_experiment("small.yaml"))
    with pytest.raises(UserError, match=r"launch\.processes: a Python process runs stages alone"):
        api.run("text", api.load_experiment("small.yaml", "launch.processes=2"))
    with pytest.raises(UserError, match="was not loaded from a file"):
        api.run("text", api.experiment_class()(name="small"))
    with pytest.raises(TrainingStopped, match="step 2"):
        api.run("fit", api.load_experiment("small.yaml", "fit.fail_at=2"), console=Lines())


def test_a_signal_is_interrupted_and_the_next_call_resumes(api):
    def stopped(ctx):
        os.kill(os.getpid(), signal.SIGINT)
        return fakes.run_fit(ctx)

    experiment, run_fit, console = api.load_experiment("small.yaml"), api.made["fit"].run, Lines()
    fakes.change(api.made, "fit", run=stopped)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        api.run("fit", experiment, console=console)
    assert caught.value.step == 1 and signal.getsignal(signal.SIGINT) == before
    fakes.change(api.made, "fit", run=run_fit)
    api.run("fit", experiment, console=console)
    assert "fit: resuming from step 1" in console.text

"""Two YAMLs of one name: what one made the other replaces only if a person says so."""

import os
import pty
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import origin
from pipeline.errors import Interrupted
from pipeline.origin import Origin, lines_of_others
from pipeline.stage import StopFlag
from tests.pipeline import fakes
from tests.pipeline.test_cli import at_a_terminal, rlhf  # noqa: F401 (a fixture)

OTHER = fakes.CONFIG.replace("steps: 12", "steps: 3")


def line_of(tmp_path, stages, made_with="small.yaml", other="other.yaml"):
    return (
        f"error: artifacts/small: {stages}: made with {tmp_path / made_with}, and {tmp_path / other} has the same name "
        f"and other settings; name=OTHER gives it a folder of its own, --override-config replaces what is there\n"
    )


def manifests():
    return {path: path.read_bytes() for path in Path("artifacts").glob("*/*/manifest.json")}


@pytest.fixture
def other(rlhf, tmp_path):  # noqa: F811
    """`other("run", "fit")` with a file of the same name and another setting, after the first one's has run."""
    assert rlhf("run", "page")[0] == 0
    Path("other.yaml").write_text(OTHER)
    return lambda *words: rlhf(*words, config="other.yaml")


def test_another_file_of_the_same_name_replaces_nothing(other, tmp_path):
    before = manifests()
    assert other("run", "page") == (2, "", line_of(tmp_path, "fit, page"))
    assert manifests() == before
    assert other("run", "text")[0] == 0  # of which both say the same


def test_the_ways_out(other, rlhf, tmp_path):  # noqa: F811
    before = manifests()
    assert other("run", "page", "name=mine")[0] == 0
    assert {path: text for path, text in manifests().items() if "small" in path.parts} == before
    code, out, _ = other("run", "page", "--override-config")
    assert code == 0 and "fit: stale because fit.steps 12 → 3; running" in out
    assert other("run", "page")[0] == 0
    assert rlhf("run", "page") == (2, "", line_of(tmp_path, "fit, page", "other.yaml", "small.yaml"))


@pytest.mark.parametrize("edit", ["the file", "the command line"])
def test_the_file_that_made_them_is_edited_and_run_as_ever(rlhf, edit):  # noqa: F811
    assert rlhf("run", "page")[0] == 0
    if edit == "the file":
        Path("small.yaml").write_text(OTHER)
    code, out, _ = rlhf("run", "page", *["fit.steps=3"] * (edit != "the file"))
    assert code == 0 and "fit: stale because fit.steps 12 → 3; running" in out


def test_a_file_that_says_the_same_is_as_good(rlhf):  # noqa: F811
    """In other words, and with what no stage depends on; the command line's settings are as ever."""
    assert rlhf("run", "page", "text.words=4")[0] == 0
    Path("copy.yaml").write_text(fakes.CONFIG.replace("every: 4", "every: 5") + "seed: 0\ntracking: {project: mine}\n")
    code, out, _ = rlhf("run", "page", "text.words=5", config="copy.yaml")
    assert code == 0 and "text: stale because text.words 4 → 5; running" in out


def test_a_checkout_may_move_with_its_artifacts(rlhf, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    Path("small.yaml").write_text(fakes.CONFIG)
    assert rlhf("run", "page")[0] == 0
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    Path("small.yaml").write_text(OTHER)
    assert rlhf("run", "page")[0] == 0


def test_artifacts_of_an_older_version_know_no_file(world):
    world.run("page")
    world.store.origin = Origin("/x/small.yaml", "settings")
    world.run("page", "fit.steps=3")
    assert world.store.manifest("fit")["config"]["file"]["path"] == "/x/small.yaml"


def test_an_interrupted_run_of_another_file_is_not_dropped(rlhf, tmp_path):  # noqa: F811
    assert rlhf("run", "fit", "fit.fail_at=7")[0] == 3
    Path("other.yaml").write_text(OTHER.replace("steps: 3", "steps: 8\n  fail_at: 7"))
    assert rlhf("run", "fit", "--restart", config="other.yaml")[2] == line_of(tmp_path, "fit")
    assert rlhf("run", "fit", "fit.steps=3", "fit.fail_at=null", "--restart")[0] == 0


def test_what_lies_in_a_shared_storage_counts_too(tmp_path):
    """There the place of this machine's folder says nothing, and a path is a path."""
    made = {"config": {"file": Origin("/a/x.yaml", "one", shared=True).record(tmp_path)}}
    replaced = [("fit", made), ("fit", made), ("page", made)]
    assert set(made["config"]["file"]) == {"path", "settings"}
    assert lines_of_others(Origin("/a/x.yaml", "two", shared=True), tmp_path, replaced) == []
    assert lines_of_others(Origin("/b/x.yaml", "one", shared=True), tmp_path, replaced) == []
    (line,) = lines_of_others(Origin("/b/x.yaml", "two", shared=True), tmp_path, replaced)
    assert ": fit, page: made with /a/x.yaml, and /b/x.yaml has the same name" in line


@pytest.mark.parametrize("typed, answer", [("y", True), ("yes", True), ("", False), ("n", False), ("no way", False)])
def test_a_person_at_a_terminal_is_asked(monkeypatch, capsys, typed, answer):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True, write=sys.stdout.write, flush=lambda: None))
    leader, follower = pty.openpty()
    with os.fdopen(follower) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(leader, f"{typed}\n".encode())
        assert origin.ask("Replace them?", StopFlag()) is answer
    os.close(leader)
    assert "Replace them? [y/N] " in capsys.readouterr().out


def test_a_signal_ends_the_question_and_without_a_terminal_there_is_none(monkeypatch):
    assert origin.ask("Replace them?", StopFlag()) is False
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True, write=lambda _: None, flush=lambda: None))
    leader, follower = pty.openpty()
    stop = StopFlag()
    with os.fdopen(follower) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        threading.Timer(0.1, lambda: setattr(stop, "requested", True)).start()
        with pytest.raises(Interrupted):
            origin.ask("Replace them?", stop)
    os.close(leader)


def forgotten_line(made, words, file, target="page"):
    run = f"`rlhf run {target} -c small.yaml"
    return (
        f"error: artifacts/small: last made with settings on the command line that this one leaves out ({made}); "
        f"{run} {words}` keeps what is there, {run} {file}` trains it anew with the file's\n"
    )


def test_a_setting_of_last_times_command_line_is_not_left_out_unseen(rlhf):  # noqa: F811
    """A stage that is finished is not trained anew for want of it; both commands work as they are printed."""
    assert rlhf("run", "fit", "fit.steps=3")[0] == 0
    before = manifests()
    assert rlhf("run", "page") == (2, "", forgotten_line("fit with fit.steps=3", "fit.steps=3", "fit.steps=12"))
    assert manifests() == before
    assert rlhf("run", "page", "fit.steps=3")[0] == 0
    assert {path: text for path, text in manifests().items() if path in before} == before
    beside = ("fit.steps=3 text.words=3", "fit.steps=12 text.words=3")
    assert rlhf("run", "page", "text.words=3")[2] == forgotten_line("fit with fit.steps=3", *beside)
    code, out, _ = rlhf("run", "page", "fit.steps=12")
    assert code == 0 and "fit: stale because fit.steps 3 → 12; running" in out
    code, out, _ = rlhf("run", "page")
    assert code == 0 and out.count("up to date") == 3


def test_override_config_leaves_it_out(rlhf):  # noqa: F811
    assert rlhf("run", "page", "fit.steps=3", "text.words=4")[0] == 0
    code, out, err = rlhf("run", "page")
    made = "text with text.words=4; fit with fit.steps=3"
    both = ("text.words=4 fit.steps=3", "text.words=3 fit.steps=12")
    assert (code, err) == (2, forgotten_line(made, *both)), "each command says all that it takes"
    code, out, _ = rlhf("run", "page", "--override-config")
    assert code == 0 and "text: stale because text.words 4 → 3; running" in out


@pytest.mark.parametrize(
    "then, file, now",
    [
        ("fit.steps=3", fakes.CONFIG, "fit.steps=4"),  # another value
        ("fit.steps=3", fakes.CONFIG.replace("words: 3", "words: 4"), ""),  # its input is made anew anyway, see below
        ("fit.steps=3", fakes.CONFIG.replace("steps: 12", "steps: 12\n  learning_rate: 0.5"), ""),  # stale by the file
        ("launch.threads=1", fakes.CONFIG, ""),  # no stage depends on it
    ],
)
def test_a_command_that_would_make_it_anew_anyway_is_not_asked(rlhf, then, file, now):  # noqa: F811
    assert rlhf("run", "page", then)[0] == 0
    Path("small.yaml").write_text(file)
    if "words: 4" in file:
        assert rlhf("run", "text")[0] == 0
    assert rlhf("run", "page", *[now] * bool(now))[0] == 0


def test_status_says_what_the_command_line_was(rlhf):  # noqa: F811
    assert rlhf("run", "page", "fit.steps=3", "seed=4")[0] == 0
    out = rlhf("status")[1]
    assert "made with settings on the command line: text, fit, page with seed=4; fit with fit.steps=3; " in out.replace(
        "\n", " "
    )
    assert "`rlhf status -c small.yaml seed=4 fit.steps=3` includes them" in out
    assert "command line" not in rlhf("status", "fit.steps=3", "seed=4")[1]
    assert "command line" not in rlhf("status", "fit.steps=5", "seed=4")[1]


def test_whole_sections_and_data_are_settings_of_the_command_line_too(tmp_path):
    from pipeline.fingerprints import Change
    from pipeline.origin import forgotten, lines_of_forgotten

    record = {"config": {"command_line": ["model.peft={method: lora}", "data.prompts=my.jsonl"]}}
    changes = [Change("", True, "model.peft.method", "lora", None), Change("", False, "data.prompts")]
    assert forgotten(record, changes, []) == record["config"]["command_line"]
    assert forgotten(record, changes, ["model.peft.r=3"]) == []
    assert forgotten(record, [*changes, Change("sft artifact changed", False)], []) == []
    (line,) = lines_of_forgotten("ppo", tmp_path, {"sft": (record["config"]["command_line"], changes)})
    assert "-c CONFIG 'model.peft={method: lora}' data.prompts=my.jsonl` keeps" in line
    assert "`rlhf run ppo -c CONFIG --override-config` trains it anew" in line
    assert forgotten({"config": {}}, changes, []) == []  # an older version's


def test_an_interrupted_run_names_the_command_that_goes_on(rlhf):  # noqa: F811
    assert rlhf("run", "fit", "fit.fail_at=7", "fit.learning_rate=0.5")[0] == 3
    code, _, err = rlhf("run", "fit", "fit.fail_at=7")
    assert code == 2 and err == (
        "error: fit: interrupted at step 4, since then fit.learning_rate 0.5 → 0.01; `rlhf run fit -c small.yaml "
        "fit.learning_rate=0.5 fit.fail_at=7` resumes with the old setting, --restart starts again, --override-config resumes "
        "with the new settings\n"
    )
    assert rlhf("run", "fit", "fit.learning_rate=0.5", "fit.fail_at=7")[0] == 3


@pytest.mark.parametrize("typed, code", [("y", 0), ("n", 2)])
def test_at_a_terminal_a_setting_that_is_left_out_is_asked_about(rlhf, tmp_path, typed, code):  # noqa: F811
    assert rlhf("run", "page", "fit.steps=3")[0] == 0
    before = manifests()
    found, asked, after = at_a_terminal(tmp_path, typed, "run", "page")
    assert found == code and asked.count("fit with fit.steps=3") == 1
    assert asked.endswith("Replace what is there? [y/N] ")
    if typed == "n":
        assert manifests() == before
        assert "error: artifacts/small: nothing was replaced; the lines above say how to proceed" in after
    else:
        assert "fit: stale because fit.steps 3 → 12; running" in after

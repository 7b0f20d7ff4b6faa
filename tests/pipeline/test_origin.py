"""Test that stages of another YAML or another command line are replaced only with consent."""

import shutil
from pathlib import Path

import pytest

from pipeline.origin import Origin, errors_about_other_files
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
    """Return a command with another YAML of the same name, after stages of the first have run."""
    assert rlhf("run", "page")[0] == 0
    Path("other.yaml").write_text(OTHER)
    return lambda *words: rlhf(*words, config="other.yaml")


def test_another_file_of_the_same_name_replaces_nothing(other, tmp_path):
    before = manifests()
    assert other("run", "page") == (2, "", line_of(tmp_path, "fit, page"))
    assert manifests() == before
    assert other("run", "text")[0] == 0  # both files have the same settings for it


def test_another_name_or_override_config(other, rlhf, tmp_path):  # noqa: F811
    before = manifests()
    assert other("run", "page", "name=mine")[0] == 0
    assert {path: text for path, text in manifests().items() if "small" in path.parts} == before
    code, out, _ = other("run", "page", "--override-config")
    assert code == 0 and "fit: stale because fit.steps 12 → 3; running" in out
    assert other("run", "page")[0] == 0
    assert rlhf("run", "page") == (2, "", line_of(tmp_path, "fit, page", "other.yaml", "small.yaml"))


@pytest.mark.parametrize("edit", ["the file", "the command line"])
def test_the_same_file_may_be_edited(rlhf, edit):  # noqa: F811
    assert rlhf("run", "page")[0] == 0
    if edit == "the file":
        Path("small.yaml").write_text(OTHER)
    code, out, _ = rlhf("run", "page", *["fit.steps=3"] * (edit != "the file"))
    assert code == 0 and "fit: stale because fit.steps 12 → 3; running" in out


def test_another_file_with_the_same_settings_may_replace(rlhf):  # noqa: F811
    """It may differ in wording and in settings that no stage depends on."""
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


def test_artifacts_of_an_older_version_have_no_file(world):
    world.run("page")
    world.store.origin = Origin("/x/small.yaml", "settings")
    world.run("page", "fit.steps=3")
    assert world.store.manifest("fit")["config"]["file"]["path"] == "/x/small.yaml"


def test_an_interrupted_run_of_another_file_is_not_dropped(rlhf, tmp_path):  # noqa: F811
    assert rlhf("run", "fit", "fit.fail_at=7")[0] == 3
    Path("other.yaml").write_text(OTHER.replace("steps: 3", "steps: 8\n  fail_at: 7"))
    assert rlhf("run", "fit", "--restart", config="other.yaml")[2] == line_of(tmp_path, "fit")
    assert rlhf("run", "fit", "fit.steps=3", "fit.fail_at=null", "--restart")[0] == 0


def test_artifacts_in_a_shared_storage_are_protected_too(tmp_path):
    """The location of this machine's folder means nothing there; paths are compared as they are."""
    made = {"config": {"file": Origin("/a/x.yaml", "one", shared=True).record(tmp_path)}}
    replaced = [("fit", made), ("fit", made), ("page", made)]
    assert set(made["config"]["file"]) == {"path", "settings"}
    assert errors_about_other_files(Origin("/a/x.yaml", "two", shared=True), tmp_path, replaced) == []
    assert errors_about_other_files(Origin("/b/x.yaml", "one", shared=True), tmp_path, replaced) == []
    (line,) = errors_about_other_files(Origin("/b/x.yaml", "two", shared=True), tmp_path, replaced)
    assert ": fit, page: made with /a/x.yaml, and /b/x.yaml has the same name" in line


def forgotten_line(made, words, file, target="page"):
    run = f"`rlhf run {target} -c small.yaml"
    return (
        f"error: artifacts/small: last made with settings on the command line that this one leaves out ({made}); "
        f"{run} {words}` keeps what is there, {run} {file}` trains again with the file's\n"
    )


def test_a_missing_command_line_setting_is_reported(rlhf):  # noqa: F811
    """A finished stage is not retrained for lack of it; both commands in the message work."""
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


def test_override_config_drops_the_settings(rlhf):  # noqa: F811
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
        ("fit.steps=3", fakes.CONFIG.replace("words: 3", "words: 4"), ""),  # its input is rebuilt anyway, see below
        (
            "fit.steps=3",
            fakes.CONFIG.replace("steps: 12", "steps: 12\n  learning_rate: 0.5"),
            "",
        ),  # the file makes it stale
        ("launch.threads=1", fakes.CONFIG, ""),  # no stage depends on it
    ],
)
def test_a_stage_that_is_rebuilt_anyway_is_not_reported(rlhf, then, file, now):  # noqa: F811
    assert rlhf("run", "page", then)[0] == 0
    Path("small.yaml").write_text(file)
    if "words: 4" in file:
        assert rlhf("run", "text")[0] == 0
    assert rlhf("run", "page", *[now] * bool(now))[0] == 0


def test_status_shows_the_old_command_line(rlhf):  # noqa: F811
    assert rlhf("run", "page", "fit.steps=3", "seed=4")[0] == 0
    out = rlhf("status")[1]
    assert "made with settings on the command line: text, fit, page with seed=4; fit with fit.steps=3; " in out.replace(
        "\n", " "
    )
    assert "`rlhf status -c small.yaml seed=4 fit.steps=3` includes them" in out
    assert "command line" not in rlhf("status", "fit.steps=3", "seed=4")[1]
    assert "command line" not in rlhf("status", "fit.steps=5", "seed=4")[1]


def test_sections_and_data_on_the_command_line(tmp_path):
    from pipeline.changes import Change
    from pipeline.origin import dropped_overrides, errors_about_dropped_overrides

    record = {"config": {"command_line": ["model.peft={method: lora}", "data.prompts=my.jsonl"]}}
    changes = [Change("", True, "model.peft.method", "lora", None), Change("", False, "data.prompts")]
    assert dropped_overrides(record, changes, []) == record["config"]["command_line"]
    assert dropped_overrides(record, changes, ["model.peft.r=3"]) == []
    assert dropped_overrides(record, [*changes, Change("sft artifact changed", False)], []) == []
    (line,) = errors_about_dropped_overrides("ppo", tmp_path, {"sft": (record["config"]["command_line"], changes)})
    assert "-c CONFIG 'model.peft={method: lora}' data.prompts=my.jsonl` keeps" in line
    assert "`rlhf run ppo -c CONFIG --override-config` trains again" in line
    assert dropped_overrides({"config": {}}, changes, []) == []  # a manifest of an older version


def test_an_interrupted_run_names_the_command_to_resume_it(rlhf):  # noqa: F811
    assert rlhf("run", "fit", "fit.fail_at=7", "fit.learning_rate=0.5")[0] == 3
    code, _, err = rlhf("run", "fit", "fit.fail_at=7")
    assert code == 2 and err == (
        "error: fit: interrupted at step 4, since then fit.learning_rate 0.5 → 0.01; `rlhf run fit -c small.yaml "
        "fit.learning_rate=0.5 fit.fail_at=7` resumes with the old setting, --restart starts again, "
        "--override-config resumes with the new settings\n"
    )
    assert rlhf("run", "fit", "fit.learning_rate=0.5", "fit.fail_at=7")[0] == 3


@pytest.mark.parametrize("typed, code", [("y", 0), ("n", 2)])
def test_a_missing_setting_is_a_question_at_a_terminal(rlhf, tmp_path, typed, code):  # noqa: F811
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

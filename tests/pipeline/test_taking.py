"""Test that stages are taken from another experiment by reference, and never changed from here."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from pipeline.store.artifacts import ArtifactStore
from tests.pipeline import fakes
from tests.pipeline.test_cli import rlhf  # noqa: F401 (a fixture)

TAKES = "from: {experiment: small, stages: [text]}\n"
OTHER = fakes.CONFIG.replace("name: small", "name: other")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Give tables room, or their words are on several lines."""
    monkeypatch.setenv("COLUMNS", "200")


def tree(folder="artifacts/small"):
    """Return every file below a folder with its bytes and the time of its last change."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture
def other(rlhf):  # noqa: F811
    """Return a command for `other`, which takes `text` from `small`; that is finished."""
    assert rlhf("run", "text")[0] == 0
    Path("other.yaml").write_text(OTHER + TAKES)

    def run(*words):
        return rlhf(*words, config="other.yaml")

    run.small, run.stages = rlhf, rlhf.stages
    return run


def manifest(stage="fit", name="other"):
    return json.loads(Path("artifacts", name, stage, "manifest.json").read_text())


def test_a_taken_stage_is_used_where_it_is_and_not_touched(other):
    before = tree()
    code, out, err = other("run", "page")
    assert (code, err) == (0, "") and "text: up to date" in out and ", from small" in out
    assert tree() == before and sorted(p.name for p in Path("artifacts/other").iterdir() if p.is_dir()) == [
        "fit",
        "page",
    ]
    assert manifest()["inputs"]["text"] == manifest("text", "small")["digest"]
    assert manifest()["config"]["from"] == {"text": {"experiment": "small", "folder": "../small/text"}}
    out = other("status")[1]
    assert "done, from small" in out and out.count("done") == 3
    assert other("run", "page")[1].count("up to date") == 3


def test_the_bytes_are_those_of_a_stage_made_here(other):
    assert other("run", "fit")[0] == 0 and other("run", "fit", "name=alone", "from=null")[0] == 0
    assert manifest()["outputs"] == manifest("fit", "alone")["outputs"]
    assert manifest()["metrics"] == manifest("fit", "alone")["metrics"]


def test_other_settings_are_refused_by_key(other):
    before = tree()
    code, _, err = other("run", "fit", "text.words=4")
    assert code == 2 and "from small, and this config needs another one (text.words 3 → 4)" in err
    assert other("run", "fit", "seed=1")[0] == 2 and not Path("artifacts/other").exists()
    assert "from small: stale because text.words 3 → 4" in other("status", "text.words=4")[1]
    assert tree() == before
    # settings that text is not made of are this experiment's own
    assert other("run", "fit", "fit.steps=3")[0] == 0


def test_missing_and_damaged_artifacts_are_named(other):
    words = Path("artifacts/small/text/words/all.json")
    words.write_text(words.read_text() + " ")
    code, _, err = other("run", "fit")
    assert code == 2 and "all.json: has 25 bytes and should have 24; rebuild it with --force" in err
    assert "from small: damaged" in " ".join(other("status")[1].split())
    shutil.rmtree("artifacts/small")
    code, _, err = other("run", "fit")
    assert code == 2 and "taken from small, which has no finished text" in err and not Path("artifacts/small").exists()
    assert "from small: missing" in other("status")[1]


def test_only_the_first_cause_is_a_line(other):
    """What is made from a damaged stage is not stale because of its own settings."""
    assert other.small("run", "fit")[0] == 0
    Path("other.yaml").write_text(OTHER + TAKES.replace("[text]", "[text, fit]"))
    words = Path("artifacts/small/text/words/all.json")
    words.write_text(words.read_text() + " ")
    code, _, err = other("run", "page")
    assert code == 2 and err.count("error:") == 1 and "all.json: has 25 bytes" in err
    assert "from small: stale because text is damaged" in " ".join(other("status")[1].split())


def test_a_stage_that_the_other_experiment_takes_itself_is_named_where_it_is(other):
    assert other("run", "fit")[0] == 0
    third = fakes.CONFIG.replace("name: small", "name: third")
    Path("third.yaml").write_text(third + "from: {experiment: other, stages: [text, fit]}\n")
    code, _, err = other.small("run", "page", config="third.yaml")
    assert code == 2 and err.count("error:") == 1
    assert "text: is taken from other, but other takes it from small; name that experiment in `from` instead" in err
    both = "from: [{experiment: small, stages: [text]}, {experiment: other, stages: [fit]}]\n"
    Path("third.yaml").write_text(third + both)
    assert other.small("run", "page", config="third.yaml")[0] == 0


@pytest.mark.parametrize("flag", ["--force", "--restart"])
def test_flags_cannot_change_what_is_taken(other, flag):
    before = tree()
    code, _, err = other("run", "text", flag)
    assert code == 2 and f"which {flag} must not change" in err and tree() == before
    assert other("run", "fit", flag)[0] == 0 and tree() == before  # of its own stages they work


def test_only_takes_finished_stages(other):
    assert other("run", "fit", "--only")[0] == 0
    shutil.rmtree("artifacts/small")
    code, _, err = other("run", "fit", "--only", "--force")
    assert code == 2 and "text: is from small: missing" in err


def test_an_own_artifact_beside_it_is_left_and_not_used(other):
    assert other("run", "text", "from=null", "text.words=7")[0] == 0
    own = tree("artifacts/other")
    code, out, _ = other("run", "fit")
    assert code == 0 and "from small (the artifact here is not used)" in out
    assert manifest()["inputs"]["text"] == manifest("text", "small")["digest"]
    assert {path: own[path] for path in own if "text" in path.parts} == {
        path: facts for path, facts in tree("artifacts/other").items() if "text" in path.parts
    }


def test_a_replaced_artifact_makes_stale_and_names_both(other):
    assert other("run", "fit")[0] == 0
    before = manifest()["inputs"]["text"]
    assert other.small("run", "text", "--force")[0] == 0
    assert manifest("text", "small")["digest"] != before  # a manifest holds the id of its run
    assert "stale because text artifact changed" in " ".join(other("status")[1].split())


@pytest.mark.parametrize(
    "value, problem",
    [
        ("{experiment: small, stages: [fit]}", "fit is made from text, which would be made here; take text too"),
        ("{experiment: other, stages: [text]}", "from.experiment: other is this experiment"),
        ("{experiment: small, stages: [tex]}", "'tex' is not a stage; choose from text, fit, page"),
        ("{experiment: small, stages: [text, text]}", "text is named twice"),
        ("[{experiment: small, stages: [text]}, {experiment: big, stages: [text]}]", "text is named twice"),
        ("{experiment: small, stages: []}", "from.stages: is empty"),
        ("{experiment: small, stages: [text, fit, page]}", "page shows this experiment"),
        ("{experiment: ../small, stages: [text]}", "should match pattern"),
        ("{experiment: small, stage: [text]}", "did you mean from.stages?"),
        ("{experiment: small, stages: [text], artifacts: nowhere}", "no such folder: nowhere"),
        ("{experiment: small, stages: [text], artifacts: 's3://b/p'}", "give a folder of this machine"),
        ("small", "should be a mapping"),
    ],
)
def test_mistakes_in_the_section(other, value, problem):
    code, out, err = other("run", "fit", f"from={value}")
    assert code == 2 and problem in err and out == ""


def test_stages_of_several_experiments_and_of_another_folder(other):
    assert other("run", "fit")[0] == 0
    Path("third.yaml").write_text(OTHER.replace("other", "third"))
    both = "from=[{experiment: small, stages: [text]}, {experiment: other, stages: [fit]}]"
    code, out, _ = other.small("run", "page", both, config="third.yaml")
    assert code == 0 and "from small" in out and "from other" in out
    Path("artifacts").rename("elsewhere")
    there = both.replace("small,", "small, artifacts: elsewhere,").replace("other,", "other, artifacts: elsewhere,")
    assert other.small("run", "page", there, config="third.yaml")[0] == 0
    assert sorted(path.name for path in Path("artifacts/third").iterdir() if path.is_dir()) == ["page"]


def test_clean_removes_only_the_own_folder_and_warns_the_others(other):
    assert other("run", "fit")[0] == 0
    before = tree()
    code, out, _ = other.small("clean")
    assert code == 2 and tree() == before
    assert other("clean", "--yes")[0] == 0 and tree() == before and not Path("artifacts/other").exists()
    assert other("run", "fit")[0] == 0
    code, out, _ = other.small("clean", "--yes")
    assert code == 0 and "taken by other" in out


def test_a_foreign_store_cannot_be_locked(tmp_path):
    store = ArtifactStore(tmp_path, "small", is_foreign=True)
    with pytest.raises(AssertionError), store.lock("text"):
        pass
    taking = ArtifactStore(tmp_path, "other", taken={"text": store})
    with pytest.raises(AssertionError), taking.lock("text"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_taken_stage_is_fetched_from_object_storage(rlhf, monkeypatch, tmp_path):  # noqa: F811
    fsspec.filesystem("memory").store.clear()
    Path("other.yaml").write_text(OTHER + TAKES)
    url = "memory://bucket/rlhf"
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "one"))
    assert rlhf("run", "text", "--artifacts", url)[0] == 0
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "two"))
    code, out, err = rlhf("run", "fit", "--artifacts", url, config="other.yaml")
    assert code == 0, err
    assert "fetched from memory://bucket/rlhf" in out
    names = [path for path in fsspec.filesystem("memory").find("/bucket/rlhf") if path.endswith("manifest.json")]
    assert sorted(name.split("/rlhf/")[1] for name in names) == ["other/fit/manifest.json", "small/text/manifest.json"]
    fsspec.filesystem("memory").store.clear()

"""Test names on the Hub: one request per command, commits as inputs; a fake Hub answers."""

import hashlib
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from pipeline.errors import UserError
from pipeline.store.hub import Hub, HubName, RecordedCommit
from tests.pipeline import fakes
from tests.pipeline.test_plan import interrupt, kinds, refused

A, B, C = ("a" * 40, "b" * 40, "c" * 40)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Return a fake Hub.

    `hub.says` maps (kind, name, revision) to a commit or an exception; `hub.asked` lists the
    requests.
    """
    here = SimpleNamespace(says={}, asked=[], cache=tmp_path / "hub")

    class Api:
        def dataset_info(self, name, revision=None, timeout=None):
            return self.answer("dataset", name, revision)

        def model_info(self, name, revision=None, timeout=None):
            return self.answer("model", name, revision)

        def answer(self, *thing):
            here.asked.append(thing)
            found = here.says.get(thing, OfflineModeIsEnabled("offline mode is enabled"))
            if isinstance(found, Exception):
                raise found
            return SimpleNamespace(sha=found)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here.cache))
    return here


def not_found():
    response = SimpleNamespace(status_code=404, headers={}, request=None)
    return RepositoryNotFoundError("Repository Not Found for url: x.\nMore", response=response)


SET = ("dataset", "org/set", None)


def test_each_name_is_requested_once_and_commits_never(hub):
    hub.says = {SET: A, ("model", "org/set", "v1"): B}
    known = Hub()
    assert [known.commit(HubName("dataset", "org/set")) for _ in range(2)] == [(A, "")] * 2
    assert known.commit(HubName("model", "org/set", "v1")) == (B, "")
    assert known.commit(HubName("model", "org/set", C)) == (C, "")
    assert hub.asked == [SET, ("model", "org/set", "v1")] and known.notes == []


def test_offline_the_recorded_commit_is_used(hub):
    known, thing = Hub(), HubName("dataset", "org/set")
    records = [
        RecordedCommit("org/set", "v1", B),
        RecordedCommit("org/set", None, None),
        RecordedCommit("org/set", None, A),
    ]
    assert known.commit(thing, records) == known.commit(thing, records) == (A, "")
    assert known.notes == [f"org/set: the Hub gave no answer; continuing with the recorded commit {A[:7]}"]
    assert hub.asked == [SET]


def test_offline_without_a_record_the_cached_commit_is_used(hub):
    folder = hub.cache / "datasets--org--set"
    assert Hub().commit(HubName("dataset", "org/set")) == (None, "")
    (folder / "snapshots" / B).mkdir(parents=True)
    assert Hub().commit(HubName("dataset", "org/set")) == (B, "")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(A)
    (folder / "refs" / "v1").write_text(C)
    assert Hub().commit(HubName("dataset", "org/set")) == (A, "")
    assert Hub().commit(HubName("dataset", "org/set", "v1")) == (C, "")
    assert Hub().commit(HubName("dataset", "org/set", "v2")) == (None, "")


def test_a_name_unknown_to_the_hub_is_an_error_without_a_record(hub):
    hub.says = {SET: not_found()}
    commit, problem = Hub().commit(HubName("dataset", "org/set"))
    assert commit is None and problem.startswith("org/set: Repository Not Found for url: x; check the name, the")
    assert Hub().commit(HubName("dataset", "org/set"), [RecordedCommit("org/set", None, A)]) == (A, "")


def test_a_hub_id_is_an_input_too(world, hub):
    world.stages = fakes.stages(reads=["prompts"])
    world.run("fit", "data.prompts=org/set")
    digest = hashlib.sha256(b"org/set@main").hexdigest()
    assert world.store.manifest("fit")["inputs"]["data:prompts"] == digest
    (reason,) = world.states("data.prompts=org/other")["fit"].reasons
    assert reason.startswith("data.prompts changed (org/other, ")


def test_the_manifest_records_the_commit_and_another_one_makes_stale(world, hub):
    world.stages, at = fakes.stages(reads=["prompts"]), "data.prompts=org/set"
    hub.says[SET] = A
    world.run("fit", at)
    recorded = world.store.manifest("fit")["config"]["data"]["prompts"]
    assert (recorded["path"], recorded["revision"]) == ("org/set", A)
    assert kinds(world.states(at))["fit"] == "done"
    hub.says[SET] = B
    assert world.states(at)["fit"].reasons == ["data.prompts changed (org/set, commit aaaaaaa → bbbbbbb)"]
    assert kinds(world.states(f"data.prompts={{path: org/set, revision: {A}}}"))["fit"] == "done"
    del hub.says[SET]
    assert kinds(world.states(at))["fit"] == "done"
    world.run("fit", at)
    assert world.console.lines[0] == "org/set: the Hub gave no answer; continuing with the recorded commit aaaaaaa"
    hub.says[SET] = B
    world.run("fit", at)
    assert world.store.manifest("fit")["config"]["data"]["prompts"]["revision"] == B


def test_a_stage_reads_the_commit_that_the_manifest_names(world, hub):
    seen = []
    world.stages = fakes.stages(reads=["prompts"])
    fakes.change(world.stages, "fit", hub_model=lambda experiment: ("model.name_or_path", "org/model"))
    fakes.change(world.stages, "fit", run=lambda ctx: seen.append((ctx.source("prompts"), ctx.model_revision)) or {})
    hub.says = {("dataset", "org/set", "v1"): A, ("model", "org/model", "v2"): B}
    at = ("data.prompts={path: org/set, revision: v1}", "model.name_or_path=org/model", "model.revision=v2")
    world.run("fit", *at)
    ((source, revision),) = seen
    assert (source.hub, source.revision, revision) == ("org/set", A, B)
    assert world.store.manifest("fit")["config"]["model"]["revision"] == B
    hub.says["model", "org/model", "v2"] = C
    assert world.states(*at)["fit"].reasons == ["model.name_or_path changed (org/model, commit bbbbbbb → ccccccc)"]
    assert kinds(world.states(*at))["text"] == "done"  # it depends on no model on the Hub
    at = (at[0], at[1], f"model.revision={B}")
    assert kinds(world.states(*at))["fit"] == "done"


def test_a_revision_with_an_unknown_commit_is_passed_on(world, hub):
    """The main branch must not be used in its place."""
    seen = []
    world.stages = fakes.stages(reads=["prompts"])
    fakes.change(world.stages, "fit", hub_model=lambda experiment: ("model.name_or_path", "org/model"))
    fakes.change(
        world.stages, "fit", run=lambda ctx: seen.append((ctx.source("prompts").revision, ctx.model_revision)) or {}
    )
    settings = ("data.prompts={path: org/set, revision: v1}", "model.name_or_path=org/model", "model.revision=v2")
    world.run("fit", *settings)
    assert seen == [("v1", "v2")]


def test_an_interrupted_run_does_not_resume_with_another_commit(world, hub):
    world.stages, at = fakes.stages(reads=["prompts"]), "data.prompts=org/set"
    hub.says[SET] = A
    interrupt(world, 6, at)
    hub.says[SET] = B
    (line,) = refused(world, "fit", at, override_config=True)
    assert "since then data.prompts changed (org/set, commit aaaaaaa → bbbbbbb); --restart starts again" in line
    del hub.says[SET]
    world.run("fit", at)
    assert world.store.manifest("fit")["config"]["data"]["prompts"]["revision"] == A


def test_another_stages_record_gives_the_commit_too(world, hub):
    world.stages, at = fakes.stages(reads=["prompts"]), "data.prompts=org/set"
    fakes.change(world.stages, "page", reads=lambda experiment: ["prompts"])
    hub.says[SET] = A
    world.run("fit", at)
    hub.says.clear()
    world.run("page", at)
    assert world.store.manifest("page")["config"]["data"]["prompts"]["revision"] == A


def test_a_commit_that_an_older_version_did_not_record_makes_nothing_stale(world, hub):
    """The next run that starts from scratch records the commit."""
    world.stages, at = fakes.stages(reads=["prompts"]), "data.prompts=org/set"
    world.run("fit", at)
    assert world.store.manifest("fit")["config"]["data"]["prompts"]["revision"] is None
    hub.says[SET] = A
    assert kinds(world.states(at))["fit"] == "done"
    world.run("fit", at, force=True)
    assert world.store.manifest("fit")["config"]["data"]["prompts"]["revision"] == A


def test_an_unknown_name_is_reported_before_anything_runs(world, hub):
    world.stages, hub.says[SET] = fakes.stages(reads=["prompts"]), not_found()
    (line,) = refused(world, "fit", "data.prompts=org/set")
    assert line.startswith("data.prompts: org/set: Repository Not Found") and world.store.manifest("text") is None


@pytest.mark.parametrize(
    "settings, line",
    [
        (
            ["model.revision=v1"],
            "override model.revision=v1: model.revision: null is not a Hub id and has no revisions",
        ),
        (["data.prompts={path: world, revision: v1}"], "data.prompts.revision: world is not a Hub id and has no revis"),
        (
            ["model.name_or_path=org/x", "model.revision=../../a"],
            "'../../a' is not the name of a branch, tag or commit; correct it",
        ),
    ],
)
def test_invalid_revisions(world, settings, line):
    world.overrides = settings
    with pytest.raises(UserError) as caught:
        world.load()
    assert any(line in said for said in caught.value.lines)

"""Test what makes a stage stale that reads a mixture, or reads data in a way of its own."""

import json

import pytest

from pipeline.errors import UserError
from pipeline.fingerprints import source_of
from pipeline.store import hub
from tests.pipeline import fakes


@pytest.fixture
def mixed(world, tmp_path):
    """Let `fit` read prompts, and write two files of them."""
    fakes.change(world.stages, "fit", reads=lambda experiment: ["prompts"])
    for name, count in (("a", 2), ("b", 3)):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "x"}\n' * count)
    return tmp_path


def reasons(world, value):
    return world.states(f"data.prompts={value}")["fit"].reasons


def test_a_mixture_is_stale_when_how_it_is_read_changes(world, mixed):
    mixture = "[a.jsonl, {path: b.jsonl, weight: 2, where: {lang: en}, columns: {prompt: q}}]"
    world.run("fit", f"data.prompts={mixture}")
    assert reasons(world, mixture) == []
    for change, key in (
        (mixture.replace("weight: 2", "weight: 3"), "weight 2.0 → 3.0"),
        (mixture.replace("lang: en", "lang: de"), "where.lang en → de"),
        (mixture.replace("prompt: q", "prompt: r"), "columns.prompt q → r"),
        (mixture.replace("weight: 2", "weight: 2, limit: 1"), "limit null → 1"),
    ):
        assert reasons(world, change) == [f"data.prompts.parts.2.{key}"]
    assert reasons(world, "[a.jsonl]") == ["data.prompts a.jsonl + b.jsonl → a.jsonl"]
    assert reasons(world, "[a.jsonl, b.jsonl, a.jsonl]") == [
        "data.prompts a.jsonl + b.jsonl → a.jsonl + b.jsonl + a.jsonl"
    ]
    manifest = world.store.manifest("fit")
    parts = manifest["config"]["data"]["prompts"]["parts"]
    assert [part["rows"] for part in parts.values()] == [2, 3] and parts["2"]["weight"] == 2


def test_a_mixture_is_stale_when_a_part_is_edited_not_when_it_is_moved(world, mixed):
    world.run("fit", "data.prompts=[a.jsonl, b.jsonl]")
    (mixed / "b.jsonl").rename(mixed / "c.jsonl")
    assert reasons(world, "[a.jsonl, c.jsonl]") == []
    with open(mixed / "c.jsonl", "a") as file:
        file.write('{"prompt": "y"}\n')
    (reason,) = reasons(world, "[a.jsonl, c.jsonl]")
    assert reason.startswith("data.prompts changed (c.jsonl, ") and reason.endswith(", rows 3 → 4)")
    assert len(reasons(world, "[c.jsonl, a.jsonl]")) == 1  # their order decides which records come first


@pytest.mark.parametrize("edited", ["a", "b"])
def test_a_part_that_is_edited_during_the_run_is_refused(world, mixed, edited):
    run = world.stages["fit"].run

    def run_and_edit(ctx):
        assert [part.sha256 is not None for part in ctx.source("prompts").parts] == [True, True]
        figures = run(ctx)
        (mixed / f"{edited}.jsonl").write_text('{"prompt": "other"}\n')
        return figures

    fakes.change(world.stages, "fit", run=run_and_edit)
    with pytest.raises(UserError) as caught:
        world.run("fit", "data.prompts=[a.jsonl, b.jsonl]")
    assert f"{edited}.jsonl (data.prompts) was edited while this stage ran" in caught.value.lines[0]
    assert world.store.manifest("fit") is None


def test_the_commit_of_a_part_on_the_hub_is_recorded(world, mixed, monkeypatch):
    commits = ["1" * 40]
    monkeypatch.setattr(hub, "request_commit", lambda name: (commits[-1], ""))
    seen = []
    run = world.stages["fit"].run
    fakes.change(world.stages, "fit", run=lambda ctx: seen.append(ctx.source("prompts")) or run(ctx))
    mixture = "[a.jsonl, {path: org/name, split: test}]"
    world.run("fit", f"data.prompts={mixture}")
    entry = world.store.manifest("fit")["config"]["data"]["prompts"]["parts"]["2"]
    assert (entry["revision"], entry["split"]) == ("1" * 40, "test")
    assert seen[0].parts[1].revision == "1" * 40
    commits.append("2" * 40)
    assert reasons(world, mixture) == ["data.prompts changed (org/name, 111111 → 222222)"]


def test_artifacts_of_before_these_settings_stay_up_to_date(world, mixed):
    """A source that says nothing of how it is read is recorded as it always was."""
    world.run("fit", "data.prompts=a.jsonl")
    recorded = world.store.manifest("fit")["config"]["data"]["prompts"]
    assert sorted(recorded) == ["limit", "path", "rows", "skip", "split", "subset"]
    assert reasons(world, "{path: a.jsonl, on_bad_row: error, ignore: []}") == []
    assert reasons(world, "{path: a.jsonl, ignore: [label]}") == ['data.prompts.ignore null → ["label"]']
    assert json.dumps(source_of("a.jsonl").reading) == "{}"

"""Test what makes a stage stale whose source names files beside its own: wordings and shots."""

import pytest

from pipeline.errors import UserError
from tests.pipeline import fakes

SOURCE = "{path: rows.jsonl, wordings: w.yaml, shots: 2, shots_from: more.jsonl}"


@pytest.fixture
def worded(world, tmp_path):
    """Let `fit` read prompts, and write rows, wordings and rows to show."""
    fakes.change(world.stages, "fit", reads=lambda experiment: ["prompts"])
    (tmp_path / "rows.jsonl").write_text('{"q": "x"}\n')
    (tmp_path / "more.jsonl").write_text('{"q": "y"}\n')
    (tmp_path / "w.yaml").write_text('- {prompt: "{q}"}\n')
    return tmp_path


def reasons(world, value):
    return world.states(f"data.prompts={value}")["fit"].reasons


@pytest.mark.parametrize("form", ["{}", "[{}, rows.jsonl]"])
def test_what_the_files_hold_counts_and_not_where_they_are(world, worded, form):
    value = form.format(SOURCE)
    world.run("fit", f"data.prompts={value}")
    assert reasons(world, value) == []
    (worded / "w.yaml").rename(worded / "v.yaml")
    (worded / "more.jsonl").rename(worded / "other.jsonl")
    moved = value.replace("w.yaml", "v.yaml").replace("more.jsonl", "other.jsonl")
    assert reasons(world, moved) == []
    for change in ("shots: 3", "shots: 2, shots_as: text", "shots: 2, wording_choice: each"):
        assert len(reasons(world, moved.replace("shots: 2", change))) == 1
    for name, key in (("v.yaml", "wordings_sha256"), ("other.jsonl", "shots_sha256")):
        before = (worded / name).read_text()
        (worded / name).write_text(before + "\n" + before.replace("q", "z"))
        (reason,) = reasons(world, moved)
        assert key in reason
        (worded / name).write_text(before)


@pytest.mark.parametrize("form", ["{}", "[{}, rows.jsonl]"])
@pytest.mark.parametrize("edited", ["w.yaml", "more.jsonl"])
def test_a_file_that_is_edited_during_the_run_is_refused(world, worded, form, edited):
    run = world.stages["fit"].run

    def run_and_edit(ctx):
        source = ctx.source("prompts")
        part = source.parts[0] if source.parts else source
        assert len(part.reading["wordings_sha256"]) == len(part.reading["shots_sha256"]) == 64
        figures = run(ctx)
        (worded / edited).write_text("other")
        return figures

    fakes.change(world.stages, "fit", run=run_and_edit)
    with pytest.raises(UserError) as caught:
        world.run("fit", f"data.prompts={form.format(SOURCE)}")
    assert f"{edited} (data.prompts." in caught.value.lines[0] and "was edited" in caught.value.lines[0]


@pytest.mark.parametrize("key", ["wordings", "shots_from"])
def test_a_file_that_is_missing_is_found_before_anything_runs(world, worded, key):
    with pytest.raises(UserError) as caught:
        world.states(f"data.prompts={{path: rows.jsonl, {key}: gone.yaml}}")
    assert f"{key}: no such file: gone.yaml" in caught.value.lines[0]


def test_shots_and_a_large_held_out_part_are_refused(world, worded):
    with pytest.raises(UserError) as caught:
        world.states(f"data.prompts={SOURCE}", "data.validation_fraction=0.6")
    assert "data.prompts.shots: are drawn from the half" in caught.value.lines[0]

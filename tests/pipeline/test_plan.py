"""The plan: nothing to do, stale and why, interrupted and where, refused and how to go on."""

import hashlib
import json
import random

import pytest

from pipeline.errors import Interrupted, TrainingStopped, UserError
from pipeline.stage import StopFlag
from tests.pipeline import fakes


def kinds(states):
    return {name: state.kind for name, state in states.items()}


class StopAfter(StopFlag):
    """A stop flag that is raised while step `step` of fit runs (it is read once a step)."""

    def __init__(self, step):
        self.left = step

    @property
    def requested(self):
        return self.left <= 0

    def passed(self):
        self.left -= 1


def interrupt(world, step, *overrides, target="fit", **flags):
    """Runs until `fit` was stopped at a step."""
    stop = StopAfter(step)
    run = fakes.run_fit

    def counted(ctx):
        log = ctx.tracker.log
        ctx.tracker.log = lambda *row: (log(*row), stop.passed())
        return run(ctx)

    fakes.change(world.stages, "fit", run=counted)
    with pytest.raises(Interrupted) as caught:
        world.run(target, *overrides, stop=stop, **flags)
    fakes.change(world.stages, "fit", run=run)
    return caught.value


def refused(world, target, *overrides, **flags):
    with pytest.raises(UserError) as caught:
        world.run(target, *overrides, **flags)
    return caught.value.lines


def contents(world, stage="fit"):
    """Digests of what a stage published, and its own journal."""
    return {name: facts["sha256"] for name, facts in world.store.verify(stage)["outputs"].items()}


def test_upstream_first_and_then_nothing_to_do(world):
    assert kinds(world.states()) == {"text": "missing", "fit": "missing", "page": "missing"}
    world.run("page")
    assert kinds(world.states()) == {"text": "done", "fit": "done", "page": "done"}
    assert [line.split(":")[0] for line in world.console.lines] == ["text", "text", "fit", "fit", "page", "page"]
    assert "text: done in 0 s · words 3 → " in world.console.text
    before = {name: world.store.manifest(name)["digest"] for name in world.stages}
    world.run("page")
    assert all("up to date (20" in line for line in world.console.lines) and len(world.console.lines) == 3
    assert {name: world.store.manifest(name)["digest"] for name in world.stages} == before


def test_the_manifest_has_the_fields_of_the_contract(world):
    world.run("fit")
    manifest = world.store.manifest("fit")
    fields = (
        "stage status run_id fingerprint config inputs outputs metrics versions git seed world_size threads "
        "device strategy hardware command started_at finished_at resumes tracker_run_id digest"
    )
    assert manifest.keys() == set(fields.split())
    assert set(manifest["outputs"]) == {"model.safetensors", "metrics.jsonl"}
    assert manifest["inputs"] == {"text": world.store.manifest("text")["digest"]}
    assert manifest["config"]["fit"]["steps"] == 12 and manifest["config"]["model"]["dtype"] == "float32"
    assert manifest["world_size"] == 1 and manifest["threads"] == 1 and manifest["resumes"] == 0
    assert "torch" in manifest["versions"] and manifest["tracker_run_id"] is None
    assert manifest["device"] and manifest["hardware"]["cores"] >= 1 and manifest["command"] is None
    text = (world.store.folder("fit") / "manifest.json").read_text()
    bare = {key: value for key, value in json.loads(text).items() if key != "digest"}
    canonical = json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(canonical.encode()).hexdigest() == manifest["digest"]


def test_a_changed_key_makes_its_stage_stale_and_what_follows(world):
    world.run("page")
    states = world.states("fit.learning_rate=0.5", "fit.keep=best")
    assert kinds(states) == {"text": "done", "fit": "stale", "page": "stale"}
    assert states["fit"].sentence() == "stale because fit.keep last → best; fit.learning_rate 0.01 → 0.5"
    assert states["page"].sentence() == "stale because fit is stale"
    world.run("fit", "fit.learning_rate=0.5")
    assert kinds(world.states("fit.learning_rate=0.5")) == {"text": "done", "fit": "done", "page": "stale"}
    (reason,) = world.states("fit.learning_rate=0.5")["page"].reasons
    assert reason.startswith("fit artifact changed (") and " → " in reason


@pytest.mark.parametrize(
    "key", ["tracking.project=x", "checkpoints.every=3", "launch.device=cpu", "tracking.wandb=offline"]
)
def test_what_does_not_change_the_result_makes_nothing_stale(world, key):
    world.run("fit")
    assert kinds(world.states(key))["fit"] == "done"


def test_an_optional_setting_of_a_later_version_makes_nothing_stale(world):
    class Later(fakes.FitConfig):
        later: int | None = None

    world.run("page")
    fakes.change(world.stages, "fit", settings=Later)
    assert set(kinds(world.states()).values()) == {"done"}
    assert world.states("fit.later=2")["fit"].reasons == ["fit.later null → 2"]


@pytest.mark.parametrize(
    "key, text", [("seed=1", "seed 0 → 1"), ("model.dtype=bfloat16", "model.dtype float32 → bfloat16")]
)
def test_seed_and_model_make_everything_stale(world, key, text):
    world.run("page")
    states = world.states(key)
    assert set(kinds(states).values()) == {"stale"} and all(text in state.reasons for state in states.values())


def test_data_counts_by_content_and_not_by_name_or_time(world, tmp_path):
    world.stages = fakes.stages(reads=["prompts"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    at = f"data.prompts={rows}"
    world.run("fit", at)
    manifest = world.store.manifest("fit")
    assert manifest["inputs"]["data:prompts"] == hashlib.sha256(rows.read_bytes()).hexdigest()
    assert manifest["config"]["data"]["prompts"]["rows"] == 1
    copy = tmp_path / "other name.jsonl"
    copy.write_bytes(rows.read_bytes())
    assert kinds(world.states(f"data.prompts={copy}"))["fit"] == "done"
    assert world.states(at, "data.validation_fraction=0.2")["fit"].reasons == ["data.validation_fraction 0.05 → 0.2"]
    limited = world.states("data.prompts={path: rows.jsonl, limit: 1}")["fit"]
    assert limited.reasons == ["data.prompts.limit null → 1"]
    rows.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (reason,) = world.states(at)["fit"].reasons
    assert reason.startswith(f"data.prompts changed ({rows}, ") and reason.endswith("rows 1 → 2)")
    world.run("fit", at)
    assert kinds(world.states(at))["fit"] == "done"


def test_data_from_another_place_is_one_phrase(world, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    world.run("fit")
    world.stages = fakes.stages(reads=["prompts"])
    assert world.states("data.prompts=rows.jsonl")["fit"].reasons == ["data.prompts not read → rows.jsonl"]
    world.run("fit", "data.prompts=rows.jsonl")
    world.stages = fakes.stages()
    assert world.states()["fit"].reasons == ["data.prompts rows.jsonl → not read"]


def test_data_that_leaves_the_world_is_one_phrase(world, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    world.stages = fakes.stages(reads=["prompts"])
    world.stages = {"world": world.stages.pop("text"), **world.stages}
    fakes.change(world.stages, "world", name="world")
    for name in ("fit", "page"):
        fakes.change(world.stages, name, needs=fakes.nothing)
    fakes.change(world.stages, "fit", run=lambda ctx: {})
    world.path.write_text("name: small\n")
    world.run("fit")
    (reason,) = world.states("data.prompts={path: rows.jsonl, limit: 1}")["fit"].reasons
    assert reason == "data.prompts world → rows.jsonl"


def test_what_lies_in_a_folder_from_outside_counts(world, tmp_path):
    folder = tmp_path / "model"
    (folder / ".cache").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    fakes.change(world.stages, "fit", folders=lambda experiment: {"fit.model": folder})
    world.run("fit")
    (folder / ".cache" / "lock").write_text("")
    assert kinds(world.states())["fit"] == "done" and "folder:fit.model" in world.store.manifest("fit")["inputs"]
    (folder / "config.json").write_text("{ }")
    (reason,) = world.states()["fit"].reasons
    assert reason.startswith("the contents of fit.model changed (")


def test_world_data_needs_the_stage_world(world):
    seen = {}
    world.stages = fakes.stages(reads=["prompts"])
    world.stages = {"world": world.stages.pop("text"), **world.stages}
    fakes.change(world.stages, "world", name="world")
    for name in ("fit", "page"):
        fakes.change(world.stages, name, needs=fakes.nothing)

    def run(ctx):
        seen["source"] = ctx.source("prompts")
        seen["inputs"] = ctx.inputs
        return {}

    fakes.change(world.stages, "fit", run=run)
    world.path.write_text("name: small\n")
    world.run("fit")
    folder = world.store.folder("world")
    assert seen["inputs"] == {"world": folder} and seen["source"].path == folder / "prompts.jsonl"
    assert kinds(world.states()) == {"world": "done", "fit": "done", "page": "missing"}


def test_force_redoes_a_fresh_stage_and_only_the_target(world):
    world.run("fit")
    text, fit = (world.store.manifest(name) for name in ("text", "fit"))
    world.run("fit", force=True)
    assert world.store.manifest("text") == text
    assert world.store.manifest("fit")["run_id"] != fit["run_id"]
    assert world.store.manifest("fit")["outputs"] == fit["outputs"]  # the same seed gives the same bytes
    assert world.console.lines[1] == "fit: forced, running"


def test_only_refuses_what_is_not_done(world):
    assert refused(world, "fit", only=True) == ["text: is missing; run it first, or leave out --only"]
    world.run("text")
    world.run("fit", only=True)
    assert not any("text" in line for line in world.console.lines)
    (line,) = refused(world, "fit", "text.words=4", only=True)
    assert line == "text: is stale because text.words 3 → 4; run it first, or leave out --only"


def test_missing_requirements_of_stages_to_run_are_reported_before_anything_runs(world):
    fakes.change(
        world.stages,
        "fit",
        missing_requirements=lambda experiment: ["fit: a press is missing; buy one"] * (experiment.fit.steps > 9),
    )
    assert refused(world, "page") == ["fit: a press is missing; buy one"]
    assert world.store.manifest("text") is None
    world.run("fit", "fit.steps=9")
    fakes.change(world.stages, "fit", missing_requirements=lambda experiment: ["fit: a press is missing; buy one"])
    world.run("page", "fit.steps=9")  # fit is done, and will not run
    same = world.stages["fit"].missing_requirements  # the same file, for example: it is reported once
    fakes.change(world.stages, "text", missing_requirements=same)
    assert refused(world, "fit", "text.words=4") == ["fit: a press is missing; buy one"]
    assert refused(world, "fit", "fit.steps=9", force=True) == ["fit: a press is missing; buy one"]


def test_an_interrupted_stage_goes_on_to_the_same_bytes(world):
    world.run("fit")
    straight = contents(world)
    world.store = type(world.store)(world.store.root, "other")
    end = interrupt(world, 6)
    assert (end.step, end.total) == (6, 12)
    assert world.store.manifest("fit") is None
    assert world.states()["fit"].sentence() == "interrupted at step 6 of 12"
    random.random()
    world.run("fit")
    assert "fit: resuming from step 6" in world.console.text
    assert contents(world) == straight
    assert world.store.manifest("fit")["resumes"] == 1


def test_journals_end_where_the_checkpoint_does(world):
    """After a kill at step 6 and a checkpoint at 4, rows 5 and 6 are replaced, not repeated."""
    interrupt(world, 4)
    journal = world.store.folder("fit") / "metrics.jsonl"
    with open(journal, "a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    world.run("fit")
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))


def test_a_stop_between_stages(world):
    stop = StopFlag(requested=True)
    with pytest.raises(Interrupted):
        world.run("page", stop=stop)
    assert set(kinds(world.states()).values()) == {"missing"}


def test_an_interrupted_stage_with_changed_settings_is_refused(world):
    interrupt(world, 6)
    text = world.store.manifest("text")
    assert refused(world, "page", "fit.learning_rate=0.5", "seed=3") == [
        "fit: interrupted at step 6, since then text is stale; --restart starts again",
        "fit: interrupted at step 6, since then fit.learning_rate 0.01 → 0.5; --restart starts again",
        "fit: interrupted at step 6, since then seed 0 → 3; --restart starts again",
    ]
    assert world.store.manifest("text") == text  # refused before anything ran
    (line,) = refused(world, "fit", "fit.learning_rate=0.5")
    assert line == (
        "fit: interrupted at step 6, since then fit.learning_rate 0.01 → 0.5; "
        "--restart starts again, --override-config resumes with the new settings"
    )
    assert world.states("fit.learning_rate=0.5")["fit"].sentence() == (
        "interrupted at step 6 of 12; fit.learning_rate 0.01 → 0.5"
    )
    world.run("fit", "checkpoints.every=5", "tracking.project=y")  # harmless: accepted


def test_override_config_goes_on_and_records_both(world):
    interrupt(world, 6)
    world.run("fit", "fit.learning_rate=0.5", override_config=True)
    assert "resuming with fit.learning_rate 0.01 → 0.5" in world.console.text
    manifest = world.store.manifest("fit")
    assert manifest["config"]["overridden"] == {"fit.learning_rate": [0.01, 0.5]}
    assert manifest["config"]["fit"]["learning_rate"] == 0.5
    assert kinds(world.states("fit.learning_rate=0.5"))["fit"] == "done"


def test_overrides_one_after_the_other_keep_the_first_value(world):
    interrupt(world, 3)
    interrupt(world, 4, "fit.learning_rate=0.5", override_config=True)
    world.run("fit", "fit.learning_rate=0.7", override_config=True)
    manifest = world.store.manifest("fit")
    assert manifest["config"]["overridden"] == {"fit.learning_rate": [0.01, 0.7]} and manifest["resumes"] == 2


def test_an_override_that_the_stage_refuses_leaves_the_run_as_it_was(world):
    interrupt(world, 6)
    run_fit = world.stages["fit"].run

    def run(ctx):
        raise UserError("fit.learning_rate: does not suit the checkpoint; lower it")

    fakes.change(world.stages, "fit", run=run)
    refused(world, "fit", "fit.learning_rate=0.5", override_config=True)
    fakes.change(world.stages, "fit", run=run_fit)
    world.run("fit")
    manifest = world.store.manifest("fit")
    assert "overridden" not in manifest["config"] and manifest["resumes"] == 2


def test_restart_drops_the_interrupted_run(world):
    interrupt(world, 6)
    world.run("fit", "fit.learning_rate=0.5", restart=True)
    assert "dropping the interrupted run (at step 6)" in world.console.text
    assert world.store.manifest("fit")["resumes"] == 0
    world.store = type(world.store)(world.store.root, "other")
    world.run("fit", "fit.learning_rate=0.5")
    assert contents(world)["metrics.jsonl"] == world.store.manifest("fit")["outputs"]["metrics.jsonl"]["sha256"]


def test_a_rebuilt_input_is_refused_even_with_override_config(world):
    interrupt(world, 6)
    world.run("text", force=True)
    (line,) = refused(world, "fit", override_config=True)
    assert line.startswith("fit: interrupted at step 6, since then text artifact changed (")
    assert line.endswith("; --restart starts again")
    world.run("fit", restart=True)


@pytest.mark.parametrize("every", [0, 4])
@pytest.mark.parametrize("redo", [False, True])
def test_an_input_that_is_rebuilt_while_the_stage_runs_publishes_nothing(world, every, redo):
    """The finished artifact stays, and the run continues like any with a changed input.

    That needs --restart, unless nothing was saved.
    """
    if redo:
        world.run("fit", "checkpoints.every=0")
    before, run_fit = world.store.manifest("fit"), world.stages["fit"].run

    def run(ctx):
        metrics = run_fit(ctx)
        other = type(world.store)(world.store.root, "small")  # as of another process
        with other.lock("text"):
            content = other.folder("text") / ".tmp-publish"
            content.mkdir()
            (content / "words.json").write_text("[]")
            other.publish("text", content, {**world.store.manifest("text"), "run_id": "another"})
        return metrics

    fakes.change(world.stages, "fit", run=run)
    every = f"checkpoints.every={every}"
    remedy = "run again with --restart" if every.endswith("4") else "run again"
    assert refused(world, "fit", every, force=redo) == [f"fit: text was replaced while this stage ran; {remedy}"]
    assert world.store.manifest("fit") == before and not (world.store.folder("fit") / ".tmp-publish").exists()
    fakes.change(world.stages, "fit", run=lambda ctx: {})
    if "--restart" in remedy:
        (line,) = refused(world, "fit", every)
        assert line.startswith("fit: interrupted at step 8, since then text artifact changed (")
    world.run("fit", every, restart="--restart" in remedy)
    assert world.store.manifest("fit")["inputs"] == {"text": world.store.manifest("text")["digest"]}


def test_an_input_that_is_gone_when_the_stage_ends_publishes_nothing(world):
    def run(ctx):
        (world.store.folder("text") / "manifest.json").unlink()
        return {}

    fakes.change(world.stages, "fit", run=run)
    assert refused(world, "fit") == ["fit: text was replaced while this stage ran; run again"]
    assert world.store.manifest("fit") is None


def editing(world, stage, file, *texts):
    """Let `stage` write these texts to the file, one after the other, when it has done its work."""
    run = world.stages[stage].run

    def run_and_edit(ctx):
        metrics = run(ctx)
        for text in texts:
            file.write_text(text)
        return metrics

    fakes.change(world.stages, stage, run=run_and_edit)
    return run


@pytest.mark.parametrize("every", [0, 4])
@pytest.mark.parametrize("what", ["file", "folder", "gone"])
def test_an_input_that_is_edited_while_the_stage_runs_publishes_nothing(world, tmp_path, every, what):
    """Nor does the run go on with the new file; with the old one put back it does."""
    world.stages, file = fakes.stages(reads=["prompts"]), tmp_path / "rows.jsonl"
    settings = [f"data.prompts={file}", f"checkpoints.every={every}"]
    if what == "folder":
        world.stages, file, settings = fakes.stages(), tmp_path / "model" / "config.json", settings[1:]
        file.parent.mkdir()
        fakes.change(world.stages, "fit", folders=lambda experiment: {"fit.model": file.parent})
    file.write_text('{"prompt": "a"}\n')
    run_fit = editing(world, "fit", file, '{"prompt": "b"}\n')
    if what == "gone":
        fakes.change(world.stages, "fit", run=lambda ctx: (run_fit(ctx), file.unlink())[0])
    remedy = "put it back, or add --restart, and run again" if every else "run again"
    place = f"{file.parent} (fit.model)" if what == "folder" else f"{file} (data.prompts)"
    how = "became unreadable" if what == "gone" else "was edited"
    assert refused(world, "fit", *settings) == [f"fit: {place} {how} while this stage ran; {remedy}"]
    assert world.store.manifest("fit") is None
    fakes.change(world.stages, "fit", run=run_fit)
    if what != "gone" and every:
        (line,) = refused(world, "fit", *settings, override_config=True)
        assert line.startswith("fit: interrupted at step 8, since then ") and line.endswith("; --restart starts again")
    file.write_text('{"prompt": "a"}\n')
    world.run("fit", *settings)
    assert kinds(world.states(*settings))["fit"] == "done"


def test_a_file_that_is_edited_before_its_stage_begins_is_what_the_manifest_names(world, tmp_path):
    world.stages, file = fakes.stages(reads=["prompts"]), tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n')
    editing(world, "text", file, '{"prompt": "b"}\n')
    seen = []
    fakes.change(world.stages, "fit", run=lambda ctx: seen.append(ctx.source("prompts").sha256) or {})
    world.run("fit", f"data.prompts={file}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert world.store.manifest("fit")["inputs"]["data:prompts"] == digest and seen == [digest]


def test_a_finished_stage_whose_file_is_edited_while_another_runs_is_run_again(world, tmp_path):
    """It was up to date when the command began."""
    world.stages, file = fakes.stages(reads=["prompts"]), tmp_path / "rows.jsonl"
    at = f"data.prompts={file}"
    file.write_text('{"prompt": "a"}\n')
    world.run("fit", at)
    stages = world.stages
    world.stages = {"other": stages["page"], "text": stages["text"], "fit": stages["fit"]}
    fakes.change(world.stages, "other", name="other", needs=fakes.nothing, run=lambda ctx: {})
    fakes.change(world.stages, "fit", needs=lambda experiment: ["other", "text"])
    world.run("fit", at)
    editing(world, "other", file, '{"prompt": "b"}\n')
    world.run("fit", at)
    assert any("fit: up to date" in line for line in world.console.lines)  # nothing ran, so nothing was edited
    world.store.folder("other").joinpath("manifest.json").unlink()
    world.run("fit", at)
    assert world.store.manifest("fit")["inputs"]["data:prompts"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_file_that_is_edited_between_two_stages_that_read_it_is_refused(world, tmp_path):
    """What follows would be of the old rows, and of the new ones."""
    world.stages, file = fakes.stages(reads=["prompts"]), tmp_path / "rows.jsonl"
    at = f"data.prompts={file}"
    file.write_text('{"prompt": "a"}\n')

    class Editing(StopFlag):  # asked once before each stage
        asked = 0

        def __init__(self):
            pass

        @property
        def requested(self):
            self.asked += 1
            if self.asked == 3:
                file.write_text('{"prompt": "b"}\n')
            return False

    stop = Editing()
    fakes.change(world.stages, "fit", run=lambda ctx: {})
    with pytest.raises(UserError) as caught:
        world.run("page", at, stop=stop)
    (line,) = caught.value.lines
    assert line.startswith(f"fit: data.prompts changed ({file}, ")
    assert line.endswith(" while this command ran; run again")
    assert kinds(world.states(at)) == {"text": "done", "fit": "stale", "page": "missing"}


def test_a_folder_that_is_edited_while_it_is_loaded_and_put_back_is_refused(world, tmp_path):
    file = tmp_path / "model" / "config.json"
    file.parent.mkdir()
    file.write_text("{}")
    fakes.change(world.stages, "fit", folders=lambda experiment: {"fit.model": file.parent})
    run_fit = world.stages["fit"].run

    def run(ctx):
        file.write_text("[]")
        file.write_text("{}")
        ctx.confirm_folders()
        return run_fit(ctx)

    fakes.change(world.stages, "fit", run=run)
    assert refused(world, "fit") == [f"fit: {file.parent} (fit.model) was edited while it was loaded; run again"]
    fakes.change(world.stages, "fit", run=lambda ctx: ctx.confirm_folders() or run_fit(ctx))
    world.run("fit")


def test_a_changed_data_file_is_refused_with_its_rows(world, tmp_path):
    world.stages = fakes.stages(reads=["prompts"])
    (tmp_path / "rows.jsonl").write_text("{}\n")
    interrupt(world, 6, "data.prompts=rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("{}\n{}\n")
    (line,) = refused(world, "fit", "data.prompts=rows.jsonl")
    assert "data.prompts changed (rows.jsonl, " in line and "rows 1 → 2" in line


def test_an_interrupted_redo_leaves_the_finished_artifact(world):
    world.run("page")
    before = contents(world)
    interrupt(world, 6, "fit.learning_rate=0.5")
    assert contents(world) == before
    assert world.states("fit.learning_rate=0.5")["fit"].sentence() == "interrupted at step 6 of 12"
    assert kinds(world.states())["fit"] == "done"  # the old settings: the old artifact is what they ask for
    world.run("fit", "fit.learning_rate=0.5")
    assert contents(world) != before and world.store.manifest("fit")["resumes"] == 1


def steps(world, folder="checkpoints"):
    return sorted(path.name for path in (world.store.folder("fit") / folder).glob("step-*"))


def test_a_redo_that_fails_early_leaves_the_finished_artifact_with_its_checkpoints(world):
    world.run("fit")
    before, saved, run_fit = contents(world), steps(world), world.stages["fit"].run
    assert saved == ["step-00000004", "step-00000008"]

    def run(ctx):
        assert ctx.checkpoints.newest() is None
        raise UserError("rows.jsonl:3: is no JSON; mend the line")

    fakes.change(world.stages, "fit", run=run)
    refused(world, "fit", force=True)
    assert contents(world) == before and steps(world) == saved and kinds(world.states())["fit"] == "done"
    fakes.change(world.stages, "fit", run=run_fit)
    interrupt(world, 6, force=True)
    assert steps(world) == saved and steps(world, ".redo/checkpoints") == ["step-00000004", "step-00000006"]
    world.run("fit", "fit.steps=6", restart=True)
    assert steps(world) == ["step-00000004"] and not (world.store.folder("fit") / ".redo").exists()
    world.run("fit", "fit.steps=6", "checkpoints.every=0", force=True)
    assert steps(world) == []


def test_a_forced_redo_that_was_interrupted_goes_on_with_force(world):
    world.run("fit")
    before = contents(world)
    interrupt(world, 6, force=True)
    assert kinds(world.states())["fit"] == "done"
    world.run("fit", force=True)
    assert "resuming from step 6" in world.console.text and contents(world) == before


def test_a_mistake_before_the_first_checkpoint_leaves_nothing_to_go_on_from(world):
    """A bad data file is found when the stage reads it: mending it must not need --restart."""

    def run(ctx):
        ctx.tracker.log(1, {"loss": 1.0})
        raise UserError("rows.jsonl:3: is no JSON; mend the line")

    run_fit = world.stages["fit"].run
    fakes.change(world.stages, "fit", run=run)
    assert refused(world, "fit") == ["rows.jsonl:3: is no JSON; mend the line"]
    assert kinds(world.states())["fit"] == "missing"
    fakes.change(world.stages, "fit", run=run_fit)
    world.run("fit", "fit.learning_rate=0.5")
    assert len((world.store.folder("fit") / "metrics.jsonl").read_text().splitlines()) == 12


def test_training_that_stopped_itself_keeps_its_checkpoint(world):
    with pytest.raises(TrainingStopped):
        world.run("fit", "fit.fail_at=7")
    assert world.states("fit.fail_at=7")["fit"].sentence() == "interrupted at step 4 of 12"
    assert world.store.manifest("fit") is None


def test_damage_is_refused_and_force_redoes(world):
    world.run("page")
    path = world.store.folder("fit") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    states = world.states()
    assert kinds(states) == {"text": "done", "fit": "damaged", "page": "stale"}
    assert str(path) in states["fit"].sentence() and states["page"].reasons == ["fit is damaged"]
    (line,) = refused(world, "page")
    assert line.startswith(f"{path}: has ") and line.endswith("`rlhf run fit -c CONFIG --force` rebuilds it")
    assert refused(world, "fit") == [line] and refused(world, "page", force=True) == [line]
    world.run("fit", force=True)
    assert kinds(world.states())["fit"] == "done"


def test_a_damaged_run_file_is_named_and_restart_drops_it(world):
    interrupt(world, 6)
    (world.store.folder("fit") / "run.json").write_text("{")
    assert kinds(world.states())["fit"] == "damaged"
    (line,) = refused(world, "fit")
    assert "run.json: damaged" in line and "--restart" in line
    world.run("fit", restart=True)


def test_a_damaged_newest_checkpoint_falls_back(world):
    world.run("fit")
    straight = contents(world)
    world.store = type(world.store)(world.store.root, "other")
    interrupt(world, 9)
    newest = world.store.folder("fit") / "checkpoints" / "step-00000009"
    (newest / "model.safetensors").write_bytes(b"")
    world.run("fit")
    assert "set aside as .damaged-step-00000009" in world.console.text
    assert "resuming from step 8" in world.console.text
    assert contents(world) == straight
    left = sorted(path.name for path in (world.store.folder("fit") / "checkpoints").iterdir())
    assert left == ["step-00000004", "step-00000008"] or left == ["step-00000008"]


def test_deleted_checkpoints_do_not_make_a_finished_stage_work(world):
    import shutil

    world.run("fit")
    shutil.rmtree(world.store.folder("fit") / "checkpoints")
    world.run("fit")
    assert all("up to date" in line for line in world.console.lines)


def test_another_process_count_needs_allow_elastic(world):
    from pipeline.store import files, integrity

    interrupt(world, 6)
    path = world.store.folder("fit") / "run.json"
    run = integrity.read_sealed(path)
    files.write_json(path, integrity.seal(run | {"world_size": 2, "threads": 7}))
    assert refused(world, "fit") == [
        "fit: interrupted at step 6, since then the number of processes 2 → 1; --allow-elastic resumes"
    ]
    world.run("fit", allow_elastic=True)
    assert "world_size 2 → 1, threads 7 → 1: the last bits may differ" in world.console.text


def test_seeds_are_set_before_every_stage(world):
    drawn = []

    def run(ctx):
        import numpy
        import torch

        drawn.append((random.random(), float(numpy.random.rand()), float(torch.rand(()))))
        return {}

    for name in ("text", "fit"):
        fakes.change(world.stages, name, run=run)
    world.run("fit")
    world.run("text", force=True)
    assert drawn[0] == drawn[2] and drawn[0] != drawn[1]


def test_a_stage_shows_what_was_made_of_todays_inputs_and_makes_none_of_it(world):
    seen = []

    def run_page(ctx):
        seen.append(sorted(ctx.inputs))
        (ctx.publish / "page.txt").write_text(" ".join(sorted(ctx.manifests)))
        return {}

    fakes.change(world.stages, "page", needs=lambda e: ["text"], shows=lambda e: ["fit"], run=run_page)
    world.run("page")
    assert seen == [["text"]] and world.store.manifest("fit") is None, "it is not made"
    world.run("fit", "fit.steps=3")
    world.run("page")
    assert seen[1:] == [["fit", "text"]], "with the settings that it was made with"
    assert "fit artifact changed" in world.console.text
    world.run("page")
    assert len(seen) == 2, "up to date"
    world.run("page", "text.words=4", override_config=True)
    assert seen[2:] == [["text"]], "fit was made of other words"
    world.run("fit", "text.words=4")
    (world.store.folder("fit") / "model.safetensors").write_bytes(b"damaged")
    world.run("page", "text.words=4")
    assert len(seen) == 3, "what is damaged is not shown"

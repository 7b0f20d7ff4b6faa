"""Test each kind of tracker: what it is told, and that a resumed run is not written twice there.

wandb (offline) and TensorBoard, MLflow and trackio are the real ones where they are installed; the
others are stand-ins that accelerate's own classes talk to.
"""

import json
import shutil
import time
from collections import Counter

import pytest

from pipeline.trackers import kinds
from pipeline.trackers.rows import Entry, Journals
from pipeline.trackers.run import TrackedRun, tracker_run_id
from pipeline.tracking import Tracker
from tests.pipeline.trackers import standins
from tests.pipeline.trackers.wandb_file import history

pytestmark = pytest.mark.usefixtures("accelerate_state")


def make_run(tmp_path, name, **changes):
    (tmp_path / "small" / "fit").mkdir(parents=True, exist_ok=True)
    values = {
        "names": (name,),
        "folder": str(tmp_path / "small" / "fit"),
        "base": str(tmp_path / "small"),
        "experiment": "small",
        "stage": "fit",
        "run_id": "0123456789abcdef0123456789abcdef",
        "project": "rlhf",
        "config": {"fit": {"lr": 0.1, "words": ["a"], "none": None}, "seed": 1},
    }
    return TrackedRun(**(values | changes))


def write(run, steps, only_metrics=False):
    """Write the rows of steps into the run's journals."""
    tracker = Tracker(run.folder, "fit")
    for step in steps:
        tracker.log(step, {"loss": step / 4, "objective/kl": 1.0}, 0.5, 10)
        if step % 2 == 0 and not only_metrics:
            tracker.evaluation(step, {"loss": step / 2})
            tracker.samples(step, [{"prompt": "<b>a</b>", "response": "`b`\n# c", "score": 0.5}])
    tracker.close()


def feed(run, name, finish=True, limit=None):
    """Send what the journals have, or the first entries of it, and finish the run, or not."""
    opened = kinds.open_run(name, run)
    for entry in Journals(run.file("fit")).new_entries(complete=True)[:limit]:
        if opened.takes(entry):
            opened.send(entry)
    if finish:
        opened.tracker.finish()
    return opened


def interrupted_and_resumed(tmp_path, name, **changes):
    """Send five steps, without an end; rewind the journals to step 4 and send all eight."""
    run = make_run(tmp_path, name, **changes)
    write(run, range(1, 6))
    feed(run, name)
    Tracker(run.folder, "fit").rewind(4)
    write(run, range(5, 9))
    resumed = make_run(tmp_path, name, resumes=1, **changes)
    feed(resumed, name)
    return resumed


LOSSES = {step: step / 4 for step in range(1, 9)}
HELD_OUT = {step: step / 2 for step in (2, 4, 6, 8)}


@pytest.mark.parametrize("name", ["aim", "comet_ml", "clearml", "swanlab"])
def test_a_resumed_run_goes_on_in_the_same_run_of_a_tracker(tmp_path, standin, name):
    run = interrupted_and_resumed(tmp_path, name)
    rows = standins.calls(standin, name, "track")
    assert len({row["run"] for row in rows}) == 1
    last = {(row["key"], row["step"]): row["value"] for row in rows}
    assert {step: value for (key, step), value in last.items() if key == "train/loss"} == LOSSES
    assert {step: value for (key, step), value in last.items() if key == "eval/loss"} == HELD_OUT
    twice = [place for place, times in Counter((row["key"], row["step"]) for row in rows).items() if times > 1]
    assert not twice or name == "aim", "aim keeps one value of a name and a step"
    assert len(standins.calls(standin, name, "finish")) == 2
    text = (standin / "calls.jsonl").read_text()
    assert "small" in text and (run.run_id in text) and "0.1" in text


def test_a_clearml_metric_that_accelerate_takes_apart_is_recognised(tmp_path, standin):
    run = make_run(tmp_path, "clearml")
    Tracker(run.folder, "fit").log(1, {"eval_loss": 1.0, "x/y": 2.0})
    feed(run, "clearml")
    feed(make_run(tmp_path, "clearml", resumes=1), "clearml")
    assert len(standins.calls(standin, "clearml", "track")) == 2


def test_dvclive_is_written_again(tmp_path, standin):
    interrupted_and_resumed(tmp_path, "dvclive")
    rows = standins.calls(standin, "dvclive", "track")
    begun = [row["dir"] for row in standins.calls(standin, "dvclive", "live")]
    assert begun == [str(tmp_path / "small" / "dvclive" / "fit")] * 2  # Live removes what is there
    second = [row for row in rows if row["key"] == "train/loss"][5:]
    assert {row["step"]: row["value"] for row in second} == LOSSES and len(second) == 8


def test_options_go_to_the_tracker_and_never_replace_ours(tmp_path, standin):
    run = make_run(tmp_path, "comet_ml", options={"comet_ml": {"online": False}})
    feed(run, "comet_ml")
    feed(make_run(tmp_path, "comet_ml", resumes=1, options={"comet_ml": {"online": False}}), "comet_ml")
    keys = [row["run"] for row in standins.calls(standin, "comet_ml", "start")]
    assert keys == [run.run_id, f"{run.run_id}x1"], "an offline experiment cannot be continued"


def test_a_run_that_goes_on_with_changed_settings_is_another_one_in_trackers():
    assert tracker_run_id("a" * 32, {}, "f") == "a" * 32
    first = tracker_run_id("a" * 32, {"overridden": {"fit.lr": [1, 2]}}, "f")
    assert first != "a" * 32 and len(first) == 32
    assert first != tracker_run_id("a" * 32, {"overridden": {"fit.lr": [1, 3]}}, "g")


# -- the real ones -------------------------------------------------------------------------------


@pytest.fixture
def wandb_offline(monkeypatch):
    """The environment in which the process of the trackers runs."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def test_wandb_offline_is_written_again_after_a_resume(tmp_path, wandb_offline):
    run = interrupted_and_resumed(tmp_path, "wandb", wandb_mode="offline")
    [folder] = run.file("wandb").glob("offline-run-*")
    assert folder.name.endswith(run.run_id)
    rows = []
    for _ in range(600):  # wandb's service writes the file a moment after the run is finished
        rows = history(run.file("wandb"))
        if len(rows) == 16:
            break
        time.sleep(0.1)
    metrics = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert metrics == list(LOSSES.items())
    assert [(row["step"], row["eval/loss"]) for row in rows if "eval/loss" in row] == list(HELD_OUT.items())
    assert sum("samples/_type" in row or "samples" in row or "samples/path" in row for row in rows) == 4
    assert rows[0]["time/tokens_per_second"] == 20.0 and rows[0]["objective/kl"] == 1.0
    assert [row["_step"] for row in rows] == list(range(len(rows)))


def test_wandb_online_goes_on_where_the_server_ends(tmp_path, monkeypatch):
    """The server counts rows: also one of a step that it has, as an evaluation that was owed."""
    server, begun = [], []

    class Run:
        def __init__(self):
            self.starting_step = len(server)
            self.config = {}

        def define_metric(self, *names, **options):
            pass

        def log(self, values, step=None):
            assert step is None
            server.append(values)

        def finish(self):
            pass

    def init(**options):
        begun.append(options)
        return Run()

    import wandb

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "Table", lambda columns, data: "table")
    run = make_run(tmp_path, "wandb")
    write(run, range(1, 3))  # metrics 1, metrics 2, evaluation 2, samples 2
    feed(run, "wandb", limit=2)  # a kill before the evaluation arrived
    write(run, range(3, 5))
    feed(make_run(tmp_path, "wandb", resumes=1), "wandb")
    assert [row["step"] for row in server] == [1, 2, 2, 2, 3, 4, 4, 4]
    assert [row.get("train/loss", row.get("eval/loss", "table")) for row in server] == [
        0.25, 0.5, 1.0, "table", 0.75, 1.0, 2.0, "table"
    ]  # fmt: skip
    assert {options["id"] for options in begun} == {run.run_id} and begun[1]["resume"] == "allow"
    assert begun[0]["group"] == "small" and begun[0]["name"] == "small/fit" and begun[0]["project"] == "rlhf"


def test_tensorboard_is_written_again_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = interrupted_and_resumed(tmp_path, "tensorboard")
    [file] = run.file("tensorboard").rglob("*.*")
    assert file.parent.name == "fit", "one run a stage, and no other for the hyperparameters"
    events = EventAccumulator(str(file.parent))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == list(LOSSES.items())
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == list(HELD_OUT.items())
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "eval/loss", "objective/kl", "time/seconds", "time/tokens", "time/tokens_per_second",
        "time/memory_gb",
    }  # fmt: skip
    texts = events.Tensors("samples/text_summary")
    shown = texts[0].tensor_proto.string_val[0].decode()
    assert len(texts) == 4 and "    <b>a</b>" in shown and "    # c" in shown, "as code: not as HTML, not as a heading"
    assert "fit.lr: 0.1" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert (
        "_hparams_/experiment" in events.summary_metadata and "_hparams_/session_start_info" in events.summary_metadata
    )


def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = interrupted_and_resumed(tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("rlhf/small")
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "fit" and found.data.params["fit.lr"] == "0.1"
    assert found.data.tags["run_id"] == run.run_id and found.info.status == "FINISHED"
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in points) == list(LOSSES.items())
    points = client.get_metric_history(found.info.run_id, "eval/loss")
    assert sorted((point.step, point.value) for point in points) == list(HELD_OUT.items())
    assert len(list(run.file("mlflow", "files").rglob("step-*.md"))) == 4


def test_trackio_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    interrupted_and_resumed(tmp_path, "trackio")
    [name] = sqlite_storage.SQLiteStorage.get_runs("rlhf")
    logs = sqlite_storage.SQLiteStorage.get_logs("rlhf", name)
    assert [(row["step"], row["train/loss"]) for row in logs if "train/loss" in row] == list(LOSSES.items())
    assert [(row["step"], row["eval/loss"]) for row in logs if "eval/loss" in row] == list(HELD_OUT.items())
    shutil.rmtree(tmp_path / "trackio", ignore_errors=True)


def test_settings_are_flat_and_samples_are_shown_as_they_are():
    values = {"a": {"b": 1, "c": {}, "d": [1, None]}, "e": None, "f": True}
    assert kinds.flat(values) == {"a.b": 1, "a.c": "{}", "a.d": "[1, null]", "e": "null", "f": True}
    text = kinds.markdown(({"step": 1, "prompt": [{"role": "user", "content": "é"}], "response": "", "score": 1.5},))
    assert text == '**1** score 1.5\n\nprompt:\n\n    [{"role": "user", "content": "é"}]\n\nresponse:\n\n    '
    assert json.dumps(kinds.columns_and_rows(({"a": 1}, {"b": 2}))) == '[["a", "b"], [["1", ""], ["", "2"]]]'


def test_a_tracker_that_says_only_its_last_step_gets_what_comes_after():
    got = []
    tracker = type("Tracker", (), {"log": lambda self, figures, step: got.append(step)})()
    opened = kinds.OpenRun(tracker, has_until=2)
    for step in (1, 2, 3):
        opened.send(Entry(step, "metrics", {"train/loss": 1.0}))
    assert got == [3]

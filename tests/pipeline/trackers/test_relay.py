"""Test the way from a command to its trackers: none of them can end a run, or be written twice."""

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import tracking
from pipeline.errors import UserError
from pipeline.trackers import process, relay
from pipeline.trackers.names import NAMES, PACKAGES, is_installed
from pipeline.trackers.run import TrackedRun
from tests.pipeline import fakes
from tests.pipeline.trackers import standins

ROOT = Path(__file__).resolve().parents[3]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sent(folder, tracker):
    """The losses that a stand-in has, in order."""
    return [
        (row["step"], row["value"]) for row in standins.calls(folder, tracker, "track") if row["key"] == "train/loss"
    ]


def written(world):
    return [(row["step"], row["loss"]) for row in rows(world.store.folder("fit") / "metrics.jsonl")]


def test_a_stage_with_rows_is_a_run_and_the_manifest_has_its_id(world, standin, capsys):
    world.run("page", "tracking.with=[comet_ml,dvclive]")
    manifests = {stage: world.store.manifest(stage) for stage in ("text", "fit", "page")}
    assert manifests["fit"]["tracker_run_id"] == manifests["fit"]["run_id"]
    assert manifests["text"]["tracker_run_id"] is None and manifests["page"]["tracker_run_id"] is None
    [begun] = standins.calls(standin, "comet_ml", "start")
    assert begun["run"] == manifests["fit"]["run_id"] and begun["project"] == "rlhf"
    assert standins.calls(standin, "comet_ml", "tags")[0]["tags"] == ["small", "fit"]
    assert sent(standin, "comet_ml") == sent(standin, "dvclive") == written(world) and len(written(world)) == 12
    assert len(standins.calls(standin, "comet_ml", "finish")) == 1 and capsys.readouterr().err == ""


def fed(tmp_path, tracker, finish=True):
    """Feed one row to a stand-in in a thread of this process; return the feed and its answers."""
    folder = tmp_path / "fit"
    folder.mkdir()
    tracking.Tracker(folder, "fit").log(1, {"loss": 1.0})
    answers = io.StringIO()
    run = TrackedRun((tracker,), str(folder), str(tmp_path), "small", "fit", "id", "p")
    feed = process.Feed(tracker, run, process.Replies(answers))
    if finish:
        feed.journals_complete.set()
    return feed, answers


@pytest.mark.parametrize(
    "trouble, reason",
    [("run:no network", "no network"), ("track:full", "[Errno 28] No space left on device"), ("finish:late", "late")],
)
def test_whatever_a_tracker_raises_is_reported_once(tmp_path, standin, monkeypatch, accelerate_state, trouble, reason):
    monkeypatch.setenv("TROUBLE", f"aim.{trouble}")
    feed, answers = fed(tmp_path, "aim")
    assert feed.over.wait(60)
    feed.give_up_if_overdue(time.monotonic() + 1000)
    assert json.loads(answers.getvalue()) == {"run": "id", "tracker": "aim", "event": "lost", "reason": reason}


def test_a_call_that_takes_too_long_is_reported_while_the_stage_runs(tmp_path, standin, monkeypatch, accelerate_state):
    monkeypatch.setenv("TROUBLE", "dvclive.track:hang")
    monkeypatch.setattr(process, "CALL_SECONDS", 0.3)
    monkeypatch.setattr(process, "POLL_SECONDS", 0.01)
    feed, answers = fed(tmp_path, "dvclive", finish=False)
    for _ in range(600):
        feed.give_up_if_overdue(time.monotonic())
        if feed.over.wait(0.05):
            break
    assert json.loads(answers.getvalue())["reason"] == "no answer within 0 s"


def test_a_second_process_waits_for_that_of_a_killed_command(tmp_path, standin, accelerate_state):
    """Otherwise it would ask the tracker what it has while the other one still writes."""
    (tmp_path / ".trackers").mkdir()
    with open(tmp_path / ".trackers" / "fit-dvclive.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        feed, _ = fed(tmp_path, "dvclive")
        assert not feed.over.wait(1) and sent(standin, "dvclive") == []
    assert feed.over.wait(60) and len(sent(standin, "dvclive")) == 1


def test_a_tracker_that_fails_is_one_warning(world, standin, monkeypatch, capsys):
    monkeypatch.setenv("TROUBLE", "aim.track:no network")
    world.run("fit", "tracking.with=[aim,dvclive]")
    said, manifest = capsys.readouterr().err, world.store.manifest("fit")
    assert said == (
        "warning: aim failed (no network); this command continues without it; metrics.jsonl has every value\n"
    )
    assert manifest["tracker_run_id"] == manifest["run_id"] and sent(standin, "dvclive") == written(world)


def test_a_tracker_that_takes_the_process_with_it_is_one_warning(world, standin, monkeypatch, capsys):
    monkeypatch.setenv("TROUBLE", "aim.track:die")
    world.run("fit", "tracking.with=[aim,dvclive]")
    said = capsys.readouterr().err
    lost = re.fullmatch(r"warning: (.*) failed \(its process ended with signal 9\);.*\n", said)[1].split(", ")
    assert lost in (["aim", "dvclive"], ["aim"])
    assert "dvclive" in lost or sent(standin, "dvclive") == written(world), "it may have had all rows before that"
    assert (world.store.manifest("fit")["tracker_run_id"] is None) == ("dvclive" in lost) and len(written(world)) == 12


def test_a_tracker_that_hangs_is_given_up(world, standin, monkeypatch, capsys):
    """The stages after it do not try it again; the next command does."""
    monkeypatch.setenv("TROUBLE", "aim.run:hang")
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 1.0)
    monkeypatch.setattr(relay, "CLOSE_SECONDS", 0.5)
    fakes.change(world.stages, "page", run=lambda ctx: ctx.tracker.log(1, {"loss": 1.0}) or {})
    world.run("page", "tracking.with=[aim]")
    said = capsys.readouterr().err
    assert said.startswith("warning: aim failed (no answer within 1 s)") and said.count("\n") == 1
    assert world.store.manifest("page")["tracker_run_id"] is None


def test_training_never_waits_for_a_process_that_reads_nothing(tmp_path, monkeypatch, capsys):
    """Not even when the pipe to it is full."""
    monkeypatch.setattr(relay, "CLOSE_SECONDS", 0.1)
    way = relay.Relay()
    run = TrackedRun(("aim",), str(tmp_path), str(tmp_path), "small", "fit", "id", "p", {"text": "x" * 70_000})
    popen = subprocess.Popen
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(subprocess, "Popen", lambda words, **options: popen(sleep, **options))
    began = time.monotonic()
    way.begin(run)
    way.begin(run)
    assert not way.finish(0.1)
    way.close()
    assert time.monotonic() - began < 10
    assert capsys.readouterr().err.startswith("warning: aim failed (its process does not read on)")


def test_a_process_that_cannot_start_is_a_warning(world, standin, monkeypatch, capsys):
    def fail(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", fail)
    world.run("fit", "tracking.with=[aim]")
    assert "warning: aim failed ([Errno 11] Resource temporarily unavailable)" in capsys.readouterr().err


@pytest.mark.slow
def test_trackers_change_no_byte_that_is_published(world, standin, tmp_path):
    world.run("fit")
    names = ("metrics.jsonl", "model.safetensors")
    before = {name: (world.store.folder("fit") / name).read_bytes() for name in names}
    world.run("fit", "tracking.with=[dvclive]")
    assert "up to date" in world.console.text, "a tracker is no reason to redo anything"
    world.run("fit", "tracking.with=[dvclive]", force=True)
    assert {name: (world.store.folder("fit") / name).read_bytes() for name in names} == before


def kill_at(world, folder, words, line):
    """Run the command in a process of its own, and kill it when it prints a line."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "tests.pipeline.fakes", "run", "fit", "-c", str(world.path), *words]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=world.path.parent)
    for text in running.stdout:
        if text.strip() == line:
            break
    running.send_signal(signal.SIGKILL)
    running.wait()


@pytest.mark.slow
def test_after_a_kill_nothing_is_missing_and_nothing_is_there_twice(world, standin):
    words = ["tracking.with=[comet_ml,clearml]", "fit.pause=1"]
    kill_at(world, standin, words, "step 11")
    assert 8 <= world.states()["fit"].step < 11
    world.run("fit", *words)
    for name in ("comet_ml", "clearml"):
        assert sorted(sent(standin, name)) == written(world), f"{name}: each row once"
    manifest = world.store.manifest("fit")
    assert manifest["resumes"] == 1 and manifest["tracker_run_id"] == manifest["run_id"]
    assert {row["run"] for row in standins.calls(standin, "comet_ml", "track")} == {manifest["run_id"]}


@pytest.mark.slow
def test_the_process_ends_with_its_command(tmp_path, standin):
    """Even if another process holds the pipe open."""
    code = (
        "import os, sys, time\n"
        "from pipeline.trackers.relay import Relay\n"
        "from pipeline.trackers.run import TrackedRun\n"
        "relay = Relay()\n"
        f"relay.begin(TrackedRun(('dvclive',), {str(tmp_path)!r}, {str(tmp_path)!r}, 'small', 'fit', 'id', 'p'))\n"
        "print(relay._process.pid, flush=True)\n"
        "os.set_inheritable(relay._process.stdin.fileno(), True)\n"
        "if os.fork() == 0:\n"
        "    os.close(1), os.close(2)\n"
        "    time.sleep(60)\n"
        "os._exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{standin}"}
    pid = int(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout)
    for _ in range(600):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("it still runs")


# -- settings ------------------------------------------------------------------------------------


def test_a_missing_package_stops_the_command_before_anything_runs(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "aim", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError) as caught:
        world.run("page", "tracking.with=[aim,tensorboard]")
    assert caught.value.lines == [
        "tracking.with: aim is not installed; .venv/bin/pip install aim, or leave it out",
        "tracking.with: tensorboard is not installed; .venv/bin/pip install -e '.[tensorboard]', or leave it out",
    ]
    assert not world.store.folder("text").exists()
    world.states("tracking.with=[aim]")  # status needs no tracker


def test_accelerates_names_are_ours():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    from pipeline.trackers.kinds import OPENERS

    assert set(NAMES) == set(PACKAGES) == set(OPENERS) == set(LOGGER_TYPE_TO_CLASS) and is_installed("wandb")


@pytest.mark.parametrize(
    "words, trackers, mode",
    [
        ([], (), "online"),
        (["tracking.with=wandb"], ("wandb",), "online"),
        (["tracking.with=[mlflow,wandb]", "tracking.wandb=offline"], ("mlflow", "wandb"), "offline"),
        (["tracking.wandb=offline"], ("wandb",), "offline"),
        (["tracking.wandb=off"], (), "online"),
    ],
)
def test_wandb_of_older_configs_is_one_of_the_trackers(world, monkeypatch, words, trackers, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    world.overrides = words
    tracking = world.load().tracking
    assert (tracking.trackers, tracking.wandb_mode) == (trackers, mode)
    assert "with" in tracking.model_dump(mode="json") and "with_" not in tracking.model_dump()


def test_wandbs_own_variable_says_the_mode_where_the_config_does_not(world, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    world.overrides = ["tracking.with=wandb"]
    assert world.load().tracking.wandb_mode == "offline"
    world.overrides = ["tracking.with=wandb", "tracking.wandb=online"]
    assert world.load().tracking.wandb_mode == "online"


@pytest.mark.parametrize(
    "words, line",
    [
        (
            ["tracking.with=[tensorbord]"],
            "tracking.with.0: the string \"tensorbord\"; should be 'tensorboard', 'wandb'",
        ),
        (["tracking.with=[wandb]", "tracking.wandb=off"], "tracking.wandb: off, and tracking.with names wandb;"),
        (["tracking.options={aim: {x: 1}}"], "tracking.options.aim: aim is not in tracking.with;"),
        (["tracking.with=[wandb]", "tracking.options={wandb: {id: a}}"], "tracking.options.wandb.id: is set from the"),
        (
            ["tracking.with=[comet_ml]", "tracking.options={comet_ml: {api_key: a}}"],
            "tracking.options.comet_ml.api_key: a config is copied into manifests and must hold no secret;",
        ),
        (
            ["tracking.with=[trackio]", "tracking.options={trackio: {server_url: 'http://me:pw@host'}}"],
            "tracking.options.trackio.server_url: a config is copied",
        ),
        (["tracking.wiht=[wandb]"], "tracking.wiht: unknown key; did you mean tracking.with?"),
        (["tracking.with_=[wandb]"], "tracking.with_: unknown key; did you mean tracking.with?"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(world, words, line):
    world.overrides = words
    with pytest.raises(UserError) as caught:
        world.load()
    assert any(line in found for found in caught.value.lines), caught.value.lines


def test_reasons_hold_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "abcdef123456")
    error = RuntimeError("401 for abcdef123456 at https://me:pass@host/x\nlong story")
    assert process.reason_of(error) == "401 for *** at https://***@host/x"
    assert process.reason_of(KeyError()) == "KeyError"


def test_the_process_is_one_of_a_kind(monkeypatch, tmp_path):
    """It has no rank, no GPU and one thread, and does not see Ctrl-C."""
    given = {}

    def popen(words, **options):
        given.update(options, words=words)
        raise OSError("enough")

    monkeypatch.setattr(subprocess, "Popen", popen)
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "1")
    relay.Relay().begin(TrackedRun(("wandb",), "a", "b", "small", "fit", "id", "p", wandb_mode="offline"))
    environment = given["env"]
    assert not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_FSDP"} & set(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == "" and environment["WANDB_MODE"] == "offline"
    assert given["start_new_session"]

"""The command: exit codes, one line a mistake, help, status, signals."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pipeline.errors import UserError
from tests.pipeline import fakes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rlhf(tmp_path, monkeypatch, capsys):
    """Return rlhf(words…), which runs in this process with the fake stages.

    It returns the exit code, stdout and stderr.
    """
    from pipeline import api, cli

    (tmp_path / "small.yaml").write_text(fakes.CONFIG)
    stages = fakes.stages()
    monkeypatch.setattr(api, "STAGES", tuple(stages))
    monkeypatch.setattr(api, "stages", lambda: stages)
    monkeypatch.setattr(api, "TESTS", ())
    monkeypatch.setattr(api, "experiment_class", lambda: fakes.experiment_class(stages))

    def run(*words, config="small.yaml"):
        code = cli.main([*words, *(["-c", config] if config else [])])
        out, err = capsys.readouterr()
        return code, out, err

    run.stages = stages
    return run


def test_run_and_run_again(rlhf):
    code, out, err = rlhf("run", "page", "fit.steps=3")
    assert (code, err) == (0, "") and "fit: done in" in out
    code, out, err = rlhf("run", "page", "--debug", "fit.steps=3")
    assert code == 0 and out.count("up to date") == 3
    code, out, err = rlhf("run", "page", "fit.steps=12")
    assert code == 0 and "fit: stale because fit.steps 3 → 12; running" in out


def test_artifacts_go_to_the_requested_folder(rlhf, tmp_path):
    assert rlhf("run", "text", "--artifacts", "elsewhere")[0] == 0
    assert (tmp_path / "elsewhere" / "small" / "text" / "manifest.json").exists()
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    "words, line",
    [
        ("run fit fit.stepz=3", "override fit.stepz=3: fit.stepz: unknown key; did you mean fit.steps?"),
        ("run fit fit.steps=x", 'override fit.steps=x: fit.steps: the string "x"; should be an integer'),
        ("run fit data.prompts=gone.jsonl", "override data.prompts=gone.jsonl: data.prompts: no such file"),
        ("run fit --only", "text: is missing; run it first, or leave out --only"),
        (
            "run fit --onyl",
            "command line: '--onyl' is neither a flag of `rlhf run` nor key=value; see `rlhf run --help`",
        ),
        ("run fit steps", "command line: 'steps' is neither a flag of `rlhf run` nor key=value; see `rlhf run --help`"),
        ("run fitt", "command line: argument stage: invalid choice: 'fitt'"),
        ("run", "command line: STAGE is missing; see `rlhf run --help`"),
        ("flatten", "command line: argument COMMAND: invalid choice: 'flatten'"),
        ("chat", "command line: the following arguments are required: --models"),
    ],
)
def test_a_users_mistake_is_exit_2_and_a_line(rlhf, words, line):
    code, out, err = rlhf(*words.split())
    assert code == 2 and err.startswith(f"error: {line}") and err.count("\n") == 1 and out == ""


def test_settings_may_stand_before_the_stage(rlhf):
    Path("a=b.yaml").write_text(Path("small.yaml").read_text())
    code, out, err = rlhf("run", "text.words=4", "--artifacts", "x=y", "-c", "a=b.yaml", "text", config=None)
    assert (code, err) == (0, "") and "words 4" in out and Path("x=y/small/text").is_dir()


def test_the_command_is_recorded_as_it_was_typed(rlhf):
    """What was up to date keeps the command that made it."""
    assert rlhf("run", "text")[0] == 0
    assert rlhf("run", "fit", "fit.steps=3", "--override-config", "name=small")[0] == 0
    made = {name: json.loads(Path(f"artifacts/small/{name}/manifest.json").read_text()) for name in ("text", "fit")}
    assert made["fit"]["command"] == "rlhf run fit fit.steps=3 --override-config name=small -c small.yaml"
    assert made["text"]["command"] == "rlhf run text -c small.yaml"


@pytest.mark.parametrize("words", ["doctor seed=1", "data check small.yaml seed=1", "run text seed=1"])
def test_a_setting_without_a_config_is_refused(rlhf, words):
    code, out, err = rlhf(*words.split(), config=None)
    assert (
        code == 2 and out == "" and err.startswith("error: command line: 'seed=1' is a setting, and no config is given")
    )


def test_missing_config(rlhf):
    assert rlhf("run", "fit", config=None)[0] == 2
    code, _, err = rlhf("status", config="none.yaml")
    assert code == 2 and err == "error: none.yaml: cannot be read (No such file or directory); should be a YAML file\n"


def test_training_that_stops_itself_is_exit_3(rlhf):
    code, _, err = rlhf("run", "fit", "fit.fail_at=2")
    assert code == 3 and err == "error: training stopped itself: the loss at step 2 is not finite\n"


def test_a_stop_is_exit_75(rlhf):
    def run(ctx):
        os.kill(os.getpid(), signal.SIGUSR1)
        return fakes.run_fit(ctx)

    fakes.change(rlhf.stages, "fit", run=run)
    code, _, err = rlhf("run", "fit")
    assert code == 75 and "stopped at step 1 of 12; run again to resume" in err
    code, out, _ = rlhf("status")
    assert code == 0 and "interrupted at step 1 of 12" in out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a caller gets its handlers back


TWO_LINES = "rows.jsonl:3: is no JSON; mend the line\nerror: rows.jsonl:4: is empty; remove it\n"


@pytest.mark.parametrize(
    "error, code, expected",
    [
        (UserError(["rows.jsonl:3: is no JSON; mend the line", "rows.jsonl:4: is empty; remove it"]), 2, TWO_LINES),
        (UserError("a: b; c"), 2, "a: b; c\n"),
        (OSError(28, "No space left on device", "/x/model"), 2, "/x/model: No space left on device ("),
        (OSError(13, "Permission denied", "/x"), 2, "/x: Permission denied; make it writable"),
        (SafetensorError("full (os error 28)"), 2, "artifacts/small/fit/.tmp-publish: No space left on device ("),
        (ConnectionError("no route\nto host"), 2, "the Hub: no route; check the id, the network"),
        (MemoryError(), 1, "out of memory; lower per_device_train_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (KeyError("oops"), 1, "unexpected KeyError: 'oops' (test_cli.py:"),
    ],
)
def test_what_a_stage_raises(rlhf, error, code, expected):
    def run(ctx):
        raise error

    fakes.change(rlhf.stages, "fit", run=run)
    got, _, err = rlhf("run", "fit")
    assert got == code and err.startswith(f"error: {expected}") and "Traceback" not in err
    got, _, err = rlhf("run", "fit", "--debug")
    assert got == code and "Traceback" in err


def test_the_hint_when_memory_runs_out_keeps_the_algorithm(rlhf):
    """The hint leaves the algorithm as it is, and says how to resume with another batch."""

    def run(ctx):
        raise MemoryError

    fakes.change(rlhf.stages, "fit", run=run)
    err = rlhf("run", "fit")[2]
    assert "mini_batch_size" not in err and "interrupted run add --override-config" in err and err.count("\n") == 1


def test_run_help(rlhf):
    code, out, _ = rlhf("run", "--help", config=None)
    assert code == 0 and "--override-config" in out and "exit codes" in out
    for words in (["run", "fit", "--help"], ["run", "--help", "fit"]):
        code, out, _ = rlhf(*words, config=None)
        assert code == 0
        for text in ("fit.learning_rate", "per step", "0.01", "of AdamW", "best | last", "mean squared error"):
            assert text in out
        for text in ("model.dtype", "checkpoints.every", "data.rankings", "launch.threads"):
            assert text in out
    assert rlhf("--help", config=None)[0] == 0


def test_help_into_a_pipe_that_nobody_reads_on(tmp_path):
    command = [sys.executable, "-m", "tests.pipeline.fakes", "run", "fit", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_status(rlhf, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    rlhf("run", "fit")
    code, out, _ = rlhf("status", "fit.learning_rate=0.5")
    lines = {line.split()[1]: line for line in out.splitlines() if line.startswith("│") and line.split()[1] != "│"}
    assert code == 0 and "done" in lines["text"] and "words 3" in lines["text"]
    assert "stale because fit.learning_rate 0.01 → 0.5" in lines["fit"] and "missing" in lines["page"]
    (Path("artifacts/small/text/words/all.json")).write_text("[]")
    assert "damaged: artifacts/small/text/words/all.json" in rlhf("status")[1].replace("\n", "")


def test_status_says_what_it_did_not_read(rlhf, monkeypatch):
    from pipeline.store import digests

    monkeypatch.setattr(digests, "TIMESTAMP_STEP", 0.0)
    rlhf("run", "text")
    time.sleep(0.02)
    rlhf("status")
    assert "1 file, 24 B: digests remembered, sizes and times unchanged; --verify reads all" in rlhf("status")[1]
    code, out, _ = rlhf("status", "--verify")
    assert code == 0 and "done" in out and "remembered" not in out


def test_status_folds_long_names_and_leaves_out_what_there_is_not(rlhf, monkeypatch):
    def run(ctx):
        (ctx.publish / ("x" * 60)).write_text("a")
        return {"words": None}

    fakes.change(rlhf.stages, "text", run=run)
    code, out, _ = rlhf("run", "text")
    assert code == 0 and "None" not in out and "words" not in out
    assert "words" not in rlhf("status")[1]
    Path("artifacts/small/text", "x" * 60).write_text("b")
    monkeypatch.setenv("COLUMNS", "60")
    out = "".join(line.split("│")[2].strip() for line in rlhf("status")[1].splitlines() if line.startswith("│"))
    assert "x" * 60 in out and "…" not in out


def test_a_world_that_no_stage_needs_is_not_missing(rlhf, monkeypatch):
    others = dict(rlhf.stages)
    rlhf.stages.clear()
    rlhf.stages.update({"world": fakes.stages()["text"], **others})
    assert "not needed: no data is the world's" in rlhf("status")[1]


def test_report_is_shown_after_a_run(rlhf):
    shown = []
    fakes.change(rlhf.stages, "page", show=lambda folder, console: shown.append(folder))
    rlhf("run", "page")
    rlhf("run", "page")
    rlhf("run", "fit")
    assert shown == [Path("artifacts/small/page")] * 2


def test_what_only_the_machine_knows(rlhf):
    code, _, err = rlhf("run", "text", "launch.device=cuda")
    assert code == 2 and err.startswith("error: launch.device: cuda, and torch sees no such GPU")


@pytest.mark.parametrize("hub, offline", [(False, "1"), (True, None)])
def test_libraries_stay_offline_unless_a_hub_id_is_named(rlhf, monkeypatch, hub, offline):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    rlhf("run", "text", *(["data.prompts=org/name"] if hub else []))
    assert os.environ.get("HF_HUB_OFFLINE") == offline
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1" and os.environ["WANDB_MODE"] == "disabled"


def start(folder, *words):
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, **pipes)


def wait_for(process, text):
    for line in process.stdout:
        if line.startswith(text):
            return
    raise AssertionError(f"{text} never came; {process.stderr.read()}")


def end(process, code):
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err, err
    return out, err


def outputs(folder):
    manifest = json.loads((folder / "small" / "fit" / "manifest.json").read_text())
    return {path: facts["sha256"] for path, facts in manifest["outputs"].items()}


def test_a_signal_and_a_kill_end_in_the_same_bytes(rlhf, tmp_path):
    """After SIGTERM (75, with a checkpoint) and kill -9, the next run resumes.

    The bytes are those of an undisturbed run.
    """
    assert rlhf("run", "fit", "--artifacts", "straight")[0] == 0
    command = ["-m", "tests.pipeline.fakes", "run", "fit", "-c", "small.yaml", "--artifacts", "hit", "fit.pause=0.1"]
    folder = tmp_path / "hit" / "small" / "fit"

    first = start(tmp_path, *command)
    wait_for(first, "step 2")
    first.send_signal(signal.SIGTERM)
    assert end(first, 75)[1].endswith("of 12; run again to resume\n")
    assert not (folder / "manifest.json").exists() and (folder / "run.json").exists()

    second = start(tmp_path, *command)
    wait_for(second, "step 9")
    second.send_signal(signal.SIGKILL)
    end(second, -signal.SIGKILL)
    assert not (folder / "manifest.json").exists()

    assert "resuming from step 8" in end(start(tmp_path, *command), 0)[0]
    assert outputs(tmp_path / "hit") == outputs(tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_kills_at_once(tmp_path, number):
    code = (
        "import time\n"
        "from pipeline.launch.signals import stop_on_signals\n"
        "from pipeline.stage import StopFlag\n"
        "with stop_on_signals(StopFlag()):\n"
        "    print('ready', flush=True)\n"
        "    for _ in range(600): time.sleep(0.1)\n"
    )
    process = start(tmp_path, "-c", code)
    wait_for(process, "ready")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    assert process.stderr.readline() + process.stderr.readline() == (
        "\nstopping after this step and saving; send the signal again to stop at once\n"
    )
    assert process.poll() is None
    process.send_signal(number)  # the first of its kind: a queue that warned by SIGUSR1 ends the job with SIGTERM
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(number)
    end(process, -number)


def test_torch_is_imported_after_the_handlers_stand():
    modules = "pipeline.commands, pipeline.plan, pipeline.launch.environment"
    code = f"import sys; import {modules}; sys.exit('torch' in sys.modules)"
    end(start(ROOT, "-c", code), 0)


ARTIFACTS = "artifacts/small/text"


def test_clean_says_what_it_removes_and_removes_only_that(rlhf, tmp_path):
    rlhf("run", "text")
    Path("artifacts/other").mkdir()
    code, out, err = rlhf("clean", "--yes")
    assert (code, err) == (0, "") and out.startswith("removing artifacts/small (") and out.endswith("): text\n")
    assert [path.name for path in Path("artifacts").iterdir()] == ["other"]
    assert rlhf("clean", "--yes")[:2] == (0, "artifacts/small: nothing there\n")


def test_clean_removes_nothing_without_a_terminal(rlhf):
    rlhf("run", "text")
    code, out, err = rlhf("clean")
    assert code == 2 and out == "" and err.startswith("error: artifacts/small (") and err.count("\n") == 1
    assert "there is no terminal to confirm this on: --yes (make: YES=1) removes it" in err
    assert Path(ARTIFACTS, "manifest.json").exists()


def at_a_terminal(folder, typed, *words):
    """Run the command at a terminal and answer its question.

    Returns:
        The exit code, and the output before and after the answer.
    """
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "tests.pipeline.fakes", *words, "-c", "small.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    before, after = b"", b""
    while b"[y/N] " not in before:
        before += os.read(leader, 1000)
    os.write(leader, f"{typed}\n".encode())
    with contextlib.suppress(OSError):  # the other end is closed
        while more := os.read(leader, 1000):
            after += more
    os.close(leader)
    return process.wait(60), before.decode(errors="replace"), after.decode(errors="replace")


@pytest.mark.parametrize("typed, removed", [("y", True), ("n", False), ("", False)])
def test_clean_asks_at_a_terminal(rlhf, tmp_path, typed, removed):
    rlhf("run", "text")
    code, asked, _ = at_a_terminal(tmp_path, typed, "clean")
    assert code == 0 and "artifacts/small (" in asked and "): text" in asked
    assert Path(ARTIFACTS).exists() is not removed


@pytest.mark.parametrize(
    "text, line",
    [
        (None, "small.yml: cannot be read (No such file or directory); should be a YAML file"),
        ("seed: 1\n", "small.yml: name: is missing; should be a string: it names the experiment's folder"),
        ("name:\n", "small.yml:1: name: is missing; should be a string: it names the experiment's folder"),
        ("name: 3\n", "small.yml:1: name: 3; should be a string: it names the experiment's folder"),
        ("name: ..\n", "small.yml:1: name: '..' cannot name a folder; use letters, digits, "),
        ("name: ''\n", "small.yml:1: name: '' cannot name a folder; use letters, digits, "),
        ("name: a/../..\n", "small.yml:1: name: 'a/../..' cannot name a folder; use letters, digits, "),
    ],
)
def test_clean_with_a_config_that_names_nothing_removes_nothing(rlhf, text, line):
    rlhf("run", "text")
    if text is not None:
        Path("small.yml").write_text(text)
    code, out, err = rlhf("clean", config="small.yml")
    assert code == 2 and out == "" and err.startswith(f"error: {line}") and err.count("\n") == 1
    assert Path(ARTIFACTS, "manifest.json").exists()


def test_clean_refuses_what_is_held_and_what_is_not_its_own(rlhf, tmp_path):
    rlhf("run", "text")
    Path("artifacts/small/notes").mkdir()
    code = "import sys, time; from pipeline.store.artifacts import ArtifactStore\n"
    code += "with ArtifactStore('artifacts', 'small').lock('text'): print('held', flush=True); time.sleep(60)\n"
    other = start(tmp_path, "-c", code)
    try:
        wait_for(other, "held")
        code, out, err = rlhf("clean")
    finally:
        other.kill()
        other.communicate()
    assert (
        code == 2
        and out == ""
        and err.splitlines()[0]
        == ("error: artifacts/small/notes: does not belong to any stage; move it away, then clean")
    )
    assert err.splitlines()[1].startswith(f"error: {ARTIFACTS}: process {other.pid} on ")
    assert Path(ARTIFACTS, "manifest.json").exists()


def test_clean_holds_what_it_removes(rlhf, monkeypatch):
    """A run that starts after the check of the locks is refused, or the clean is."""
    from pipeline.store import artifacts

    def full(*_):
        raise OSError(28, "No space left on device")

    rlhf("run", "fit", "fit.steps=2")
    names, rename, held = ("text", "fit"), os.rename, []

    def look(source, target):
        other = artifacts.ArtifactStore("artifacts", "small")
        held.extend(name for name in names if other.is_held(name))
        rename(source, target)

    with artifacts.ArtifactStore("artifacts", "small").lock("fit"), monkeypatch.context() as patch:
        patch.setattr(artifacts.ArtifactStore, "is_held", lambda *_: False)
        code, out, err = rlhf("clean", "--yes")
    assert code == 2 and out == "" and f"process {os.getpid()} on " in err and Path(ARTIFACTS, "manifest.json").exists()
    Path("artifacts/.tmp-small/half").mkdir(parents=True)  # what a clean left that was killed
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        patch.setattr(os, "rename", look)
        assert rlhf("clean", "--yes")[0] == 0
    assert held == ["text", "fit"] and list(Path("artifacts").iterdir()) == []


def test_more_processes_than_gpus(monkeypatch):
    import torch

    from pipeline.launch.processes import join

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_PORT": "1"}
    for name, value in (place | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        join(3, 1.0)
    what = "3 processes on a machine with 2 GPU(s); use at most one per GPU"
    assert caught.value.lines == [f"launch.processes: {what}"]


def test_make_clean_artifacts_with_a_mistyped_config_removes_nothing(tmp_path):
    (tmp_path / "artifacts" / "small").mkdir(parents=True)
    (tmp_path / "nameless.yaml").write_text("seed: 1\n")
    for config in ("tinny.yaml", "nameless.yaml"):
        words = ["make", "-s", "-C", ROOT, "-o", ".venv/.installed", "clean-artifacts"]
        words += [f"CONFIG={tmp_path / config}", f"ARTIFACTS={tmp_path / 'artifacts'}"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path / config}: ")
        assert (tmp_path / "artifacts" / "small").is_dir()


@pytest.mark.parametrize(
    "words, tests, settings",
    [
        (["--lm-eval", "a, b", "--limit", "5"], ["lm_eval"], ['lm_eval.tasks=["a", "b"]', "lm_eval.limit=5"]),
        (["--lm-eval", "--num-fewshot", "2"], ["lm_eval"], ["lm_eval.num_fewshot=2"]),
        (["--reward-bench", "a=b.jsonl"], ["reward_bench"], ['reward_bench.data="a=b.jsonl"']),
        (["--harmful", "7", "x.y=3"], ["refusals"], ['refusals.harmful="7"', "x.y=3"]),
        (["--refusals", "--lm-eval", "a"], ["lm_eval", "refusals"], ['lm_eval.tasks=["a"]']),
        ([], [], []),
    ],
)
def test_flags_of_evaluate_are_settings(words, tests, settings):
    from pipeline.cli import parse

    arguments = parse(["evaluate", *words, "-c", "small.yaml"])
    assert (arguments.tests, arguments.overrides) == (tests, settings)


def test_a_flag_without_its_test_is_refused(capsys):
    from pipeline.cli import main

    assert main(["evaluate", "--limit", "5", "-c", "small.yaml"]) == 2
    assert "--limit does nothing without --lm-eval" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "-c CONFIG is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["rank", "--tasks-only"], ["rank", "--export", "x"], ["playground", "--export", "x"]]
)
def test_new_tokens_for_no_page_are_refused(words, capsys):
    from pipeline.cli import main

    assert main([*words, "--new-tokens", "-c", "small.yaml"]) == 2
    assert f"--new-tokens does nothing with {words[1]}" in capsys.readouterr().err

"""Test tracking: journals without times, rewinding, progress lines."""

import json
from types import SimpleNamespace

import numpy
import torch
from rich.console import Console

from pipeline import tracking
from pipeline.tracking import Tracker, format_number, json_value


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_plain_json_with_step_first(tmp_path):
    tracker = Tracker(tmp_path, "ppo")
    tracker.log(1, {"loss": torch.tensor(0.1), "count": numpy.int64(3), "lr": 1e-5})
    tracker.log(2, {"loss": float("nan"), "kl": torch.tensor(float("inf")), "low": -float("inf")})
    tracker.evaluation(2, {"accuracy": 0.5})
    tracker.samples(2, [{"prompt": "é\n", "response": "b"}, {"prompt": "c", "response": "d", "score": 1.0}])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before closing: each row is flushed at once
    assert lines[0] == '{"step": 1, "loss": 0.10000000149011612, "count": 3, "lr": 1e-05}'
    assert lines[1] == '{"step": 2, "loss": "NaN", "kl": "Infinity", "low": "-Infinity"}'
    assert rows(tmp_path / "evaluations.jsonl") == [{"step": 2, "accuracy": 0.5}]
    assert rows(tmp_path / "samples.jsonl")[0] == {"step": 2, "prompt": "é\n", "response": "b"}
    tracker.close()


def test_rewind_drops_later_rows_and_an_incomplete_line(tmp_path):
    tracker = Tracker(tmp_path, "ppo")
    for step in range(1, 6):
        tracker.log(step, {"loss": 1.0})
        tracker.samples(step, [{"prompt": "a"}, {"prompt": "b"}])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    tracker.rewind(3)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(rows(tmp_path / "samples.jsonl")) == 6
    for step in (4, 5):
        tracker.log(step, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    tracker.rewind(-1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"" and sorted(tmp_path.glob(".tmp*")) == []
    Tracker(tmp_path / "new", "ppo").rewind(3)  # without files, there is nothing to do


def test_values_and_numbers():
    assert json_value({1: (numpy.float32(0.5), True, None, "x")}) == {"1": [0.5, True, None, "x"]}
    assert (
        format_number(0.123456) == "0.123"
        and format_number(12345.6) == "1.23e+04"
        and format_number(1e-5) == "1.00e-05"
    )
    assert (
        format_number(1500.4) == "1500"
        and format_number(3) == "3"
        and format_number(float("nan")) == "NaN"
        and format_number(0.0) == "0"
    )


def test_progress_is_quiet_when_nobody_watches(tmp_path, capsys):
    console = Console(force_terminal=False, width=100)
    with Tracker(tmp_path, "ppo", console=console).progress(1000, "updates") as progress:
        for step in range(1, 1001):
            progress.update(step, loss=0.5)
    assert len(capsys.readouterr().out.splitlines()) <= 1  # at most one line per second


class Clock:
    """Replace time.monotonic by a clock that the test sets."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(tracking.time, "monotonic", lambda: self.now)


def lines_of(clock, seconds, total, start=0, wait=0.0, every=1):
    """Return the progress lines of a run.

    Args:
        clock: the clock to advance.
        seconds: what each step takes.
        total: the number of steps.
        start: steps done before.
        wait: seconds before the first step.
    """
    said = []
    console = SimpleNamespace(is_terminal=False, print=lambda line, **_: said.append(line))
    with tracking.ProgressLine(console, total, "sft", start) as progress:
        clock.now += wait
        for step in range(start + 1, total + 1):
            clock.now += seconds
            progress.update(step, loss=1.6789)
    return said


def test_progress_lines_have_elapsed_and_remaining_time(monkeypatch):
    said = lines_of(Clock(monkeypatch), 0.1, 900)
    assert said[0] == "sft: 51/900 loss 1.68 · 5 s · about 80 s left", "as soon as a few seconds tell"
    assert said[1].startswith("sft: 141/900 loss 1.68 · 14 s · about 80 s left") and len(said) == 10
    assert said[-1].startswith("sft: 861/900") and said[-1].endswith(" · 86 s · about 4 s left")


def test_time_before_the_first_step_does_not_count_for_the_pace(monkeypatch):
    """Loading, compiling and the first held-out evaluation come before it."""
    said = lines_of(Clock(monkeypatch), 10.0, 12, wait=600.0)
    assert said[1] == "sft: 3/12 loss 1.68 · 10 min 30 s · about 1 min 30 s left"


def test_a_resumed_run_counts_its_own_steps(monkeypatch):
    said = lines_of(Clock(monkeypatch), 10.0, 100, start=90)
    assert said[0] == "sft: 92/100 loss 1.68 · 20 s · about 80 s left"
    assert said[-1] == "sft: 98/100 loss 1.68 · 80 s · about 20 s left"


def test_long_runs_print_fewer_lines(monkeypatch):
    said = lines_of(Clock(monkeypatch), 10.0, 8640)  # a day
    assert 280 < len(said) < 500 and said[2].endswith(" · 80 s · about 23 h 59 min left")


def test_a_line_names_its_stage_once(tmp_path, capsys):
    tracker = Tracker(tmp_path, "dpo", console=Console(force_terminal=False, width=100))
    assert tracker.progress(3, "dpo").description == "dpo"
    assert tracker.progress(3, "dpo reference").description == "dpo: reference"


def test_times_are_in_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "memory_gb", lambda: 1.25)
    tracker = Tracker(tmp_path, "sft")
    tracker.log(1, {"loss": 1.0}, 0.5, 1000)
    tracker.log(2, {"loss": 0.5}, 0.25, 1000)
    tracker.log(3, {"loss": 0.5})
    times = {"seconds": 0.5, "tokens": 1000, "tokens_per_second": 2000.0, "memory_gb": 1.25}
    assert rows(tmp_path / "timing.jsonl")[0] == {"step": 1, **times} and set(times) == set(tracking.TIMES)
    assert [row["step"] for row in rows(tmp_path / "timing.jsonl")] == [1, 2]
    assert rows(tmp_path / "metrics.jsonl")[0] == {"step": 1, "loss": 1.0}
    tracker.rewind(1, owes_evaluation=True)
    assert [row["step"] for row in rows(tmp_path / "timing.jsonl")] == [1]


def test_memory_is_that_of_this_process(monkeypatch):
    import resource

    before = tracking.memory_gb()
    assert abs(before - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9) < 0.01
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_250_000_000)
    assert tracking.memory_gb() == 5.25


def test_peak_memory_is_measured_per_stage(tmp_path, monkeypatch):
    """The stages of one command share a process, and so the GPU's peak memory."""
    held = {"peak": 40e9}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=3e9))
    tracker = Tracker(tmp_path, "dpo")
    tracker.log(1, {"loss": 1.0}, 0.5, 1000)
    assert rows(tmp_path / "timing.jsonl")[0]["memory_gb"] == 3.0


def test_times_are_there_before_the_metrics(tmp_path):
    """A tracker that sees a row of metrics.jsonl finds its times."""
    seen = []
    tracker = Tracker(tmp_path, "sft")
    append = tracker._append
    tracker._append = lambda name, new: (seen.append(name), append(name, new))
    tracker.log(1, {"loss": 1.0}, 0.5, 100)
    assert seen == ["timing.jsonl", "metrics.jsonl"]


def test_progress_draws_a_bar_on_a_terminal(tmp_path, capsys):
    console = Console(force_terminal=True, width=100)
    with Tracker(tmp_path, "ppo", console=console).progress(10, "updates") as progress:
        progress.update(5, loss=0.25)
    assert "ppo: updates" in capsys.readouterr().out

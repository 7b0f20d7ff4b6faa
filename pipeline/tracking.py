"""Record what happens while a stage runs: journals and progress, and trackers that are asked for.

metrics.jsonl, evaluations.jsonl and samples.jsonl contain no time of day, so that a run that was
interrupted and resumed writes the same bytes as one that was not. Times and memory are in
timing.jsonl, which is published beside them and is not part of the artifact's digest.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.launch import devices
from pipeline.store import files
from pipeline.trackers.relay import FINISH_SECONDS, LEAVE_SECONDS, Relay
from pipeline.trackers.run import TrackedRun

JOURNALS = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
TIMING = "timing.jsonl"
TIMES = {  # the keys of a row of timing.jsonl besides `step`; trackers show them as `time/…`
    "seconds": "of the step: forward, backward and update (ppo: sampling too), without evaluation and checkpoints",
    "tokens": "in the step's batch, without padding, over all processes (ppo: of its episodes, prompts included)",
    "tokens_per_second": "tokens / seconds",
    "memory_gb": "peak memory of rank 0 in 10⁹ bytes: of the GPU since the stage began (of Apple's, what torch holds), "
    "or without a GPU of the process since the command began",
}


def json_value(value: Any) -> Any:
    """Convert a value to what JSON can hold.

    0-d tensors and numpy scalars become numbers. NaN and infinities become strings, since JSON has
    no numbers for them. Keys become strings, tuples lists.
    """
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if not isinstance(value, float) and hasattr(value, "item"):
        return json_value(value.item())
    value = float(value)
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


class Tracker:
    """The journals of one run of one stage, and what people see: lines, progress, trackers."""

    def __init__(
        self,
        folder: Path,
        stage: str,
        tracked: TrackedRun | None = None,
        console: Console | None = None,
        writes: bool = True,
        relay: Relay | None = None,
    ):
        """Open a tracker; journals are created by their first row.

        Args:
            folder: where the journals are.
            stage: the stage's name.
            tracked: what trackers are told of the run; None for journals only.
            console: where lines and progress go.
            writes: False on every rank but 0, which write no journals.
            relay: the command's way to its trackers; None for journals only.
        """
        self.writes = writes
        self.folder, self.stage = Path(folder), stage
        self.console = console or Console()
        reset_peak_memory()
        self._open: dict[str, IO[str]] = {}  # journals that have been written to, by file name
        self._tracked, self._relay = tracked, relay
        self._begun = False  # whether trackers have been told of the run
        self.tracker_run_id: str | None = None  # the run's id in trackers, once one of them has all of it

    # -- journals ---------------------------------------------------------------------------------

    def log(self, step: int, metrics: dict[str, Any], seconds: float | None = None, tokens: int | None = None) -> None:
        """Write rows of metrics.jsonl and timing.jsonl for one optimizer step (PPO: one update).

        Args:
            step: the step's number.
            metrics: its figures, without any time.
            seconds: how long it took; None for no row in timing.jsonl.
            tokens: in its batch, over all processes.
        """
        if seconds is not None:  # written first: trackers show both as one row, when they see the metrics
            times = {
                "seconds": round(seconds, 4),
                "tokens": tokens,
                "tokens_per_second": round((tokens or 0) / max(seconds, 1e-9), 1),
                "memory_gb": memory_gb(),
            }
            self._append(TIMING, [{"step": step, **times}])
        self._append("metrics.jsonl", [{"step": step, **metrics}])

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Write a row of evaluations.jsonl.

        Args:
            step: the steps done before this held-out evaluation.
            metrics: its figures.
        """
        self._append("evaluations.jsonl", [{"step": step, **metrics}])

    def samples(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows of samples.jsonl.

        Args:
            step: the steps done before they were generated.
            rows: {prompt, response, score?, kl?, gold?}.
        """
        self._append("samples.jsonl", [{"step": step, **row} for row in rows])

    def rewind(self, step: int, owes_evaluation: bool = False) -> None:
        """Drop the rows that a resumed run will write again.

        Args:
            step: the step of the checkpoint that it resumes from; -1 drops all rows.
            owes_evaluation: the held-out evaluation at `step` was cut short and will be repeated;
                what it wrote is dropped too.
        """
        self.close_journals()
        for name in (*JOURNALS, TIMING):
            path = self.folder / name
            if not path.exists():
                continue
            last = step
            if owes_evaluation and name in ("evaluations.jsonl", "samples.jsonl"):
                last = step - 1
            kept = []
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # a kill cut the line in two
                if line.endswith(b"\n") and row["step"] <= last:
                    kept.append(line)
            staged = path.with_name(f".tmp-{name}")
            with files.name_in_errors(staged), open(staged, "wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
            files.fsync_folder(self.folder)

    def sync(self) -> None:
        """Force the journals to disk, before a checkpoint is saved that relies on their rows."""
        for file in self._open.values():
            with files.name_in_errors(Path(file.name)):
                os.fsync(file.fileno())

    def close_journals(self) -> None:
        """Close the journals; the next row opens them again."""
        for file in self._open.values():
            with files.name_in_errors(Path(file.name)):  # closing writes what is left in the buffer
                file.close()
        self._open.clear()

    def close(self, finished: bool = True) -> None:
        """Force the journals to disk, close them, and wait until trackers have all rows.

        Args:
            finished: whether the stage has done its work. Otherwise trackers get less time: a run
                that is resumed catches up there.
        """
        self.sync()
        self.close_journals()
        if finished and (self.folder / "metrics.jsonl").exists():
            self._begin()  # a run that was resumed after its last row
        if self._begun and self._relay is not None and self._tracked is not None:
            all_sent = self._relay.finish(FINISH_SECONDS if finished else LEAVE_SECONDS)
            self.tracker_run_id = self._tracked.run_id if all_sent else None

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Append rows to a journal and flush them, so that a kill of this process loses none."""
        if not self.writes:
            return
        if name not in self._open:
            path = self.folder / name
            self._open[name] = open(path, "a", encoding="utf-8")  # noqa: SIM115 (`close_journals` closes it)
        with files.name_in_errors(self.folder / name):
            for row in rows:
                self._open[name].write(json.dumps(json_value(row), ensure_ascii=False, allow_nan=False) + "\n")
            self._open[name].flush()
        self._begin()
        if self._relay is not None:
            self._relay.heed()

    def _begin(self) -> None:
        """Tell trackers of the run, once: the run of a stage without rows is in none of them."""
        if not self._begun and self._relay is not None and self._tracked is not None and self._tracked.names:
            self._begun = True
            self._relay.begin(self._tracked)

    # -- lines and progress -----------------------------------------------------------------------

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def progress(self, total: int, description: str, start: int = 0) -> "ProgressLine":
        """Return a context manager whose `update(step, **figures)` shows progress.

        Args:
            total: the number of steps.
            description: what is counted; the stage's name is put before it.
            start: steps done before, by the run that is resumed.
        """
        detail = description.removeprefix(self.stage).strip()
        return ProgressLine(self.console, total, f"{self.stage}: {detail}" if detail else self.stage, start)


class ProgressLine:
    """Progress of a stage: a bar on a terminal, otherwise a line now and then.

    A line has the time so far and the time left. There is one at every tenth of the steps, one as
    soon as the first steps show how long it will take, and otherwise two per minute (fewer when it
    takes hours), but never more than one per second.
    """

    def __init__(self, console: Console, total: int, description: str, start: int):
        """Describe what will be shown.

        Args:
            console: where it is shown.
            total: the number of steps.
            description: what is counted.
            start: steps done before.
        """
        self.console, self.total, self.description, self.step = console, total, description, start
        self._bar: Progress | None = None
        self._began = self._printed_at = time.monotonic()
        self._start = self._printed_step = start
        self._first: tuple[int, float] | None = None  # the step that was done first, and when

    def __enter__(self) -> "ProgressLine":
        if self.console.is_terminal:
            columns = [
                TextColumn("{task.description}"),
                BarColumn(bar_width=24 if self.console.width >= 80 else 8),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            ]
            if self.console.width >= 60:
                columns.append(TextColumn("{task.fields[figures]}", style="dim"))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(self.description, total=self.total, completed=self.step, figures="")
            self._bar.start()
        return self

    def update(self, step: int, **figures: Any) -> None:
        """Show that `step` of `total` steps are done.

        Args:
            step: the steps done, those before `start` included.
            figures: numbers to show beside it.
        """
        self.step, now = step, time.monotonic()
        left = self._seconds_left(step, now)
        text = " ".join(f"{name} {format_number(value)}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
            return
        waited, elapsed = now - self._printed_at, now - self._began
        is_tenth = step - self._printed_step >= max(self.total / 10, 1) and waited >= 1
        is_first = self._printed_step == self._start and step - self._start >= 2 and elapsed >= 5
        if is_tenth or is_first or waited >= min(300, max(30, elapsed / 20)):
            line = f"{self.description}: {step}/{self.total} {text}".rstrip() + f" · {format_duration(elapsed)}"
            if left is not None and step < self.total:
                line += f" · about {format_duration(round_estimate(left))} left"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._printed_step, self._printed_at = step, now

    def _seconds_left(self, step: int, now: float) -> float | None:
        """Estimate the remaining seconds; None before there is anything to estimate from.

        The pace is measured from the first finished step on: loading and compiling come before it.
        """
        if self._first is None:
            self._first = (step, now)
            return (now - self._began) / (step - self._start) * (self.total - step) if step > self._start else None
        first_step, first_time = self._first
        return (now - first_time) / (step - first_step) * (self.total - step) if step > first_step else None

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def format_duration(seconds: float) -> str:
    """Format a duration for people: 12 s, 1 min 50 s, 2 h 10 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def round_estimate(seconds: float) -> float:
    """Round an estimate to whole seconds below 20, then to multiples of 5, 10 or 60."""
    if seconds < 20:
        unit = 1
    elif seconds < 60:
        unit = 5
    elif seconds < 600:
        unit = 10
    else:
        unit = 60
    return max(1.0, round(seconds / unit) * unit)


def format_number(value: Any) -> str:
    """Format a number for people, with three significant digits."""
    value = json_value(value)
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.2e}"


def reset_peak_memory() -> None:
    """Start measuring the GPU's peak memory again: the stages of one command share a process."""
    if (kind := devices.in_use()) != "cpu":
        devices.reset_peak(kind)


def memory_gb() -> float:
    """Return the peak memory of this process in 10⁹ bytes.

    On a GPU it is the GPU's since `reset_peak_memory`, otherwise the main memory since the process
    began.
    """
    kind = devices.in_use()
    held = None if kind == "cpu" else devices.peak(kind)
    if held is not None:
        return round(held / 1e9, 3)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes on macOS, elsewhere in KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)

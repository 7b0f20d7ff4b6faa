"""What a stage tells the world while it runs: journals (the truth), progress, samples, and wandb where it is
asked for.

metrics.jsonl, evaluations.jsonl and samples.jsonl hold no time of day, so that a run that was stopped and
went on writes the same bytes as one that was not. What the clock and the memory say of a step is in timing.jsonl, which
is published beside them and is no part of the artifact's digest.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.store import files

INIT_SECONDS = 8.0  # for wandb's first answer; WANDB_INIT_TIMEOUT says otherwise
FINISH_SECONDS = 60.0  # for the rest of a stage's figures to go there
JOURNALS = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
TIMING = "timing.jsonl"
TIMES = {  # what a row of it holds beside `step`; wandb gets them as `time/…`
    "seconds": "of the step, forward, backward and update (ppo: sampling too), without evaluation and checkpoints",
    "tokens": "of the step's batch, padding not counted, in all processes (ppo: of its episodes, prompts included)",
    "tokens_per_second": "tokens / seconds",
    "memory_gb": "the most that the first process has held so far: of a GPU's memory since the stage began, or without "
    "one of the machine's since the command did",
}


def plain(value: Any) -> Any:
    """A value as JSON holds it: 0-d tensors and numpy scalars become numbers; NaN and infinities become
    strings, because JSON has no words for them."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if not isinstance(value, float) and hasattr(value, "item"):
        return plain(value.item())
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


@dataclass
class Dashboard:
    """wandb, as far as one command has it: what fails once, or does not answer in time, is not tried again by the
    command's other stages."""

    lost: bool = False

    def attempt(self, call: Callable[[], Any], seconds: float) -> Any:
        """Return call(), which a network may hold for ever; TimeoutError after so many seconds. An error that comes
        later is nobody's any more."""
        found: dict[str, Any] = {}

        def run() -> None:
            try:
                found["value"] = call()
            except BaseException as error:  # told below, in the thread that asked
                found["error"] = error

        thread = threading.Thread(target=run, daemon=True, name="wandb")
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        if "error" in found:
            raise found["error"]
        return found["value"]

    def lose(self, error: BaseException) -> None:
        """Say once that there is no wandb any more."""
        if self.lost:
            return
        self.lost = True
        first = str(error).strip().splitlines()
        print(
            f"warning: wandb failed ({first[0] if first else type(error).__name__}); this command goes on without it, "
            f"and metrics.jsonl has all of it",
            file=sys.stderr,
        )


class Tracker:
    """The journals of one run of one stage in `folder`. `settings` is the section `tracking` (None = journals
    only); `dashboard`: the command's."""

    def __init__(
        self,
        folder: Path,
        stage: str,
        settings: Any = None,
        run_id: str = "",
        experiment: str = "",
        config: dict[str, Any] | None = None,
        console: Console | None = None,
        writes: bool = True,
        dashboard: Dashboard | None = None,
    ):
        self.writes = writes  # False in a process that helps another one, which writes
        self.folder, self.stage, self.run_id = Path(folder), stage, run_id
        self.console = console or Console()
        forget_peak()
        self._open: dict[str, Any] = {}
        self._dashboard = dashboard or Dashboard()
        self._wandb = None
        if settings is not None and settings.wandb != "off" and not self._dashboard.lost:
            self._start_wandb(settings, experiment, config)

    # -- journals ----------------------------------------------------------------------------------------

    def log(self, step: int, metrics: dict[str, Any], seconds: float | None = None, tokens: int | None = None) -> None:
        """Write what one optimizer step (PPO: one update) was like: a row of metrics.jsonl, and one of timing.jsonl.

        Args:
            step: its number.
            metrics: its figures, none of the clock.
            seconds: how long it took; None: there is no row of timing.jsonl.
            tokens: of its batch, in all processes.
        """
        self._append("metrics.jsonl", [{"step": step, **metrics}])
        times: dict[str, Any] = {}
        if seconds is not None:
            times = {"seconds": round(seconds, 4), "tokens": tokens}
            times |= {"tokens_per_second": round((tokens or 0) / max(seconds, 1e-9), 1), "memory_gb": memory_gb()}
            self._append(TIMING, [{"step": step, **times}])
        told = {key: value for key, value in metrics.items() if not isinstance(value, str)}
        self._to_wandb(told | {f"time/{key}": value for key, value in times.items()}, step)

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """One row of evaluations.jsonl: held-out figures after `step` steps."""
        self._append("evaluations.jsonl", [{"step": step, **metrics}])
        self._to_wandb({f"eval/{key}": value for key, value in metrics.items()}, step)

    def samples(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """Rows of samples.jsonl: {prompt, response, score?, kl?, gold?}."""
        rows = [{"step": step, **row} for row in rows]
        self._append("samples.jsonl", rows)
        if self._wandb is not None and rows:
            self._guard(lambda wandb: wandb.log({"samples": _wandb_table(wandb, rows)}, step=step))

    def rewind(self, step: int, owes_look: bool = False) -> None:
        """Drops every row after `step`: a run goes on from a checkpoint and writes those rows again. -1 drops
        all. owes_look: also what a held-out look at `step` wrote, which will be made again."""
        self.close_journals()
        for name in (*JOURNALS, TIMING):
            path = self.folder / name
            if not path.exists():
                continue
            kept, last = [], step - (owes_look and name in JOURNALS[1:])
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the line that a kill cut in two
                if line.endswith(b"\n") and row["step"] <= last:
                    kept.append(line)
            staged = path.with_name(f".tmp-{name}")
            with files.naming(staged), open(staged, "wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
            files.fsync_folder(self.folder)

    def sync(self) -> None:
        """Makes the journals durable; called before a checkpoint that stands on them."""
        for file in self._open.values():
            with files.naming(Path(file.name)):
                os.fsync(file.fileno())

    def close_journals(self) -> None:
        for file in self._open.values():
            with files.naming(Path(file.name)):  # what a full disk did not take is written once more
                file.close()
        self._open.clear()

    def close(self) -> None:
        self.sync()
        self.close_journals()
        if self._wandb is not None:
            self._guard(lambda wandb: self._dashboard.attempt(wandb.finish, FINISH_SECONDS))

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if not self.writes:
            return
        if name not in self._open:
            self._open[name] = open(self.folder / name, "a", encoding="utf-8")
        with files.naming(self.folder / name):
            for row in rows:
                self._open[name].write(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n")
            self._open[name].flush()

    # -- people ------------------------------------------------------------------------------------------

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def progress(self, total: int, description: str, start: int = 0) -> "ProgressLine":
        """A context manager whose `.update(step, **figures)` moves a bar, or prints a line now and then."""
        own = description.removeprefix(self.stage).strip()
        return ProgressLine(self.console, total, f"{self.stage}: {own}" if own else self.stage, start)

    # -- wandb: a convenience that must never stop training ----------------------------------------------

    def _start_wandb(self, settings: Any, experiment: str, config: dict[str, Any] | None) -> None:
        try:
            import wandb

            patience = float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_SECONDS))
            folder = self.folder.parent if self.folder.name != ".redo" else self.folder.parent.parent
            options = {
                "project": settings.project,
                "name": f"{experiment}/{self.stage}",
                "group": experiment,
                "id": self.run_id or None,
                "resume": "allow",
                "mode": settings.wandb,
                "dir": str(folder),
                "config": config,
                "settings": wandb.Settings(silent=True, console="off", init_timeout=patience),
            }
            self._dashboard.attempt(lambda: wandb.init(**options), 1.25 * patience)
            self._wandb = wandb
        except Exception as error:  # whatever a network or a service can do
            self._lose_wandb(error)

    def _to_wandb(self, metrics: dict[str, Any], step: int) -> None:
        if self._wandb is not None:
            self._guard(lambda wandb: wandb.log(metrics, step=step))

    def _guard(self, call: Any) -> None:
        try:
            call(self._wandb)
        except Exception as error:
            self._lose_wandb(error)

    def _lose_wandb(self, error: Exception) -> None:
        self._wandb = None
        self._dashboard.lose(error)

    @property
    def tracker_run_id(self) -> str | None:
        return self.run_id if self._wandb is not None else None


class ProgressLine:
    """A rich bar on a terminal; elsewhere a line with the time so far and the time left: at every tenth of the way, as
    soon as the first steps tell how long it will take, and else twice a minute (less often where it takes hours), but
    never more often than once a second."""

    def __init__(self, console: Console, total: int, description: str, start: int):
        self.console, self.total, self.description, self.step = console, total, description, start
        self._bar: Progress | None = None
        self._began = self._said_at = time.monotonic()
        self._start = self._said_step = start
        self._first: tuple[int, float] | None = None  # the step that was done first, and when

    def __enter__(self) -> "ProgressLine":
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24 if self.console.width >= 80 else 8),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                *[TextColumn("{task.fields[figures]}", style="dim")] * (self.console.width >= 60),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(self.description, total=self.total, completed=self.step, figures="")
            self._bar.start()
        return self

    def update(self, step: int, **figures: Any) -> None:
        """`step` of `total` is done; `figures` are shown beside it."""
        self.step, now = step, time.monotonic()
        left = self._left(step, now)
        text = " ".join(f"{name} {figure(value)}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
            return
        waited, elapsed = now - self._said_at, now - self._began
        tenth = step - self._said_step >= max(self.total / 10, 1) and waited >= 1
        first = self._said_step == self._start and step - self._start >= 2 and elapsed >= 5
        if tenth or first or waited >= min(300, max(30, elapsed / 20)):
            line = f"{self.description}: {step}/{self.total} {text}".rstrip() + f" · {duration(elapsed)}"
            line += f" · about {duration(roughly(left))} left" if left is not None and step < self.total else ""
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._said_step, self._said_at = step, now

    def _left(self, step: int, now: float) -> float | None:
        """Seconds until the end at the pace so far, without what came before the first step was done; None where no
        step tells."""
        if self._first is None:
            self._first = (step, now)
            return (now - self._began) / (step - self._start) * (self.total - step) if step > self._start else None
        first, at = self._first
        return (now - at) / (step - first) * (self.total - step) if step > first else None

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """A time as people say it: 12 s, 1 min 50 s, 2 h 10 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def roughly(seconds: float) -> float:
    """An estimate without the digits that it does not have: whole seconds below 20, then 5, 10 or 60 of them."""
    unit = 1 if seconds < 20 else 5 if seconds < 60 else 10 if seconds < 600 else 60
    return max(1.0, round(seconds / unit) * unit)


def on_gpu() -> Any:
    """torch, where this process computes on a GPU; otherwise None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None


def forget_peak() -> None:
    """Count the most of a GPU's memory from here on: the stages of one command share a process."""
    if (torch := on_gpu()) is not None:
        torch.cuda.reset_peak_memory_stats()


def memory_gb() -> float:
    """The most that this process has held, in GB: of the GPU's memory since `forget_peak` where it computes on one,
    otherwise of the machine's since it began."""
    if (torch := on_gpu()) is not None:
        return round(torch.cuda.max_memory_allocated() / 1e9, 3)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes there
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def figure(value: Any) -> str:
    """A number as people read it: three significant digits."""
    value = plain(value)
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.2e}"


def _wandb_table(wandb: Any, rows: list[dict[str, Any]]) -> Any:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return wandb.Table(columns=columns, data=[[str(row.get(column, "")) for column in columns] for row in rows])

"""Run two programs in turns on one machine and record the ratio of each pair of runs.

The order is A B B A …; one line a key is kept in results/NAME.jsonl. A driver (`run_bench`) starts
one long-lived worker process for each side (`Worker`). A worker answers JSON lines (`serve`) and
sleeps on its input between questions, so the measured process never shares the cores. This module
uses the standard library only, because it runs in every environment.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""The environment of a worker that measures the CPU."""


class Worker:
    """Start a worker process and put questions to it."""

    def __init__(self, name: str, command: list[str], log: Path, env: dict[str, str] | None = None):
        """Start the process.

        Args:
            name: Name of the worker in error messages.
            command: Command line of the process.
            log: File that stderr is appended to.
            env: Environment variables on top of the present ones.
        """
        self.name, self.log = name, log
        with log.open("a") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, **(env or {})},
            )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send one question and wait for its answer.

        Args:
            do: Name of the function in the worker.
            **arguments: Its keyword arguments, as JSON.

        Returns:
            What the function returned.

        Raises:
            RuntimeError: The function raised an error or the worker has died.
        """
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the worker has died; its last lines are read from the log below
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with exit code {self.process.wait()}"}
        if "error" in answer:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise RuntimeError(f"worker {self.name}, question {do}: {answer['error']}\n{tail}")
        return answer["ok"]

    def close(self) -> None:
        """End the worker by closing its input, and wait for it."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def serve(answers: dict[str, Callable]) -> None:
    """Answer questions from stdin until it is closed; this is the main loop of a worker.

    A question is one line `{"do": name, …}`, an answer one line `{"ok": …}` or `{"error": …}`.
    Whatever libraries print goes to stderr, since stdout belongs to the answers.

    Args:
        answers: Name → function that answers the question.
    """
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = {"ok": answers[question.pop("do")](**question)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        release_memory()
        stdout.write(json.dumps(answer) + "\n")
        stdout.flush()


def gpu() -> ModuleType | None:
    """Return torch.cuda if this process has imported torch and sees a GPU; otherwise None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def settle() -> None:
    """Wait until the GPU, if any, has finished its work; call it before reading a clock."""
    if (device := gpu()) is not None:
        device.synchronize()


def release_memory() -> None:
    """Give free memory back to the system.

    The other side runs next, and the peaks of both may not fit in memory together.
    """
    gc.collect()
    if (device := gpu()) is not None:
        device.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class Clock:
    """Print progress on stderr, with the minutes since the start."""

    def __init__(self, minutes: float):
        """Start the clock; `minutes` is the time budget of the run."""
        self.began, self.minutes = time.monotonic(), minutes

    @property
    def elapsed(self) -> float:
        """Return the minutes since the start."""
        return (time.monotonic() - self.began) / 60

    def say(self, text: str) -> None:
        """Print one line."""
        print(f"[{self.elapsed:5.1f} min] {text}", file=sys.stderr, flush=True)


class Stopwatch:
    """Measure a piece of work by both clocks: the wall's, and this process's on all its cores."""

    def __init__(self):
        """Start both clocks."""
        settle()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        """Return `seconds` and `cpu_seconds` since the start."""
        settle()
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


class Collections:
    """Count what a library's own calls of gc.collect and torch.cuda.empty_cache cost."""

    def __init__(self):
        """Wrap both functions for the rest of this process."""
        self.calls, self.seconds = 0, 0.0
        gc.collect = self._counted(gc.collect)
        if (device := gpu()) is not None:
            device.empty_cache = self._counted(device.empty_cache)

    def _counted(self, function: Callable) -> Callable:
        def wrapper(*args: Any) -> Any:
            settle()
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - began

        return wrapper

    def take(self) -> dict[str, float]:
        """Return `calls` and `seconds` since the last call, and start again from zero."""
        taken = {"calls": self.calls, "seconds": self.seconds}
        self.calls, self.seconds = 0, 0.0
        return taken


class Phases:
    """Measure the seconds spent in each phase.

    Times are exclusive: the time of an inner phase does not count for the outer one.
    """

    def __init__(self):
        self.seconds, self.stack, self.since = Counter(), [], 0.0

    @property
    def now(self) -> str | None:
        """Return the name of the innermost phase that is running; None outside of all phases."""
        return self.stack[-1] if self.stack else None

    def _book(self) -> None:
        """Add the time since the last call to the phase that is running."""
        settle()
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def enter(self, name: str) -> None:
        """Begin a phase inside the present one."""
        self._book()
        self.stack.append(name)

    def leave(self) -> None:
        """End the innermost phase."""
        self._book()
        self.stack.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run the body of a `with` statement as a phase."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, function: Callable, name: str | Callable) -> Callable:
        """Wrap a function so that its time counts for a phase.

        Args:
            function: The function to measure.
            name: Name of the phase, or a function of the same arguments that returns it.

        Returns:
            The wrapped function.
        """

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name if isinstance(name, str) else name(*args)):
                return function(*args, **kwargs)

        return wrapper

    def time_optimizer(self, optimizer: Any) -> None:
        """Measure each step of a torch optimizer as the phase `optimizer`."""
        optimizer.register_step_pre_hook(lambda *_: self.enter("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self.leave())

    def time_prefill(self, trunk: Any) -> None:
        """Measure the prefill of a trunk as the phase `prefill`.

        A forward pass counts as prefill when it runs inside the phase `decode` on more than one
        column of tokens.
        """
        is_prefill = []

        def before(_: Any, args: tuple, kwargs: dict) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            is_prefill.append(self.now == "decode" and ids is not None and ids.shape[-1] > 1)
            if is_prefill[-1]:
                self.enter("prefill")

        def after(*_: Any) -> None:
            if is_prefill.pop():
                self.leave()

        trunk.register_forward_pre_hook(before, with_kwargs=True)
        trunk.register_forward_hook(after)

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, and start again from zero."""
        taken, self.seconds = dict(self.seconds), Counter()
        return taken


def reset_peak() -> None:
    """Start measuring peak memory: the GPU's if there is one, otherwise resident memory (Linux)."""
    if (device := gpu()) is not None:
        return device.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the peak memory in bytes since `reset_peak`, weights and optimizer included."""
    if (device := gpu()) is not None:
        return device.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and the packages, and the GPU's name if there is one."""
    device = {} if gpu() is None else {"device": gpu().get_device_name(0)}
    return {"python": platform.python_version(), **{p: version(p) for p in packages}, **device}


def in_turns(pairs: int) -> Iterator[tuple[int, int]]:
    """Yield (pair, side) in the order in which the sides run: (0, A) (0, B) (1, B) (1, A) (2, A) …

    A is 0 and B is 1. Alternating means that a drift of the machine's speed affects both sides
    alike.
    """
    for pair in range(pairs):
        yield from ((pair, side) for side in ((0, 1) if pair % 2 == 0 else (1, 0)))


def run_pairs(
    a: Callable[[int], dict],
    b: Callable[[int], dict],
    pairs: int,
    report: Callable[[int, int, dict], None] | None = None,
) -> list[list[dict]]:
    """Call a(pair) and b(pair) in turns.

    Args:
        a: The first side, called with the index of the pair.
        b: The second side.
        pairs: Number of pairs.
        report: Called after each run with the pair, the side (0 or 1) and the answer.

    Returns:
        [answers of a, answers of b], each in the order of the pairs.
    """
    answers = [[None] * pairs, [None] * pairs]
    for pair, side in in_turns(pairs):
        answers[side][pair] = (a, b)[side](pair)
        if report is not None:
            report(pair, side, answers[side][pair])
    return answers


def ratio(values: list[float]) -> dict[str, float]:
    """Return the median, minimum and maximum of the pairs' ratios, and the number of pairs."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "pairs": len(values),
    }


def medians(dicts: list[dict[str, float]], digits: int = 4) -> dict[str, float]:
    """Return the median of each key over all dicts; a missing key counts as 0."""
    keys = dict.fromkeys(k for d in dicts for k in d)
    return {k: round(statistics.median(d.get(k, 0.0) for d in dicts), digits) for k in keys}


def machine() -> str:
    """Describe the machine: processor, cores, memory and GPUs."""
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        model = platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return ", ".join([platform.machine(), model, f"{len(os.sched_getaffinity(0))} cores", f"{memory:.0f} GiB", *gpus()])


def gpus() -> list[str]:
    """Return the names of the GPUs as nvidia-smi gives them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[:-1]


def stamp() -> dict[str, str]:
    """Return the commit, the machine and the date.

    The commit ends with "+" if tracked files other than the results have changed.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()

    dirty = "+" if git("status", "--porcelain", "--untracked-files=no", ":/", ":(exclude)results") else ""
    return {
        "commit": git("rev-parse", "--short", "HEAD") + dirty,
        "machine": machine(),
        "date": date.today().isoformat(),
    }


def save_row(row: dict, key: tuple[str, ...], path: Path) -> None:
    """Print a row and write it into a JSON Lines file.

    Args:
        row: The row.
        key: Names of the fields that identify a row. A line with the same key is replaced; the
            others stay.
        path: The file.
    """
    print(json.dumps(row), flush=True)
    path.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def key_of(line: dict) -> list:
        return [line.get(field) for field in key]

    matches = [i for i, line in enumerate(lines) if key_of(line) == key_of(row)]
    if matches:
        lines[matches[0]] = row
    else:
        lines.append(row)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(path)


def run_bench(
    name: str,
    doc: str,
    models: list[str],
    minutes: float,
    key: tuple[str, ...],
    plan: Callable[[list[str]], list],
    open_session: Callable[[str, Path, Clock], object],
    measure: Callable[[object, object, int], dict],
) -> int:
    """Run a benchmark from the command line; this is the main program of a driver.

    Args:
        name: Name of the benchmark; lines are kept in results/NAME.jsonl.
        doc: Help text of the program.
        models: Names of the models to measure.
        minutes: Default time budget.
        key: Names of the fields that identify a line.
        plan: Models → rows to measure. A row has `model`, `name` and `law` (a growth law is skipped
            when the time is up).
        open_session: (model, scratch folder, clock) → a session, one for each model. It has
            `stop()` and `expected_minutes(row, pairs)`.
        measure: (session, row, pairs) → the line to keep.

    Returns:
        The exit code: 1 if a row failed, otherwise 0.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="PREFIX",
        help="measure only rows whose name begins with one of these",
    )
    parser.add_argument("--pairs", type=int, default=5, help="number of pairs for each row")
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="time budget; skip growth laws that would exceed it"
    )
    parser.add_argument("--quick", action="store_true", help="smoke test: tiny model, one pair, keep nothing")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and exit")
    args = parser.parse_args()
    rows = [row for row in plan(["quick"] if args.quick else models) if row.name.startswith(tuple(args.only))]
    if args.list:
        print(*(row.name for row in rows), sep="\n")
        return 0
    if not rows:
        parser.error(f"no row's name begins with {' or '.join(args.only)}; --list shows them")
    pairs = 1 if args.quick else args.pairs
    clock, failed = Clock(args.minutes), []
    clock.say(f"{len(rows)} rows on {machine()}: " + ", ".join(row.name for row in rows))
    if os.getloadavg()[0] > 0.5:
        clock.say("the machine is busy with other work, so these measurements are unreliable")
    with tempfile.TemporaryDirectory(prefix=f"bench_{name}_") as scratch:
        results = Path(scratch) / "quick.jsonl" if args.quick else HERE / "results" / f"{name}.jsonl"
        sessions: dict[str, object] = {}
        for row in rows:
            if row.model not in sessions:
                (folder := Path(scratch) / row.model).mkdir()
                sessions[row.model] = open_session(row.model, folder, clock)
            session = sessions[row.model]
            for other in sessions.values():  # one model at a time in memory
                if other is not session:
                    other.stop()
            expected = session.expected_minutes(row, pairs)
            if row.law and clock.elapsed + expected > args.minutes:
                clock.say(f"{row.name}: skipped, it would take {expected:.0f} more minutes")
                continue
            clock.say(f"{row.name}" + (f": about {expected:.1f} min" if expected else ""))
            try:
                line = measure(session, row, pairs)
            except (RuntimeError, ValueError) as error:
                clock.say(f"{row.name}: {error}")
                failed.append(row.name)
                session.stop()
                continue
            save_row(line, key, results)
        for session in sessions.values():
            session.stop()
    clock.say("done" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0

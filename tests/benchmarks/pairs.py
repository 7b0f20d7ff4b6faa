"""Two programs in turns on one machine: A B B A …, the ratio of each pair, one line a key in results/NAME.jsonl.

A driver (`run_bench`) starts a long-lived worker a side (`Worker`), which answers JSON lines (`serve`) and, between
questions, sleeps on its input: what is measured never shares the cores. Standard library alone: it runs in every
environment.
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

HERE = Path(__file__).resolve().parent
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # for a worker that measures a CPU


class Worker:
    """The driver's end of a worker: `ask` sends one question and waits for its answer."""

    def __init__(self, name: str, command: list[str], log: Path, env: dict[str, str] | None = None):
        self.name, self.log = name, log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(env or {})},
            )

    def ask(self, do: str, **what):
        try:
            self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: what it said is below
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with exit code {self.process.wait()}"}
        if "error" in answer:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise RuntimeError(f"{self.name}, asked to {do}: {answer['error']}\n{tail}")
        return answer["ok"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def serve(answers: dict[str, Callable]) -> None:
    """The worker's end: `{"do": name, …}` a line in, `{"ok": …}` or `{"error": …}` a line out, until input ends.

    What libraries print goes to stderr: the output belongs to the answers.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = {"ok": answers[question.pop("do")](**question)}
        except Exception as problem:
            traceback.print_exc()
            answer = {"error": f"{type(problem).__name__}: {problem}"}
        release_memory()
        out.write(json.dumps(answer) + "\n")
        out.flush()


def gpu():
    """torch.cuda in a process that has imported torch and sees a GPU; else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def settle() -> None:
    """Wait until the GPU, if there is one, has done what it was asked: clocks are read behind this."""
    if (device := gpu()) is not None:
        device.synchronize()


def release_memory() -> None:
    """Give what is free back to the system: the other side's turn is next, and two peaks may not fit side by side."""
    gc.collect()
    if (device := gpu()) is not None:
        device.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class Clock:
    """Says on stderr what happens, and how much of the time is gone."""

    def __init__(self, minutes: float):
        self.began, self.minutes = time.monotonic(), minutes

    @property
    def gone(self) -> float:
        return (time.monotonic() - self.began) / 60

    def say(self, text: str) -> None:
        print(f"[{self.gone:5.1f} min] {text}", file=sys.stderr, flush=True)


class Phases:
    """Seconds a phase, exclusive: what runs in an inner phase does not count for the outer one."""

    def __init__(self):
        self.seconds, self.stack, self.since = Counter(), [], 0.0

    @property
    def now(self) -> str | None:
        return self.stack[-1] if self.stack else None

    def _book(self) -> None:
        settle()
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def enter(self, name: str) -> None:
        self._book()
        self.stack.append(name)

    def leave(self) -> None:
        self._book()
        self.stack.pop()

    @contextmanager
    def phase(self, name: str):
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, function: Callable, name: str | Callable) -> Callable:
        """The function, its time booked under a name, or under name(*its arguments)."""

        def wrapper(*args, **kwargs):
            with self.phase(name if isinstance(name, str) else name(*args)):
                return function(*args, **kwargs)

        return wrapper

    def time_optimizer(self, optimizer) -> None:
        """Books each step of a torch optimizer as `optimizer`."""
        optimizer.register_step_pre_hook(lambda *_: self.enter("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self.leave())

    def time_prefill(self, trunk) -> None:
        """Books a trunk's passes over more than one column, where they happen inside `decode`, as `prefill`."""
        is_prefill = []

        def before(_, args, kwargs):
            ids = kwargs.get("input_ids", args[0] if args else None)
            is_prefill.append(self.now == "decode" and ids is not None and ids.shape[-1] > 1)
            if is_prefill[-1]:
                self.enter("prefill")

        def after(*_):
            if is_prefill.pop():
                self.leave()

        trunk.register_forward_pre_hook(before, with_kwargs=True)
        trunk.register_forward_hook(after)

    def take(self) -> dict[str, float]:
        """The seconds since the last take."""
        taken, self.seconds = dict(self.seconds), Counter()
        return taken


def reset_peak() -> None:
    """Peak memory counts from here (the GPU's if there is one; else resident memory, Linux)."""
    if (device := gpu()) is not None:
        return device.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory since `reset_peak`, weights and optimizer included."""
    if (device := gpu()) is not None:
        return device.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def versions(*packages: str) -> dict[str, str]:
    device = {} if gpu() is None else {"device": gpu().get_device_name(0)}
    return {"python": platform.python_version(), **{p: version(p) for p in packages}, **device}


def in_turns(pairs: int) -> Iterator[tuple[int, int]]:
    """Which side goes, by pair: (0, A) (0, B) (1, B) (1, A) (2, A) …, A = 0: a drift of the machine hits both alike."""
    for pair in range(pairs):
        yield from ((pair, side) for side in ((0, 1) if pair % 2 == 0 else (1, 0)))


def run_pairs(a: Callable[[int], dict], b: Callable[[int], dict], pairs: int, say=lambda *_: None):
    """a(pair), b(pair) in turns → the answers of both, in order of the pairs."""
    answers = [[None] * pairs, [None] * pairs]
    for pair, side in in_turns(pairs):
        answers[side][pair] = (a, b)[side](pair)
        say(pair, side, answers[side][pair])
    return answers


def ratio(values: list[float]) -> dict[str, float]:
    """Of each pair's ratio: the middle one, the least and the most, and how many pairs there were."""
    shown = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {**{k: round(v, 4) for k, v in shown.items()}, "pairs": len(values)}


def middle(dicts: list[dict[str, float]], digits: int = 4) -> dict[str, float]:
    """The median of each key."""
    keys = dict.fromkeys(k for d in dicts for k in d)
    return {k: round(statistics.median(d.get(k, 0.0) for d in dicts), digits) for k in keys}


def machine() -> str:
    """Processor, cores, memory and GPUs."""
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        model = platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return ", ".join([platform.machine(), model, f"{len(os.sched_getaffinity(0))} cores", f"{memory:.0f} GiB", *gpus()])


def gpus() -> list[str]:
    """Names of the GPUs, by their driver's tool."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[:-1]


def stamp() -> dict[str, str]:
    """Commit (with + where tracked files but the results are changed), machine and date."""
    git = lambda *args: subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True).stdout.strip()  # noqa: E731
    dirty = "+" if git("status", "--porcelain", "--untracked-files=no", ":/", ":(exclude)results") else ""
    return {
        "commit": git("rev-parse", "--short", "HEAD") + dirty,
        "machine": machine(),
        "date": date.today().isoformat(),
    }


def keep(row: dict, key: tuple[str, ...], path: Path) -> None:
    """Print the row, and write it to `path` in the place of the line with the same key; other lines stay."""
    print(json.dumps(row), flush=True)
    path.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    name = lambda r: [r.get(k) for k in key]  # noqa: E731
    places = [i for i, line in enumerate(lines) if name(line) == name(row)]
    if places:
        lines[places[0]] = row
    else:
        lines.append(row)
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fresh.replace(path)


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
    """The main program of a driver: its options, the rows of `plan`, a line of results/NAME.jsonl each; → exit code.

    A row has model, name, and law (left out where the time is up). A session, one a model, has stop() and
    expected_minutes(row, pairs).
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="PART", help="rows whose name begins with one of these"
    )
    parser.add_argument("--pairs", type=int, default=5, help="pairs of a claim")
    parser.add_argument("--minutes", type=float, default=minutes, help="growth laws that would end later are left out")
    parser.add_argument("--quick", action="store_true", help="a very small model, one pair, nothing kept: does it run?")
    parser.add_argument("--list", action="store_true", help="the names of the rows, and stop")
    asked = parser.parse_args()
    rows = [row for row in plan(["quick"] if asked.quick else models) if row.name.startswith(tuple(asked.only))]
    if asked.list:
        print(*(row.name for row in rows), sep="\n")
        return 0
    if not rows:
        parser.error(f"no row's name begins with {' or '.join(asked.only)}; --list shows them")
    pairs = 1 if asked.quick else asked.pairs
    clock, failed = Clock(asked.minutes), []
    clock.say(f"{len(rows)} rows on {machine()}: " + ", ".join(row.name for row in rows))
    if os.getloadavg()[0] > 0.5:
        clock.say("the machine is busy with something else: what is measured now is worth little")
    with tempfile.TemporaryDirectory(prefix=f"bench_{name}_") as scratch:
        kept = Path(scratch) / "quick.jsonl" if asked.quick else HERE / "results" / f"{name}.jsonl"
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
            if row.law and clock.gone + expected > asked.minutes:
                clock.say(f"{row.name}: left out, it would take {expected:.0f} min more")
                continue
            clock.say(f"{row.name}" + (f": about {expected:.1f} min" if expected else ""))
            try:
                found = measure(session, row, pairs)
            except (RuntimeError, ValueError) as problem:
                clock.say(f"{row.name}: {problem}")
                failed.append(row.name)
                session.stop()
                continue
            keep(found, key, kept)
        for session in sessions.values():
            session.stop()
    clock.say("done" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0

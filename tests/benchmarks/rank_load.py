"""Measure the ranking page under load: many labelers at a person's pace, over loopback.

    python tests/benchmarks/rank_load.py [--labelers 50] [--seconds 180] [--pause 2.5] [--answers 6]

Starts the real `rlhf rank` in a process of its own, on a new database. Each labeler reads, waits a
drawn time (log-normal; --pause is its median, in seconds) and makes a move, as the page would: one
request a move, one to submit, one for the next task; a few skip, undo, or set an answer aside. A
lead loads the figures every --lead seconds (0: nobody does). A move counts from the request to its
answer, which comes after the transaction is on the disk.

Prints one JSON line and keeps it in results/rank_load.jsonl. The machine's load at the beginning
and the end is in it: with other work on the cores the figures are worse.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from pairs import save_row, stamp

from tests.people.server import Browser, Server

HERE = Path(__file__).resolve().parent
SPREAD = 0.6
"""Standard deviation of the logarithm of a pause."""
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Times:
    """Collect how long answers took, from all threads."""

    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    """Kind of request → milliseconds of each."""
    failures: list[str] = field(default_factory=list)
    """What was not answered as it should be."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, browser: Browser, kind: str, method: str, path: str, body: dict | None = None) -> Any:
        """Send a request, keep its time, and return the answer; None if it was refused or lost."""
        began = time.perf_counter()
        try:
            status, answer = browser.ask(method, path, body)
        except Exception as error:
            status, answer = 0, f"{type(error).__name__}: {error.__cause__}"
        took = 1000 * (time.perf_counter() - began)
        with self.lock:
            self.milliseconds.setdefault(kind, []).append(took)
            if status != 200:
                self.failures.append(f"{kind}: {status} {answer}")
        return answer if status == 200 else None


class Person(threading.Thread):
    """A labeler who works until the end."""

    def __init__(self, server: Server, number: int, times: Times, end: float, pause: float):
        super().__init__(daemon=True)
        self.server, self.times, self.end, self.pause = server, times, end, pause
        self.rng = random.Random(number)
        self.number = number
        self.submitted = self.skipped = 0

    def wait(self) -> bool:
        """Wait as somebody who reads, and return whether there is time left."""
        time.sleep(min(self.pause * self.rng.lognormvariate(0, SPREAD), max(0.0, self.end - time.monotonic())))
        return time.monotonic() < self.end

    def run(self) -> None:
        """Join, then rank one task after the other."""
        time.sleep(self.pause * self.rng.random())  # not all in the same instant
        browser = Browser(self.server)
        browser.join(f"Labeler {self.number}")
        while time.monotonic() < self.end:
            found = self.times.ask(browser, "next", "GET", "/api/next")
            if found is None or found["assignment"] is None:
                if not self.wait():
                    return
                continue
            self.rank(browser, found["assignment"])

    def rank(self, browser: Browser, assignment: dict[str, Any]) -> None:
        """Rank one task; now and then skip it, undo a move, or set an answer aside."""
        path, seq = f"/api/assignments/{assignment['id']}", assignment["seq"]
        answers = [answer["id"] for answer in assignment["answers"]]
        moves: list[tuple[str, dict]] = []
        slots = self.rng.sample(range(len(answers)), len(answers))
        for answer, slot in zip(answers, slots, strict=True):
            moves.append(("place", {"answer": answer, "tier": slot}))
            if self.rng.random() < 0.05:
                moves += [("undo", {}), ("place", {"answer": answer, "tier": slot})]
        if self.rng.random() < 0.1:
            moves.append(("aside", {"answer": answers[0]}))
        if self.rng.random() < 0.03:
            if self.wait() and self.times.ask(
                browser, "skip", "POST", f"{path}/skip", {"seq": seq, "reason": "I do not know enough about this"}
            ):
                self.skipped += 1
            return
        for kind, body in moves:
            if not self.wait():
                return
            sent = {
                "seq": seq,
                "kind": kind,
                "body": body,
                "active_ms": 1000,
                "idle_ms": 0,
                "id": str(self.rng.random()),
            }
            said = self.times.ask(browser, "move", "POST", f"{path}/moves", sent)
            if said is None:
                return
            seq = said["seq"]
        if self.wait() and self.times.ask(browser, "submit", "POST", f"{path}/submit", {"seq": seq, "active_ms": 1000}):
            self.submitted += 1


def look(server: Server, times: Times, end: float, every: float) -> None:
    """Load the lead's figures again and again."""
    lead = Browser(server)
    lead.ask("GET", server.lead_url.partition(str(server.port))[2])
    while time.monotonic() + every < end:
        time.sleep(every)
        lead.connection = None  # the server has closed it meanwhile
        times.ask(lead, "figures", "GET", "/api/lead/figures")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory_mib(pid: int, name: str) -> float:
    """Return VmRSS (now) or VmHWM (at most) of a process, in MiB."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


def summary(milliseconds: list[float]) -> dict[str, float]:
    """Return how many there were, and the percentiles of their times."""
    cuts = statistics.quantiles(milliseconds, n=100, method="inclusive") if len(milliseconds) > 1 else milliseconds * 99
    figures = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(milliseconds)}
    return {"n": len(milliseconds), **{f"{name}_ms": round(value, 2) for name, value in figures.items()}}


def write_tasks(path: Path, tasks: int, answers: int) -> None:
    """Write a file of answers of a few hundred characters."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(tasks):
            texts = [f"Answer {n}: {'so it is said ' * rng.randint(5, 60)}{rng.random()}" for n in range(answers)]
            file.write(json.dumps({"prompt": f"Question {number}: why?", "responses": texts}) + "\n")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the load against a server in a folder, and return the figures."""
    tasks = args.tasks or round(2 + 3 * args.labelers * args.seconds / (args.pause * (args.answers + 2)))
    write_tasks(folder / "answers.jsonl", tasks, args.answers)
    settings = ("rank.answers=answers.jsonl", "rank.overlap=0.3", "rank.repeat=0.05")
    with Server(folder, *settings) as server:
        pid, times = server.process.pid, Times()
        before, load = cpu_seconds(pid), os.getloadavg()[0]
        end = time.monotonic() + args.seconds
        people = [Person(server, number, times, end, args.pause) for number in range(args.labelers)]
        for person in people:
            person.start()
        if args.lead:
            look(server, times, end, args.lead)
        for person in people:
            person.join(args.seconds + 60)
        figures = {
            "cpu_s": round(cpu_seconds(pid) - before, 2),
            "rss_mib": round(memory_mib(pid, "VmRSS"), 1),
            "most_rss_mib": round(memory_mib(pid, "VmHWM"), 1),
            "database_mib": round(
                sum(file.stat().st_size for file in server.database.parent.glob("*.sqlite*")) / 2**20, 1
            ),
        }
        code = server.stop()
    return {
        "bench": "rank_load",
        "labelers": args.labelers,
        "seconds": args.seconds,
        "pause_s": args.pause,
        "answers": args.answers,
        "tasks": tasks,
        "submitted": sum(person.submitted for person in people),
        "skipped": sum(person.skipped for person in people),
        "failures": len(times.failures),
        "first_failures": times.failures[:3],
        **{kind: summary(values) for kind, values in sorted(times.milliseconds.items())},
        "server": figures,
        "exit_code": code,
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }


def main(argv: list[str]) -> int:
    """Measure, print one line and keep it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelers", type=int, default=50, help="people at the same time")
    parser.add_argument("--seconds", type=float, default=180.0, help="how long they work")
    parser.add_argument("--pause", type=float, default=2.5, help="median seconds between two moves of one person")
    parser.add_argument("--answers", type=int, default=6, help="answers of a task")
    parser.add_argument("--tasks", type=int, default=0, help="number of tasks; 0: more than they can do")
    parser.add_argument(
        "--lead", type=float, default=30.0, help="seconds between two looks of the lead; 0: nobody looks"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "rank_load.jsonl", help="file of the line")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench_rank_") as folder:
        row = {**measure(args, Path(folder)), **stamp()}
    save_row(row, ("bench", "labelers", "seconds", "pause_s", "answers"), args.results)
    return 1 if row["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Let simulated labelers rank on a running page: they post what a browser posts.

Each has a browser and a thread of its own. They submit in turns (the one with the fewest tasks
first), because what a labeler gets next depends on what is submitted before: so the same seed gives
the same rankings, however fast each of them is, and also after a kill.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Protocol

from pipeline.errors import Interrupted, UserError
from stages.people.rounds.browser import GIVE_UP, Browser, Refusal
from stages.people.rounds.opinions import Assignment, Opinion, next_move

POLL = 0.2
"""Seconds after which a labeler who waits looks whether to stop."""
SAY_EVERY = 5.0
"""Seconds between two lines of progress."""
SIMULATED = " (simulated)"
"""End of the name of a simulated labeler, by which people and they are told apart."""
MOST_CODES = 100
"""Codes that are tried until one is free."""


class Judge(Protocol):
    """What forms an opinion of answers."""

    def judge(self, assignment: Assignment) -> Opinion:
        """Return what it thinks of the answers of an assignment."""


@dataclass
class Counts:
    """What simulated labelers have done since they began."""

    ranked: int = 0
    """Tasks that were ranked."""
    skipped: int = 0
    """Tasks that were skipped."""
    moves: int = 0
    """Moves: ratings, places, ties, answers set aside."""
    sent_again: int = 0
    """Requests that were sent again because no answer came."""


@dataclass
class Worker:
    """A simulated labeler at work."""

    name: str
    """What the page shows the lead, and the code in the data unless somebody has it."""
    judge: Judge
    """What it thinks."""
    browser: Browser
    """Its browser."""
    counts: Counts = field(default_factory=Counts)
    """What it has done."""
    assignment: Assignment | None = None
    """What it works on."""
    last: float = field(default_factory=time.monotonic)
    """When it last sent something."""


class Turns:
    """Let workers submit in a fixed order: by the running number of their task, then by index."""

    def __init__(self, places: Mapping[int, int], is_stopped: Callable[[], bool]) -> None:
        """Begin with the running number of each worker's task, by the worker's index."""
        self._places = dict(places)
        self._is_stopped = is_stopped
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, index: int) -> Iterator[None]:
        """Wait until it is a worker's turn, and hold it while the block runs.

        Raises:
            Interrupted: It is to stop.
        """
        with self._changed:
            while not self._is_next(index):
                if self._is_stopped():
                    raise Interrupted()
                self._changed.wait(POLL)
        yield

    def _is_next(self, index: int) -> bool:
        """Return whether it is a worker's turn."""
        return min((place, other) for other, place in self._places.items())[1] == index

    def go_on(self, index: int, number: int | None) -> None:
        """Note a worker's next task, or that it has none, which ends its turn."""
        with self._changed:
            if number is None:
                self._places.pop(index, None)
            else:
                self._places[index] = number
            self._changed.notify_all()


def work(
    address: str,
    judges: Mapping[str, Judge],
    keys: dict[str, str],
    keep: Callable[[], None],
    is_stopped: Callable[[], bool],
    say: Callable[[str], None],
    give_up: float = GIVE_UP,
) -> Counts:
    """Rank until no labeler gets another task.

    Args:
        address: The page's address with its token.
        judges: What each labeler thinks, by name.
        keys: The key that each labeler's browser keeps, by name; new ones are added.
        keep: Is called when a key is new, to write the keys down.
        is_stopped: Returns whether to stop.
        say: Prints a line.
        give_up: Seconds without any answer after which the page counts as gone.

    Returns:
        What was done.

    Raises:
        Interrupted: It was to stop; run again to go on.
        UserError: The page does not answer.
    """
    failures: list[BaseException] = []

    def is_over() -> bool:
        return is_stopped() or bool(failures)

    workers = [Worker(name, judge, Browser(address, is_over, give_up)) for name, judge in judges.items()]
    try:
        for worker in workers:
            worker.browser.open()
            sign_in(worker, keys, keep)
        while find_tasks(workers):  # again at the end: a task that one has skipped is another's
            rank_in_threads(workers, failures, is_over, say)
            if failures:
                raise next((one for one in failures if not isinstance(one, Interrupted)), failures[0])
    except Refusal as refusal:
        raise UserError(f"http://{workers[0].browser.host}: {refusal}") from None
    finally:
        for worker in workers:
            worker.browser.close()
    return total(workers)


def total(workers: list[Worker]) -> Counts:
    """Return what all workers have done."""
    counts = Counts()
    for worker in workers:
        counts.ranked += worker.counts.ranked
        counts.skipped += worker.counts.skipped
        counts.moves += worker.counts.moves
        counts.sent_again += worker.browser.sent_again
    return counts


# -- signing in ----------------------------------------------------------------------------------


def sign_in(worker: Worker, keys: dict[str, str], keep: Callable[[], None]) -> None:
    """Come back with the key that the browser keeps, or join."""
    if worker.name in keys:
        try:
            worker.browser.ask("POST", "/api/session", {"key": keys[worker.name]})
            return
        except Refusal as refusal:
            if refusal.status != 404:  # 404: nobody has it; the database is another one
                raise
    keys[worker.name] = join(worker)
    keep()


def join(worker: Worker) -> str:
    """Join under a code that is free, and return the key.

    Also after an answer that was lost: then the first code belongs to a labeler without a browser.
    """
    for number in range(1, MOST_CODES):
        code = worker.name if number == 1 else f"{worker.name}-{number}"
        with suppress_status(409):
            joined = worker.browser.ask("POST", "/api/labelers", {"name": worker.name + SIMULATED, "code": code})
            return joined["key"]
    raise Refusal(409, {"error": f"code: {MOST_CODES} codes like {worker.name} are taken"})


@contextmanager
def suppress_status(status: int) -> Iterator[None]:
    """Ignore a refusal with one status."""
    try:
        yield
    except Refusal as refusal:
        if refusal.status != status:
            raise


# -- ranking -------------------------------------------------------------------------------------


def find_tasks(workers: list[Worker]) -> bool:
    """Ask for each worker's task, one after the other; return whether anybody has one."""
    for worker in workers:
        worker.assignment = worker.browser.ask("GET", "/api/next")["assignment"]
    return any(worker.assignment is not None for worker in workers)


def rank_in_threads(
    workers: list[Worker], failures: list[BaseException], is_over: Callable[[], bool], say: Callable[[str], None]
) -> None:
    """Let each worker rank in a thread until it gets no task; add what goes wrong to `failures`."""
    places = {i: worker.assignment["number"] for i, worker in enumerate(workers) if worker.assignment is not None}
    turns = Turns(places, is_over)

    def run(index: int) -> None:
        try:
            rank_all(workers[index], index, turns)
        except BaseException as problem:
            failures.append(problem)
        finally:
            turns.go_on(index, None)

    threads = [threading.Thread(target=run, args=(i,), name=f"labeler {i}", daemon=True) for i in places]
    for thread in threads:
        thread.start()
    said = time.monotonic()
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(POLL)
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            say(f"simulate: {total(workers).ranked:,} tasks are ranked")


def rank_all(worker: Worker, index: int, turns: Turns) -> None:
    """Rank one task after the other."""
    while worker.assignment is not None:
        decide(worker, worker.assignment, turns, index)
        number = None if worker.assignment is None else worker.assignment["number"]
        turns.go_on(index, number)


def decide(worker: Worker, assignment: Assignment, turns: Turns, index: int) -> None:
    """Rank or skip an assignment, and take what comes next.

    The state that the server reports decides what is done next, so a draft that an earlier run left
    and a change in another window are both no mistake.
    """
    opinion = worker.judge.judge(assignment)
    path, state = f"/api/assignments/{assignment['id']}", assignment
    while True:
        move = None if opinion.skipped else next_move(state["draft"], assignment, opinion)
        try:
            if move is not None:
                kind, body = move
                state = worker.browser.ask("POST", f"{path}/moves", request_of(worker, state, kind=kind, body=body))
                worker.counts.moves += 1
                continue
            with turns.turn(index):
                worker.assignment = close(worker, path, state, opinion)
                return
        except Refusal as refusal:
            if refusal.status != 409 or "draft" not in refusal.body:
                raise
            if refusal.body["seq"] == state["seq"]:  # it is closed: somebody else has done that
                with turns.turn(index):
                    worker.assignment = worker.browser.ask("GET", "/api/next")["assignment"]
                    return
            state = refusal.body


def close(worker: Worker, path: str, state: dict[str, Any], opinion: Opinion) -> Assignment | None:
    """Submit or skip an assignment; return what comes next."""
    if opinion.skipped:
        answer = worker.browser.ask("POST", f"{path}/skip", request_of(worker, state, reason=opinion.skipped))
        worker.counts.skipped += 1
    else:
        answer = worker.browser.ask("POST", f"{path}/submit", request_of(worker, state))
        worker.counts.ranked += 1
    return answer["next"]["assignment"]


def request_of(worker: Worker, state: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the body of a request about an assignment.

    Its `id` lets the server know a request that is sent again because the answer was lost.
    """
    now = time.monotonic()
    spent, worker.last = now - worker.last, now
    return {"seq": state["seq"], "id": token_hex(12), "active_ms": round(1000 * spent), "idle_ms": 0, **more}

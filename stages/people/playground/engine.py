"""Give each device one policy to run at a time, and let a bounded number of answers wait for it.

It knows nothing of torch: what answers is a function.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import TrainingStopped, UserError

FIRST_GUESS = 5.0
"""Seconds that an answer is expected to take before one was measured."""


@dataclass(frozen=True)
class Options:
    """Choose how an answer is sampled."""

    temperature: float
    """Divides the logits; 0: the likeliest token."""
    top_p: float
    """Draw from the likeliest tokens of this total probability."""
    top_k: int
    """Draw from so many of the likeliest tokens; 0: from all."""
    max_tokens: int
    """The longest answer in tokens."""
    seed: int
    """Seed of sampling: the same seed gives the same answer."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are not part of it."""


@dataclass(frozen=True)
class Question:
    """A conversation that waits for a policy's answer."""

    policy: str
    """Name of the policy."""
    messages: tuple[dict[str, str], ...]
    """The messages, system first if there is one; the last is the user's."""
    options: Options
    """How the answer is sampled."""
    forgets: bool
    """Whether the oldest turns are left out where the context is full, which else is an error."""
    scored: bool
    """Whether the reward model scores the answer."""


@dataclass(frozen=True)
class Waiting:
    """Say that an answer waits."""

    ahead: int
    """Answers that come first."""


@dataclass(frozen=True)
class Piece:
    """A further piece of an answer's text."""

    text: str
    """The piece."""


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    text: str
    """Its text."""
    finished: bool
    """Whether it ended by itself or at a stop text, before the length limit."""
    tokens: int
    """Its length in tokens."""
    prompt_tokens: int
    """Length of what the policy read, in tokens."""
    score: float | None
    """The reward model's score; None without one."""
    forgotten: int
    """Questions, with their answers, that were left out because the context was full."""


@dataclass(frozen=True)
class Failed:
    """Explain why there is no answer."""

    sentence: str
    """For the person."""
    is_users: bool
    """Whether the request is at fault."""
    code: str | None = None
    """A word for programs, such as "context_length_exceeded"."""


Event = Waiting | Piece | Reply | Failed
Emit = Callable[[Event], None]
"""Takes what happens to a question, in any thread; the last event is a Reply or Failed."""
Answerer = Callable[[Question, Emit, Callable[[], None]], Reply]
"""Answers a question: takes what gets the pieces, and what raises when nobody waits any more."""


class Unanswerable(Exception):
    """Report a question that a policy cannot answer, such as one that is too long."""

    def __init__(self, sentence: str, code: str | None = None) -> None:
        """Build the error from a sentence for people and a word for programs."""
        super().__init__(sentence)
        self.code = code


class Cancelled(Exception):
    """Report that nobody waits for an answer any more."""


class Busy(Exception):
    """Report that no more answers can wait."""

    def __init__(self, sentence: str, retry_after: int) -> None:
        """Build the error from a sentence for people and the seconds after which to try again."""
        super().__init__(sentence)
        self.retry_after = retry_after


@dataclass(eq=False)
class Ticket:
    """A question in the queue of its policy's device."""

    question: Question
    """The question."""
    emit: Emit
    """Gets what happens to it."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits any more."""

    def cancel(self) -> None:
        """Say that nobody waits any more: the answer ends before its next token."""
        self.cancelled.set()

    def poll(self) -> None:
        """Raise Cancelled if nobody waits any more."""
        if self.cancelled.is_set():
            raise Cancelled


class Lane:
    """A device: its queue, and the thread that answers one question after the other."""

    def __init__(self, name: str, answerers: Mapping[str, Answerer]) -> None:
        """Start the thread of a device with the policies that are on it."""
        self.name = name
        self.answerers = answerers
        self.waiting: deque[Ticket] = deque()
        self.running: Ticket | None = None
        self.changed = threading.Condition()
        self.closed = False
        self.seconds = FIRST_GUESS
        self.thread = threading.Thread(target=self.work, name=f"playground-{name}", daemon=True)
        self.thread.start()

    def room(self, most: int) -> int:
        """Return how many more answers may wait, after those that nobody waits for are dropped."""
        for ticket in [ticket for ticket in self.waiting if ticket.cancelled.is_set()]:
            self.waiting.remove(ticket)
        # one that can begin at once does not wait
        return most - len(self.waiting) + (1 if self.running is None else 0)

    def work(self) -> None:
        """Answer questions until the lane is closed."""
        while True:
            with self.changed:
                while not self.waiting and not self.closed:
                    self.changed.wait()
                if self.closed:
                    return
                ticket = self.waiting.popleft()
                self.running = ticket
                for place, other in enumerate(self.waiting, start=1):
                    other.emit(Waiting(place))
            started = time.monotonic()
            try:
                self.answer(ticket)
            finally:
                with self.changed:
                    self.running = None
                    self.seconds = 0.7 * self.seconds + 0.3 * (time.monotonic() - started)

    def answer(self, ticket: Ticket) -> None:
        """Answer a question, and tell whoever waits how that ended."""
        event: Event
        try:
            ticket.poll()
            event = self.answerers[ticket.question.policy](ticket.question, ticket.emit, ticket.poll)
        except Cancelled:
            event = Failed("the server is stopping" if self.closed else "stopped", is_users=False, code="stopped")
        except Unanswerable as error:
            event = Failed(str(error), is_users=True, code=error.code)
        except UserError as error:
            event = Failed(" ".join(str(error).split()), is_users=True)
        except TrainingStopped as error:  # an engine in another process is gone
            event = Failed(f"{error}; start the playground again", is_users=False, code="engine_lost")
        except Exception as error:
            # whatever a model does, the next person's question must be answered
            traceback.print_exc()
            event = Failed(f"the model failed ({type(error).__name__}); the server's terminal says more", False)
        ticket.emit(event)


class Engine:
    """Answer questions on several devices."""

    def __init__(self, answerers: Mapping[str, Answerer], devices: Mapping[str, str], max_queue: int) -> None:
        """Start a thread for each device.

        Args:
            answerers: Name of a policy → what answers.
            devices: Name of a policy → the device it is on.
            max_queue: How many answers may wait for a device.
        """
        self.devices, self.max_queue, self.closed = dict(devices), max_queue, False
        self.lock = threading.Lock()
        self.lanes: dict[str, Lane] = {}
        for device in dict.fromkeys(devices.values()):
            here = {name: answerers[name] for name in answerers if devices[name] == device}
            self.lanes[device] = Lane(device, here)

    @property
    def policies(self) -> list[str]:
        """Return the names of the policies."""
        return list(self.devices)

    def submit(self, questions: Sequence[Question], emits: Sequence[Emit]) -> list[Ticket]:
        """Put questions into the queues: all of them or none.

        Args:
            questions: The questions.
            emits: What gets the events of each.

        Returns:
            A ticket for each question.

        Raises:
            Busy: Too many answers wait already, or the server is stopping.
        """
        tickets = [Ticket(question, emit) for question, emit in zip(questions, emits, strict=True)]
        with self.lock:
            if self.closed:
                raise Busy("the server is stopping", 30)
            for device, lane in self.lanes.items():
                mine = [ticket for ticket in tickets if self.devices[ticket.question.policy] == device]
                with lane.changed:
                    if mine and lane.room(self.max_queue) < len(mine):
                        seconds = max(1, round(lane.seconds))  # then the queue has moved on by about one
                        raise Busy(f"{len(lane.waiting)} answers wait already; try again in {seconds} s", seconds)
            for ticket in tickets:
                lane = self.lanes[self.devices[ticket.question.policy]]
                with lane.changed:
                    ahead = len(lane.waiting) + (lane.running is not None)
                    lane.waiting.append(ticket)
                    if ahead:
                        ticket.emit(Waiting(ahead))
                    lane.changed.notify()
        return tickets

    def state(self) -> dict[str, Any]:
        """Return what runs and waits on each device."""
        return {
            device: {"running": int(lane.running is not None), "waiting": len(lane.waiting)}
            for device, lane in self.lanes.items()
        }

    def close(self) -> None:
        """Stop all answers, and wait for the threads. May be called twice."""
        with self.lock:
            self.closed = True
        for lane in self.lanes.values():
            with lane.changed:
                lane.closed = True
                waiting, running = list(lane.waiting), lane.running
                lane.waiting.clear()
                lane.changed.notify_all()
            if running is not None:
                running.cancel()
            for ticket in waiting:
                ticket.cancel()
                ticket.emit(Failed("the server is stopping", is_users=False, code="stopped"))
        for lane in self.lanes.values():
            lane.thread.join(timeout=10)

"""Let a request wait for what happens to its questions, and notice when nobody waits any more."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from stages.people.playground.engine import Emit, Engine, Event, Failed, Question, Reply

LOOK = 0.25
"""Seconds between looks whether a client that was sent nothing yet is still there."""
ALIVE = 10.0
"""Seconds of silence after which a comment is sent, so that no proxy ends the connection."""


class Gone(Exception):
    """Report that the client has closed the connection."""


class TooMany(Exception):
    """Report that a person has too many requests open."""


class Limits:
    """Count the open requests of each person."""

    def __init__(self, most: int) -> None:
        """Build counters that allow so many requests."""
        self.most, self.open = most, Counter[str]()

    def enter(self, person: str) -> None:
        """Count a request.

        Raises:
            TooMany: The person has too many open.
        """
        if self.open[person] >= self.most:
            raise TooMany(f"{self.open[person]} of your requests are being answered; wait for one of them")
        self.open[person] += 1

    def leave(self, person: str) -> None:
        """Forget a request."""
        self.open[person] -= 1
        if self.open[person] <= 0:
            del self.open[person]


class Wait:
    """Questions that are asked together, and the events of all of them in order."""

    def __init__(self, engine: Engine, questions: Sequence[Question]) -> None:
        """Put questions into the queues; call it in the event loop.

        Raises:
            Busy: There is no room for them.
        """
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.left = len(questions)
        self.looked = time.monotonic()
        self.tickets = engine.submit(questions, [self.listener(side) for side in range(len(questions))])

    def listener(self, side: int) -> Emit:
        """Return what hands the events of a question from a thread to the event loop."""
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(self.events.put_nowait, (side, event))

        return emit

    async def next(self, timeout: float) -> tuple[int, Event] | None:
        """Return the next event with the index of its question; None if none comes in time."""
        try:
            side, event = await asyncio.wait_for(self.events.get(), timeout)
        except TimeoutError:
            return None
        if isinstance(event, Reply | Failed):
            self.left -= 1
        return side, event

    async def next_for(self, request: Request) -> tuple[int, Event]:
        """Return the next event, for a client that was sent nothing yet.

        Raises:
            Gone: The client has closed the connection; the answers are stopped.
        """
        while True:
            found = await self.next(LOOK)
            # also while events come: their pieces are not sent before the answer is whole
            if time.monotonic() - self.looked >= LOOK:
                self.looked = time.monotonic()
                if await request.is_disconnected():
                    self.cancel()
                    raise Gone
            if found is not None:
                return found

    def cancel(self) -> None:
        """Stop the answers that are not whole yet."""
        for ticket in self.tickets:
            ticket.cancel()


class EventStream:
    """Send server-sent events, and always do what has to be done at the end."""

    def __init__(self, lines: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        """Build the response.

        Args:
            lines: The events as text.
            at_end: Is called when all was sent, or the client has gone.
        """
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        self.response = StreamingResponse(lines, media_type="text/event-stream", headers=headers)
        self.at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; an iterator that was never begun would not clean up by itself."""
        try:
            await self.response(scope, receive, send)
        finally:
            self.at_end()

"""Tell whoever runs a long pass over data how far it is.

`data` does not know how progress is shown: a command hands in a `Watch`, and a pass that may take
long is made under it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

Note = Callable[[int, float | None], None]
"""Is called now and then with the rows so far, and the share of the pass that is done, from 0 to 1;
None if nobody knows how long it is."""
Watch = Callable[[str], AbstractContextManager[Note]]
"""Is called with what a pass does, and gives the function that is told how far it is."""

NOTE_EVERY = 100
"""Rows after which a pass says how far it is."""

Item = TypeVar("Item")


@contextmanager
def unwatched(what: str) -> Iterator[Note]:
    """Give a function that shows nothing: the `Watch` of a pass that nobody watches.

    Args:
        what: What the pass does.
    """
    yield no_note


def no_note(rows: int, share: float | None) -> None:
    """Show nothing."""


def watched(items: Iterable[Item], number: int, what: str, watch: Watch) -> Generator[Item]:
    """Yield items, and tell how many of them there were.

    Args:
        items: The items.
        number: How many there will be.
        what: What is done with them.
        watch: Shows it.
    """
    with watch(what) as note:
        for count, item in enumerate(items, 1):
            yield item
            if count % NOTE_EVERY == 0:
                note(count, count / number)

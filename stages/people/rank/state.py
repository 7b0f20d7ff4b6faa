"""Hold what the routes of the ranking page share."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from stages.people.rank.rules import Rules
from stages.people.store.database import Database
from stages.people.web.security import Gate


@dataclass(frozen=True)
class RankState:
    """A running ranking page."""

    experiment: str
    """Name of the experiment."""
    database: Database
    """What people say."""
    rules: Rules
    """How the page works."""
    gate: Gate
    """What a request has to show."""
    clock: Callable[[], float] = field(default=time.time)
    """Returns the time, in seconds since 1970."""

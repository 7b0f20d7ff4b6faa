"""Hold the rules of a ranking page as plain values."""

from dataclasses import dataclass
from functools import lru_cache

from data.streams import derive_seed

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What the answers are called, in the order in which they are shown."""
LARGEST = 2**63
"""What `derive_seed` stays below."""


@dataclass(frozen=True)
class Flag:
    """A yes/no question about one answer."""

    name: str
    """What the data call it."""
    question: str
    """What the page asks."""


@dataclass(frozen=True)
class Rules:
    """What a ranking page does, apart from its tasks."""

    seed: int = 0
    """The experiment's seed: what is drawn depends on it and on the database alone."""
    overlap: float = 0.15
    """The share of tasks that several labelers get."""
    overlap_labelers: int = 2
    """How many."""
    repeat: float = 0.05
    """The share of a labeler's tasks that are shown to the same labeler again."""
    known_share: float = 0.05
    """The share of a labeler's tasks whose right ranking is known."""
    abandon_after: float = 1800.0
    """Seconds without a move after which a task goes to the next labeler."""
    break_every: float = 2700.0
    """Seconds of work after which the page reminds of a break; 0: never."""
    likert: bool = False
    """Whether each answer is rated alone before the ranking."""
    flags: tuple[Flag, ...] = ()
    """The yes/no questions of that step."""
    guidelines: str = ""
    """The guidelines, Markdown."""
    guidelines_digest: str = ""
    """16 hexadecimal digits of their SHA-256."""

    def copies(self, uid: str) -> int:
        """Return how many labelers a task is for, by its digest: the same at each start."""
        return self.overlap_labelers if draw_of(self.seed, uid) < self.overlap else 1


@lru_cache(maxsize=100_000)  # it is asked of every task whenever somebody gets the next
def draw_of(seed: int, uid: str) -> float:
    """Return a task's number in [0, 1), which decides whether several labelers get it."""
    return derive_seed(seed, "overlap", uid) / LARGEST

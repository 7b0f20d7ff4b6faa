"""Define a data form: how its rows are recognised, and how they are converted."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

Row = dict
"""A row of a file: an object with string keys."""


class LeftOut(ValueError):
    """Say why a row that is understood holds nothing of the kind that is read.

    A row whose answer was marked as bad is no demonstration, and a deleted message no prompt. Such
    rows are counted by their reason. Every other ValueError is a mistake in the row.
    """


@dataclass(frozen=True)
class Options:
    """Hold what a source in the config says about how its rows are read."""

    by: str | None = None
    """Which of several judgments makes the ranks (see `Form.by`); None: the form's first."""
    ignore: frozenset[str] = frozenset()
    """Keys that may be left unread although they change what a row means."""
    templated: str | None = None
    """What to do with text that has a chat template in it: "strip", "keep"; None: refuse it."""
    tie_within: float = 0.0
    """The difference up to which two scores are a tie."""
    min_score_ratio: float = 1.0
    """The smallest ratio of the better score to the worse one, for forms that count votes."""
    tiers: tuple[str, ...] = ()
    """The names of the tiers, the best first, for forms whose labelers sort into buckets."""


Converted = Row | list[Row | LeftOut]
"""Rows of our own form: {text}, {prompt}, {prompt, completion, learnt?} or {prompt, responses,
ranks or scores, …}; among several, a LeftOut counts a part that holds nothing."""


OTHER_NAMES = ("system_prompt", "system_message", "systemInstruction")
"""Other names of optional keys, which error lines need not list."""


@dataclass(frozen=True)
class Form:
    """Describe the rows of one form of data.

    A row has this form if it has all keys of `needs`, and if `fits` agrees. To add a form, write a
    module with a `Form` in this folder and name it in the table of `data/forms/__init__.py`.
    """

    needs: tuple[str, ...]
    """Keys that every row of this form has."""
    also: tuple[str, ...]
    """Keys that a row may have, and that are read."""
    convert: Callable[[Row, Options], Converted]
    """Row of this form → rows of our own form, which `data/parsing.py` checks. Raises
    ValueError("what is wrong; what to do"), or LeftOut."""
    name: str = ""
    """The name of the data set or the tool that writes this form; "" for our own forms."""
    fits: Callable[[Row], bool] | None = None
    """Whether a row with all keys of `needs` is of this form; None: every such row is."""
    by: tuple[str, ...] = ()
    """The values of `by` that this form takes, the default first; () if it takes none, and a last
    "*" if it takes others too, which `convert` checks."""
    gather: Callable[[Sequence[tuple[str, Row]], Options], Iterator[tuple[str, Row | ValueError]]] | None = None
    """For forms whose records need several rows: all rows of the file, with their locations → rows
    of our own form, each with the location to name in error lines; a LeftOut counts what holds
    nothing, and another ValueError is a mistake there. Then `convert` is not called."""
    prompt: Callable[[Row, Options], Row] | None = None
    """Row of this form → {prompt}, where the prompt can be read although the rest cannot; None: the
    prompt of what `convert` gives."""
    harmless: frozenset[str] = field(default_factory=frozenset)
    """Keys that change the meaning of rows of other forms (see `data/forms/meaning.py`), and not of
    this one."""
    in_messages: frozenset[str] = field(default_factory=frozenset)
    """Keys of messages, beside role and content, that the form reads."""
    reads: Callable[[Row], Iterable[str]] | None = None
    """Further keys that the form reads in a row, where they are numbered or named by the user."""
    has_votes: bool = False
    """Whether answers have votes, which `min_score_ratio` compares; for others it is an error."""
    has_degrees: bool = False
    """Whether a preference between two answers is a number, which `tie_within` compares as it does
    scores; for rows without either it is an error."""
    has_tiers: bool = False
    """Whether labelers may sort into buckets, which `tiers` puts in order; for others an error."""
    strict: bool = False
    """Whether a key that is neither in `needs` nor in `also` is an error: True for our own forms,
    where it is a misspelling."""

    def keys_of(self, row: Row) -> set[str]:
        """Return the keys that the form reads in a row, whether the row has them or not."""
        return {*self.needs, *self.also, *(self.reads(row) if self.reads is not None else ())}

    @cached_property
    def needed(self) -> frozenset[str]:
        """Return `needs` as a set: every row of a file is compared with every form."""
        return frozenset(self.needs)

    def __str__(self) -> str:
        """Return name and keys, as in error lines: "hh-rlhf {chosen, rejected}"."""
        return self._text

    @cached_property
    def _text(self) -> str:
        """Return what `__str__` does: the rows of a file are counted by it."""
        also = [f"{key}?" for key in self.also if key not in OTHER_NAMES]
        keys = "{" + ", ".join([*self.needs, *also]) + "}"
        return f"{self.name} {keys}" if self.name else keys

"""Read the inputs of a command one record after the other, and tell what reading has found."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from data.check.command import Context
from data.check.config import Input
from data.check.inspect_file import check
from data.progress import Watch, unwatched
from data.records import Record
from data.source import Loaded, Source
from data.sources import stream
from pipeline.errors import UserError


@dataclass
class Opened:
    """Hold a source that is about to be read."""

    source: Source
    """Where the rows come from, and how they are read."""
    kind: str
    """The kind of data."""
    max_rows: int | None = None
    """The number of rows after which reading stops."""
    loaded: Loaded = field(default_factory=Loaded)
    """What reading has found; complete when the records have ended."""
    watch: Watch = unwatched
    """Shows how far reading is."""

    def records(self) -> Generator[tuple[str, Record]]:
        """Yield (location, record); whoever stops early closes the generator before printing."""
        with self.watch(f"{self.source.name}: reading") as note:
            self.loaded.note = note
            yield from stream(self.kind, self.source, self.loaded, self.max_rows)


def open_inputs(inputs: Sequence[Input], kind: str | None, context: Context) -> list[Opened]:
    """Return the inputs of a command, or, without any, all data of the config.

    Args:
        inputs: The files and data sets that the command line names.
        kind: The kind that it names, or None.
        context: What the config says.

    Raises:
        UserError: The rows of an input are of no known kind, or the config names no data.
    """
    if not inputs:
        opened = [Opened(source, name, watch=context.watch) for name, source in context.sources.items()]
        if not opened:
            raise UserError("data: the config names no data; give a FILE, or set data.demonstrations")
        return opened
    opened = []
    for given in inputs:
        source, own_kind = context.resolve(given, kind)
        if own_kind is None:
            raise UserError(check(source).errors)  # which says why
        opened.append(Opened(source, own_kind, given.max_rows, watch=context.watch))
    return opened


def sample(items: Generator[tuple[str, Record]], number: int, seed: int | None) -> list[tuple[str, Record]]:
    """Return some items: the first ones, or, with a seed, random ones in their order.

    Args:
        items: The items.
        number: How many to return at most.
        seed: What gives the random choice; None: the first ones.
    """
    if seed is None:
        chosen = []
        for item in items:
            chosen.append(item)
            if len(chosen) == number:
                break
        items.close()
        return chosen
    import random

    draw = random.Random(seed)
    kept: list[tuple[int, tuple[str, Record]]] = []
    for position, item in enumerate(items):  # reservoir sampling: the number of items is not known
        if len(kept) < number:
            kept.append((position, item))
        elif (place := draw.randrange(position + 1)) < number:
            kept[place] = (position, item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]

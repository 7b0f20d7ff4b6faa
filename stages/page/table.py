"""Hold tables as values, which the template draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.page.numbers import NONE, fixed, interval, percent


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    """Its text."""
    small: str = ""
    """A smaller line below the text."""
    tone: str = ""
    """The policy or stage whose colour marks it."""
    strong: bool = False
    """Whether it is bold."""
    code: bool = False
    """Whether it is set as code."""


@dataclass(frozen=True)
class Table:
    """A table."""

    label: str
    """What it shows; screen readers read it in place of a heading."""
    columns: tuple[str, ...]
    """The head of each column."""
    rows: tuple[tuple[Cell, ...], ...]
    """The cells, row by row."""
    left: frozenset[int] = frozenset({0})
    """The columns that hold text, which is left-aligned and may wrap."""
    folded: str = ""
    """The line that unfolds it; "" for a table that is open."""


def dense(table: Table) -> Table:
    """Return the table without the columns that are empty in every row, except the first."""
    kept = [i for i in range(len(table.columns)) if i == 0 or any(row[i].text not in ("", NONE) for row in table.rows)]
    columns = tuple(table.columns[i] for i in kept)
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    left = frozenset(kept.index(i) for i in table.left if i in kept)
    return Table(table.label, columns, rows, left, table.folded)


def value_cell(value: Any, digits: int, ci95: Sequence[float] | None = None) -> Cell:
    """Return a cell with a number and its 95 % interval below it."""
    return Cell(fixed(value, digits), f"{fixed(ci95[0], digits)} to {fixed(ci95[1], digits)}" if ci95 else "")


def share_cell(value: Any, ci95: Sequence[float] | None = None, digits: int = 1) -> Cell:
    """Return a cell with a share in percent and its 95 % interval below it."""
    return Cell(percent(value, digits), f"{interval(*ci95, digits)}\u00a0%" if ci95 else "")


def erring_cell(value: Any, digits: int, ci95: Sequence[float] | None, error: float | None) -> Cell:
    """Return a cell with a number, its 95 % interval and its standard error."""
    cell = value_cell(value, digits, ci95)
    return cell if error is None or not cell.small else Cell(cell.text, f"{cell.small}; s.e. {fixed(error, digits)}")


def estimate_cell(estimate: dict[str, Any] | None, digits: int) -> Cell:
    """Return a cell with an estimate {value, ci95}; empty where there is none."""
    known = estimate or {}
    return value_cell(known.get("value"), digits, known.get("ci95"))


def gold_cell(gold: dict[str, Any] | None) -> Cell:
    """Return a cell with overall gold; empty where there is none."""
    known = gold or {}
    return value_cell(known.get("overall"), 3, known.get("ci95"))


def policy_cell(name: str, names: dict[str, str], mark: str = "") -> Cell:
    """Return the cell that names a policy."""
    return Cell(names.get(name, name) + mark, tone=name)

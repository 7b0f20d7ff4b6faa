"""Keep encoded rankings in Arrow files, and read them as prompt groups one by one.

A file is mapped into memory, so that a million rankings take no more of it than those that are
being read. Rankings of the same responses by several labelers are one group: the index says which
rows make a group.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from data.groups import PromptGroup
from data.labels import LabelledGroups, labels_of
from data.records import Ranking, prompt_key
from data.ties import judged_ties, largest_tie

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 1024
"""Rows of a batch in the file."""
FACTS = ("ranks", "id", "labeler", "margin", "scores", "labels")
"""Columns of the file beside token ids."""
COLUMNS = ("tokens", "widths", "responses", "pairs", "ties", "largest", "labels")
"""Numbers of each group in the index, as of `IndexBuilder`."""


@dataclass(frozen=True)
class EncodedRanking:
    """Hold a ranking with its prompt and responses as token ids."""

    prompt: list[int]
    """Token ids of the prompt."""
    responses: list[list[int]]
    """Token ids of the responses, within the length limit."""
    ranking: Ranking
    """The ranking itself."""

    @cached_property
    def group(self) -> PromptGroup:
        """Return the ranking as a group of its own."""
        labels = self.ranking.labels
        return PromptGroup(self.prompt, self.responses, self.ranking.ranks, labels=() if labels is None else (labels,))

    @cached_property
    def ties(self) -> int:
        """Return the number of its tied pairs."""
        return sum(1 for _ in judged_ties(self.group))


@dataclass
class IndexBuilder:
    """Find out which rows are one group, while rows are written one by one."""

    groups: dict[int, int] = field(default_factory=dict)
    """Hash of prompt and answers → index of the group, in the order of their first rows."""
    owner: array = field(default_factory=lambda: array("i"))
    """The group of each row."""
    tokens: array = field(default_factory=lambda: array("i"))
    """The tokens of each group, its prompt counted once."""
    widths: array = field(default_factory=lambda: array("i"))
    """The tokens of each group's prompt with its longest response."""
    responses: array = field(default_factory=lambda: array("i"))
    """The responses of each group, K."""
    pairs: array = field(default_factory=lambda: array("i"))
    """The usable pairs of each group, over all labelers."""
    ties: array = field(default_factory=lambda: array("i"))
    """The tied pairs of each group, over all labelers."""
    largest: array = field(default_factory=lambda: array("i"))
    """The most different responses that share a rank in each group."""
    labels: array = field(default_factory=lambda: array("i"))
    """The labels of single responses of each group, over all labelers, as of `labels_of`."""

    def add(self, row: EncodedRanking) -> None:
        """Add the next row."""
        key = hash((prompt_key(row.ranking.prompt), row.ranking.answers))
        group = self.groups.setdefault(key, len(self.groups))
        if group == len(self.tokens):
            lengths = [len(response) for response in row.responses]
            self.tokens.append(len(row.prompt) + sum(lengths))
            self.widths.append(len(row.prompt) + max(lengths))
            self.responses.append(len(lengths))
            self.pairs.append(0)
            self.ties.append(0)
            self.largest.append(1)
            self.labels.append(0)
        self.owner.append(group)
        one = row.group
        self.pairs[group] += len(one.pairs())
        self.labels[group] += sum(label is not None for labels in labels_of(one) for label in labels)
        if row.ties:
            self.ties[group] += row.ties
            self.largest[group] = max(self.largest[group], largest_tie(one))

    def table(self) -> pyarrow.Table:
        """Return the index: a row for each group with a usable pair, a tie or a label."""
        import pyarrow as pa

        order = np.argsort(np.asarray(self.owner), kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(np.asarray(self.owner), minlength=len(self.tokens)))
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        rows = pa.ListArray.from_arrays(pa.array(offsets), pa.array(order))
        columns = {name: pa.array(np.asarray(getattr(self, name), dtype=np.int32)) for name in COLUMNS}
        table = pa.table({"rows": rows, **columns})
        return table.filter(pa.array(np.asarray(self.pairs) + np.asarray(self.ties) + np.asarray(self.labels) > 0))


def schema() -> pyarrow.Schema:
    """Return the columns of a file of encoded rankings."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        {
            "prompt": ids,
            "responses": pa.list_(ids),
            "ranks": pa.list_(pa.int32()),
            "id": pa.string(),
            "labeler": pa.string(),
            "margin": pa.float64(),
            "scores": pa.list_(pa.float64()),
            "labels": pa.list_(pa.bool_()),
        }
    )


def write_rows(target: Any, rows: Iterable[EncodedRanking]) -> pyarrow.Table:
    """Write encoded rankings as an Arrow file, and return their index.

    Args:
        target: A path, or a stream of pyarrow.
        rows: The rows.
    """
    import pyarrow as pa

    index = IndexBuilder()
    columns = schema()
    with pa.ipc.new_file(target, columns) as writer:
        for batch in batches_of(rows, index):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=columns))
    return index.table()


def batches_of(rows: Iterable[EncodedRanking], index: IndexBuilder) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a file as lists of ROWS_AT_ONCE objects; the last list may be shorter.

    Args:
        rows: The rows.
        index: Gets each row.
    """
    batch: list[dict[str, Any]] = []
    for row in rows:
        index.add(row)
        ranking = row.ranking
        batch.append(
            {
                "prompt": row.prompt,
                "responses": row.responses,
                "ranks": ranking.ranks,
                "id": ranking.id,
                "labeler": ranking.labeler,
                "margin": ranking.margin,
                # a margin that the labeler gave goes before one that scores would give
                "scores": ranking.scores if ranking.margin is None else None,
                "labels": ranking.labels,
            }
        )
        if len(batch) == ROWS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass(eq=False)
class Lists:
    """Read a column of lists as Python lists, without an object of pyarrow for each row."""

    offsets: np.ndarray
    """Where each row begins in `values`, and where the last one ends; a view of the file."""
    values: np.ndarray
    """The values of all rows, a view too."""

    @staticmethod
    def of(column: Any) -> Lists:
        """Make one of pyarrow's column of lists; neither these nor their values may be null."""
        return Lists(column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=True))

    def __getitem__(self, i: int) -> list[int]:
        """Return the list in a row."""
        return self.values[self.offsets[i] : self.offsets[i + 1]].tolist()


@dataclass(eq=False)
class RowBatch:
    """Read rows of one batch of a file; it holds no memory but the file's own."""

    facts: dict[str, Any]
    """Columns of FACTS in which any row says something."""
    prompts: Lists
    """The token ids of each prompt."""
    answers: np.ndarray
    """Where the responses of each row begin in `responses`, and where the last one's end."""
    responses: Lists
    """The token ids of each response."""

    @staticmethod
    def of(batch: Any) -> RowBatch:
        """Make one of pyarrow's batch."""
        columns = {name: batch.column(name) for name in FACTS}
        facts = {name: column for name, column in columns.items() if column.null_count < len(column)}
        responses = batch.column("responses")
        return RowBatch(
            facts, Lists.of(batch.column("prompt")), responses.offsets.to_numpy(), Lists.of(responses.values)
        )


@dataclass(eq=False)
class RowFile:
    """Read rows of a file of encoded rankings, by number."""

    reader: Any
    """pyarrow's RecordBatchFileReader."""
    _batches: dict[int, RowBatch] = field(default_factory=dict)
    """Batches that have been read; they hold no memory but the file's own."""

    @staticmethod
    def open(source: Any) -> RowFile:
        """Open a file.

        Args:
            source: A path, which is mapped into memory, or pyarrow's buffer.
        """
        import pyarrow as pa

        mapped = pa.memory_map(str(source)) if isinstance(source, str | Path) else source
        return RowFile(pa.ipc.open_file(mapped))

    def row(self, number: int, with_tokens: bool = True) -> dict[str, Any]:
        """Return a row.

        Args:
            number: Which.
            with_tokens: Whether to return its token ids too.
        """
        at, i = divmod(number, ROWS_AT_ONCE)
        batch = self._batches.get(at)
        if batch is None:
            batch = self._batches[at] = RowBatch.of(self.reader.get_batch(at))
        row = dict.fromkeys(FACTS) | {name: column[i].as_py() for name, column in batch.facts.items()}
        if with_tokens:
            row["prompt"] = batch.prompts[i]
            row["responses"] = [batch.responses[k] for k in range(batch.answers[i], batch.answers[i + 1])]
        return row


@dataclass(eq=False)
class GroupRows(Sequence[PromptGroup]):
    """Read prompt groups from a file of encoded rankings, each when it is asked for."""

    file: RowFile
    """The rankings."""
    index: Any
    """The index, pyarrow's table; or a part of it."""
    _last: tuple[int, PromptGroup] | None = None
    """The group that was read last, with its index: its pairs often ask for it again."""

    def __len__(self) -> int:
        """Return the number of groups."""
        return self.index.num_rows

    @overload
    def __getitem__(self, at: int) -> PromptGroup: ...

    @overload
    def __getitem__(self, at: slice) -> list[PromptGroup]: ...

    def __getitem__(self, at: int | slice) -> PromptGroup | list[PromptGroup]:
        """Return a group, or several."""
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        at %= len(self)
        if self._last is None or self._last[0] != at:
            self._last = at, self._read(at)
        return self._last[1]

    def _read(self, at: int) -> PromptGroup:
        """Read the group with an index."""
        first, *others = self.index.column("rows")[at].as_py()
        row = self.file.row(first)
        rows = [row, *(self.file.row(number, with_tokens=False) for number in others)]
        has_scores = any(one["scores"] is not None for one in rows)
        has_labels = any(one["labels"] is not None for one in rows)
        return PromptGroup(
            prompt=row["prompt"],
            responses=row["responses"],
            ranks=tuple(row["ranks"]),
            id=row["id"],
            more_ranks=tuple(tuple(one["ranks"]) for one in rows[1:]),
            labelers=tuple(one["labeler"] for one in rows),
            margins=tuple(one["margin"] or 0.0 for one in rows),
            scores=tuple(one["scores"] and tuple(one["scores"]) for one in rows) if has_scores else (),
            labels=tuple(one["labels"] and tuple(one["labels"]) for one in rows) if has_labels else (),
        )

    def part(self, indices: Sequence[int]) -> GroupRows:
        """Return the groups with these indices, in this order."""
        import pyarrow as pa

        return GroupRows(self.file, self.index.take(pa.array(indices, pa.int64())))

    def column(self, name: str) -> list[int]:
        """Return a number for each group, by its name in COLUMNS."""
        return self.index.column(name).to_numpy().tolist()


def write_groups(target: Path, index: Path, rows: Iterable[EncodedRanking]) -> None:
    """Write encoded rankings and their index as two Arrow files.

    Args:
        target: The path of the rows.
        index: The path of the index.
        rows: The rows.
    """
    import pyarrow as pa

    table = write_rows(str(target), rows)
    with pa.ipc.new_file(str(index), table.schema) as writer:
        writer.write_table(table)


def read_groups(target: Path, index: Path, with_ties: bool = False, with_labels: bool = False) -> GroupRows:
    """Map the files of `write_groups` into memory.

    Args:
        target: The path of the rows.
        index: The path of the index.
        with_ties: Whether to return groups that have ties only, too.
        with_labels: Whether to return groups with a label of a response, and no others.
    """
    import pyarrow as pa

    with pa.memory_map(str(index)) as file:
        return GroupRows(RowFile.open(target), usable(pa.ipc.open_file(file).read_all(), with_ties, with_labels))


def groups_of(rows: Iterable[EncodedRanking], with_ties: bool = False, with_labels: bool = False) -> GroupRows:
    """Make groups of rows in memory, without a file.

    Args:
        rows: The rows.
        with_ties: As of `read_groups`.
        with_labels: As of `read_groups`.
    """
    import pyarrow as pa

    stream = pa.BufferOutputStream()
    index = write_rows(stream, rows)
    return GroupRows(RowFile.open(stream.getvalue()), usable(index, with_ties, with_labels))


def usable(index: pyarrow.Table, with_ties: bool, with_labels: bool) -> pyarrow.Table:
    """Return the rows of an index with a usable pair; or a tie too; or with a label instead."""
    import pyarrow as pa

    counts = index.column("labels" if with_labels else "pairs").to_numpy()
    if with_ties:
        counts = counts + index.column("ties").to_numpy()
    return index.filter(pa.array(counts > 0))


# ── what batches need of many groups, without their token ids ────────────────────────────────────


def tokens_of(groups: Sequence[PromptGroup]) -> list[int]:
    """Return the tokens of each group, its prompt counted once."""
    return groups.column("tokens") if isinstance(groups, GroupRows) else [group.tokens() for group in groups]


def widths_of(groups: Sequence[PromptGroup]) -> list[int]:
    """Return the tokens of each group's longest row, where each response has a row of its own."""
    if isinstance(groups, GroupRows):
        return groups.column("widths")
    return [len(group.prompt) + max(map(len, group.responses)) for group in groups]


def most_responses(groups: Sequence[PromptGroup]) -> int:
    """Return the most responses of a group."""
    if isinstance(groups, GroupRows):
        return max(groups.column("responses"))
    return max(len(group.responses) for group in groups)


def count_pairs(groups: Sequence[PromptGroup]) -> int:
    """Count the usable pairs of groups."""
    return sum(groups.column("pairs")) if isinstance(groups, GroupRows) else sum(len(g.pairs()) for g in groups)


def has_pair(groups: Sequence[PromptGroup]) -> list[bool]:
    """Return whether each group has a usable pair."""
    if isinstance(groups, GroupRows):
        return [pairs > 0 for pairs in groups.column("pairs")]
    return [len(group.pairs()) > 0 for group in groups]


def count_ties(groups: Sequence[PromptGroup]) -> int:
    """Count the tied pairs of groups."""
    if isinstance(groups, GroupRows):
        return sum(groups.column("ties"))
    return sum(1 for group in groups for _ in judged_ties(group))


def most_tied(groups: Sequence[PromptGroup]) -> int:
    """Return the most different responses that share a rank in a group; 1 without a tie."""
    if isinstance(groups, GroupRows):
        return max(groups.column("largest"), default=1)
    return max(map(largest_tie, groups), default=1)


def part_of(groups: Sequence[PromptGroup], indices: Sequence[int]) -> Sequence[PromptGroup]:
    """Return the groups with these indices, in this order."""
    if isinstance(groups, LabelledGroups):
        return LabelledGroups(part_of(groups.groups, indices))
    return groups.part(indices) if isinstance(groups, GroupRows) else [groups[i] for i in indices]

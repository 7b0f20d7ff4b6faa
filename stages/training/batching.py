"""Choose the rows of each batch and cut batches into micro-batches.

However a batch is cut, and shared among ranks, its gradient is the same: losses are divided by
counts of the whole batch.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from data.group_rows import most_responses, tokens_of, widths_of
from data.groups import PromptGroup
from data.streams import derive_seed, grouped_by_length
from pipeline.launch import parallel

Item = TypeVar("Item")


def micro_batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Yield `items` in successive slices of `size`; the last one may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


# -- prompts with all their responses (rm, dpo) --------------------------------------------------


def group_order(
    groups: Sequence[PromptGroup], steps: int, batch_size: int, seed: tuple[object, ...], member: int = 0
) -> list[int]:
    """Return the indices of the prompt groups of all batches, in order.

    The order is shuffled; within four batches, groups of similar length are put together.

    Args:
        groups: The groups to train on.
        steps: Number of batches.
        batch_size: Groups in a batch.
        seed: What the order is derived from: the experiment's seed and the stage's name.
        member: Index of the model, where a stage trains several: each has an order of its own.
    """
    lengths = tokens_of(groups)
    if member:
        seed = (*seed, member)
    return grouped_by_length(lengths, batch_size, steps * batch_size, derive_seed(*seed), window=4)


@dataclass(frozen=True)
class GroupBatches:
    """Cut batches of prompt groups into micro-batches."""

    groups: Sequence[PromptGroup]
    """All groups; batches are lists of their indices."""
    size: int
    """The most groups in a micro-batch (per_device_train_batch_size)."""
    budget: int | None
    """The most tokens in a micro-batch, in place of `size` (per_device_train_tokens)."""
    packed: bool
    """Whether the responses of a prompt share one row."""

    @cached_property
    def tokens(self) -> list[int]:
        """Tokens of each group, its prompt counted once."""
        return tokens_of(self.groups)

    @cached_property
    def widths(self) -> list[int]:
        """Tokens of each group's longest row, where each response has a row of its own."""
        return widths_of(self.groups)

    @cached_property
    def most_responses(self) -> int:
        """The most responses of a group."""
        return most_responses(self.groups)

    def to_train(self, rows: list[int]) -> list[list[int]]:
        """Cut a batch: packed rows into about equal micro-batches, padded rows by length."""
        if self.packed:
            return balanced(rows, self.tokens, self.size, self.budget)
        return self._sorted(rows)

    def to_evaluate(self) -> tuple[list[list[int]], list[int]]:
        """Cut all groups for a forward pass only.

        Returns:
            The micro-batches, and the tokens of each.
        """
        parts = self._sorted(list(range(len(self.groups))))
        return parts, [sum(self.tokens[i] for i in part) for part in parts]

    def _sorted(self, rows: list[int]) -> list[list[int]]:
        """Cut groups in the order of their lengths; fast for any number of them."""
        if self.packed:
            return sorted_chunks(rows, self.tokens, sum, self.size, self.budget)

        def padded_tokens(widths: list[int]) -> int:
            return len(widths) * self.most_responses * max(widths)

        return sorted_chunks(rows, self.widths, padded_tokens, self.size, self.budget)


def balanced(rows: list[int], tokens: Sequence[int], size: int, budget: int | None) -> list[list[int]]:
    """Divide rows into as few micro-batches as the limit allows, about equal in tokens.

    The longest row goes first, each to the micro-batch that has the fewest tokens so far.

    Args:
        rows: Indices of the rows.
        tokens: Tokens of each row, by index.
        size: The most rows in a micro-batch.
        budget: The most tokens in a micro-batch, in place of `size`; a longer row is by itself.
    """
    ordered = sorted(rows, key=lambda i: tokens[i], reverse=True)
    least = -(-len(rows) // size) if budget is None else -(-sum(tokens[i] for i in rows) // budget)
    for count in range(max(1, least), len(rows) + 1):
        parts, heap = [[] for _ in range(count)], [(0, i) for i in range(count)]
        for row in ordered:
            total, i = heapq.heappop(heap)
            parts[i].append(row)
            if budget is not None or len(parts[i]) < size:  # otherwise it is full, and leaves the heap
                heapq.heappush(heap, (total + tokens[row], i))
        if budget is None or all(len(p) == 1 or sum(tokens[i] for i in p) <= budget for p in parts):
            return parts
    return [[row] for row in ordered]


def sorted_chunks(
    rows: list[int], tokens: Sequence[int], cost: Callable[[list[int]], int], size: int, budget: int | None
) -> list[list[int]]:
    """Sort rows by length and cut them into micro-batches.

    Args:
        rows: Indices of the rows.
        tokens: Tokens of each row, by index.
        cost: Tokens of the rows of a micro-batch → tokens of the micro-batch, padding included.
        size: The most rows in a micro-batch.
        budget: The highest cost of a micro-batch, in place of `size`; a row above it is by itself.
    """
    parts: list[list[int]] = []
    for row in sorted(rows, key=lambda i: tokens[i]):
        fits = parts and len(parts[-1]) < size
        if parts and budget is not None:
            fits = cost([tokens[i] for i in [*parts[-1], row]]) <= budget
        if fits:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


# -- sampled responses (ppo) ---------------------------------------------------------------------


def share_groups(lengths: Sequence[int], index: Sequence[int], n: int) -> list[int]:
    """Return this rank's share of the episodes; the samples of a prompt stay on one rank.

    Args:
        lengths: Tokens of each episode, by index.
        index: The episodes to share, n successive ones of each prompt.
        n: Samples of a prompt.
    """
    groups = [index[i : i + n] for i in range(0, len(index), n)]
    shared = parallel.rows_of_this_rank(groups, [sum(lengths[i] for i in group) for group in groups])
    return [i for group in shared for i in group]


def in_micro_batches(
    lengths: Sequence[int], index: Sequence[int], n: int, size: int, tokens: int | None = None
) -> list[list[int]]:
    """Cut episodes into micro-batches of similar lengths, which need little padding.

    The samples of a prompt stay beside each other, so that a packed row computes the prompt once.

    Args:
        lengths: Tokens of each episode, by index.
        index: The episodes to cut, n successive ones of each prompt.
        n: Samples of a prompt.
        size: The most episodes in a micro-batch.
        tokens: The most tokens in a micro-batch; only the samples of one prompt may exceed it.
    """
    index = list(index)

    def tokens_of(part: list[int]) -> int:
        return sum(lengths[i] for i in part)

    groups = sorted((index[i : i + n] for i in range(0, len(index), n)), key=tokens_of)
    parts: list[list[int]] = [[]]
    for group in groups:
        if tokens is not None and parts[-1] and tokens_of(parts[-1]) + tokens_of(group) > tokens:
            parts.append([])
        for i in group:
            if len(parts[-1]) == size:
                parts.append([])
            parts[-1].append(i)
    return [part for part in parts if part]

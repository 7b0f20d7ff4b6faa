"""Read prompt groups as responses that are good or bad each, as KTO learns from them.

A label is what a labeler said of one response alone. Where a labeler ranked instead, the responses
ranked first are good and those ranked last are bad; of a pair that is what trl makes of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from data.groups import PromptGroup

Labels = tuple[bool | None, ...]
"""For each response whether it is good; None: not judged."""


def labels_of(group: PromptGroup) -> list[Labels]:
    """Return the labels by each labeler."""
    found = []
    for labeler, ranks in enumerate(group.rankings()):
        given = group.labels[labeler] if group.labels else None
        found.append(labels_of_ranks(group, ranks) if given is None else given)
    return found


def labels_of_ranks(group: PromptGroup, ranks: Sequence[int | None]) -> Labels:
    """Return the labels that ranks stand for; all None where nothing is better than anything.

    Args:
        group: The group.
        ranks: The ranks by one of its labelers.
    """
    judged = [rank for rank in ranks if rank is not None]
    if not judged or min(judged) == max(judged):
        return (None,) * len(group.responses)
    first, last = min(judged), max(judged)
    best = [group.responses[i] for i, rank in enumerate(ranks) if rank == first]
    labels: list[bool | None] = []
    for response, rank in zip(group.responses, ranks, strict=True):
        is_bad = rank == last and response not in best  # equal responses are neither better nor worse
        labels.append(True if rank == first else False if is_bad else None)
    return tuple(labels)


def only_labelled(group: PromptGroup) -> PromptGroup:
    """Return a group with its labelled responses only, and labels in place of ranks."""
    labels = labels_of(group)
    kept = [i for i in range(len(group.responses)) if any(own[i] is not None for own in labels)]
    return PromptGroup(
        prompt=group.prompt,
        responses=[group.responses[i] for i in kept],
        id=group.id,
        labels=tuple(tuple(own[i] for i in kept) for own in labels),
    )


def judgements(groups: Sequence[PromptGroup]) -> list[tuple[int, bool]]:
    """Return (row, whether it is good) of every label of groups that have labels only.

    Args:
        groups: Groups as of `only_labelled`; their responses are the rows, in order.
    """
    found, start = [], 0
    for group in groups:
        for labels in group.labels:
            assert labels is not None
            found += [(start + i, label) for i, label in enumerate(labels) if label is not None]
        start += len(group.responses)
    return found


def mismatched(batch: Sequence[int]) -> list[tuple[int, int]]:
    """Return (prompt, responses): each prompt of a batch with the responses to the one before it.

    Args:
        batch: Indices of the groups of a batch; the first one gets the responses of the last.
    """
    return [(group, batch[at - 1]) for at, group in enumerate(batch)]


@dataclass(eq=False)
class LabelledGroups(Sequence[PromptGroup]):
    """Read groups as of `only_labelled`, each when it is asked for."""

    groups: Sequence[PromptGroup]
    """The groups, each with a label."""

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.groups)

    @overload
    def __getitem__(self, at: int) -> PromptGroup: ...

    @overload
    def __getitem__(self, at: slice) -> list[PromptGroup]: ...

    def __getitem__(self, at: int | slice) -> PromptGroup | list[PromptGroup]:
        """Return a group, or several."""
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return only_labelled(self.groups[at])


@dataclass(eq=False)
class MismatchedGroups(Sequence[PromptGroup]):
    """Pair prompts with the responses to other prompts, each when it is asked for."""

    groups: Sequence[PromptGroup]
    """The groups."""
    pairs: Sequence[tuple[int, int]]
    """Index of the group whose prompt it is, and of that whose responses they are."""
    max_length: int
    """The most tokens of a prompt and a response, which loses its end beyond them."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.pairs)

    @overload
    def __getitem__(self, at: int) -> PromptGroup: ...

    @overload
    def __getitem__(self, at: slice) -> list[PromptGroup]: ...

    def __getitem__(self, at: int | slice) -> PromptGroup | list[PromptGroup]:
        """Return a group, or several."""
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        prompt, answered = self.pairs[at]
        ids = self.groups[prompt].prompt
        responses = [response[: self.max_length - len(ids)] for response in self.groups[answered].responses]
        return PromptGroup(ids, responses)

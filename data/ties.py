"""List the ties of prompt groups: tied pairs, and rankings as choices of one or several responses.

Losses that count ties read these; all others leave ties out (`PromptGroup.pairs`). Equal responses
are one response here: they are no tie, and have the best of their ranks. Shape letters: P pairs, C
choices, K the most responses of a choice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from data.groups import PromptGroup, moved


@dataclass(frozen=True)
class Comparisons:
    """Hold what labelers said of G groups (B = ΣK responses, in order), ties included."""

    first: torch.Tensor
    """(P,): a response of each judged pair of different responses; the better one if not tied."""
    second: torch.Tensor
    """(P,): the other response of each pair."""
    tied: torch.Tensor
    """(P,): True where both have the same rank."""
    pair_weights: torch.Tensor
    """(P,): the weight of each pair, as of `PromptGroup.pairs`."""
    alternatives: torch.Tensor
    """(C, K): the responses that each choice is made from; anything where `is_open` is False."""
    is_open: torch.Tensor
    """(C, K): True where there is an alternative."""
    chosen: torch.Tensor
    """(C, K): True at those that are chosen: all of one rank, out of them and those below."""
    choice_weights: torch.Tensor
    """(C,): the weight of each choice, 1/(K − 1) divided by the number of labelers."""
    choice_shares: torch.Tensor
    """(C,): the share of each choice among those of its group; they sum to 1 in a group."""

    def to(self, device: torch.device | str) -> "Comparisons":
        """Return a copy with its tensors on a device."""
        return Comparisons(**moved(vars(self), device))


def ranked_once(group: PromptGroup) -> Iterator[list[tuple[int, int]]]:
    """Yield, for each labeler, (rank, response) of the different responses that were judged.

    A response that occurs several times has the best of its ranks.

    Args:
        group: The group.
    """
    for ranks in group.rankings():
        best: dict[tuple[int, ...], tuple[int, int]] = {}
        for i, rank in enumerate(ranks):
            if rank is not None:
                key = tuple(group.responses[i])
                best[key] = min(best.get(key, (rank, i)), (rank, i))
        yield sorted(best.values())


def tiers(ranked: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the responses of each rank, the best rank first.

    Args:
        ranked: (rank, response), sorted.
    """
    by_rank: dict[int, list[int]] = {}
    for rank, response in ranked:
        by_rank.setdefault(rank, []).append(response)
    return list(by_rank.values())


def judged_ties(group: PromptGroup) -> Iterator[tuple[int, int, int]]:
    """Yield (response, response, labeler) of each tied pair of different responses."""
    for labeler, ranks in enumerate(group.rankings()):
        for i, j in combinations(range(len(ranks)), 2):
            if ranks[i] is not None and ranks[i] == ranks[j] and group.responses[i] != group.responses[j]:
                yield i, j, labeler


def largest_tie(group: PromptGroup) -> int:
    """Return the most different responses of a group that share a rank; 1 without a tie."""
    return max((len(tier) for ranked in ranked_once(group) for tier in tiers(ranked)), default=1)


def compare(groups: Sequence[PromptGroup], *, by_choices: bool = False) -> Comparisons:
    """Lay out what labelers said of groups, ties included.

    Args:
        groups: The groups.
        by_choices: Whether a ranking of K responses weighs K − 1 (`ranking_weight: choices`);
            otherwise every group weighs 1.
    """
    pairs: list[tuple[int, int, bool, float]] = []
    choices: list[tuple[list[int], int, float, float]] = []  # alternatives, how many are chosen, weight, share
    start = 0  # the first response of the group
    for group in groups:
        labelers = len(group.rankings())
        judged = [max(2, sum(rank is not None for rank in ranks)) for ranks in group.rankings()]
        # what a choice weighs, by labeler; a pair weighs 2/K of it
        weights = [1.0 if by_choices else 1.0 / (k - 1) / labelers for k in judged]
        won = [(pair.winner, pair.loser, False, pair.labeler) for pair in group.pairs()]
        for i, j, is_tie, who in [*won, *((i, j, True, who) for i, j, who in judged_ties(group))]:
            pairs.append((start + i, start + j, is_tie, 2.0 / judged[who] * weights[who]))
        own = []
        for who, ranked in enumerate(ranked_once(group)):
            rest = [start + response for _, response in ranked]
            for tier in tiers(ranked):
                if len(rest) > 1:  # the last one alone is no choice
                    own.append((rest, len(tier), weights[who]))
                rest = rest[len(tier) :]
        choices += [(rest, size, weight, 1.0 / len(own)) for rest, size, weight in own]
        start += len(group.responses)
    width = max((len(rest) for rest, _, _, _ in choices), default=1)
    columns = torch.arange(width)
    open_counts = torch.tensor([len(rest) for rest, _, _, _ in choices], dtype=torch.long)
    sizes = torch.tensor([size for _, size, _, _ in choices], dtype=torch.long)
    padded = [[*rest, *[0] * (width - len(rest))] for rest, _, _, _ in choices]
    return Comparisons(
        first=torch.tensor([i for i, _, _, _ in pairs], dtype=torch.long),
        second=torch.tensor([j for _, j, _, _ in pairs], dtype=torch.long),
        tied=torch.tensor([is_tie for _, _, is_tie, _ in pairs], dtype=torch.bool),
        pair_weights=torch.tensor([weight for _, _, _, weight in pairs], dtype=torch.float32),
        alternatives=torch.tensor(padded, dtype=torch.long).reshape(len(choices), width),
        is_open=columns < open_counts.unsqueeze(-1),
        # the best rank comes first
        chosen=columns < sizes.unsqueeze(-1),
        choice_weights=torch.tensor([weight for _, _, weight, _ in choices], dtype=torch.float32),
        choice_shares=torch.tensor([share for _, _, _, share in choices], dtype=torch.float32),
    )

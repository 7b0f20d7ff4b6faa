"""A prompt and its K responses: the batch element of everything that learns from preferences.

InstructGPT (§3.5) makes all C(K,2) comparisons of a prompt one batch element. A PromptGroup holds the ids; a
GroupBatch lays groups of any K out as rows: prompts padded on the left, responses on the right, so that column P
is the first response token of every row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PromptGroup:
    """One prompt, its K responses (EOS included) and their ranks: 1 = best, equal = tie, None = not judged."""

    prompt: list[int]
    responses: list[list[int]]
    ranks: tuple[int | None, ...] = ()
    id: str = ""

    def pairs(self) -> list[tuple[int, int]]:
        """(winner, loser) indices of every judged, untied pair of different responses, in order."""
        ranks, responses = self.ranks, self.responses
        return [
            (i, j)
            for i in range(len(ranks))
            for j in range(len(ranks))
            if ranks[i] is not None and ranks[j] is not None and ranks[i] < ranks[j] and responses[i] != responses[j]
        ]

    def pair_weight(self) -> float:
        """1 / C(K, 2) over the K judged responses: every prompt weighs the same at any K (ties weigh nothing)."""
        judged = sum(r is not None for r in self.ranks)
        return 2.0 / (judged * (judged - 1)) if judged > 1 else 0.0


@dataclass(frozen=True)
class Rows:
    """B rows of one prompt and one response.

    input_ids, position_ids (B, P + R); attention_mask (B, P + R), True where a token is real;
    responses, response_mask (B, R): the last R columns; the EOS counts as a response token.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    prompt_width: int

    @property
    def responses(self) -> torch.Tensor:
        return self.input_ids[:, self.prompt_width :]

    @property
    def response_mask(self) -> torch.Tensor:
        return self.attention_mask[:, self.prompt_width :]

    def to(self, device) -> "Rows":
        return Rows(
            self.input_ids.to(device), self.attention_mask.to(device), self.position_ids.to(device), self.prompt_width
        )

    def select(self, index: torch.Tensor) -> "Rows":
        """The rows of `index`, still padded as before."""
        return Rows(self.input_ids[index], self.attention_mask[index], self.position_ids[index], self.prompt_width)


def make_rows(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    prompt_width: int | None = None,
    response_width: int | None = None,
) -> Rows:
    """Rows of prompts[i] + responses[i]; widths default to the longest prompt and response."""
    p = prompt_width or max(map(len, prompts))
    r = response_width or max(1, max(map(len, responses)))
    ids = torch.full((len(prompts), p + r), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), p + r), dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        row = torch.tensor([*prompt, *response], dtype=torch.long)
        start = p - len(prompt)
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = True
    return Rows(ids, mask, (mask.long().cumsum(-1) - 1).clamp(min=0), p)


@dataclass(frozen=True)
class GroupBatch:
    """G groups laid out as B = ΣK rows.

    winners, losers, pair_weights (N,): row indices of every usable pair, and 1/C(K,2) of its group; groups: G.
    """

    rows: Rows
    winners: torch.Tensor
    losers: torch.Tensor
    pair_weights: torch.Tensor
    pair_group: torch.Tensor
    groups: int

    def mean(self, x: torch.Tensor) -> float:
        """Mean over prompts of the mean over a prompt's pairs: x (N,). Prompts without a pair do not count."""
        sizes = torch.bincount(self.pair_group, minlength=self.groups)
        return ((x / sizes[self.pair_group]).sum() / (sizes > 0).sum().clamp(min=1)).item()

    def to(self, device) -> "GroupBatch":
        return GroupBatch(
            self.rows.to(device),
            self.winners.to(device),
            self.losers.to(device),
            self.pair_weights.to(device),
            self.pair_group.to(device),
            self.groups,
        )


def batch_groups(groups: Sequence[PromptGroup], pad_id: int) -> GroupBatch:
    """Groups of any K, mixed, ties and unjudged included, as one batch. Responses without a rank ride along."""
    prompts, responses, winners, losers, weights, owner = [], [], [], [], [], []
    for g, group in enumerate(groups):
        first = len(responses)
        prompts += [group.prompt] * len(group.responses)
        responses += group.responses
        for winner, loser in group.pairs():
            winners.append(first + winner)
            losers.append(first + loser)
            weights.append(group.pair_weight())
            owner.append(g)
    as_long = lambda x: torch.tensor(x, dtype=torch.long)  # noqa: E731
    return GroupBatch(
        make_rows(prompts, responses, pad_id),
        as_long(winners),
        as_long(losers),
        torch.tensor(weights, dtype=torch.float32),
        as_long(owner),
        len(groups),
    )

"""A prompt and its K responses: the batch element of everything that learns from preferences.

InstructGPT (§3.5) makes all C(K,2) comparisons of a prompt one batch element. A PromptGroup holds the ids; a
GroupBatch lays groups of any K out as rows, one a response or one a prompt, and names their pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PromptGroup:
    """One prompt, its K responses (EOS included) and their ranks: 1 = best, equal = tie, None = not judged.

    more_ranks: what further labelers made of the same responses, which are computed once for all of them.
    """

    prompt: list[int]
    responses: list[list[int]]
    ranks: tuple[int | None, ...] = ()
    id: str = ""
    more_ranks: tuple[tuple[int | None, ...], ...] = ()

    def weighted_pairs(self) -> list[tuple[int, int, float]]:
        """(winner, loser, weight) of every judged, untied pair of different responses, a labeler after the other.

        weight: 1 / C(K, 2) over the K responses that the labeler judged, over the number of labelers: every prompt
        weighs the same at any K (ties weigh nothing).
        """
        pairs, responses = [], self.responses
        for ranks in (self.ranks, *self.more_ranks):
            judged = [i for i, rank in enumerate(ranks) if rank is not None]
            weight = 2.0 / (max(2, len(judged)) * (max(2, len(judged)) - 1)) / (1 + len(self.more_ranks))
            better = ((i, j) for i in judged for j in judged if ranks[i] < ranks[j] and responses[i] != responses[j])
            pairs += [(i, j, weight) for i, j in better]
        return pairs

    def pairs(self) -> list[tuple[int, int]]:
        """`weighted_pairs` without their weights."""
        return [(i, j) for i, j, _ in self.weighted_pairs()]


@dataclass(frozen=True)
class Rows:
    """B responses laid out in N rows of T tokens, padding on the right: causal attention never reaches it.

    input_ids (N, T). Either one response a row (N = B, `segments` None), or all responses of a prompt behind it in
    one row, so that the prompt is computed once: then segments (N, T) is 0 on the prompt, k on its k-th response,
    −1 on padding, every response sees the prompt and itself (`attention_mask`), and position_ids (N, T) start anew
    behind the prompt for each of them.
    responses (B, R), lengths (B,): ids and number of response tokens, EOS included; row, prompt_lengths, first (B,):
    the row of each response, its prompt's length, and the column of its first token.
    """

    input_ids: torch.Tensor
    responses: torch.Tensor
    lengths: torch.Tensor
    row: torch.Tensor
    prompt_lengths: torch.Tensor
    first: torch.Tensor
    segments: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None

    @property
    def response_mask(self) -> torch.Tensor:
        """(B, R), True where a response token is real."""
        return torch.arange(self.responses.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(-1)

    @property
    def before(self) -> torch.Tensor:
        """(B, R): index into the N·T tokens of the one that precedes each response token. Valid under the mask."""
        steps = torch.arange(self.responses.shape[1], device=self.first.device)
        column = torch.where(steps == 0, self.prompt_lengths.unsqueeze(-1) - 1, self.first.unsqueeze(-1) + steps - 1)
        return self.row.unsqueeze(-1) * self.input_ids.shape[1] + column

    @property
    def last(self) -> torch.Tensor:
        """(B,): index into the N·T tokens of the last token of each response (of its prompt, if it has none)."""
        end = torch.where(self.lengths > 0, self.first + self.lengths, self.prompt_lengths) - 1
        return self.row * self.input_ids.shape[1] + end

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """(N, 1, T, T), True where a query (row of the matrix) may look; None where plain causal attention is right."""
        if self.segments is None:
            return None
        keys, queries = self.segments.unsqueeze(-2), self.segments.unsqueeze(-1)
        return (((keys == 0) | (keys == queries)).tril()).unsqueeze(1)

    def to(self, device) -> "Rows":
        return Rows(*(None if x is None else x.to(device) for x in vars(self).values()))

    def select(self, index: torch.Tensor) -> "Rows":
        """The responses of `index` (one response a row only), without columns that none of them needs."""
        assert self.segments is None, "rows that share prompts are not taken apart"
        first, lengths = self.first[index], self.lengths[index]
        width = int((first + lengths).max())
        return Rows(
            self.input_ids[index][:, :width],
            self.responses[index],
            lengths,
            torch.arange(len(index), device=index.device),
            self.prompt_lengths[index],
            first,
        )


def make_rows(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int) -> Rows:
    """One row a response: prompts[i] + responses[i]."""
    return _lay_out([(p, [r]) for p, r in zip(prompts, responses, strict=True)], pad_id)


def share_prompts(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], pad_id: int) -> Rows:
    """One row a group (prompt, its responses): the prompt once, then each response."""
    return _lay_out(groups, pad_id, shared=True)


def _lay_out(groups, pad_id: int, shared: bool = False) -> Rows:
    rows = [[*p, *(t for r in rs for t in r)] for p, rs in groups]
    flat = [
        (g, len(p), r, len(p) + sum(map(len, rs[:k]))) for g, (p, rs) in enumerate(groups) for k, r in enumerate(rs)
    ]
    width = max(map(len, rows))
    padded = lambda lists, fill: torch.tensor([x + [fill] * (width - len(x)) for x in lists])  # noqa: E731
    segments = positions = None
    if shared:
        segments = padded([[0] * len(p) + [k for k, r in enumerate(rs, 1) for _ in r] for p, rs in groups], -1)
        positions = padded([[*range(len(p)), *(len(p) + t for r in rs for t in range(len(r)))] for p, rs in groups], 0)
    most = max(1, *(len(r) for _, _, r, _ in flat))
    return Rows(
        padded(rows, pad_id),
        torch.tensor([[*r, *[pad_id] * (most - len(r))] for _, _, r, _ in flat]),
        torch.tensor([len(r) for _, _, r, _ in flat]),
        torch.tensor([g for g, _, _, _ in flat]),
        torch.tensor([p for _, p, _, _ in flat]),
        torch.tensor([start for _, _, _, start in flat]),
        segments,
        positions,
    )


@dataclass(frozen=True)
class GroupBatch:
    """G groups laid out as rows; B = ΣK responses, in order.

    winners, losers, pair_weights (N,): the responses of every usable pair, and its weight (1/C(K,2)); pair_group (N,):
    its group; groups: G.
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


def batch_groups(groups: Sequence[PromptGroup], pad_id: int, *, share: bool = False) -> GroupBatch:
    """Groups of any K, mixed, ties and unjudged included, as one batch. Responses without a rank ride along.

    share: a prompt and all its responses in one row (for models that can, `stages/models/forward.py`); else K rows.
    """
    winners, losers, weights, owner, count = [], [], [], [], 0
    for g, group in enumerate(groups):
        first, count = count, count + len(group.responses)
        for winner, loser, weight in group.weighted_pairs():
            winners.append(first + winner)
            losers.append(first + loser)
            weights.append(weight)
            owner.append(g)
    pairs = [(group.prompt, group.responses) for group in groups]
    as_long = lambda x: torch.tensor(x, dtype=torch.long)  # noqa: E731
    return GroupBatch(
        share_prompts(pairs, pad_id)
        if share
        else make_rows([p for p, rs in pairs for _ in rs], [r for _, rs in pairs for r in rs], pad_id),
        as_long(winners),
        as_long(losers),
        torch.tensor(weights, dtype=torch.float32),
        as_long(owner),
        len(groups),
    )

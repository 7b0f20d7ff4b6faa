"""A prompt and its K responses: the batch element of everything that learns from preferences.

InstructGPT (§3.5) makes all C(K,2) comparisons of a prompt one batch element. A PromptGroup holds the ids; a
GroupBatch lays groups of any K out as rows, padded or packed, and names their pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Pair(NamedTuple):
    """A judged, untied pair of different responses of a group: rows of the winner and the loser, the labeler who
    said so (a number), and the pair's weight."""

    winner: int
    loser: int
    labeler: int
    weight: float


@dataclass(frozen=True)
class PromptGroup:
    """One prompt, its K responses and their ranks: 1 = best, equal = tie, None = not judged.

    responses: ids with EOS, but of those that were cut off.
    more_ranks: what further labelers made of the same responses, which are computed once for all of them. labelers,
    margins: each labeler's name, and the score difference that all pairs of the ranking should have at least (0).
    """

    prompt: list[int]
    responses: list[list[int]]
    ranks: tuple[int | None, ...] = ()
    id: str = ""
    more_ranks: tuple[tuple[int | None, ...], ...] = ()
    labelers: tuple[str | None, ...] = ()
    margins: tuple[float, ...] = ()

    def pairs(self) -> list[Pair]:
        """Every usable pair, a labeler after the other.

        weight: 1 / C(K, 2) over the K responses that the labeler judged, over the number of labelers: every prompt
        weighs the same at any K (ties weigh nothing).
        """
        pairs, responses = [], self.responses
        for labeler, ranks in enumerate(self.rankings()):
            judged = [i for i, rank in enumerate(ranks) if rank is not None]
            weight = 2.0 / (max(2, len(judged)) * (max(2, len(judged)) - 1)) / (1 + len(self.more_ranks))
            better = ((i, j) for i in judged for j in judged if ranks[i] < ranks[j] and responses[i] != responses[j])
            pairs += [Pair(i, j, labeler, weight) for i, j in better]
        return pairs

    def rankings(self) -> tuple[tuple[int | None, ...], ...]:
        """The ranks of every labeler."""
        return (self.ranks, *self.more_ranks)

    def first(self) -> list[tuple[int, float]]:
        """(response, weight) of those that each labeler put first; the weights of a group sum to 1 where all of its
        labelers judged."""
        found = []
        for ranks in self.rankings():
            best = min((rank for rank in ranks if rank is not None), default=None)
            rows = [i for i, rank in enumerate(ranks) if rank is not None and rank == best]
            found += [(i, 1.0 / len(rows) / (1 + len(self.more_ranks))) for i in rows]
        return found

    def tokens(self) -> int:
        """What a forward pass computes: the prompt once, and the responses."""
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass(frozen=True)
class Rows:
    """B responses laid out in N rows of T tokens, in one of two ways.

    Padded (`sequences` None): one response a row (N = B), its prompt before it, padding on the right, which causal
    attention never reaches. Packed: one row (N = 1) in which nothing is padded, and a prompt that several responses
    in succession have stands once before them; position_ids (1, T) start anew with each prompt, and behind it for
    each of its responses. Then spans holds the lengths in that row, (prompt, its responses) one after another;
    sequences (B, W) the tokens of each response's own prompt and response, in order (the rest of a row repeats its
    last); home (T,) the place in B·W that holds each token. Attention goes by them; all else is a token's own matter.

    responses (B, R), lengths (B,): ids and number of response tokens, with EOS where there is one; row (B,): the row of
    each response; prompt_end, first (B,): the columns of its prompt's last token and of its own first.
    """

    input_ids: torch.Tensor
    responses: torch.Tensor
    lengths: torch.Tensor
    row: torch.Tensor
    prompt_end: torch.Tensor
    first: torch.Tensor
    position_ids: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    home: torch.Tensor | None = None
    spans: tuple[tuple[int, tuple[int, ...]], ...] | None = None

    @property
    def response_mask(self) -> torch.Tensor:
        """(B, R), True where a response token is real."""
        return torch.arange(self.responses.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(-1)

    @property
    def before(self) -> torch.Tensor:
        """(B, R): index into the N·T tokens of the one that precedes each response token. Valid under the mask."""
        steps = torch.arange(self.responses.shape[1], device=self.first.device)
        column = torch.where(steps == 0, self.prompt_end.unsqueeze(-1), self.first.unsqueeze(-1) + steps - 1)
        return self.row.unsqueeze(-1) * self.input_ids.shape[1] + column

    @property
    def last(self) -> torch.Tensor:
        """(B,): index into the N·T tokens of the last token of each response (of its prompt, if it has none)."""
        end = torch.where(self.lengths > 0, self.first + self.lengths - 1, self.prompt_end)
        return self.row * self.input_ids.shape[1] + end

    def to(self, device) -> "Rows":
        return Rows(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in vars(self).values()))


def make_rows(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, *, packed: bool = False
) -> Rows:
    """prompts[i] + responses[i] as rows; packed: for models that can (`can_pack` of stages/models/packing.py)."""
    most = max(1, *map(len, responses))
    ids = torch.tensor([[*r, *[pad_id] * (most - len(r))] for r in responses])
    lengths = torch.tensor([len(r) for r in responses])
    if packed:
        return _pack(prompts, responses, ids, lengths)
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    first = torch.tensor([len(p) for p in prompts])
    padded = torch.tensor([x + [pad_id] * (width - len(x)) for x in rows])
    return Rows(padded, ids, lengths, torch.arange(len(rows)), first - 1, first)


def _pack(prompts, responses, ids: torch.Tensor, lengths: torch.Tensor) -> Rows:
    tokens, positions, ends, firsts, places, before, spans = [], [], [], [], [], None, []
    for prompt, response in zip(prompts, responses, strict=True):
        if before is None or list(prompt) != list(before):
            start, before = len(tokens), prompt
            tokens += prompt
            positions += range(len(prompt))
            spans.append((len(prompt), []))
        spans[-1][1].append(len(response))
        ends.append(start + len(prompt) - 1)
        firsts.append(len(tokens))
        places.append([*range(start, start + len(prompt)), *range(len(tokens), len(tokens) + len(response))])
        tokens += response
        positions += range(len(prompt), len(prompt) + len(response))
    width = max(map(len, places))
    sequences = torch.tensor([s + s[-1:] * (width - len(s)) for s in places])
    home = torch.empty(len(tokens), dtype=torch.long)
    for i in reversed(range(len(places))):  # of the places that hold a shared prompt, the first
        home[sequences[i, : len(places[i])]] = torch.arange(i * width, i * width + len(places[i]))
    end, first = torch.tensor(ends), torch.tensor(firsts)
    return Rows(
        torch.tensor([tokens]),
        ids,
        lengths,
        torch.zeros_like(first),
        end,
        first,
        torch.tensor([positions]),
        sequences,
        home,
        tuple((prompt, tuple(rest)) for prompt, rest in spans),
    )


@dataclass(frozen=True)
class GroupBatch:
    """G groups laid out as rows; B = ΣK responses, in order.

    winners, losers, pair_weights, pair_margins (N,): the responses of every usable pair, its weight (1/C(K,2)) and
    its margin; pair_group (N,): its group; groups: G.
    choice (N,): pairs with the same winner by the same labeler are one choice, of the winner out of itself and the
    losers; choice_weights (C,): 1/(K − 1) each over the number of labelers.
    first, first_weights (F,): the responses that labelers put first (see `PromptGroup.first`).
    """

    rows: Rows
    winners: torch.Tensor
    losers: torch.Tensor
    pair_weights: torch.Tensor
    pair_margins: torch.Tensor
    pair_group: torch.Tensor
    choice: torch.Tensor
    choice_weights: torch.Tensor
    first: torch.Tensor
    first_weights: torch.Tensor
    groups: int

    def mean(self, x: torch.Tensor) -> float:
        """Mean over prompts of the mean over a prompt's pairs: x (N,). Prompts without a pair do not count."""
        sizes = torch.bincount(self.pair_group, minlength=self.groups)
        return ((x / sizes[self.pair_group]).sum() / (sizes > 0).sum().clamp(min=1)).item()

    def to(self, device) -> "GroupBatch":
        return GroupBatch(*(x if isinstance(x, int) else x.to(device) for x in vars(self).values()))


def batch_groups(groups: Sequence[PromptGroup], pad_id: int, *, packed: bool = False) -> GroupBatch:
    """Groups of any K, mixed, ties and unjudged included, as one batch. Responses without a rank ride along.

    packed: no padding, and each prompt once (for models that can, `can_pack`); else a padded row a response.
    """
    pairs, owners, margins, choices, first, start = [], [], [], {}, [], 0
    for g, group in enumerate(groups):
        for pair in group.pairs():
            row = pair._replace(winner=start + pair.winner, loser=start + pair.loser)
            if (choice := (g, pair.labeler, row.winner)) not in choices:
                judged = sum(rank is not None for rank in group.rankings()[pair.labeler])
                choices[choice] = 1.0 / (judged - 1) / len(group.rankings())
            pairs.append(row)
            owners.append(g)
            margins.append(group.margins[pair.labeler] if group.margins else 0.0)
        first += [(start + i, weight) for i, weight in group.first()]
        start += len(group.responses)
    number = {name: i for i, name in enumerate(choices)}
    texts = [(group.prompt, group.responses) for group in groups]
    as_long = lambda x: torch.tensor(x, dtype=torch.long)  # noqa: E731
    as_float = lambda x: torch.tensor(x, dtype=torch.float32)  # noqa: E731
    return GroupBatch(
        make_rows([p for p, rs in texts for _ in rs], [r for _, rs in texts for r in rs], pad_id, packed=packed),
        as_long([p.winner for p in pairs]),
        as_long([p.loser for p in pairs]),
        as_float([p.weight for p in pairs]),
        as_float(margins),
        as_long(owners),
        as_long([number[g, p.labeler, p.winner] for g, p in zip(owners, pairs, strict=True)]),
        as_float(list(choices.values())),
        as_long([i for i, _ in first]),
        as_float([w for _, w in first]),
        len(groups),
    )

"""Lay prompts with their K responses out as batches.

Everything that learns from preferences reads these batches. InstructGPT (§3.5) makes all C(K, 2)
comparisons of a prompt one batch element. A PromptGroup holds
the ids, Rows lay responses out as tensors (padded or packed), and a GroupBatch adds the pairs of
groups of any K. Shape letters: B responses, N rows, T tokens of a row, R tokens of the longest
response, W tokens of the longest prompt with its response.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Pair(NamedTuple):
    """Name a judged, untied pair of different responses of a group."""

    winner: int
    """The row of the better response."""
    loser: int
    """The row of the worse response."""
    labeler: int
    """The index of the labeler who judged the pair."""
    weight: float
    """The pair's weight in the loss."""


@dataclass(frozen=True)
class PromptGroup:
    """Hold one prompt, its K responses and how labelers ranked them."""

    prompt: list[int]
    """Token ids of the prompt."""
    responses: list[list[int]]
    """Token ids of the K responses, each with EOS unless it was cut off."""
    ranks: tuple[int | None, ...] = ()
    """The first labeler's ranks: 1 is best, equal ranks are a tie, None was not judged."""
    id: str = ""
    """The id of the ranking."""
    more_ranks: tuple[tuple[int | None, ...], ...] = ()
    """The ranks by further labelers; the responses are computed once for all of them."""
    labelers: tuple[str | None, ...] = ()
    """The name of each labeler."""
    margins: tuple[float, ...] = ()
    """For each labeler the score difference that every pair should have at least; 0 for none."""
    scores: tuple[tuple[float | None, ...] | None, ...] = ()
    """For each labeler the scores that the ranks were made from, where they give the margins."""
    labels: tuple[tuple[bool | None, ...] | None, ...] = ()
    """For each labeler whether each response is good by itself; None where that was not said."""

    def margin(self, pair: Pair) -> float:
        """Return the score difference that a pair should have at least; 0 for none.

        It is m(r) in Llama 2's equation 2: what the labeler said of the whole ranking, or how far
        apart the labeler's own scores of the two responses are.
        """
        scores = self.scores[pair.labeler] if self.scores else None
        if scores is not None:
            better, worse = scores[pair.winner], scores[pair.loser]
            if better is not None and worse is not None:
                return better - worse
        return self.margins[pair.labeler] if self.margins else 0.0

    def pairs(self) -> list[Pair]:
        """Return every usable pair, labeler by labeler.

        A pair weighs 1 / C(K, 2), with the K responses that its labeler judged, divided by the
        number of labelers. So every prompt weighs the same at any K; ties weigh nothing.
        """
        pairs = []
        for labeler, ranks in enumerate(self.rankings()):
            judged = [(i, rank) for i, rank in enumerate(ranks) if rank is not None]
            k = max(2, len(judged))
            weight = 2.0 / (k * (k - 1)) / (1 + len(self.more_ranks))
            for i, rank in judged:
                for j, other in judged:
                    if rank < other and self.responses[i] != self.responses[j]:
                        pairs.append(Pair(i, j, labeler, weight))
        return pairs

    def rankings(self) -> tuple[tuple[int | None, ...], ...]:
        """Return the ranks by every labeler."""
        return (self.ranks, *self.more_ranks)

    def first(self) -> list[tuple[int, float]]:
        """Return (response, weight) of the responses that each labeler ranked first.

        The weights of a group sum to 1 if all of its labelers judged.
        """
        weighted = []
        for ranks in self.rankings():
            best = min((rank for rank in ranks if rank is not None), default=None)
            rows = [i for i, rank in enumerate(ranks) if rank is not None and rank == best]
            weighted += [(i, 1.0 / len(rows) / (1 + len(self.more_ranks))) for i in rows]
        return weighted

    def tokens(self) -> int:
        """Count the tokens of a packed forward pass: the prompt once, and all responses."""
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass(frozen=True)
class Rows:
    """Hold B responses with their prompts, laid out in N rows of T tokens in one of two ways.

    Padded (`sequences` is None): one response a row (N = B), its prompt before it, and padding on
    the right, where causal attention never reaches.

    Packed: a single row (N = 1) without padding, in which a prompt occurs once, before all
    successive responses to it. Attention then goes by `sequences` and `home`; everything else in a
    model works token by token, and needs no more than `position_ids`.
    """

    input_ids: torch.Tensor
    """(N, T): token ids."""
    responses: torch.Tensor
    """(B, R): token ids of the responses, padded on the right."""
    lengths: torch.Tensor
    """(B,): tokens of each response, with EOS where there is one."""
    row: torch.Tensor
    """(B,): the row that holds each response."""
    prompt_end: torch.Tensor
    """(B,): the column of its prompt's last token."""
    first: torch.Tensor
    """(B,): the column of its own first token."""
    real: torch.Tensor
    """(n,): index into the B·R places of `responses` of each real token, as `response_mask` shows
    them. A device would have to be waited for to find them from the mask."""
    position_ids: torch.Tensor | None = None
    """(1, T), packed only: positions, which restart at each prompt, and after the prompt for each
    response to it."""
    sequences: torch.Tensor | None = None
    """(B, W), packed only: the columns of each response's own prompt and response, in order; the
    remainder repeats its last column."""
    home: torch.Tensor | None = None
    """(T,), packed only: for each token an index into `sequences`, flattened, that holds it."""
    spans: tuple[tuple[int, tuple[int, ...]], ...] | None = None
    """Packed only: (length of a prompt, lengths of its responses), in the order of the row."""

    @property
    def response_mask(self) -> torch.Tensor:
        """Return (B, R): True where a response token is real."""
        return torch.arange(self.responses.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(-1)

    @property
    def before(self) -> torch.Tensor:
        """Return (B, R): index into the N·T tokens of the one before each response token.

        Its logits predict the response token. Valid under `response_mask`.
        """
        steps = torch.arange(self.responses.shape[1], device=self.first.device)
        column = torch.where(steps == 0, self.prompt_end.unsqueeze(-1), self.first.unsqueeze(-1) + steps - 1)
        return self.row.unsqueeze(-1) * self.input_ids.shape[1] + column

    @property
    def last(self) -> torch.Tensor:
        """Return (B,): index into the N·T tokens of each response's last token, or its prompt's."""
        end = torch.where(self.lengths > 0, self.first + self.lengths - 1, self.prompt_end)
        return self.row * self.input_ids.shape[1] + end

    def to(self, device: torch.device | str) -> "Rows":
        """Return a copy with its tensors on a device."""
        return Rows(**vars(self) | moved(vars(self), device))


def moved(values: dict[str, Any], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Copy the tensors among some values to a device, those of a dtype in one transfer.

    To a GPU they go through pinned memory, and nothing waits for the work that is queued there.

    Args:
        values: By name; tensors lie on the CPU.
        device: The device.

    Returns:
        The tensors there, by name; the same ones if that is the CPU.
    """
    tensors = {name: x for name, x in values.items() if isinstance(x, torch.Tensor)}
    if torch.device(device).type == "cpu":
        return tensors
    copies: dict[str, torch.Tensor] = {}
    for dtype in {x.dtype for x in tensors.values()}:
        same = {name: x for name, x in tensors.items() if x.dtype == dtype}
        flat = torch.cat([x.flatten() for x in same.values()])
        if torch.device(device).type == "cuda":
            flat = flat.pin_memory()
        parts = flat.to(device, non_blocking=True).split([x.numel() for x in same.values()])
        copies |= {name: part.view(x.shape) for (name, x), part in zip(same.items(), parts, strict=True)}
    return copies


def make_rows(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, *, packed: bool = False
) -> Rows:
    """Lay responses out as rows, each after its prompt.

    Args:
        prompts: Token ids of each response's prompt (B).
        responses: Token ids of the responses (B).
        pad_id: The id of padding.
        packed: Whether to pack all of them into one row without padding, each run of equal prompts
            once; only for models that can (`can_pack` of stages/models/packing.py).
    """
    longest = max(1, *map(len, responses))
    ids = torch.tensor([[*response, *[pad_id] * (longest - len(response))] for response in responses])
    lengths = torch.tensor([len(response) for response in responses])
    real = torch.tensor([i * longest + j for i, response in enumerate(responses) for j in range(len(response))])
    real = real.long()  # of empty responses only, it would be of floats
    if packed:
        return _pack(prompts, responses, ids, lengths, real)
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    first = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    return Rows(padded, ids, lengths, torch.arange(len(rows)), first - 1, first, real)


def _pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    ids: torch.Tensor,
    lengths: torch.Tensor,
    real: torch.Tensor,
) -> Rows:
    """Pack responses and their prompts into one row.

    Args:
        prompts: Token ids of each response's prompt (B).
        responses: Token ids of the responses (B).
        ids: (B, R), the responses as a padded tensor.
        lengths: (B,), their lengths.
        real: (n,), the places of their tokens, as of `Rows`.
    """
    tokens: list[int] = []
    positions: list[int] = []
    prompt_ends: list[int] = []
    firsts: list[int] = []
    columns: list[list[int]] = []  # of each response: the columns of its prompt and of itself
    spans: list[tuple[int, list[int]]] = []
    previous, start = None, 0
    for prompt, response in zip(prompts, responses, strict=True):
        if previous is None or list(prompt) != list(previous):
            start, previous = len(tokens), prompt
            tokens += prompt
            positions += range(len(prompt))
            spans.append((len(prompt), []))
        spans[-1][1].append(len(response))
        prompt_ends.append(start + len(prompt) - 1)
        firsts.append(len(tokens))
        columns.append([*range(start, start + len(prompt)), *range(len(tokens), len(tokens) + len(response))])
        tokens += response
        positions += range(len(prompt), len(prompt) + len(response))
    width = max(map(len, columns))
    sequences = torch.tensor([row + row[-1:] * (width - len(row)) for row in columns])
    home = torch.empty(len(tokens), dtype=torch.long)
    # Backwards, so that the tokens of a shared prompt end up with the first response that has it.
    for i in reversed(range(len(columns))):
        length = len(columns[i])
        home[sequences[i, :length]] = torch.arange(i * width, i * width + length)
    first = torch.tensor(firsts)
    return Rows(
        input_ids=torch.tensor([tokens]),
        responses=ids,
        lengths=lengths,
        row=torch.zeros_like(first),
        prompt_end=torch.tensor(prompt_ends),
        first=first,
        real=real,
        position_ids=torch.tensor([positions]),
        sequences=sequences,
        home=home,
        spans=tuple((prompt, tuple(answers)) for prompt, answers in spans),
    )


@dataclass(frozen=True)
class GroupBatch:
    """Hold G groups as rows (B = ΣK responses, in order) with all of their usable pairs.

    Shape letters: P pairs, C choices, F first responses.
    """

    rows: Rows
    """The B responses."""
    winners: torch.Tensor
    """(P,): the better response of each pair."""
    losers: torch.Tensor
    """(P,): the worse response of each pair."""
    pair_weights: torch.Tensor
    """(P,): the weight of each pair, as of `PromptGroup.pairs`."""
    pair_margins: torch.Tensor
    """(P,): the score difference that each pair should have at least."""
    pair_group: torch.Tensor
    """(P,): the group of each pair."""
    pair_sizes: torch.Tensor
    """(P,): the number of pairs of the pair's group."""
    choice: torch.Tensor
    """(P,): the choice that each pair belongs to. Pairs with the same winner by one labeler are one
    choice: of the winner out of itself and the losers."""
    choice_weights: torch.Tensor
    """(C,): the weight of each choice, 1/(K − 1) divided by the number of labelers."""
    first: torch.Tensor
    """(F,): the responses that labelers ranked first, as of `PromptGroup.first`."""
    first_weights: torch.Tensor
    """(F,): their weights."""
    groups: int
    """G, the number of groups."""
    paired: int
    """Groups that have a pair."""

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean over prompts of the mean of x (P,) over a prompt's pairs, a scalar.

        Prompts without a pair do not count.
        """
        return (x / self.pair_sizes).sum() / max(1, self.paired)

    def to(self, device: torch.device | str) -> "GroupBatch":
        """Return a copy with its tensors on a device."""
        return GroupBatch(**vars(self) | moved(vars(self), device) | {"rows": self.rows.to(device)})


def batch_groups(groups: Sequence[PromptGroup], pad_id: int, *, packed: bool = False) -> GroupBatch:
    """Lay groups out as one batch; they may differ in K and have ties and unjudged responses.

    Responses without a rank take part in the forward pass, but in no pair.

    Args:
        groups: The groups.
        pad_id: The id of padding.
        packed: As of `make_rows`.
    """
    winners: list[int] = []
    losers: list[int] = []
    weights: list[float] = []
    margins: list[float] = []
    owners: list[int] = []  # the group of each pair
    pair_choices: list[int] = []  # the choice of each pair
    choices: dict[tuple[int, int, int], int] = {}  # (group, labeler, winner) → index of the choice
    choice_weights: list[float] = []
    first: list[tuple[int, float]] = []
    start = 0  # the first response of the group
    for index, group in enumerate(groups):
        rankings = group.rankings()
        for pair in group.pairs():
            winner = start + pair.winner
            choice = (index, pair.labeler, winner)
            if choice not in choices:
                judged = sum(rank is not None for rank in rankings[pair.labeler])
                choices[choice] = len(choices)
                choice_weights.append(1.0 / (judged - 1) / len(rankings))
            winners.append(winner)
            losers.append(start + pair.loser)
            weights.append(pair.weight)
            margins.append(group.margin(pair))
            owners.append(index)
            pair_choices.append(choices[choice])
        first += [(start + i, weight) for i, weight in group.first()]
        start += len(group.responses)
    prompts = [group.prompt for group in groups for _ in group.responses]
    responses = [response for group in groups for response in group.responses]
    sizes = Counter(owners)
    return GroupBatch(
        rows=make_rows(prompts, responses, pad_id, packed=packed),
        winners=_integers(winners),
        losers=_integers(losers),
        pair_weights=_floats(weights),
        pair_margins=_floats(margins),
        pair_group=_integers(owners),
        pair_sizes=_integers([sizes[owner] for owner in owners]),
        choice=_integers(pair_choices),
        choice_weights=_floats(choice_weights),
        first=_integers([i for i, _ in first]),
        first_weights=_floats([weight for _, weight in first]),
        groups=len(groups),
        paired=len(sizes),
    )


def _integers(values: list[int]) -> torch.Tensor:
    """Return an integer tensor, also of an empty list."""
    return torch.tensor(values, dtype=torch.long)


def _floats(values: list[float]) -> torch.Tensor:
    """Return a float32 tensor, also of an empty list."""
    return torch.tensor(values, dtype=torch.float32)

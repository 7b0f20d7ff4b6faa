"""Sample with a transformers model and its key-value cache.

Each row draws from its own seed: token t is the inverse of the cumulative distribution at the row's
t-th uniform number. So a response depends on its prompt, its seed and the weights, not on the batch
it is in.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.launch import parallel
from stages.models.compiled import as_written
from stages.models.forward import head_is_linear
from stages.models.head import EXCLUDED, dot
from stages.models.packing import reads_packed_rows
from stages.models.sharding import gathered
from stages.models.soft_prompts import excluded_ids
from stages.rollouts.engine import EngineSpec, Sampled, SampleRequest
from stages.rollouts.lanes import Lane, lane_for

LIKELIEST = 1e-9  # a top_p that keeps only the likeliest token
VOCABULARY_BLOCK = 128  # tokens whose probabilities are summed first, before one of them is chosen
KEEP_ALL_ABOVE = 0.75  # finished rows leave the cache once at most this share of its rows is unfinished
ROW_MULTIPLE = 4  # a steady lane holds a multiple of it: a matrix product of 13 rows is slower than of 16


@dataclass(frozen=True)
class Decoding:
    """Say how responses are decoded."""

    response_length: int
    """The longest response in tokens, EOS included."""
    eos_id: int
    """The token that ends a response."""
    pad_id: int
    """The token that pads rows."""
    temperature: float = 1.0
    """Divides the logits."""
    top_k: int | None = None
    """Draw only from so many of the likeliest tokens; None: from all."""
    top_p: float | None = None
    """Draw only from the smallest set of the likeliest tokens that has this probability, within
    those of `top_k`; None: from all."""
    batch_size: int = 64
    """How many rows are decoded at a time."""


def decoding_of(request: SampleRequest, pad_id: int, batch_size: int) -> Decoding:
    """Return how the responses of a request are decoded.

    Args:
        request: Limits, temperature (0: the likeliest token), top-k and top-p.
        pad_id: The token that pads rows.
        batch_size: How many rows are decoded at a time.
    """
    decoding = Decoding(
        response_length=request.response_length,
        eos_id=request.eos_id,
        pad_id=pad_id,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        batch_size=batch_size,
    )
    if request.temperature == 0:
        return replace(decoding, temperature=1.0, top_k=None, top_p=LIKELIEST)
    return decoding


class TransformersEngine:
    """Sample with the policy itself. Each rank samples its share of the prompts."""

    is_policy = True

    def __init__(self, spec: EngineSpec):
        self.spec = spec
        self.model: nn.Module | None = None

    def start(self, model: nn.Module, poll: Callable[[], None]) -> None:
        """Keep the policy; there is nothing to wait for."""
        self.model = model

    def update_weights(self, model: nn.Module) -> None:
        """Keep the policy. Its weights are the ones that train, so they are always current."""
        self.model = model

    def sample(self, request: SampleRequest, poll: Callable[[], None]) -> Sampled:
        """Return one response to each prompt of the request, on all ranks."""
        decoding = decoding_of(request, self.spec.pad_id, self.spec.batch_size)
        # a sharded policy is gathered once, not layer by layer at each token
        with self.spec.autocast(), gathered(self.model) as policy:

            def sample_some(index: list[int]) -> Sampled:
                prompts = [request.prompts[i] for i in index]
                seeds = [request.seeds[i] for i in index]
                return sample_with_logprobs(policy, prompts, seeds, decoding, poll)

            return _sample_on_all_ranks(sample_some, request, self.spec.device)

    def close(self) -> None:
        """Forget the policy; there is nothing else to free."""
        self.model = None


def _sample_on_all_ranks(
    sample_some: Callable[[list[int]], Sampled], request: SampleRequest, device: torch.device
) -> Sampled:
    """Sample this rank's share of a request, and all-gather the others' shares.

    Args:
        sample_some: Samples the episodes of a list of indices.
        request: The whole request; the samples of a prompt stay on one rank, which reads the prompt
            once.
        device: Device of the result.
    """
    if parallel.rank_and_world_size()[1] == 1:
        return sample_some(list(range(len(request.prompts))))
    n = request.samples_per_prompt

    def sample_groups(groups: list[range]) -> list[list[tuple]]:
        sampled = sample_some([i for group in groups for i in group])
        # clones: a row that is a view would send its whole tensor to the other ranks
        logprobs = [row.clone() for row in sampled.logprobs.cpu()]
        entropy = [row.clone() for row in sampled.entropy.cpu()]
        episodes = list(zip(sampled.responses, logprobs, entropy, strict=True))
        return [episodes[i : i + n] for i in range(0, len(episodes), n)]

    groups = [range(i, i + n) for i in range(0, len(request.prompts), n)]
    costs = [len(request.prompts[group[0]]) for group in groups]
    gathered = parallel.compute_and_all_gather(groups, costs, sample_groups, alone=True)
    episodes = [episode for group in gathered for episode in group]
    responses, logprobs, entropy = zip(*episodes, strict=True)
    width = max(map(len, responses))
    return Sampled(list(responses), _stack(logprobs, width, device), _stack(entropy, width, device))


def _stack(rows: Sequence[Tensor], width: int, device: torch.device) -> Tensor:
    """Return rows of different lengths as one tensor (B, width), padded with 0."""
    return torch.stack([F.pad(row, (0, width - len(row))) for row in rows]).to(device)


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    decoding: Decoding,
    poll: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Return one response to each prompt, as token ids.

    Args:
        model: A causal language model.
        prompts: Token ids. A prompt that occurs several times in a row is read once if the model
            packs.
        seeds: One for each prompt.
        decoding: Limits, temperature, top-k and top-p.
        poll: Is called before each token; what it raises ends the sampling (a request to stop).
    """
    return sample_with_logprobs(model, prompts, seeds, decoding, poll).responses


@torch.no_grad()
def sample_with_logprobs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    decoding: Decoding,
    poll: Callable[[], None] = lambda: None,
    watch: Callable[[int, int], None] | None = None,
) -> Sampled:
    """Return one response to each prompt, with log-probabilities and entropies of its tokens.

    Args:
        model: A causal language model.
        prompts: Token ids. A prompt that occurs several times in a row is read once if the model
            packs.
        seeds: One for each prompt.
        decoding: Limits, temperature, top-k and top-p.
        poll: Is called before each token; what it raises ends the sampling (a request to stop).
        watch: Is called with the prompt's index and each of its tokens as they are drawn, EOS
            included; what it raises ends the sampling. It waits for the device at each token.

    Returns:
        Responses; log-probabilities in the distribution that is drawn from; entropies of
        softmax(logits / temperature), whatever `top_k` and `top_p` are.
    """
    model.eval()  # activation checkpointing, where it is on, would drop the cache in training mode
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: little padding
    responses: list[list[int]] = [[] for _ in prompts]
    logprobs = torch.zeros(len(prompts), decoding.response_length, device=model.device)
    entropy = torch.zeros_like(logprobs)
    excluded = excluded_ids(model, model.device)
    make_lane = lane_for(model, reads_packed_rows(model) and head_is_linear(model))
    for start in range(0, len(order), decoding.batch_size):
        chosen = order[start : start + decoding.batch_size]
        uniforms = torch.stack([_uniforms(seeds[i], decoding.response_length) for i in chosen]).to(model.device)
        lane = make_lane(model, [prompts[i] for i in chosen], decoding.response_length, decoding.pad_id)
        with cast_once(model), as_written(model):
            watch_rows = _watch_rows(chosen, watch)
            tokens, batch_logprobs, batch_entropy = _decode(lane, uniforms, decoding, poll, watch_rows, excluded)
        rows = torch.tensor(chosen, device=model.device)
        logprobs[rows, : batch_logprobs.shape[1]] = batch_logprobs
        entropy[rows, : batch_entropy.shape[1]] = batch_entropy
        for i, response in zip(chosen, tokens.tolist(), strict=True):
            if decoding.eos_id in response:
                response = response[: response.index(decoding.eos_id) + 1]
            responses[i] = response
    width = max(map(len, responses))
    return Sampled(responses, logprobs[:, :width], entropy[:, :width])


def _watch_rows(
    chosen: Sequence[int], watch: Callable[[int, int], None] | None
) -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """Return what hands the tokens of a batch's unfinished rows to `watch`; None without one.

    Args:
        chosen: The prompt's index of each row of the batch.
        watch: Takes a prompt's index and a token.
    """
    if watch is None:
        return None

    def watch_rows(rows: Tensor, tokens: Tensor, unfinished: Tensor) -> None:
        drawn = zip(rows.tolist(), tokens.tolist(), unfinished.tolist(), strict=True)
        for row, token, is_unfinished in drawn:
            if is_unfinished:
                watch(chosen[row], token)

    return watch_rows


def _uniforms(seed: int, count: int) -> Tensor:
    """Return `count` uniform numbers in [0, 1), drawn on the CPU: the same on every device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Let autocast keep its cast of every weight while inside.

    It keeps only the casts of weights that require a gradient; the frozen base of an adapter would
    be cast again at each token. So frozen weights require one for a while (nothing is
    differentiated inside).
    """
    is_casting = torch.is_autocast_enabled(model.device.type)
    frozen = [p for p in model.parameters() if is_casting and not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _decode(
    lane: Lane,
    uniforms: Tensor,
    decoding: Decoding,
    poll: Callable[[], None],
    watch_rows: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    excluded: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode one batch token by token.

    Args:
        lane: The model with its cache, before it has read the prompts.
        uniforms: (B, R) uniform numbers that choose the tokens.
        decoding: Temperature, top-k, top-p and EOS.
        poll: Is called before each token.
        watch_rows: Is called with the rows that the lane holds, their tokens, and which of them
            were unfinished.
        excluded: Ids (n,) of tokens that are never drawn; None: none.

    Returns:
        Tokens (B, R'), EOS from the end of each row on; their log-probabilities and entropies (B,
        R'), 0 after the end. R' ≤ R is the longest response.
    """
    count, width = uniforms.shape
    drawn = torch.full((count, width), decoding.eos_id, device=uniforms.device)
    logprobs = torch.zeros(count, width, device=uniforms.device)
    entropy = torch.zeros_like(logprobs)
    rows = torch.arange(count, device=uniforms.device)  # which rows of the batch the lane still holds
    unfinished = torch.ones_like(rows, dtype=torch.bool)  # of the rows that the lane holds
    logits = lane.start()
    for t in range(width):
        poll()
        logits = logits.float()
        if excluded is not None:
            logits = logits.index_fill(-1, excluded, EXCLUDED)
        if decoding.temperature != 1.0:
            logits = logits / decoding.temperature
        logp = logits.log_softmax(-1)
        probs = logp.exp()
        kept = truncated(probs, decoding.top_k, decoding.top_p)
        tokens = torch.where(unfinished, pick(kept, uniforms[rows, t]), decoding.eos_id)
        drawn[rows, t] = tokens
        if watch_rows is not None:
            watch_rows(rows, tokens, unfinished)
        of_kept = logp if kept is probs else (kept / kept.sum(-1, keepdim=True)).log()
        logprobs[rows, t] = torch.where(unfinished, of_kept.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), 0.0)
        # 0 · (−∞) would be NaN where a token is impossible
        token_entropy = -dot(probs, logp.clamp(min=-1e30))
        entropy[rows, t] = torch.where(unfinished, token_entropy, 0.0)
        unfinished &= tokens != decoding.eos_id
        alive = int(unfinished.sum())
        if alive == 0 or t + 1 == width:
            break
        wanted = rows_to_keep(alive, len(rows), lane.steady)
        if wanted < len(rows):
            # unfinished rows first, then as many finished ones as fill up to the wanted count
            kept = unfinished.logical_not().argsort(stable=True)[:wanted]
            if lane.keep(kept):
                rows, unfinished, tokens = rows[kept], unfinished[kept], tokens[kept]
        logits = lane.step(tokens)
    return drawn[:, : t + 1], logprobs[:, : t + 1], entropy[:, : t + 1]


def rows_to_keep(alive: int, held: int, steady: bool) -> int:
    """Return how many rows of a cache to keep; dropping some copies the cache.

    Args:
        alive: Rows that are unfinished.
        held: Rows that the cache holds.
        steady: Whether the lane wants rows to leave seldom, and many at a time.
    """
    if not steady:
        return alive if alive <= KEEP_ALL_ABOVE * held else held
    rows = -(-alive // ROW_MULTIPLE) * ROW_MULTIPLE
    return rows if 2 * rows <= held else held


def draw(logits: Tensor, uniform: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Return the tokens (B,) at quantiles (B,) of softmax(logits) (B, V), truncated."""
    return pick(truncated(logits.softmax(-1), top_k, top_p), uniform)


def truncated(probs: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Return probabilities with 0 at the tokens that are not drawn from.

    `top_k` comes first, and `top_p` counts within what it leaves, as in transformers and vLLM.
    Tokens that tie with the k-th stay, so a row's set does not depend on how a sort breaks ties.

    Args:
        probs: (B, V).
        top_k: How many of the likeliest tokens stay; None: all.
        top_p: Probability of the set that stays; None: 1.

    Returns:
        (B, V); `probs` itself where nothing is left out, and otherwise not always a sum of 1.
    """
    if top_k is not None and top_k < probs.shape[-1]:
        probs = torch.where(probs >= probs.topk(top_k).values[:, -1:], probs, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs if top_p is None else nucleus(probs, top_p)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Return probs (B, V) with 0 outside the smallest set of top tokens that reaches `top_p`."""
    if top_p >= 1.0:
        return probs
    ordered, index = probs.sort(-1, descending=True)
    ordered = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    return torch.zeros_like(probs).scatter(-1, index, ordered)


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the first token whose cumulative weight exceeds uniform · total.

    It is found in two steps, first a block of the vocabulary and then a token of it, because
    cumulative sums are slow and need double precision.

    Args:
        weights: (B, V), not negative.
        uniform: (B,) in [0, 1).

    Returns:
        (B,) token ids.
    """
    if weights.device.type == "mps":  # no float64 there; this machine's CPU shares its memory
        return pick(weights.cpu(), uniform.cpu()).to(weights.device)
    B, V = weights.shape
    blocks = F.pad(weights, (0, -V % VOCABULARY_BLOCK)).view(B, -1, VOCABULARY_BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform.double().unsqueeze(-1) * sums[:, -1:]
    block = _first_above(sums, target)
    below = torch.where(block > 0, sums.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(B, device=block.device), block.squeeze(-1)].double().cumsum(-1)
    token = _first_above(inside, target - below)
    return (block * VOCABULARY_BLOCK + token).squeeze(-1).clamp(max=V - 1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return the first index (B, 1) whose cumulative sum (B, n) exceeds the target (B, 1).

    Sums that are not finite give the last index: the token's log-probability is then not finite
    either, and the episode is refused for it.
    """
    # just below the total: rounding must not choose a token of weight 0 after the last one that has
    # some
    target = torch.minimum(target, cumulative[:, -1:] * (1 - 1e-15))
    return torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)

"""Turn prompts into a rollout: sample responses, then run every model of PPO over them."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.groups import Rows, moved
from data.streams import derive_seed
from pipeline.errors import UserError
from pipeline.launch import parallel
from stages.models.adapters import adapter_off
from stages.models.forward import response_logprobs, response_values
from stages.models.roles import Roles
from stages.objectives.masked import masked_mean
from stages.objectives.rewards import final_scores, kl_per_token
from stages.rollouts.engine import RolloutEngine, Sampled, SampleRequest
from stages.rollouts.rollout import DrawnPrompt, Rollout
from stages.scorers.scorer import ScorerDropped, ScoreRequest, ScorerLost, no_poll
from stages.scorers.weighted import WeightedSum, merged
from stages.training.batching import in_micro_batches, share_groups


@dataclass(frozen=True)
class ScoreRules:
    """Say how a scorer's score becomes a reward."""

    missing_eos_score: float | None = None
    """Score of a response without EOS; None: its own."""
    score_clip: float | None = None
    """Clips scores to ± this; None: they are not clipped."""
    length_penalty: float = 0.0
    """Is subtracted for each token of the response."""

    def apply(self, scores: Tensor, finished: Tensor, lengths: Tensor) -> Tensor:
        """Return the scores (B,) under these rules.

        Args:
            scores: (B,) as the scorer gives them.
            finished: (B,) True where the response ends with EOS.
            lengths: (B,) tokens of the responses.
        """
        return final_scores(
            scores,
            finished,
            self.missing_eos_score,
            lengths=lengths,
            score_clip=self.score_clip,
            length_penalty=self.length_penalty,
        )


@dataclass(frozen=True)
class Sampling:
    """Say how a rollout is sampled and scored."""

    samples_per_prompt: int
    """Responses to each prompt."""
    response_length: int
    """The longest response in tokens, EOS included."""
    temperature: float
    """Divides the logits in sampling, and in the log-probabilities of policy and reference."""
    micro_batch_size: int
    """The most episodes in one forward pass of the models."""
    scores: ScoreRules
    """What becomes of the scorer's scores."""


def collect(
    roles: Roles,
    scorer: WeightedSum,
    engine: RolloutEngine,
    sampling: Sampling,
    prompts: Sequence[DrawnPrompt],
    *,
    seed: Sequence,
    recompute: bool,
    poll: Callable[[], None] = no_poll,
) -> Rollout:
    """Return the rollout of some prompts, the samples of a prompt next to each other.

    Args:
        roles: The models.
        scorer: Scores the responses.
        engine: Samples the responses.
        sampling: How they are sampled and scored.
        prompts: The prompts.
        seed: The start of each episode's seed; the prompt's id and the sample's index are appended.
        recompute: Compute log-probabilities and entropies with the policy's forward pass of the
            update, because the engine's are not the same numbers.
        poll: Is called between tokens and micro-batches; what it raises ends the rollout.
    """
    device, tokenizer = roles.accelerator.device, roles.tokenizer
    prompt_ids = [prompt.index for prompt in prompts]
    request = make_request(sampling, [prompt.ids for prompt in prompts], prompt_ids, seed, tokenizer.eos_token_id)
    sampled = engine.sample(request, poll)
    sampled = Sampled(sampled.responses, sampled.logprobs.to(device), sampled.entropy.to(device))
    lengths = torch.tensor([len(r) for r in sampled.responses], device=device)
    width = sampled.logprobs.shape[1]
    blank = torch.zeros_like(sampled.logprobs)
    rollout = Rollout(
        prompts=request.prompts,
        responses=sampled.responses,
        prompt_ids=[i for i in prompt_ids for _ in range(sampling.samples_per_prompt)],
        mask=torch.arange(width, device=device) < lengths.unsqueeze(-1),
        logprobs=sampled.logprobs,
        ref_logprobs=blank,
        values=blank,
        entropy=sampled.entropy,
        scores=torch.zeros(len(request.prompts), device=device),
        finished=torch.tensor([r[-1] == tokenizer.eos_token_id for r in sampled.responses], device=device),
    )
    rollout = replace(rollout, **run_models(roles, scorer, rollout, sampling, recompute, poll))
    drawn = [prompt for prompt in prompts for _ in range(sampling.samples_per_prompt)]
    texts, dropped = score_texts(scorer, rollout, drawn, tokenizer, sampling, poll)
    parts = {**rollout.parts, **texts}
    rollout = replace(rollout, scores=scorer.total(parts, dropped), parts=parts if scorer.shows_parts else {})
    if scorer.drops is not None:
        rollout = replace(rollout, dropped=dropped)
    if recompute:
        kl = engine_kl(sampled.logprobs, rollout.logprobs, rollout.mask)
        rollout = replace(rollout, sampler_logprobs=sampled.logprobs, engine_kl=kl)
    return replace(rollout, scores=sampling.scores.apply(rollout.scores, rollout.finished, lengths))


def make_request(
    sampling: Sampling, prompts: Sequence[Sequence[int]], prompt_ids: Sequence[int], seed: Sequence, eos_id: int
) -> SampleRequest:
    """Return the request for some responses to each prompt, each with a seed of its own.

    Args:
        sampling: How responses are sampled.
        prompts: Token ids.
        prompt_ids: For each prompt, its index in the list that it was drawn from.
        seed: The start of each episode's seed.
        eos_id: The token that ends a response.
    """
    n = sampling.samples_per_prompt
    seeds: list[int] = []
    samples_so_far: Counter = Counter()  # a prompt may be drawn twice: the second time its samples count on
    for i in prompt_ids:
        seeds += [derive_seed(*seed, i, samples_so_far[i] + k) for k in range(n)]
        samples_so_far[i] += n
    return SampleRequest(
        prompts=[list(prompt) for prompt in prompts for _ in range(n)],
        seeds=seeds,
        samples_per_prompt=n,
        response_length=sampling.response_length,
        temperature=sampling.temperature,
        eos_id=eos_id,
    )


@torch.no_grad()
def run_models(
    roles: Roles, scorer: WeightedSum, rollout: Rollout, sampling: Sampling, recompute: bool, poll: Callable[[], None]
) -> dict[str, Any]:
    """Run reference, value and reward models over sampled responses, each rank over its share.

    Args:
        roles: The models.
        scorer: Those of its scorers that read rows score.
        rollout: Prompts, responses and their mask.
        sampling: Temperature, micro-batches and samples a prompt.
        recompute: Run the policy too.
        poll: Is called between micro-batches.

    Returns:
        Fields of a rollout by name, the same on all ranks; `parts` holds reward models' scores.
    """
    names = ["ref_logprobs"] + (["logprobs", "entropy"] if recompute else [])
    if roles.value_model is not None:
        names.append("values")
    computed = {name: torch.zeros_like(rollout.logprobs) for name in names}
    parts = {one.name: torch.zeros_like(rollout.scores) for one in scorer.of_rows}
    lengths, n, width = rollout.lengths(), sampling.samples_per_prompt, rollout.mask.shape[1]
    share = share_groups(lengths, range(len(lengths)), n)
    chunks = in_micro_batches(lengths, share, n, sampling.micro_batch_size, roles.most_tokens())
    with roles.accelerator.autocast():
        for index, is_own in parallel.padded_micro_batches(chunks, roles.spare()):
            poll()
            rows = rollout.rows(index, roles.tokenizer.pad_token_id, roles.packed)
            prompts, responses = [rollout.prompts[i] for i in index], [rollout.responses[i] for i in index]
            request = ScoreRequest(prompts, responses, roles.tokenizer, rows)
            outputs = {"ref_logprobs": reference_logprobs(roles, rows, sampling.temperature)}
            if roles.value_model is not None:
                outputs["values"] = response_values(roles.value_model, rows)
            scores = {one.name: one.scorer.score(request).total for one in scorer.of_rows}
            if recompute:
                logprobs, entropy = response_logprobs(roles.policy, rows, sampling.temperature, with_entropy=True)
                outputs |= {"logprobs": logprobs, "entropy": entropy}
            if not is_own:
                continue  # a forward pass only to keep in step with ranks that have more micro-batches
            episodes = moved({"episodes": torch.tensor(index)}, rollout.mask.device)["episodes"]
            for name, x in outputs.items():
                computed[name][episodes] = F.pad(x, (0, width - x.shape[1]))
            for name, x in scores.items():
                parts[name][episodes] = x.to(rollout.scores)
    # each rank holds 0 where others have computed
    parallel.all_reduce_tensors([*computed.values(), *parts.values()])
    return computed | {"parts": parts}


def score_texts(
    scorer: WeightedSum,
    rollout: Rollout,
    drawn: Sequence[DrawnPrompt],
    tokenizer: Any,
    sampling: Sampling,
    poll: Callable[[], None],
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the scores of those scorers that read texts, each rank asking for its share.

    Args:
        scorer: Its scorers of texts score.
        rollout: B sampled responses.
        drawn: The prompt of each response.
        tokenizer: The policy's.
        sampling: Samples a prompt, which stay together.
        poll: Is called by scorers that wait.

    Returns:
        Name → (B,), the same on all ranks; NaN where a scorer did not name that part. And the names
        of the scorers that have failed on a rank and are left out: all of their scores are NaN, so
        that the responses of an update stay comparable.

    Raises:
        ScorerLost, UserError: On all ranks, if a scorer has failed on one of them.
    """
    if not scorer.of_texts:
        return {}, ()
    lengths = rollout.lengths()
    share = sorted(share_groups(lengths, range(len(lengths)), sampling.samples_per_prompt))
    if not parallel.is_first_of_group():
        share = []  # the first one asks for the same rows

    def score_share() -> tuple[dict[str, Tensor], dict[str, str]]:
        request = ScoreRequest(
            prompts=[rollout.prompts[i] for i in share],
            responses=[rollout.responses[i] for i in share],
            tokenizer=tokenizer,
            data_rows=[drawn[i].data_row or {} for i in share],
            places=[drawn[i].place for i in share],
            poll=poll,
        )
        parts: dict[str, Tensor] = {}
        failed: dict[str, str] = {}
        for one in scorer.of_texts if share else []:
            try:
                parts |= {name: x.float().cpu() for name, x in one.parts(request).items()}
            except ScorerDropped as problem:
                failed[one.name] = str(problem)
        return parts, failed

    found = parallel.all_gather((share, *outcome_of(score_share)))
    for _, _, _, error in found:
        if error is not None:  # that of the first rank, everywhere
            raise error
    parts = merged([parts for _, parts, _, _ in found], [index for index, _, _, _ in found], len(lengths))
    failed: dict[str, str] = {}
    for _, _, failed_there, _ in found:
        failed = failed_there | failed
    if scorer.drops is not None:
        scorer.drops.note(failed)
    # what a scorer gave on other ranks is dropped too
    parts = {name: x for name, x in parts.items() if name.split("/")[0] not in failed}
    parts |= {name: torch.full((len(lengths),), torch.nan) for name in failed}
    return {name: x.to(rollout.scores) for name, x in parts.items()}, tuple(failed)


def outcome_of(
    score: Callable[[], tuple[dict[str, Tensor], dict[str, str]]],
) -> tuple[dict[str, Tensor], dict[str, str], Exception | None]:
    """Return scores, dropped scorers and None; or nothing and the error that all ranks raise."""
    try:
        return *score(), None
    except (ScorerLost, UserError) as error:
        return {}, {}, error


def engine_kl(sampled: Tensor, logprobs: Tensor, mask: Tensor) -> float:
    """Return KL(sampler ‖ policy) in nats a token, estimated from the sampler's samples (k3).

    Args:
        sampled: (B, R) the sampler's log-probabilities.
        logprobs: (B, R) the policy's.
        mask: (B, R) True for each response token.
    """
    return masked_mean(kl_per_token(sampled, logprobs, "k3"), mask).item()


def reference_logprobs(roles: Roles, rows: Rows, temperature: float) -> Tensor:
    """Return the reference's log-probabilities (B, R).

    The reference is a model of its own, or the policy without its adapter.
    """
    reference_model = adapter_off(roles.policy) if roles.ref_policy is None else nullcontext(roles.ref_policy)
    with reference_model as reference:
        return response_logprobs(reference, rows, temperature)

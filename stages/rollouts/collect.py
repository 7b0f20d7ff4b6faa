"""Turn prompts into a rollout: sample responses, then run every model of PPO over them."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.groups import Rows
from data.streams import derive_seed
from pipeline.launch import parallel
from stages.models.adapters import adapter_off
from stages.models.forward import response_logprobs, response_scores, response_values
from stages.models.roles import Roles
from stages.objectives.masked import masked_mean
from stages.objectives.rewards import final_scores, kl_per_token
from stages.rollouts.engine import RolloutEngine, Sampled, SampleRequest
from stages.rollouts.rollout import Rollout
from stages.training.batching import in_micro_batches, share_groups


@dataclass(frozen=True)
class ScoreRules:
    """What becomes of a reward model's score before it is a reward."""

    missing_eos_score: float | None = None
    """Score of a response without EOS; None: its own."""
    score_clip: float | None = None
    """Clips scores to ± this; None: they are not clipped."""
    length_penalty: float = 0.0
    """Is subtracted for each token of the response."""

    def apply(self, scores: Tensor, finished: Tensor, lengths: Tensor) -> Tensor:
        """Return the scores (B,) under these rules.

        Args:
            scores: (B,) as the reward model gives them.
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
    """How a rollout is sampled and scored."""

    samples_per_prompt: int
    """Responses to each prompt."""
    response_length: int
    """The longest response in tokens, EOS included."""
    temperature: float
    """Divides the logits in sampling, and in the log-probabilities of policy and reference."""
    micro_batch_size: int
    """The most episodes in one forward pass of the models."""
    scores: ScoreRules
    """What becomes of the reward model's scores."""


def collect(
    roles: Roles,
    engine: RolloutEngine,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    *,
    seed: Sequence,
    recompute: bool,
    poll: Callable[[], None] = lambda: None,
) -> Rollout:
    """Return the rollout of some prompts, the samples of a prompt next to each other.

    Args:
        roles: The models.
        engine: Samples the responses.
        sampling: How they are sampled and scored.
        prompts: Token ids.
        prompt_ids: For each prompt, its index in the list that it was drawn from.
        seed: The start of each episode's seed; the prompt's id and the sample's index are appended.
        recompute: Compute log-probabilities and entropies with the policy's forward pass of the
            update, because the engine's are not the same numbers.
        poll: Is called between tokens and micro-batches; what it raises ends the rollout.
    """
    device, tokenizer = roles.accelerator.device, roles.tokenizer
    request = make_request(sampling, prompts, prompt_ids, seed, tokenizer.eos_token_id)
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
    rollout = replace(rollout, **judge(roles, rollout, sampling, recompute, poll))
    if recompute:
        rollout = replace(rollout, engine_kl=engine_kl(sampled.logprobs, rollout.logprobs, rollout.mask))
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
def judge(
    roles: Roles, rollout: Rollout, sampling: Sampling, recompute: bool, poll: Callable[[], None]
) -> dict[str, Tensor]:
    """Run reference, value model and reward model over sampled responses, each rank over its share.

    Args:
        roles: The models.
        rollout: Prompts, responses and their mask.
        sampling: Temperature, micro-batches and samples a prompt.
        recompute: Run the policy too.
        poll: Is called between micro-batches.

    Returns:
        Fields of a rollout by name, the same on all ranks.
    """
    names = ["ref_logprobs", "values"] + (["logprobs", "entropy"] if recompute else [])
    judged = {name: torch.zeros_like(rollout.logprobs) for name in names}
    judged["scores"] = torch.zeros_like(rollout.scores)
    lengths, n, width = rollout.lengths(), sampling.samples_per_prompt, rollout.mask.shape[1]
    share = share_groups(lengths, range(len(lengths)), n)
    chunks = in_micro_batches(lengths, share, n, sampling.micro_batch_size, roles.most_tokens())
    with roles.accelerator.autocast():
        for index, is_own in parallel.padded_micro_batches(chunks, roles.spare()):
            poll()
            rows = rollout.rows(index, roles.tokenizer.pad_token_id, roles.packed)
            outputs = {
                "ref_logprobs": reference_logprobs(roles, rows, sampling.temperature),
                "values": response_values(roles.value_model, rows),
                "scores": response_scores(roles.reward_model, rows),
            }
            if recompute:
                logprobs, entropy = response_logprobs(roles.policy, rows, sampling.temperature, with_entropy=True)
                outputs |= {"logprobs": logprobs, "entropy": entropy}
            if not is_own:
                continue  # a forward pass only to keep in step with ranks that have more micro-batches
            episodes = torch.tensor(index, device=rollout.mask.device)
            for name, x in outputs.items():
                if x.dim() == 2:
                    x = F.pad(x, (0, width - x.shape[1]))
                judged[name][episodes] = x
    parallel.all_reduce_tensors(list(judged.values()))  # each rank holds 0 where others have computed
    return judged


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

"""Prompts → Rollout: samples, and what every model says of them."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data.streams import derive_seed
from pipeline.launch import parallel
from stages.models.adapters import adapter_off
from stages.models.forward import response_logprobs, response_scores, response_values
from stages.models.roles import Roles
from stages.models.sharding import whole
from stages.objectives.masked import masked_mean
from stages.objectives.rewards import final_scores, kl_per_token
from stages.rollouts.rollout import Rollout
from stages.rollouts.transformers import Sampled, sample_with_logprobs
from stages.training.batching import in_micro_batches, share_groups


def collect(
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    *,
    samples_per_prompt: int,
    seed: Sequence,
    response_length: int,
    temperature: float,
    sample_size: int,
    micro_size: int,
    recompute: bool,
    by_engine: bool = False,
    missing_eos_score: float | None = None,
    score_clip: float | None = None,
    length_penalty: float = 0.0,
    poll: Callable[[], None] = lambda: None,
) -> Rollout:
    """`samples_per_prompt` episodes a prompt, in succession.

    seed: the beginning of each episode's seed, which goes on with the prompt's id and the sample's number.
    sample_size, micro_size: episodes that are sampled, and read by the models, at a time.
    recompute: log-probs by the forward that the update uses, where the sampler's are not the same numbers. by_engine:
    roles.engine samples, and not the policy itself; with `recompute`. poll() is called between tokens and
    micro-batches: what it raises ends the rollout.
    """
    n, tokenizer, device = samples_per_prompt, roles.tokenizer, roles.accelerator.device
    seeds, seen = [], Counter()  # a prompt may be drawn twice: its samples are numbered on
    for i in prompt_ids:
        seeds += [derive_seed(*seed, i, seen[i] + k) for k in range(n)]
        seen[i] += n
    repeated = [list(p) for p in prompts for _ in range(n)]

    def sample(policy, own: list[int]) -> Sampled:
        return sample_with_logprobs(
            policy,
            [repeated[i] for i in own],
            [seeds[i] for i in own],
            response_length=response_length,
            temperature=temperature,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            batch_size=sample_size,
            poll=poll,
        )

    if by_engine:
        options = {"response_length": response_length, "temperature": temperature, "eos_id": tokenizer.eos_token_id}
        sampled = roles.engine.sample(repeated, seeds, **options, poll=poll, device=device)
    else:
        with roles.accelerator.autocast(), whole(roles.policy) as policy:
            sampled = shared_samples(partial(sample, policy), [len(p) for p in repeated], n, device)
    lengths = torch.tensor([len(r) for r in sampled.responses], device=device)
    width = sampled.logprobs.shape[1]
    rollout = Rollout(
        prompts=repeated,
        responses=sampled.responses,
        prompt_ids=[i for i in prompt_ids for _ in range(n)],
        mask=torch.arange(width, device=device) < lengths.unsqueeze(-1),
        logprobs=torch.zeros_like(sampled.logprobs) if recompute else sampled.logprobs,
        ref_logprobs=torch.zeros_like(sampled.logprobs),
        values=torch.zeros_like(sampled.logprobs),
        entropy=torch.zeros_like(sampled.entropy) if recompute else sampled.entropy,
        scores=torch.zeros(len(repeated), device=device),
        finished=torch.tensor([r[-1] == tokenizer.eos_token_id for r in sampled.responses], device=device),
    )
    with torch.no_grad(), roles.accelerator.autocast():
        own = share_groups(rollout.lengths(), range(len(repeated)), n)
        parts = in_micro_batches(rollout.lengths(), own, n, micro_size, roles.most_tokens())
        for index, mine in parallel.padded_micro_batches(parts, roles.spare()):
            poll()
            at = torch.tensor(index, device=device)
            rows = rollout.rows(index, tokenizer.pad_token_id, roles.packed)
            found = {
                "ref_logprobs": reference_logprobs(roles, rows, temperature),
                "values": response_values(roles.value_model, rows),
                "scores": response_scores(roles.reward_model, rows),
            }
            if recompute:
                logprobs, entropy = response_logprobs(roles.policy, rows, temperature, with_entropy=True)
                found |= {"logprobs": logprobs, "entropy": entropy}
            for name, x in found.items() if mine else ():
                getattr(rollout, name)[at] = F.pad(x, (0, width - x.shape[1])) if x.dim() == 2 else x
        computed = [rollout.ref_logprobs, rollout.values, rollout.scores]
        parallel.all_reduce_tensors(
            computed + [rollout.logprobs, rollout.entropy] * recompute
        )  # 0 where others computed
    if recompute:
        rollout = replace(rollout, engine_kl=drift(sampled.logprobs, rollout.logprobs, rollout.mask))
    scores = final_scores(
        rollout.scores,
        rollout.finished,
        missing_eos_score,
        lengths=lengths,
        score_clip=score_clip,
        length_penalty=length_penalty,
    )
    return replace(rollout, scores=scores)


def drift(sampled: Tensor, logprobs: Tensor, mask: Tensor) -> float:
    """KL(sampler ‖ policy) in nats a token, from samples of the former (k3); log-probs (B, R) of both."""
    return masked_mean(kl_per_token(sampled, logprobs, "k3"), mask).item()


def reference_logprobs(roles: Roles, rows, temperature: float) -> Tensor:
    with adapter_off(roles.policy) if roles.ref_policy is None else nullcontext(roles.ref_policy) as reference:
        return response_logprobs(reference, rows, temperature)


def shared_samples(
    sample: Callable[[list[int]], Sampled], lengths: Sequence[int], n: int, device: torch.device
) -> Sampled:
    """sample(episodes) of this process's share, and the others' beside it: all episodes, everywhere."""
    if parallel.rank_and_world_size()[1] == 1:
        return sample(list(range(len(lengths))))

    def rows(groups: list[range]) -> list[list[tuple]]:
        found = sample([i for group in groups for i in group])
        # clones: a row of a tensor would take the whole tensor with it to the others
        tensors = [[x.clone() for x in part.cpu()] for part in (found.logprobs, found.entropy)]
        every = list(zip(found.responses, *tensors, strict=True))
        return [every[i : i + n] for i in range(0, len(every), n)]

    groups = [range(i, i + n) for i in range(0, len(lengths), n)]
    every = [
        row for group in parallel.compute_and_all_gather(groups, [lengths[g[0]] for g in groups], rows) for row in group
    ]
    responses, logprobs, entropy = zip(*every, strict=True)
    width = max(map(len, responses))
    wide = lambda xs: torch.stack([F.pad(x, (0, width - len(x))) for x in xs]).to(device)  # noqa: E731
    return Sampled(list(responses), wide(logprobs), wide(entropy))



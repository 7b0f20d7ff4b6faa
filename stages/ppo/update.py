"""Update policy and value model from one batch: PPO's gradients, ptx's gradient, steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.groups import moved
from data.streams import derive_seed
from pipeline.launch import parallel
from stages.models.adapters import trainable_parameters
from stages.models.forward import response_logprobs, response_values, text_logprobs
from stages.models.roles import Roles
from stages.models.sharding import reducing_last, whole
from stages.objectives.losses import kl_loss, policy_loss, value_loss
from stages.ppo.figures import OF_PTX
from stages.ppo.options import UpdateOptions
from stages.rollouts.rollout import Rollout
from stages.training.batching import in_micro_batches, micro_batches, share_groups
from stages.training.readings import Figure, detached, read_sums
from stages.training.scaling import Scaling
from stages.training.trainee import (
    Average,
    DotProduct,
    Skips,
    Trainee,
    clipped_step,
    cosine,
    dot_product,
    gradients_of,
    norm_problem,
    total_norm,
)


@dataclass(frozen=True)
class Batch:
    """A rollout with its advantages and returns."""

    rollout: Rollout
    """B episodes."""
    advantages: Tensor
    """(B, R) how much better each token was than expected."""
    returns: Tensor | None
    """(B, R) targets of the values; None without a value model."""
    weights: Tensor | None = None
    """(B, R) weight of each token in the policy's loss; None: 1."""
    kl_coef: float | None = None
    """β of the KL penalty in the loss (GRPO); None: the penalty is in the rewards."""


@dataclass(frozen=True)
class Learners:
    """Everything that an update changes."""

    policy: Trainee
    """The policy and its optimizer."""
    value: Trainee | None
    """The value model and its optimizer; None if none is trained."""
    average: Average
    """Exponential average of the policy's weights."""
    skips: Skips
    """Counts the steps that are skipped because a number is not finite."""
    scaling: Scaling = field(default_factory=Scaling)
    """The gradient scaler of float16: one, since policy and value model step together."""

    def trainees(self) -> list[Trainee]:
        """Return the policy, and the value model if one is trained."""
        return [self.policy] if self.value is None else [self.policy, self.value]


@dataclass(frozen=True)
class Rates:
    """Learning rates of one update."""

    policy: float
    """The policy's."""
    value: float
    """The value model's."""


def update(
    roles: Roles,
    learners: Learners,
    batch: Batch,
    options: UpdateOptions,
    *,
    step: int,
    rates: Rates,
    next_texts: Callable[[int], list[list[int]]] | None,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Take all optimizer steps over a batch.

    Each minibatch is one policy step, down the sum of PPO's gradient and ptx_coef times the
    pretraining gradient, clipped as one, and one value step if there is a value model.

    Args:
        roles: The models.
        learners: Policy, value model, the average and the count of skipped steps.
        batch: Episodes, advantages and returns.
        options: Sizes, epochs, clipping.
        step: Index of the update.
        rates: Learning rates of this update.
        next_texts: Returns the next so many pretraining rows; None for plain PPO.
        say: Prints a line.

    Returns:
        Metrics, averaged over the optimizer steps.

    Raises:
        TrainingStopped: If too many gradients are not finite.
    """
    policy, trainees, scaling = learners.policy, learners.trainees(), learners.scaling
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for epoch in range(options.epochs):
        for index in minibatches(options, step, epoch):
            scale = scaling.scale
            parts = ppo_gradients(roles, batch, index, options)
            norms = {"grad_norm/ppo": total_norm(gradients_of(policy.parameters.values()))}
            ptx = None
            if next_texts is not None:
                ptx = ptx_gradient(roles, policy, next_texts(options.ptx.rows), options)
                parts, norms = parts + ptx.parts, norms | {"grad_norm/ptx": ptx.norm}
            if learners.value is not None:
                norms["grad_norm/value"] = total_norm(gradients_of(learners.value.parameters.values()))
            overflowed = scaling.overflow(trainees)
            steps = [total_norm(gradients_of(trainee.parameters.values())) for trainee in trainees]
            # Everything that the host has to know of the device is read here, at once.
            figures, stepped = read(parts, norms, steps, ptx, scale)
            # both are checked before either steps: they step together or not at all
            checked = zip(trainees, stepped, strict=True)
            if overflowed:
                if problem := scaling.problem(step):
                    say(learners.skips.skip(problem))
            elif problems := [problem for trainee, norm in checked if (problem := norm_problem(trainee, norm, step))]:
                for trainee in trainees:
                    trainee.zero_grad()
                say(learners.skips.skip(problems[0]))
            else:
                for trainee, norm, rate in zip(trainees, steps, (rates.policy, rates.value), strict=False):
                    clipped_step(trainee, norm, rate)
                learners.average.step(policy)
            for key, figure in figures.items():
                # the norms of gradients that have overflowed are no numbers: they are left out
                is_counted = not (overflowed and key.startswith("grad_"))
                totals[key] = totals.get(key, 0.0) + (figure if is_counted else 0.0)
                counts[key] = counts.get(key, 0) + is_counted
    means = {key: total / counts[key] if counts[key] else math.nan for key, total in totals.items()}
    return means | scaling.figures()


def read(
    parts: Sequence[Mapping[str, Figure]],
    norms: Mapping[str, Tensor],
    steps: Sequence[Tensor],
    ptx: "PtxGradient | None",
    scale: float,
) -> tuple[dict[str, float], list[float]]:
    """Read all that is to be known of a minibatch before its step, from the device at once.

    Args:
        parts: The figures of this rank's micro-batches.
        norms: Norms of gradients, by name.
        steps: Norms of the gradients to step by, of each trainee.
        ptx: The pretraining gradient; None for plain PPO.
        scale: Factor of the losses, and so of the gradients, under float16. It is a power of two,
            so that dividing norms by it is exact.

    Returns:
        The sums of the figures over all ranks' micro-batches, with the norms, and the cosine of
        both gradients; and the norms to step by.
    """
    named = {name: whole(norm) for name, norm in norms.items()}
    stepped = [whole(norm) for norm in steps]
    product = [] if ptx is None else [named["grad_norm/ppo"] * named["grad_norm/ptx"], *ptx.dot.terms]
    sums, numbers = read_sums(parts, *named.values(), *stepped, *product)
    figures = parallel.all_reduce_figures(sums)
    figures |= {name: numbers.pop(0) / scale for name in named}
    if ptx is not None:
        size, *terms = numbers[len(steps) :]
        figures["grad_cosine"] = cosine(ptx.dot.sum(terms), size)
    return {name: figures[name] for name in sorted(figures, key=place)}, numbers[: len(steps)]


ORDER = ("grad_norm/ppo", *OF_PTX, "grad_norm/value")


def place(name: str) -> int:
    """Return where a figure stands in a line of metrics.jsonl, behind those of its losses."""
    return 1 + ORDER.index(name) if name in ORDER else 0


def minibatches(options: UpdateOptions, step: int, epoch: int) -> list[list[int]]:
    """Return the episodes of each minibatch, drawn again in each epoch.

    The samples of a prompt stay together if whole prompts fill a minibatch.

    Args:
        options: Sizes and seed.
        step: Index of the update.
        epoch: Index of the pass over the batch.
    """
    n = options.group_size
    generator = torch.Generator().manual_seed(derive_seed(options.seed, "minibatches", step, epoch))
    groups = torch.randperm(options.batch_size // n, generator=generator).tolist()
    episodes = [group * n + k for group in groups for k in range(n)]
    return list(micro_batches(episodes, options.mini_batch_size))


def ppo_gradients(roles: Roles, batch: Batch, index: list[int], options: UpdateOptions) -> list[dict[str, Figure]]:
    """Accumulate the gradients of policy loss and value loss over one minibatch.

    Both losses are sums over the minibatch's tokens divided by their count, so neither the
    micro-batches nor the number of ranks change the gradient.

    Args:
        roles: The models.
        batch: Episodes, advantages and returns.
        index: The minibatch's episodes.
        options: Micro-batch size, temperature and clipping.

    Returns:
        Losses, ratio and clipped fractions, of each micro-batch of this rank: their sums are those
        of the minibatch.
    """
    rollout, n = batch.rollout, options.group_size
    tokens = sum(len(rollout.responses[i]) for i in index)
    figures: list[dict[str, Figure]] = []
    lengths = rollout.lengths()
    share = share_groups(lengths, index, n)
    chunks = in_micro_batches(lengths, share, n, options.micro_batch_size, roles.most_tokens())
    for chunk, is_own in reducing_last(roles.trained(), parallel.padded_micro_batches(chunks, roles.spare())):
        rows = rollout.rows(chunk, roles.tokenizer.pad_token_id, roles.packed)
        mask = rows.response_mask
        episodes = moved({"episodes": torch.tensor(chunk)}, rollout.mask.device)["episodes"]
        old_logprobs, ref_logprobs, advantages = (
            x[episodes, : mask.shape[1]] for x in (rollout.logprobs, rollout.ref_logprobs, batch.advantages)
        )
        with roles.accelerator.autocast():
            logprobs = response_logprobs(roles.policy, rows, options.temperature)
        weights = None if batch.weights is None else batch.weights[episodes, : mask.shape[1]]
        loss, sums = policy_loss(logprobs, old_logprobs, advantages, mask, options.clipping.ratio, tokens, weights)
        found = {"loss/policy_avg": loss}
        if batch.kl_coef is not None:
            found["loss/kl"] = kl_loss(logprobs, ref_logprobs, mask, batch.kl_coef, tokens)
            loss = loss + found["loss/kl"]
        # a padding micro-batch only keeps this rank in step; times 0 it takes part in the
        # collectives
        roles.accelerator.backward(parallel.for_sum(loss if is_own else 0.0 * loss))
        if roles.value_model is not None:
            old_values, returns = (x[episodes, : mask.shape[1]] for x in (rollout.values, batch.returns))
            with roles.accelerator.autocast():
                values = response_values(roles.value_model, rows)
            v_loss, v_sums = value_loss(values, old_values, returns, mask, options.clipping.value, tokens)
            roles.accelerator.backward(parallel.for_sum(v_loss if is_own else 0.0 * v_loss))
            found["loss/value_avg"] = v_loss
        if not is_own:
            continue
        found["val/ratio"] = sums["ratio"] / tokens
        found["policy/clipfrac_avg"] = sums["clipped"] / tokens
        found["policy/approxkl_avg"] = sums["approxkl"] / tokens
        if roles.value_model is not None:
            found["val/clipfrac_avg"] = v_sums["clipped"] / tokens
        figures.append(detached(found))
    for model in roles.trained():
        parallel.all_reduce_gradients(trainable_parameters(model).values())
    return figures


@dataclass(frozen=True)
class PtxGradient:
    """Hold the figures of the pretraining gradient; all of them are still on the device."""

    parts: list[dict[str, Figure]]
    """The loss, of each micro-batch of this rank."""
    norm: Tensor
    """Norm of the gradient that was added, as `total_norm` gives it."""
    dot: DotProduct
    """Its dot product with PPO's."""


def ptx_gradient(roles: Roles, policy: Trainee, texts: list[list[int]], options: UpdateOptions) -> PtxGradient:
    """Add ptx_coef times the gradient of the pretraining loss to the policy's gradients.

    The loss is the mean cross-entropy a token over `texts`. It has a backward pass of its own, so
    that the norms of both gradients and their cosine are known before they are summed.

    Args:
        roles: The models.
        policy: Holds PPO's gradients, and then the sums.
        texts: Pretraining rows of T tokens each.
        options: ptx_coef and micro-batch size.

    Returns:
        The loss, the norm of the added gradient, and its product with PPO's.
    """
    parameters = list(policy.parameters.values())
    ppo_grads = gradients_of(parameters)
    for p in parameters:
        p.grad = None
    tokens = len(texts) * (len(texts[0]) - 1)  # nothing predicts the first token of a row
    parts: list[dict[str, Figure]] = []
    share = parallel.rows_of_this_rank(texts, [1] * len(texts))
    chunks = list(micro_batches(share, options.micro_batch_size))
    passes = parallel.padded_micro_batches(chunks, texts[:1] if roles.spare() else None)
    for chunk, is_own in reducing_last([roles.policy], passes):
        ids = moved({"ids": torch.tensor(chunk)}, roles.accelerator.device)["ids"]
        with roles.accelerator.autocast():
            loss = -text_logprobs(roles.policy, ids).sum() / tokens
        if is_own:
            parts.append(detached({"loss/ptx": loss}))
        roles.accelerator.backward(parallel.for_sum((options.ptx.coef if is_own else 0.0) * loss))
    parallel.all_reduce_gradients(parameters)
    ptx_grads = gradients_of(parameters)
    found = PtxGradient(parts, total_norm(ptx_grads), dot_product(ppo_grads, ptx_grads))
    for p, ppo_grad, ptx_grad in zip(parameters, ppo_grads, ptx_grads, strict=True):
        if ppo_grad is None:
            p.grad = ptx_grad
        elif ptx_grad is None:
            p.grad = ppo_grad
        else:
            p.grad = ppo_grad.add_(ptx_grad)
    return found

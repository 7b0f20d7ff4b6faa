"""Train a policy on rankings by DPO, without a reward model and without sampling.

    loss = − 1/C(K,2) · Σ_pairs log σ( β [ log π/π_ref (y_w) − log π/π_ref (y_l) ] )

(Rafailov 2023, eq. 7), or another of the losses that loss_type names. The policy takes the place of
PPO's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from data import sources
from data.group_rows import count_pairs, has_pair, part_of
from data.groups import GroupBatch, PromptGroup, batch_groups, moved
from data.labels import LabelledGroups
from pipeline.launch import parallel
from pipeline.stage import StageRun
from stages.models.adapters import AdapterSettings, with_adapter
from stages.models.compiled import is_compiled
from stages.models.forward import response_logprobs
from stages.models.loading import load_policy, load_tokenizer
from stages.models.sharding import is_sharded, publishable
from stages.objectives.logprobs import sequence_logps
from stages.objectives.losses import chosen_loss, dpo_loss, plackett_luce_loss
from stages.settings.dpo import DPOSettings
from stages.settings.experiment import Experiment
from stages.settings.training import TIE_LOSSES, total_steps
from stages.shared.cards import ANSWER, ModelCard
from stages.shared.disk import say_written
from stages.shared.inputs import LengthLimit, load_groups, published
from stages.shared.provenance import Provenance, provenance_of
from stages.shared.publishing import adapter_base, publish_model
from stages.shared.row_cache import RowCache
from stages.shared.runtime import (
    Runtime,
    adapter_settings,
    can_pack_rows,
    check_context,
    compiling_of,
    note_default_rate,
    place_model,
    runtime_of,
    with_accelerator,
)
from stages.shared.show import show_samples
from stages.training.batching import GroupBatches, group_order, micro_batches
from stages.training.kto import KTO, Marks, count_marks, weight_note
from stages.training.loop import Task, fit
from stages.training.readings import Figure, Share, read_sums
from stages.training.reference import Reference
from stages.training.session import session_of
from stages.training.ties import TieModel, learned_ties, tie_model, tie_note
from stages.training.trainee import trainee_of


@dataclass(frozen=True)
class Counts:
    """Hold the counts by which the losses and figures of a batch are divided."""

    prompts: int
    """Prompts of the batch."""
    paired: int
    """Those that have a usable pair; the others have ties only."""
    tokens: float
    """Tokens of the responses that were put first (`tokens_first`)."""
    marks: Marks
    """Judgements of single responses, with kto only; otherwise 0."""


@dataclass(frozen=True)
class Objective:
    """The policy and its loss."""

    config: DPOSettings
    """The stage's settings."""
    policy: nn.Module
    """The policy that trains."""
    pad_id: int
    """Id of the padding."""
    runtime: Runtime
    """How the stage computes."""
    ties: TieModel | None = None
    """The loss that counts ties; None where ties are left out."""
    kto: KTO | None = None
    """The loss on single responses; None for all others."""

    def micro_batch(
        self, groups: Sequence[PromptGroup], reference: Sequence[Tensor], whole: Counts
    ) -> tuple[Tensor, dict[str, Figure]]:
        """Compute the share of a micro-batch in the loss of its batch.

        Args:
            groups: The micro-batch.
            reference: log π_ref of the responses of each group, (K,).
            whole: The size of the batch.

        Returns:
            The loss, and figures to sum over the batch.
        """
        config, accelerator = self.config, self.runtime.accelerator
        batch = batch_groups(groups, self.pad_id, packed=self.runtime.packed).to(accelerator.device)
        ref_logps = moved({"logps": torch.cat(list(reference))}, accelerator.device)["logps"]
        with accelerator.autocast():
            logprobs = response_logprobs(self.policy, batch.rows)
        logps = sequence_logps(logprobs, batch.rows.response_mask)
        if self.kto is not None:
            return self.kto.share(groups, logps, ref_logps, whole.marks)
        parts, tied = {}, {}
        for name in config.losses():
            if name in TIE_LOSSES:
                assert self.ties is not None
                parts[name], tied = self.ties.loss(groups, config.beta * (logps - ref_logps), whole.prompts)
                continue
            parts[name] = loss_of(
                name, logps, ref_logps, batch, config.beta, config.label_smoothing, whole.prompts, whole.tokens
            )
        value = sum(weight * parts[name] for name, weight in config.losses().items())
        share = batch.paired / max(1, whole.paired)
        figures = pair_figures(value, logps.detach(), ref_logps, batch, config.beta, share) | tied
        if len(parts) > 1:
            figures.update({f"loss/{name}": x for name, x in parts.items()})
        return value, figures


def run(ctx: StageRun[DPOSettings, Experiment]) -> dict:
    """Publish model/, a policy."""
    config, source, rankings = ctx.config, ctx.inputs["sft"] / "model", ctx.inputs["rankings"]
    session, runtime, provenance = session_of(ctx), with_accelerator(runtime_of(ctx)), provenance_of(ctx)
    check_context(session, config, source)
    tokenizer = load_tokenizer(source, trust_remote_code=runtime.trust_remote_code)
    limit = LengthLimit(config.max_length, config.on_too_long, "dpo")
    cache = RowCache(ctx.cache, source, session.tracker, partial(session.leave_if_requested, 0, 0))
    with_ties, by_label = any(name in TIE_LOSSES for name in config.loss_type), "kto" in config.loss_type
    groups, report = load_groups(rankings / "train.jsonl", tokenizer, limit, cache, with_ties, by_label)
    held, held_report = load_groups(rankings / "validation.jsonl", tokenizer, limit, cache, with_ties, by_label)
    if by_label:
        groups, held = LabelledGroups(groups), LabelledGroups(held)
        marks = count_marks(groups)
        learnt = f"{marks.good} good and {marks.bad} bad responses{weight_note(marks, config.label_weights())}"
    else:
        learnt = f"{count_pairs(groups)} pairs{tie_note(report.ties, with_ties)}"
    report += held_report
    steps = total_steps(config, len(groups))
    session.say(f"{report.line('rankings')}; {learnt}; {len(held)} rankings held out; {steps} steps")
    if provenance.model.peft is not None:
        note_default_rate(session, config)
    load = partial(load_policy, source, **runtime.load_options())
    adapter = adapter_settings(provenance.model)
    make = partial(make_policy, load, adapter, ctx.seed)
    policy = place_model(make, runtime, config.max_length, compiling_of(runtime, session))
    runtime = replace(runtime, packed=can_pack_rows(session, [policy], config.max_length))
    cut = partial(
        GroupBatches,
        size=config.per_device_train_batch_size,
        budget=config.per_device_train_tokens,
        packed=runtime.packed,
    )

    # 1 the reference's log-probabilities, once: the policy is the reference before training
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    order = group_order(groups, steps, batch_size, (ctx.seed, "dpo"))
    drawn = sorted(set(order))
    leave = partial(session.leave_if_requested, 0, steps)
    made_by = reference_inputs(provenance, runtime) + (["compiled layers"] if is_compiled(policy) else [])
    pad_id = tokenizer.pad_token_id
    reference = Reference(policy, pad_id, runtime, ctx.cache, made_by, session.tracker, leave)
    ref_logps = dict(zip(drawn, reference.logps("train", cut(part_of(groups, drawn))), strict=True))
    held_ref_logps = reference.logps("validation", cut(held))
    kto = KTO(config, policy, pad_id, runtime, cut) if by_label else None
    estimate_kl = kto and kto.estimator(reference, "train", groups, list(micro_batches(order, batch_size)))
    held_rows = range(len(held))
    estimate_held_kl = kto and kto.estimator(reference, "validation", held, [held_rows])

    # 2 train
    ties = tie_model(config, config.loss_type, groups, [held], runtime.accelerator.device, policy)
    trainee = trainee_of(config, policy, steps, layout=runtime.layout, **learned_ties(config, ties))
    say_written(session, provenance, [policy], [policy], steps, sets=int(config.keep == "best"))
    objective = Objective(config, policy, pad_id, runtime, ties, kto)
    paired = has_pair(groups)
    shown = [r.prompt for r in sources.load("rankings", replace(published(rankings / "validation.jsonl"), limit=4))]

    def loss(rows: list[int], batch: Sequence[int]) -> tuple[Tensor, dict[str, Figure]]:
        whole = counts_of(batch, groups, paired, by_label)
        return objective.micro_batch([groups[i] for i in rows], [ref_logps[i] for i in rows], whole)

    def samples() -> list[dict]:
        with runtime.accelerator.autocast():
            return show_samples(policy, tokenizer, shown, seed=ctx.seed, response_length=config.sample_tokens)

    def evaluate_held(poll: Callable[[], None]) -> dict[str, float]:
        if estimate_held_kl is not None:
            estimate_held_kl(held_rows, poll)
        return evaluate(objective, cut(held), held_ref_logps, poll)

    batches = cut(groups)
    task = Task(
        order=order,
        batch_size=batch_size,
        costs=batches.tokens,
        cut=batches.to_train,
        loss=loss,
        evaluate=evaluate_held,
        samples=samples,
        prepare=estimate_kl,
    )
    figures = fit(
        session,
        runtime.accelerator,
        trainee,
        task,
        config.schedule(steps),
        config.selection("loss", higher_is_better=False),
    )

    # 3 publish
    figures = {**figures, "truncated": report.truncated, "dropped": report.dropped}
    figures |= ties.published() if ties else {}
    publish(provenance, publishable(policy, load), tokenizer, figures)
    return figures


def make_policy(load: Callable[[], nn.Module], adapter: AdapterSettings, seed: int) -> nn.Module:
    """Return the policy before training, with its adapter if one trains.

    Args:
        load: Loads the model.
        adapter: Which weights train.
        seed: Of the adapter.
    """
    return with_adapter(load(), adapter, seed=seed, exact=True)


def reference_inputs(provenance: Provenance, runtime: Runtime) -> list[Any]:
    """List what the reference's log-probabilities depend on, besides the responses.

    Args:
        provenance: The run.
        runtime: How the stage computes.
    """
    libraries = ["torch", "transformers"]
    peft = provenance.model.peft
    if peft is not None and peft.method == "qlora":  # the reference is the quantized base model
        libraries.append("bitsandbytes")
    return [
        provenance.manifests["sft"]["digest"],
        runtime.dtype,
        runtime.attention,
        runtime.packed,
        runtime.accelerator.device.type,
        *map(version, libraries),
    ]


@torch.no_grad()
def evaluate(
    objective: Objective, batches: GroupBatches, reference: Sequence[Tensor], poll: Callable[[], None]
) -> dict[str, float]:
    """Return loss and figures over all held-out groups, of all ranks.

    Args:
        objective: The policy and its loss.
        batches: The held-out groups, and how they are cut.
        reference: log π_ref of the responses of each group, (K,).
        poll: Called between two forward passes; may raise Interrupted.
    """
    groups, found = batches.groups, []
    whole = counts_of(range(len(groups)), groups, has_pair(groups), objective.kto is not None)
    parts, costs = batches.to_evaluate()
    spare = parts[0] if is_sharded(objective.policy) else None
    for rows, is_own in parallel.padded_micro_batches(parallel.rows_of_this_rank(parts, costs), spare):
        poll()
        members, ref_logps = [groups[i] for i in rows], [reference[i] for i in rows]
        _, figures = objective.micro_batch(members, ref_logps, whole)
        if is_own:
            found.append(figures)
    figures = parallel.all_reduce_figures(read_sums(found)[0])
    return figures | (objective.ties.figures() if objective.ties else {})


def counts_of(batch: Sequence[int], groups: Sequence[PromptGroup], paired: Sequence[bool], by_label: bool) -> Counts:
    """Count what a batch is divided by.

    Args:
        batch: Indices of its groups.
        groups: All groups.
        paired: Whether each has a usable pair.
        by_label: Whether single responses are counted.
    """
    members = [groups[i] for i in batch]
    marks = count_marks(members) if by_label else Marks(0, 0)
    return Counts(len(members), sum(paired[i] for i in batch), sum(map(tokens_first, members)), marks)


def loss_of(
    name: str,
    logps: Tensor,
    ref_logps: Tensor,
    batch: GroupBatch,
    beta: float,
    label_smoothing: float,
    prompts: int,
    tokens: float,
) -> Tensor:
    """Compute one of the losses over a micro-batch, divided by a count of the whole batch.

    Args:
        name: The loss, as loss_type names it.
        logps: log π of each response, (N,).
        ref_logps: log π_ref of each response, (N,).
        batch: The micro-batch: pairs, choices and their weights.
        beta: β.
        label_smoothing: Probability that a preference is wrong.
        prompts: Prompts of the batch; sft is divided by tokens.
        tokens: Tokens of the responses that were put first.
    """
    if name == "sft":
        return chosen_loss(logps, batch.first, batch.first_weights, tokens or 1.0)  # 0 if cut off before a token
    if name == "plackett_luce":
        choices = (batch.winners, batch.losers, batch.choice, batch.choice_weights)
        return plackett_luce_loss(beta * (logps - ref_logps), *choices, prompts)
    pairs = (batch.winners, batch.losers, batch.pair_weights)
    return dpo_loss(logps, ref_logps, *pairs, beta, prompts, name, label_smoothing)


def publish(provenance: Provenance, model: nn.Module, tokenizer: Any, figures: dict) -> None:
    """Write the policy to model/.

    Args:
        provenance: What the policy was made of.
        model: The policy, whole.
        tokenizer: Its tokenizer.
        figures: What was measured.
    """
    source, folder = provenance.inputs["sft"] / "model", provenance.publish / "model"
    base = adapter_base(provenance, folder, source)
    card = ModelCard("a policy trained by DPO", ANSWER, figures=figures, source=source, adapter=base)
    publish_model(provenance, model, tokenizer, folder, card, temperature=1.0)


def tokens_first(group: PromptGroup) -> float:
    """Return the tokens of the responses that were put first, weighted as in the loss sft."""
    return sum(weight * len(group.responses[i]) for i, weight in group.first())


def pair_figures(
    value: Tensor, logps: Tensor, ref_logps: Tensor, batch: GroupBatch, beta: float, share: float
) -> dict[str, Figure]:
    """Return trl's figures of a micro-batch, to be summed over the batch.

    Args:
        value: The micro-batch's share of the loss.
        logps: log π of each response, (N,).
        ref_logps: log π_ref of each response, (N,).
        batch: The micro-batch.
        beta: β.
        share: The micro-batch's share of the batch's prompts.
    """
    rewards = beta * (logps - ref_logps)
    chosen, rejected = rewards[batch.winners], rewards[batch.losers]
    figures = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "logps/chosen": logps[batch.winners],
        "logps/rejected": logps[batch.losers],
    }
    return {"loss": value, **{name: Share(batch.mean(x), share) for name, x in figures.items()}}

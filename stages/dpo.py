"""dpo: rankings → a policy, without a reward model and without sampling; stands wherever ppo's policy does.

loss = − 1/C(K,2) · Σ_pairs log σ( β [ log π/π_ref (y_w) − log π/π_ref (y_l) ] )     (Rafailov 2023, eq. 7)
"""

from typing import Literal

import torch

from data import sources
from data.groups import batch_groups
from pipeline.stage import StageRun
from stages.common import (
    adapter_settings,
    card,
    check_context,
    device_of,
    dtype_of,
    group_order,
    load_groups,
    packing,
    show_samples,
)
from stages.engine import fit, learning_rate_at, make_accelerator, make_trainee
from stages.models.adapters import merged, with_adapter
from stages.models.forward import response_logprobs
from stages.models.loading import load_policy, load_tokenizer, save_model
from stages.objectives.logprobs import sequence_logps
from stages.objectives.losses import dpo_loss
from stages.settings import TooLong, Training, over_context, setting, too_long, total_steps

NAME = "dpo"
METRICS = {
    "loss": "DPO loss a prompt of this step's batch",
    "rewards/chosen": "mean of β · log(π/π_ref) of the preferred responses",
    "rewards/rejected": "the same of the other responses",
    "rewards/accuracies": "share of pairs with the preferred response's reward higher",
    "rewards/margins": "mean of chosen minus rejected reward",
    "logps/chosen": "mean log-probability of the preferred responses, in nats a response",
    "logps/rejected": "the same of the other responses",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of the step",
}
HEADLINE = ("rewards/accuracies", "rewards/margins")


class Config(Training):
    """Direct preference optimisation over all pairs of each ranking."""

    learning_rate: float = setting(1e-6, "peak learning rate", "per step", gt=0)
    on_too_long: TooLong = too_long()
    beta: float = setting(0.1, "how strongly the policy is held to the reference", gt=0)
    loss_type: Literal["sigmoid", "ipo", "hinge"] = setting(
        "sigmoid", "the loss of a pair; ipo sums log-ratios over tokens (Azar 2023), trl averages them"
    )
    label_smoothing: float = setting(0.0, "share of labels taken to be flipped (sigmoid only)", ge=0, lt=0.5)
    per_device_train_batch_size: int = setting(
        8, "prompts, with all their responses, in one forward and backward", "prompts", ge=1
    )
    gradient_accumulation_steps: int = setting(4, "micro-batches a step; changes memory, not the gradient", ge=1)
    sample_tokens: int = setting(48, "length of the generations kept in samples.jsonl", "tokens", ge=1)


def needs(experiment) -> list[str]:
    return ["sft", "rankings"]


def reads(experiment) -> list[str]:
    return []


def check(experiment) -> list[str]:
    c, wrong = experiment.dpo, over_context(experiment, "dpo")
    if c.label_smoothing and c.loss_type != "sigmoid":
        wrong += [f"dpo.label_smoothing: has no meaning with loss_type {c.loss_type}; use sigmoid, or 0"]
    return wrong


def run(ctx: StageRun) -> dict:
    """→ model/, a policy."""
    m, c = ctx.experiment.model, ctx.config
    source = ctx.inputs["sft"] / "model"
    check_context(ctx, source)
    tokenizer = load_tokenizer(source, trust_remote_code=ctx.trust_remote_code)
    accelerator = make_accelerator(device_of(ctx), dtype_of(ctx.experiment))
    limits = {"max_length": c.max_length, "on_too_long": c.on_too_long}
    groups, report = load_groups(ctx, tokenizer, "train", **limits)
    held, held_report = load_groups(ctx, tokenizer, "validation", **limits)
    report += held_report
    steps = total_steps(c, len(groups))
    ctx.tracker.say(f"dpo: {report.line('rankings')}; {len(held)} rankings held out; {steps} steps")
    policy = load_policy(source, attn_implementation=m.attn_implementation, trust_remote_code=ctx.trust_remote_code)
    policy.to(accelerator.device)
    packed = packing(ctx, policy)

    # 1 the reference's log-probabilities, once: the policy is the reference before training
    batch_size = c.per_device_train_batch_size * c.gradient_accumulation_steps
    order = group_order(ctx, groups, steps, batch_size)
    drawn = sorted(set(order))
    options = (tokenizer.pad_token_id, accelerator, c.per_device_train_batch_size, packed)
    reference = {
        "train": dict(zip(drawn, reference_logps(policy, [groups[i] for i in drawn], *options), strict=True)),
        "validation": reference_logps(policy, held, *options),
    }

    if m.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    policy = with_adapter(policy, **(adapter_settings(m) or {"method": None}), seed=ctx.seed)
    policy.to(accelerator.device)
    trainee = make_trainee(
        "model",
        policy,
        learning_rate=c.learning_rate,
        max_grad_norm=c.max_grad_norm,
        weight_decay=c.weight_decay,
        adam_beta2=c.adam_beta2,
    )

    # 2 the loss of a micro-batch of prompts
    def forward(part, ref, rows, prompts):
        batch = batch_groups([part[i] for i in rows], tokenizer.pad_token_id, packed=packed).to(accelerator.device)
        ref_logps = torch.cat([ref[i] for i in rows]).to(accelerator.device)
        with accelerator.autocast():
            logprobs = response_logprobs(policy, batch.rows)
        logps = sequence_logps(logprobs, batch.rows.response_mask)
        value = dpo_loss(
            logps,
            ref_logps,
            batch.winners,
            batch.losers,
            batch.pair_weights,
            c.beta,
            prompts,
            c.loss_type,
            c.label_smoothing,
        )
        return value, pair_figures(value, logps.detach(), ref_logps, batch, c.beta, len(rows) / prompts)

    @torch.no_grad()
    def evaluate() -> dict:
        sums: dict[str, float] = {}
        for start in range(0, len(held), c.per_device_train_batch_size):
            rows = list(range(start, min(start + c.per_device_train_batch_size, len(held))))
            for key, value in forward(held, reference["validation"], rows, len(held))[1].items():
                sums[key] = sums.get(key, 0.0) + value
        return sums

    shown = [r.prompt for r in sources.load("rankings", path=ctx.inputs["rankings"] / "validation.jsonl")[:4]]

    def samples() -> list[dict]:
        with accelerator.autocast():
            return show_samples(policy, tokenizer, shown, seed=ctx.seed, response_length=c.sample_tokens)

    # 3 train
    figures = fit(
        ctx,
        trainee,
        accelerator,
        order=order,
        batch_size=batch_size,
        micro_size=c.per_device_train_batch_size,
        loss=lambda rows, prompts: forward(groups, reference["train"], rows, prompts),
        evaluate=evaluate,
        judge="loss",
        higher_is_better=False,
        keep=c.keep,
        patience=c.patience,
        eval_steps=c.eval_steps,
        samples=samples,
        learning_rate=lambda s: learning_rate_at(s, steps, c.learning_rate, c.lr_scheduler_type, c.warmup_steps),
    )
    save_model(merged(policy), tokenizer, ctx.publish / "model", card=card(ctx, "a policy trained by DPO"))
    return {**figures, "truncated": report.truncated, "dropped": report.dropped}


@torch.no_grad()
def reference_logps(policy, groups, pad_id: int, accelerator, size: int, packed: bool) -> list[torch.Tensor]:
    """log π_ref of every response: one tensor (K,) a group."""
    out = []
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        batch = batch_groups(part, pad_id, packed=packed).to(accelerator.device)
        with accelerator.autocast():
            logprobs = response_logprobs(policy, batch.rows)
        logps = sequence_logps(logprobs, batch.rows.response_mask).cpu()
        out += list(logps.split([len(g.responses) for g in part]))
    return out


def pair_figures(value, logps, ref_logps, batch, beta: float, share: float) -> dict[str, float]:
    """trl's figures of a micro-batch, each weighted by its share of the batch's prompts."""
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
    return {"loss": value.item()} | {name: share * batch.mean(x) for name, x in figures.items()}

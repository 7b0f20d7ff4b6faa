"""dpo: rankings → a policy, without a reward model and without sampling; stands wherever ppo's policy does.

loss = − 1/C(K,2) · Σ_pairs log σ( β [ log π/π_ref (y_w) − log π/π_ref (y_l) ] )     (Rafailov 2023, eq. 7)

Or the Plackett–Luce likelihood of each whole ranking under the rewards β log π/π_ref (its appendix A.3).
"""

import hashlib
import json
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version

import torch

from data import sources
from data.groups import batch_groups
from pipeline.launch import parallel
from pipeline.stage import StageRun
from stages.models.adapters import adapter_off, is_adapted, save_merged, with_adapter
from stages.models.forward import response_logprobs
from stages.models.loading import load_policy, load_tokenizer
from stages.models.sharding import is_sharded, publishable
from stages.objectives.logprobs import sequence_logps
from stages.objectives.losses import chosen_loss, dpo_loss, plackett_luce_loss
from stages.settings.dpo import DPOSettings
from stages.settings.experiment import Experiment
from stages.settings.training import total_steps
from stages.shared.cards import ANSWER, card
from stages.shared.disk import say_written
from stages.shared.inputs import cut_by_tokens, group_order, in_parts, load_groups
from stages.shared.publishing import adapter_base, publish_dtype
from stages.shared.runtime import (
    adapter_settings,
    check_context,
    device_of,
    dtype_of,
    note_default_rate,
    packing,
    place,
)
from stages.shared.show import show_samples
from stages.training.loop import fit, make_accelerator, make_trainee, pause_if_asked
from stages.training.schedule import learning_rate_at


def run(ctx: StageRun[DPOSettings, Experiment]) -> dict:
    """→ model/, a policy."""
    m, c = ctx.experiment.model, ctx.config
    source = ctx.inputs["sft"] / "model"
    check_context(ctx, source)
    tokenizer = load_tokenizer(source, trust_remote_code=ctx.trust_remote_code)
    accelerator = make_accelerator(device_of(ctx.experiment), dtype_of(ctx.experiment))
    limits = {"max_length": c.max_length, "on_too_long": c.on_too_long}
    groups, report = load_groups(ctx, tokenizer, "train", **limits)
    held, held_report = load_groups(ctx, tokenizer, "validation", **limits)
    report += held_report
    steps = total_steps(c, len(groups))
    ctx.tracker.say(f"dpo: {report.line('rankings')}; {len(held)} rankings held out; {steps} steps")
    note_default_rate(ctx)
    load = partial(
        load_policy, source, attn_implementation=m.attn_implementation, trust_remote_code=ctx.trust_remote_code
    )
    adapter = adapter_settings(m) or {"method": None}
    policy = place(ctx, lambda: with_adapter(load(), **adapter, seed=ctx.seed), accelerator)
    packed = packing(ctx, policy)

    # 1 the reference's log-probabilities, once: the policy is the reference before training, its adapter off
    batch_size = c.per_device_train_batch_size * c.gradient_accumulation_steps
    order = group_order(ctx, groups, steps, batch_size)
    drawn = sorted(set(order))
    poll = partial(pause_if_asked, ctx, 0, steps, lambda: None)
    options = (ctx, policy, tokenizer.pad_token_id, accelerator, packed, poll)
    reference = {
        "train": dict(zip(drawn, reference_logps("train", [groups[i] for i in drawn], *options), strict=True)),
        "validation": reference_logps("validation", held, *options),
    }

    trainee = make_trainee(
        "model",
        policy,
        learning_rate=c.learning_rate,
        max_grad_norm=c.max_grad_norm,
        weight_decay=c.weight_decay,
        adam_beta2=c.adam_beta2,
        steps=steps,
    )

    say_written(ctx, [policy], [policy], steps, sets=int(c.keep == "best"))

    # 2 the loss of a micro-batch of prompts, a part of a batch with so many prompts and tokens of first responses
    def forward(part, ref, rows, prompts, tokens):
        batch = batch_groups([part[i] for i in rows], tokenizer.pad_token_id, packed=packed).to(accelerator.device)
        ref_logps = torch.cat([ref[i] for i in rows]).to(accelerator.device)
        with accelerator.autocast():
            logprobs = response_logprobs(policy, batch.rows)
        logps = sequence_logps(logprobs, batch.rows.response_mask)
        parts = {
            name: loss_of(name, logps, ref_logps, batch, c.beta, c.label_smoothing, prompts, tokens)
            for name in c.losses()
        }
        value = sum(weight * parts[name] for name, weight in c.losses().items())
        figures = pair_figures(value, logps.detach(), ref_logps, batch, c.beta, len(rows) / prompts)
        if len(parts) > 1:
            figures |= {f"loss/{name}": x.item() for name, x in parts.items()}
        return value, figures

    @torch.no_grad()
    def evaluate(poll) -> dict:
        sums: dict[str, float] = {}
        tokens = sum(map(tokens_first, held))
        parts, costs = in_parts(ctx, held, packed)
        for rows, own in parallel.padded_micro_batches(
            parallel.rows_of_this_rank(parts, costs), parts[0] if is_sharded(policy) else None
        ):
            poll()
            figures = forward(held, reference["validation"], rows, len(held), tokens)[1]
            for key, value in figures.items() if own else ():
                sums[key] = sums.get(key, 0.0) + value
        return parallel.all_reduce_figures(sums)

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
        costs=[g.tokens() for g in groups],
        cut=cut_by_tokens(ctx, groups, packed)[0],
        loss=lambda rows, whole: forward(
            groups, reference["train"], rows, len(whole), sum(tokens_first(groups[i]) for i in whole)
        ),
        evaluate=evaluate,
        judge="loss",
        higher_is_better=False,
        keep=c.keep,
        patience=c.patience,
        eval_steps=c.eval_steps,
        samples=samples,
        learning_rate=lambda s: learning_rate_at(s, steps, c.learning_rate, c.lr_scheduler_type, c.warmup_steps),
    )
    figures = {**figures, "truncated": report.truncated, "dropped": report.dropped}
    base = adapter_base(ctx, ctx.publish / "model", source)
    text = card(ctx, "a policy trained by DPO", ANSWER, figures=figures, source=source, adapter=base)
    options = {"base": base or ("", None), "temperature": 1.0, "dtype": publish_dtype(ctx, source)}
    save_merged(publishable(policy, load), tokenizer, ctx.publish / "model", card=text, **options)
    return figures


def loss_of(name: str, logps, ref_logps, batch, beta: float, label_smoothing: float, prompts: int, tokens: float):
    """One of the losses over a micro-batch, divided by the whole batch's prompts (sft: tokens of first responses)."""
    if name == "sft":
        return chosen_loss(logps, batch.first, batch.first_weights, tokens or 1.0)  # none: cut off before a word
    if name == "plackett_luce":
        choices = (batch.winners, batch.losers, batch.choice, batch.choice_weights)
        return plackett_luce_loss(beta * (logps - ref_logps), *choices, prompts)
    pairs = (batch.winners, batch.losers, batch.pair_weights)
    return dpo_loss(logps, ref_logps, *pairs, beta, prompts, name, label_smoothing)


@torch.no_grad()
def reference_logps(
    split: str, groups, ctx: StageRun, policy, pad_id: int, accelerator, packed: bool, poll=lambda: None
) -> list[torch.Tensor]:
    """log π_ref of every response, one tensor (K,) a group; kept under a digest of the model and the groups, so that
    a run that goes on, or begins anew with other settings, does not compute it again."""
    m, digest = ctx.experiment.model, hashlib.sha256()
    made_by = [ctx.manifests["sft"]["digest"], dtype_of(ctx.experiment), m.attn_implementation, packed]
    made_by += [accelerator.device.type, *map(version, ("torch", "transformers"))]
    if m.peft is not None and m.peft.method == "qlora":  # the reference is the quantized base
        made_by += [version("bitsandbytes")]
    for what in (made_by, *([g.prompt, g.responses] for g in groups)):
        digest.update(json.dumps(what).encode())
    digest = digest.hexdigest()
    sizes = [len(g.responses) for g in groups]
    kept = parallel.from_rank_zero(lambda: ctx.cache.recall(f"reference_logps_{split}", digest))
    if kept is not None:
        return list(kept["logps"].split(sizes))

    parts, costs = in_parts(ctx, groups, packed)
    sharded = is_sharded(policy)

    def logps_of(own: list[list[int]]):
        off = adapter_off(policy) if is_adapted(policy) else nullcontext()
        with off, ctx.tracker.progress(len(own), "dpo reference") as progress:
            for done, (rows, mine) in enumerate(parallel.padded_micro_batches(own, parts[0] if sharded else None), 1):
                poll()
                batch = batch_groups([groups[i] for i in rows], pad_id, packed=packed).to(accelerator.device)
                with accelerator.autocast():
                    logprobs = response_logprobs(policy, batch.rows)
                if mine:
                    yield sequence_logps(logprobs, batch.rows.response_mask).cpu().split([sizes[i] for i in rows])
                    progress.update(done)

    every = parallel.compute_and_all_gather(parts, costs, lambda own: list(logps_of(own)), idle=sharded)
    out: dict[int, torch.Tensor] = {}
    for rows, logps in zip(parts, every, strict=True):
        out.update(zip(rows, logps, strict=True))
    found = [out[i] for i in range(len(groups))]
    ctx.cache.remember(f"reference_logps_{split}", digest, {"logps": torch.cat(found)})
    return found


def tokens_first(group) -> float:
    """Tokens of the responses that were put first, by their weights."""
    return sum(weight * len(group.responses[i]) for i, weight in group.first())


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

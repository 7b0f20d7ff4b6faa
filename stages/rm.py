"""rm: rankings → a reward model, r(x, y) a scalar read at the last token of the response.

    loss = − 1/C(K,2) · Σ_pairs log σ( r(x, y_w) − r(x, y_l) )     mean over prompts (InstructGPT, eq. 1)

All pairs of a prompt are one batch element: K forward passes, and each response is seen by one gradient.
Afterwards a bias makes the demonstrations score 0 on average; it is `reward_bias` in config.json.
"""

import torch

from data import sources
from data.encode import decode_response, encode_prompt, encode_response
from data.groups import batch_groups
from data.records import DataError
from data.streams import Stream, derive_seed
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
    read,
)
from stages.engine import fit, learning_rate_at, make_accelerator, make_trainee
from stages.models.adapters import merged, with_adapter
from stages.models.forward import response_scores, score_all
from stages.models.loading import load_tokenizer, new_reward_model, save_model
from stages.objectives.losses import ranking_loss
from stages.settings import TooLong, Training, over_context, setting, too_long, total_steps
from stages.statistics import expected_calibration_error, labeler_agreement, pair_accuracy

NAME = "rm"
METRICS = {
    "loss": "ranking loss a prompt, in nats, of this step's batch",
    "accuracy": "share of pairs whose preferred response scores higher, mean over prompts (evaluations.jsonl: over all "
    "held-out pairs, equal scores counting half)",
    "margin": "mean score difference between preferred and other response",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of the step",
}
HEADLINE = ("accuracy", "accuracy_ceiling")


class Config(Training):
    """The K-wise ranking reward model."""

    learning_rate: float = setting(9e-6, "peak learning rate (the paper's)", "per step", gt=0)
    on_too_long: TooLong = too_long()
    per_device_train_batch_size: int = setting(
        8, "prompts, with all their responses, in one forward and backward", "prompts", ge=1
    )
    gradient_accumulation_steps: int = setting(8, "micro-batches a step (the paper: 64 prompts a step)", ge=1)
    bias_demonstrations: int = setting(256, "demonstrations that the mean score 0 is taken over", "rows", ge=1)


def needs(experiment) -> list[str]:
    return ["sft", "rankings"]


def reads(experiment) -> list[str]:
    return ["demonstrations"]


def check(experiment) -> list[str]:
    return over_context(experiment, "rm")


def run(ctx: StageRun) -> dict:
    """→ model/, an AutoModelForSequenceClassification with one label and reward_bias."""
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
    ctx.tracker.say(
        f"rm: {report.line('rankings')}; {sum(len(g.pairs()) for g in groups)} pairs; "
        f"{len(held)} rankings held out; {steps} steps"
    )

    # 1 the policy's trunk, a fresh scalar head
    model = new_reward_model(
        source, seed=ctx.seed, attn_implementation=m.attn_implementation, trust_remote_code=ctx.trust_remote_code
    )
    if m.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model = with_adapter(model, **(adapter_settings(m) or {"method": None}), scalar=True, seed=ctx.seed)
    model.to(accelerator.device)
    packed = packing(ctx, model)
    trainee = make_trainee(
        "model",
        model,
        learning_rate=c.learning_rate,
        max_grad_norm=c.max_grad_norm,
        weight_decay=c.weight_decay,
        adam_beta2=c.adam_beta2,
    )

    # 2 the loss of a micro-batch of prompts
    def loss(rows: list[int], prompts: int):
        batch = batch_groups([groups[i] for i in rows], tokenizer.pad_token_id, packed=packed).to(accelerator.device)
        with accelerator.autocast():
            scores = response_scores(model, batch.rows)
        value = ranking_loss(scores, batch.winners, batch.losers, batch.pair_weights, prompts)
        margins = (scores[batch.winners] - scores[batch.losers]).detach()
        weight = len(rows) / prompts
        return value, {
            "loss": value.item(),
            "accuracy": weight * batch.mean((margins > 0).float()),
            "margin": weight * batch.mean(margins),
        }

    def evaluate() -> dict:
        margins, _, value = held_out_margins(
            model, held, tokenizer.pad_token_id, accelerator, c.per_device_train_batch_size, packed
        )
        right = (margins > 0).float() + 0.5 * (margins == 0).float()
        return {"loss": value, "accuracy": float(right.mean()), "margin": float(margins.mean())}

    batch_size = c.per_device_train_batch_size * c.gradient_accumulation_steps

    # 3 train; then how far it can be trusted
    figures = fit(
        ctx,
        trainee,
        accelerator,
        order=group_order(ctx, groups, steps, batch_size),
        batch_size=batch_size,
        micro_size=c.per_device_train_batch_size,
        loss=loss,
        evaluate=evaluate,
        judge="loss",
        higher_is_better=False,
        keep=c.keep,
        patience=c.patience,
        eval_steps=c.eval_steps,
        learning_rate=lambda s: learning_rate_at(s, steps, c.learning_rate, c.lr_scheduler_type, c.warmup_steps),
    )
    margins, owners, _ = held_out_margins(
        model, held, tokenizer.pad_token_id, accelerator, c.per_device_train_batch_size, packed
    )
    validation = sources.load("rankings", path=ctx.inputs["rankings"] / "validation.jsonl")
    prompts = {}  # two labelers may have ranked one prompt: the interval is over prompts
    owners = [prompts.setdefault(tuple(held[g].prompt), len(prompts)) for g in owners.tolist()]
    figures |= pair_accuracy(margins.tolist(), owners, ctx.seed)
    figures |= {
        "ece": expected_calibration_error(margins.tolist()),
        "labeler_agreement": labeler_agreement(validation),
        "accuracy_ceiling": ctx.manifests["rankings"]["metrics"].get("accuracy_ceiling"),
    }

    # 4 the bias: demonstrations score 0 on average
    model = merged(model)
    bias = demonstration_mean(ctx, model, tokenizer, accelerator)
    model.config.reward_bias = bias
    texts = {ranking.id: ranking.prompt for ranking in validation}
    write_samples(ctx, model, tokenizer, held[:4], texts, figures["steps"], accelerator)
    save_model(model, tokenizer, ctx.publish / "model", card=card(ctx, "a reward model"))
    return {**figures, "reward_bias": bias, "truncated": report.truncated, "dropped": report.dropped}


@torch.no_grad()
def held_out_margins(model, held, pad_id: int, accelerator, size: int, packed: bool):
    """Over all pairs of the held-out groups: score margins (N,), the group of each (N,), and the mean loss a prompt."""
    margins, owners, loss = [], [], 0.0
    for start in range(0, len(held), size):
        batch = batch_groups(held[start : start + size], pad_id, packed=packed).to(accelerator.device)
        with accelerator.autocast():
            scores = response_scores(model, batch.rows)
        loss += ranking_loss(scores, batch.winners, batch.losers, batch.pair_weights, len(held)).item()
        margins.append((scores[batch.winners] - scores[batch.losers]).cpu())
        owners.append(batch.pair_group.cpu() + start)
    return torch.cat(margins), torch.cat(owners), loss


@torch.no_grad()
def demonstration_mean(ctx: StageRun, model, tokenizer, accelerator) -> float:
    """Mean score of the demonstrations that fit (at most `bias_demonstrations`), the bias not yet subtracted."""
    c, rows, pairs = ctx.config, read(ctx, "demonstrations"), []
    for i in Stream(len(rows), derive_seed(ctx.seed, "bias")).take(len(rows)):
        pair = (encode_prompt(tokenizer, rows[i].prompt), encode_response(tokenizer, rows[i].completion))
        if sum(map(len, pair)) <= c.max_length:
            pairs.append(pair)
        if len(pairs) == c.bias_demonstrations:
            break
    if not pairs:
        raise DataError(
            [
                f"data.demonstrations: none of them fits in rm.max_length {c.max_length}, and the mean score 0 "
                f"is taken over them; raise it"
            ]
        )
    prompts, responses = zip(*pairs, strict=True)
    size = 4 * c.per_device_train_batch_size
    scores = score_all(
        model, prompts, responses, pad_id=tokenizer.pad_token_id, batch_size=size, accelerator=accelerator
    )
    return scores.double().mean().item()


@torch.no_grad()
def write_samples(ctx: StageRun, model, tokenizer, groups, texts: dict, step: int, accelerator) -> None:
    """A few held-out responses with their scores, for a person to look at. texts: prompts as recorded, by id."""
    rows = []
    for group in groups:
        scores = score_all(
            model,
            [group.prompt] * len(group.responses),
            group.responses,
            pad_id=tokenizer.pad_token_id,
            batch_size=len(group.responses),
            accelerator=accelerator,
        )
        rows += [
            {"prompt": texts[group.id], "response": decode_response(tokenizer, r), "score": s}
            for r, s in zip(group.responses, scores.tolist(), strict=True)
        ]
    ctx.tracker.samples(step, rows)

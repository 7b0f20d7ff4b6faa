"""sft: demonstrations → a policy that answers; the reference of everything after.

loss = − mean log π(token | prompt, before)     over the tokens of completions and their EOS
"""

from data.encode import encode_demonstrations
from data.records import DataError, prompt_key
from data.streams import held_out
from pipeline.stage import StageRun
from stages.common import adapter_settings, card, check_context, device_of, dtype_of, read_placed, show_samples
from stages.language_modeling import train_language_model
from stages.models.loading import load_policy, load_tokenizer, save_model
from stages.settings import TooLong, Training, over_context, setting, too_long, total_steps

NAME = "sft"
METRICS = {
    "loss": "cross-entropy a completion token, in nats, of this step's batch (evaluations.jsonl: held out by prompt)",
    "perplexity": "exp(loss) on held-out demonstrations",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of the step",
}
HEADLINE = ("loss", "perplexity")


class Config(Training):
    """Supervised fine-tuning with trl's SFTTrainer."""

    learning_rate: float = setting(9.65e-6, "peak learning rate (the paper's for 1.3B and 6B)", "per step", gt=0)
    on_too_long: TooLong = too_long()
    per_device_train_batch_size: int = setting(32, "demonstrations in one forward and backward", "rows", ge=1)
    num_train_epochs: float = setting(
        2.0, "passes over the demonstrations (the paper: 16, with dropout)", "epochs", gt=0
    )
    sample_tokens: int = setting(48, "length of the generations kept in samples.jsonl", "tokens", ge=1)


def needs(experiment) -> list[str]:
    return ["base"]


def reads(experiment) -> list[str]:
    return ["demonstrations"]


def check(experiment) -> list[str]:
    return over_context(experiment, "sft")


def run(ctx: StageRun) -> dict:
    """→ model/, with the tokenizer and chat template of base."""
    m, c = ctx.experiment.model, ctx.config
    source = ctx.inputs["base"] / "model"
    check_context(ctx, source)
    tokenizer = load_tokenizer(source, trust_remote_code=ctx.trust_remote_code)
    model = load_policy(source, attn_implementation=m.attn_implementation, trust_remote_code=ctx.trust_remote_code)
    demonstrations, places = read_placed(ctx, "demonstrations")
    kept, encoded, report = encode_demonstrations(
        tokenizer, demonstrations, names=places, max_length=c.max_length, on_too_long=c.on_too_long, section="sft"
    )
    prompts = [demonstrations[i].prompt for i in kept]
    train, valid = held_out([prompt_key(p) for p in prompts], ctx.experiment.data.validation_fraction)
    if not valid:
        problem = f"one prompt is left within {c.max_length} tokens; at least 2 are needed, one of them to hold out"
        raise DataError([f"data.demonstrations: {problem}"])
    rows, held = ([encoded[i] for i in part] for part in (train, valid))
    steps = total_steps(c, len(rows))
    ctx.tracker.say(f"sft: {report.line('demonstrations')}; {len(held)} held out; {steps} steps")
    shown = [prompts[i] for i in valid[:4]]
    model, figures = train_language_model(
        ctx,
        model,
        tokenizer,
        rows,
        held,
        steps=steps,
        group_by_length=True,
        learning_rate=c.learning_rate,
        lr_scheduler_type=c.lr_scheduler_type,
        warmup_steps=c.warmup_steps,
        per_device_train_batch_size=c.per_device_train_batch_size,
        gradient_accumulation_steps=c.gradient_accumulation_steps,
        max_grad_norm=c.max_grad_norm,
        weight_decay=c.weight_decay,
        adam_beta2=c.adam_beta2,
        keep=c.keep,
        patience=c.patience,
        eval_steps=c.eval_steps,
        device=device_of(ctx),
        dtype=dtype_of(ctx.experiment),
        gradient_checkpointing=m.gradient_checkpointing,
        adapter=adapter_settings(m),
        samples=lambda live: show_samples(live, tokenizer, shown, seed=ctx.seed, response_length=c.sample_tokens),
    )
    save_model(model, tokenizer, ctx.publish / "model", card=card(ctx, "a supervised fine-tuned policy"))
    return {**figures, "rows": len(rows), "truncated": report.truncated, "dropped": report.dropped}

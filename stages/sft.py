"""sft: demonstrations → a policy that answers; the reference of everything after.

loss = − mean log π(token | prompt, before)     over the tokens of completions and their EOS
"""

from functools import partial

from data.answer_lengths import quantiles
from data.documents import wrap_documents
from data.encode import encode_demonstrations
from data.records import prompt_key
from data.streams import Stream, derive_seed, held_out
from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun
from stages.models.adapters import save_merged, trainable, with_adapter
from stages.models.loading import load_policy, load_tokenizer
from stages.settings.experiment import Experiment
from stages.settings.sft import SFTSettings
from stages.settings.training import total_steps
from stages.shared.cards import ANSWER, card
from stages.shared.inputs import read_placed, split_documents
from stages.shared.publishing import adapter_base, publish_dtype
from stages.shared.runtime import adapter_settings, check_context, device_of, dtype_of, note_default_rate
from stages.shared.show import say_off_template, show_samples
from stages.training.loop import Trainee, has_settings_of_today
from stages.training.text import train_language_model


def run(ctx: StageRun[SFTSettings, Experiment]) -> dict:
    """→ model/, with the tokenizer and chat template of base; and ppo_init/ if asked for. An adapter apart is one on
    base's model."""
    m, c = ctx.experiment.model, ctx.config
    source = ctx.inputs["base"] / "model"
    check_context(ctx, source)
    tokenizer = load_tokenizer(source, trust_remote_code=ctx.trust_remote_code)
    adapter = adapter_settings(m) or {"method": None}
    new_tokens = ctx.manifests["base"]["metrics"].get("new_tokens", [])  # later their rows are as good as others

    def start():
        model = load_policy(source, attn_implementation=m.attn_implementation, trust_remote_code=ctx.trust_remote_code)
        return with_adapter(model, **adapter, seed=ctx.seed % 2**31, dropout=True, new_tokens=new_tokens)

    demonstrations, places = read_placed(ctx, "demonstrations")
    kept, encoded, report = encode_demonstrations(
        tokenizer, demonstrations, names=places, max_length=c.max_length, on_too_long=c.on_too_long, section="sft"
    )
    pairs = [(demonstrations[i].prompt, demonstrations[i].completion) for i in kept]
    say_off_template(ctx, tokenizer, pairs, [places[i] for i in kept], "demonstrations")
    prompts = [demonstrations[i].prompt for i in kept]
    train, valid = held_out([prompt_key(p) for p in prompts], ctx.experiment.data.validation_fraction)
    if not valid:
        problem = f"one prompt is left within {c.max_length} tokens; at least 2 are needed, one of them to hold out"
        raise UserError([f"data.demonstrations: {problem}"])
    rows, held = ([encoded[i] for i in part] for part in (train, valid))
    mixed = [] if c.ppo_init is None else rows + pretraining_rows(ctx, tokenizer, rows)
    steps, more = total_steps(c, len(rows)), 0
    if c.ppo_init is not None:
        more = total_steps(c.model_copy(update=dict(c.ppo_init) | {"max_steps": None}), len(mixed))
    note_default_rate(ctx)
    ctx.tracker.say(
        f"sft: {report.line('demonstrations')}; {len(held)} held out; {steps} steps"
        + (f", then {more} for ppo_init" if more else "")
    )
    shown = [prompts[i] for i in valid[:4]]
    fit = partial(
        train_language_model,
        ctx,
        start,
        tokenizer=tokenizer,
        held_out_rows=held,
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
        device=device_of(ctx.experiment),
        dtype=dtype_of(ctx.experiment),
        gradient_checkpointing=m.gradient_checkpointing,
        router_aux_loss_coef=c.router_aux_loss_coef,
        samples=lambda live: show_samples(live, tokenizer, shown, seed=ctx.seed, response_length=c.sample_tokens),
        total=steps + more,
        published=1 if c.ppo_init is None else 2,
    )
    found = ctx.checkpoints.newest()
    if found is not None and "finished" in found.state:  # interrupted while ppo_init trained: model/ is made
        refuse_another_length(ctx, found, steps)
        model, figures, weights = None, found.state["finished"], {}
        if parallel.is_rank_zero():  # which publishes
            model, weights = start(), found.tensors("finished")
            Trainee("sft", model, trainable(model), None, 0.0).load(weights)
    else:
        model, figures = fit(train_rows=rows, steps=steps, group_by_length=True)
        weights = {name: p.detach() for name, p in trainable(model).items()}
    figures = {**figures, "rows": len(rows), "truncated": report.truncated, "dropped": report.dropped}
    figures["answer_tokens"] = quantiles([sum(label != -100 for label in row["labels"]) for row in encoded])
    publish(ctx, model, tokenizer, "model", "a supervised fine-tuned policy", figures)
    if c.ppo_init is None:
        return figures

    carried = {"finished": weights}, {"finished": figures, "steps": steps}
    if ctx.checkpoints.every and (found is None or "finished" not in found.state):
        ctx.checkpoints.save(steps, *carried, steps + more)
    # by length, the long rows of text would fill batches of their own and not be mixed in
    rest = {"first": steps, "carried": carried, "group_by_length": False}
    model, other = fit(train_rows=mixed, steps=more, **rest)
    publish(ctx, model, tokenizer, "ppo_init", "the policy that PPO starts from", other)
    return figures | {f"ppo_init_{name}": other[name] for name in ("loss", "perplexity", "steps")}


def publish(ctx: StageRun, model, tokenizer, name: str, what: str, figures: dict) -> None:
    """Write a policy to the folder `name`. what, figures: for its card."""
    source, folder = ctx.inputs["base"] / "model", ctx.publish / name
    base = adapter_base(ctx, folder, source)
    text = card(ctx, what, ANSWER, figures=figures, source=source, adapter=base)
    options = {"temperature": 1.0, "dtype": publish_dtype(ctx, source)}
    save_merged(model, tokenizer, folder, card=text, base=base or ("", None), **options)


def refuse_another_length(ctx: StageRun, found, steps: int) -> None:
    """Raise UserError if model/ is trained and the settings now ask for another number of steps: the checkpoints of
    ppo_init count from there."""
    was = found.state.get("steps", steps if has_settings_of_today(ctx, found) else None)
    if was != steps:
        raise UserError(
            f"sft: model/ is trained{'' if was is None else f', in {was} steps'}, and sft.max_steps or "
            f"sft.num_train_epochs now ask for {steps}; set them back to go on, --restart begins anew"
        )


def pretraining_rows(ctx: StageRun, tokenizer, demonstrations: list[dict]) -> list[dict]:
    """Packed rows of the training documents with `pretraining_fraction` of all labels, the demonstrations' included."""
    fraction = ctx.config.ppo_init.pretraining_fraction
    train, _ = split_documents(ctx)
    rows = wrap_documents(tokenizer, train, length=ctx.config.max_length)
    if not rows:
        problem = f"fewer than sft.max_length = {ctx.config.max_length} tokens of pretraining text"
        raise UserError([f"data.documents: {problem}; give more text, or set sft.ppo_init: null"])
    labels = sum(label != -100 for row in demonstrations for label in row["labels"])
    wanted = max(1, round(labels * fraction / (1 - fraction) / (ctx.config.max_length - 1)))
    order = Stream(len(rows), derive_seed(ctx.seed, "ppo_init")).take(wanted)
    return [{"input_ids": rows[i], "labels": rows[i]} for i in order]

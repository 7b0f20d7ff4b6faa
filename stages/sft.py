"""Fine-tune the base model on demonstrations; the result is the reference of all later stages.

loss = − mean log π(token | prompt, before)     over the tokens of the answers and their EOS

Of a conversation all answers are learnt (sft.turns), each after exactly what the policy would see.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.documents import PackedRows
from data.streams import Stream, derive_seed
from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun
from pipeline.store.checkpoints import Checkpoint
from stages.models.adapters import AdapterSettings, refuse_untrained, trainable_parameters, with_adapter
from stages.models.control_tokens import control_ids_of
from stages.models.loading import load_policy, load_tokenizer
from stages.models.soft_prompts import soft_prompt_of
from stages.rollouts.engine import EngineSpec
from stages.settings.checks import prefix_tokens
from stages.settings.experiment import Experiment
from stages.settings.sft import ConditionalSettings, SFTSettings
from stages.settings.training import total_steps
from stages.shared.cards import ANSWER, ModelCard
from stages.shared.conditional import (
    Sampler,
    asked_demonstrations,
    asked_prompts,
    label_rows,
    of_round,
    records_of,
    score_answers,
)
from stages.shared.demonstrations import Given, load_demonstrations
from stages.shared.disk import say_written
from stages.shared.encoded_documents import load_training_text
from stages.shared.engines import engine_spec
from stages.shared.inputs import GivenText, LengthLimit
from stages.shared.provenance import Provenance, provenance_of
from stages.shared.publishing import adapter_base, publish_model
from stages.shared.row_cache import RowCache
from stages.shared.runtime import (
    Runtime,
    adapter_settings,
    check_context,
    note_default_rate,
    place_model,
    runtime_of,
    with_accelerator,
)
from stages.shared.show import show_samples
from stages.shared.source_words import recorded_rows
from stages.training.checkpoint import has_current_settings, save_groups
from stages.training.loop import Phase
from stages.training.session import Session, session_of
from stages.training.text import Optimization, TextTask, train_language_model
from stages.training.text_hooks import weights_of


def run(ctx: StageRun[SFTSettings, Experiment]) -> dict:
    """Publish model/, and ppo_init/ if asked for, with the tokenizer and chat template of base."""
    if ctx.config.conditional is not None:
        return run_conditional(ctx, ctx.config.conditional)
    config, source = ctx.config, ctx.inputs["base"] / "model"
    session, runtime, provenance = session_of(ctx), runtime_of(ctx), provenance_of(ctx)
    check_context(session, config, source, ahead=prefix_tokens(ctx.experiment, "sft"))
    tokenizer = load_tokenizer(source, trust_remote_code=runtime.trust_remote_code)
    refuse_untrained(new_tokens_of(provenance), adapter_settings(provenance.model).method, tokenizer)
    fraction = ctx.experiment.data.validation_fraction
    given = Given(
        source=ctx.source("demonstrations"),
        rows=recorded_rows(ctx.data.get("demonstrations", {})),
        fraction=fraction,
        limit=LengthLimit(config.max_length, config.on_too_long, "sft"),
        turns=config.turns,
    )
    cache = RowCache(ctx.cache, source, session.tracker, partial(session.leave_if_requested, 0, 0))
    data = load_demonstrations(session, given, tokenizer, cache)
    steps, more_steps, mixed_rows = total_steps(config, len(data.train)), 0, data.train
    if config.ppo_init is not None:
        soft_prompt = soft_prompt_of(source)
        length = config.max_length - len(soft_prompt)
        documents = GivenText(ctx.source("documents"), recorded_rows(ctx.data.get("documents", {})))
        packed = load_training_text(documents, fraction, tokenizer, cache, length)
        text = pretraining_rows(config, packed, data.train.labels(), ctx.seed)
        mixed_rows = data.train.with_texts(text, soft_prompt)
        more_steps = total_steps(
            config.model_copy(update={**dict(config.ppo_init), "max_steps": None}), len(mixed_rows)
        )
    if provenance.model.peft is not None:
        note_default_rate(session, config)
    line = f"{data.report.line('demonstrations')}; {data.turns.text()}; {len(data.held_out)} held out; {steps} steps"
    session.say(f"{line}, then {more_steps} for ppo_init" if more_steps else line)
    make = partial(make_policy, source, runtime, adapter_settings(provenance.model), provenance)
    samples = partial(
        show_samples, tokenizer=tokenizer, prompts=data.shown, seed=ctx.seed, response_length=config.sample_tokens
    )
    announce = partial(announce_written, session, provenance, config, steps + more_steps)
    task = TextTask(
        train_rows=data.train,
        held_out_rows=data.held_out,
        rows_per_device=config.per_device_train_batch_size,
        accumulation_steps=config.gradient_accumulation_steps,
        group_by_length=True,
        samples=samples,
        announce=announce,
    )
    train = partial(train_language_model, session, runtime, make, tokenizer)
    optimization = optimization_of(config)
    selection = config.selection("loss", higher_is_better=False)

    # 1 the policy
    phase = Phase(total=steps + more_steps)
    checkpoint = session.checkpoints.newest()
    is_trained = checkpoint is not None and "finished" in checkpoint.state  # interrupted while ppo_init trained
    if is_trained:
        check_same_steps(session, checkpoint, steps)
        model, figures, weights = restore_policy(checkpoint, make)
    else:
        model, figures = train(task, optimization, config.schedule(steps), selection, phase)
        weights = {name: p.detach() for name, p in trainable_parameters(model).items()}
    figures = {
        **figures,
        "rows": len(data.train),
        "truncated": data.report.truncated,
        "dropped": data.report.dropped,
        "assistant_turns": data.turns.assistant,
        "learnt_turns": data.turns.learnt,
        "learnt_tokens": data.learnt_tokens,
        "answer_tokens": data.answer_tokens,
        **session.notes.figures,
    }
    publish(provenance, model, tokenizer, "model", ModelCard("a supervised fine-tuned policy", figures=figures))
    if config.ppo_init is None:
        return figures

    # 2 the policy that PPO starts from, trained on pretraining text too
    tensors, state = {"finished": weights}, {"finished": figures, "steps": steps}
    if session.checkpoints.every and not is_trained:
        save_groups(session, steps, steps + more_steps, tensors, state)
        session.finish_saves()  # the training below looks for the newest checkpoint
    # not grouped by length: the long rows of text would fill batches of their own
    task = replace(task, train_rows=mixed_rows, group_by_length=False)
    phase = Phase(first=steps, total=steps + more_steps, tensors=tensors, state=state)
    model, more = train(task, optimization, config.schedule(more_steps), selection, phase)
    publish(provenance, model, tokenizer, "ppo_init", ModelCard("the policy that PPO starts from", figures=more))
    return figures | {f"ppo_init_{name}": more[name] for name in ("loss", "perplexity", "steps")}


def run_conditional(ctx: StageRun[SFTSettings, Experiment], how: ConditionalSettings) -> dict:
    """Publish model/, trained on answers after control tokens that say how good they are.

    loss = − mean log π(token | prompt, control token, before)    over the tokens of the answers

    Args:
        ctx: The run.
        how: What scores the answers, and whose answers they are.

    Returns:
        The figures for the manifest.
    """
    config, source = ctx.config, ctx.inputs["base"] / "model"
    session, runtime, provenance = session_of(ctx), with_accelerator(runtime_of(ctx)), provenance_of(ctx)
    check_context(session, config, source, ahead=prefix_tokens(ctx.experiment, "sft"))
    tokenizer = load_tokenizer(source, trust_remote_code=runtime.trust_remote_code)
    refuse_untrained(new_tokens_of(provenance), adapter_settings(provenance.model).method, tokenizer)
    fraction, limit = ctx.experiment.data.validation_fraction, LengthLimit(config.max_length, config.on_too_long, "sft")
    if provenance.model.peft is not None:
        note_default_rate(session, config)
    make = partial(make_policy, source, runtime, adapter_settings(provenance.model), provenance)

    # 1 what is asked in each round, and so the steps of each
    if how.samples_per_prompt is None:
        asked, given = asked_demonstrations(ctx.source("demonstrations"), config.turns, tokenizer, session)
        rounds = [asked]
    else:
        asked = asked_prompts(ctx.source("prompts"), limit, how.longest_sample, tokenizer, session)
        given, count = None, how.prompts_per_round
        rounds = [of_round(asked, count, number, ctx.seed) for number in range(how.rounds or 1)]
    steps = [total_steps(config, own.train_answers(how.samples_per_prompt or 1, fraction)) for own in rounds]
    session.say(f"{sum(len(own.prompts) for own in rounds)} prompts in {len(rounds)} rounds; {sum(steps)} steps")
    announce = partial(announce_written, session, provenance, config, sum(steps))

    # 2 the rounds: answers, scores, labels, training
    checkpoint = session.checkpoints.newest()
    state = {} if checkpoint is None else checkpoint.state.get("conditional", {})
    first, figures, model = int(state.get("round", 0)), dict(state.get("figures", {})), None
    weights = {} if checkpoint is None or not first else checkpoint.tensors("finished")
    for number in range(first, len(rounds)):
        own, done = rounds[number], sum(steps[:number])
        start = partial(make_with, make, weights)
        if number == first and "answers" in state:
            scored = records_of(state)
        else:
            answers = given
            if answers is None:
                sampler = Sampler(sampling_spec(ctx, runtime, tokenizer, how), tokenizer, how, ctx.seed)
                poll = partial(session.leave_if_requested, done, sum(steps))
                policy = place_model(start, runtime, config.max_length).eval()
                answers = sampler.answers(policy, own, number, poll)
            scored = score_answers(how, own, answers, tokenizer, runtime, session)
            ctx.confirm_folders()  # those of reward models have been loaded
        labelled, report = label_rows(own, scored, control_ids_of(source), how.thresholds, fraction, limit, tokenizer)
        session.say(labelled.line(number, len(rounds)))
        task = TextTask(
            train_rows=labelled.train,
            held_out_rows=labelled.held_out,
            rows_per_device=config.per_device_train_batch_size,
            accumulation_steps=config.gradient_accumulation_steps,
            group_by_length=True,
            samples=partial(show_samples, tokenizer=tokenizer, prompts=asked.prompts[:4], seed=ctx.seed,
                            response_length=config.sample_tokens),
            announce=announce,
        )  # fmt: skip
        of_round_state = {"conditional": {"round": number, "figures": figures} | scored.state()}
        carried = {"finished": weights} if weights else {}
        phase = Phase(first=done, total=sum(steps), tensors=carried, state=of_round_state)
        model, trained = train_language_model(
            session, runtime, start, tokenizer, task, optimization_of(config), config.schedule(steps[number]),
            config.selection("loss", higher_is_better=False), phase,
        )  # fmt: skip
        weights = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
        lengths = {"truncated": report.truncated, "dropped": report.dropped, "rows": len(labelled.train)}
        figures = {
            **figures,
            **trained,
            **lengths,
            **labelled.figures,
            f"score_{number + 1}": labelled.figures["score"],
        }
        if session.checkpoints.every and number + 1 < len(rounds):
            after = {"conditional": {"round": number + 1, "figures": figures}}
            save_groups(session, done + steps[number], sum(steps), {"finished": weights}, after)
            session.finish_saves()  # the next round's training looks for the newest checkpoint

    # 3 publish
    figures = {**figures, "samples": sum(len(own.prompts) for own in rounds) * (how.samples_per_prompt or 0)}
    card = ModelCard("a policy fine-tuned conditionally on scores", figures=figures)
    publish(provenance, model, tokenizer, "model", card)
    return figures | session.notes.figures


def make_with(make: Callable[[], nn.Module], weights: dict[str, Tensor]) -> nn.Module:
    """Make the policy with the weights that an earlier round has trained; {}: as it was."""
    model = make()
    if weights:
        replace(weights_of(model), name="sft").load(weights)
    return model


def sampling_spec(
    ctx: StageRun[SFTSettings, Experiment], runtime: Runtime, tokenizer: Any, how: ConditionalSettings
) -> EngineSpec:
    """Return what the engine is built from that samples the policy's own answers."""
    return engine_spec(
        "transformers",
        ctx.inputs["base"] / "model",
        runtime,
        ctx.experiment.launch,
        work=ctx.checkpoints.folder.parent,
        pad_id=tokenizer.pad_token_id,
        max_length=ctx.config.max_length,
        batch_size=how.batch_size,
    )


def optimization_of(config: SFTSettings) -> Optimization:
    """Return the settings of the optimizer."""
    return Optimization(
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        router_aux_loss_coef=config.router_aux_loss_coef,
        dropout=config.dropout,
        neftune_noise_alpha=config.neftune_noise_alpha,
        label_smoothing=config.label_smoothing,
        packing=config.packing,
    )


def pretraining_rows(config: SFTSettings, rows: PackedRows, labels: int, seed: int) -> list[list[int]]:
    """Draw rows of pretraining text, to be mixed with the demonstrations.

    Args:
        config: The stage's settings; `ppo_init.pretraining_fraction` is the share of pretraining
            text in all labels.
        rows: The training part of the documents.
        labels: Labels of the rows to mix with.
        seed: The experiment's seed.
    """
    if not rows:
        problem = f"fewer than {rows.length} tokens (a row as long as sft.max_length) of pretraining text"
        raise UserError([f"data.documents: {problem}; give more text, or set sft.ppo_init: null"])
    share = config.ppo_init.pretraining_fraction
    count = max(1, round(labels * share / (1 - share) / (rows.length - 1)))  # a row's first token has no label
    order = Stream(len(rows), derive_seed(seed, "ppo_init")).take(count)
    return [rows[i] for i in order]


def make_policy(source: Path, runtime: Runtime, adapter: AdapterSettings, provenance: Provenance) -> nn.Module:
    """Load base's model and add the adapter, if any; the same model at every call.

    Args:
        source: The folder of base's model.
        runtime: How the stage computes.
        adapter: As `adapter_settings` gives it.
        provenance: The run; base's manifest says which tokens are new.
    """
    model, new_tokens = load_policy(source, **runtime.load_options()), new_tokens_of(provenance)
    return with_adapter(model, adapter, seed=provenance.seed % 2**31, dropout=True, new_tokens=new_tokens)


def new_tokens_of(provenance: Provenance) -> list[int]:
    """Return the tokens that base added, whose random rows train even where an adapter does."""
    return provenance.manifests["base"]["metrics"].get("new_tokens", [])


def announce_written(
    session: Session, provenance: Provenance, config: SFTSettings, steps: int, model: nn.Module
) -> None:
    """Print what the stage will write to disk.

    Args:
        session: The run.
        provenance: What the models are made of.
        config: The stage's settings.
        steps: Steps of the whole stage.
        model: The model that trains.
    """
    copies = 1 if config.ppo_init is None else 2
    # while ppo_init trains, checkpoints also hold the finished policy
    sets = copies - 1 + (config.keep == "best")
    say_written(session, provenance, [model], [model], steps, sets=sets, copies=copies)


def restore_policy(checkpoint: Checkpoint, make: Any) -> tuple[nn.Module | None, dict, dict]:
    """Return the finished policy of a run that was interrupted while ppo_init trained.

    Args:
        checkpoint: The checkpoint that the run resumes from.
        make: Returns the model before training.

    Returns:
        The model, its figures and its trained weights; only rank 0, which publishes, gets model and
        weights.
    """
    figures = checkpoint.state["finished"]
    if not parallel.is_rank_zero():
        return None, figures, {}
    model, weights = make(), checkpoint.tensors("finished")
    replace(weights_of(model), name="sft").load(weights)
    return model, figures, weights


def check_same_steps(session: Session, checkpoint: Checkpoint, steps: int) -> None:
    """Check that the settings ask for as many steps of the finished policy as it was trained for.

    The checkpoints of ppo_init count from there.

    Args:
        session: The run.
        checkpoint: The checkpoint that the run resumes from.
        steps: Steps that the settings ask for.

    Raises:
        UserError: They ask for another number.
    """
    trained = checkpoint.state.get("steps", steps if has_current_settings(session, checkpoint) else None)
    if trained != steps:
        how_long = "" if trained is None else f", in {trained} steps"
        raise UserError(
            f"sft: model/ is trained{how_long}, and sft.max_steps or sft.num_train_epochs now ask for {steps}; set "
            f"them back to resume, --restart starts again"
        )


def publish(provenance: Provenance, model: nn.Module | None, tokenizer: Any, name: str, card: ModelCard) -> None:
    """Write a policy to its folder.

    Args:
        provenance: What the policy was made of.
        model: The policy; None on ranks other than 0.
        tokenizer: Its tokenizer.
        name: Name of the folder.
        card: What its card says.
    """
    source, folder = provenance.inputs["base"] / "model", provenance.publish / name
    card = replace(card, use=ANSWER, source=source, adapter=adapter_base(provenance, folder, source))
    publish_model(provenance, model, tokenizer, folder, card, temperature=1.0)

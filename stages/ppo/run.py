"""Train a policy by PPO-ptx: prompts, a reward model and pretraining text → a better policy.

    maximise  E[ r(x, y) − β log( π(y|x) / π_SFT(y|x) ) ]  +  γ E[ log π(x_pretrain) ]

This is equation 2 of InstructGPT, with β = kl_coef and γ = ptx_coef. Read `run`: one update is the
numbered list 1 … 7.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from data import answer_lengths
from data.prompt_rows import PromptRows
from data.streams import Stream, derive_seed
from pipeline.errors import UserError
from pipeline.stage import StageRun
from pipeline.store.cache import Cache
from stages.objectives.advantages import gae, grpo, rloo
from stages.objectives.control import adaptive_kl_coef
from stages.objectives.importance import importance_figures, importance_weights
from stages.objectives.masked import masked_whiten
from stages.objectives.rewards import kl_per_token, token_rewards
from stages.ppo.evaluation import evaluate
from stages.ppo.figures import OF_KL, OF_PTX, OF_UPDATE, OF_VALUES, describe, not_finite_episodes
from stages.ppo.inputs import (
    Streams,
    load_models,
    load_ptx_rows,
    load_text_model,
    own_text_reader,
    role_folders,
    start_folder,
    text_reward_line,
)
from stages.ppo.options import (
    AdvantageOptions,
    Correction,
    KlControl,
    UpdateOptions,
    advantage_options,
    correction_of,
    kl_control,
    sampling_options,
    update_options,
)
from stages.ppo.prompts import load_prompts, refuse_rows
from stages.ppo.publish import Publication, publish
from stages.ppo.sampling import Sampler, make_sampler, preflight
from stages.ppo.scoring import make_scorers
from stages.ppo.state import Run, drawn_before, new_run, refuse_other_prompts, resume, total_updates
from stages.ppo.update import Batch, Rates, update
from stages.rollouts.engine import EngineLost
from stages.rollouts.rollout import Rollout
from stages.scorers.scorer import ScorerLost
from stages.settings.experiment import Experiment
from stages.settings.ppo import (
    PPOSettings,
    advantage_method,
    has_value_model,
    named_rewards,
    steps_per_update,
    unused_settings,
)
from stages.settings.scorers.model import ModelScorer
from stages.shared.disk import say_written
from stages.shared.engines import engine_rules, engine_spec
from stages.shared.inputs import GivenText
from stages.shared.provenance import Provenance, provenance_of
from stages.shared.row_cache import RowCache
from stages.shared.runtime import (
    Runtime,
    adapter_settings,
    check_context,
    note_default_rate,
    runtime_of,
    with_accelerator,
)
from stages.shared.source_words import recorded_rows
from stages.training.session import Session, session_of


@dataclass(frozen=True)
class Setup:
    """Everything that a run needs: state, models, data."""

    run: Run
    """What trains, and carries on from one update to the next."""
    sampler: Sampler
    """The models, and the engine that samples."""
    streams: Streams
    """What prompts and pretraining rows are drawn from."""
    held_out: PromptRows
    """Prompts of the held-out evaluation."""
    publication: Publication
    """What the cards of the published models say."""
    runtime: Runtime
    """How the models compute."""


def run(ctx: StageRun[PPOSettings, Experiment]) -> dict:
    """Train; publish model/ (the policy), value_model/ if there is one and, if asked, model_ema/.

    Returns:
        Figures of the published policy, and of the one before the first update.
    """
    c = ctx.config
    session, runtime, provenance = session_of(ctx), with_accelerator(runtime_of(ctx)), provenance_of(ctx)
    given = {kind: GivenText(source, recorded_rows(ctx.data.get(kind, {}))) for kind, source in ctx.sources.items()}
    setup = set_up(ctx.experiment, session, runtime, provenance, given, ctx.cache, ctx.confirm_folders)
    run, sampler, streams = setup.run, setup.sampler, setup.streams
    held_out = setup.held_out
    kl, how, options = kl_control(c), advantage_options(c), update_options(c, session.seed)
    correction = correction_of(c)
    step = begin(setup, c)
    policy_schedule, value_schedule = c.schedule(run.updates), c.value_schedule(run.updates)
    if step == 0 or run.pending.owed:
        evaluate(run, sampler, held_out, kl, step)
    with session.tracker.progress(run.updates, "ppo", step) as progress:
        while step < run.updates and not run.best.exhausted:
            step, began = step + 1, time.perf_counter()
            kl_coef = kl.coef if kl.target is None else run.kl_coef
            # 1 prompts
            indices = streams.prompts.take(c.batch_size // c.samples_per_prompt)
            # 2 sample, and run every model over the samples
            rollout = sample(run, sampler, streams, indices, step)
            # 3 reward: the score at the last token, minus kl_coef · KL at each token
            rewards = reward(rollout, kl_coef, kl.estimator, how.whiten_rewards)
            # 4 advantage, and the targets of the values
            batch = advantage(rollout, rewards, how, kl_coef)
            batch, corrected = correct(batch, correction)
            # 5 update
            rates = Rates(policy=policy_schedule.rate_at(step), value=value_schedule.rate_at(step))
            learned = learn(setup, batch, options, step, rates)
            # 6 keep
            count_draws(setup, c)
            row = describe(rollout, batch.returns, kl_coef, kl.estimator) | corrected | learned
            seconds = time.perf_counter() - began
            row |= {"kl_coef": kl_coef, "eps": c.batch_size / seconds, "lr": rates.policy}
            row["episode"] = run.drawn.episodes
            session.tracker.log(step, row, seconds, sum(rollout.lengths()))
            progress.update(step, score=row["objective/scores"], kl=row["objective/kl"])
            if kl.target is not None and math.isfinite(row["objective/kl"]):
                run.kl_coef = adaptive_kl_coef(kl_coef, row["objective/kl"], kl.target, c.batch_size, kl.horizon)
            run.sound(run.alarms.updated(step, row))
            if step % c.eval_steps == 0 or step == run.updates:
                evaluate(run, sampler, held_out, kl, step)
            if session.save_is_due(step) and step < run.updates:
                run.save(step)
            if c.on_alarm == "stop":
                run.stop_on_alarm(step)
            if step < run.updates:
                session.stop_if_requested(step, run.updates, lambda at=step: run.save(at))
    # 7 publish
    session.finish_saves()
    return finish(setup, c, kl, step) | session.notes.figures


def set_up(
    experiment: Experiment,
    session: Session,
    runtime: Runtime,
    provenance: Provenance,
    given: dict[str, GivenText],
    kept: Cache,
    confirm_folders: Callable[[], None],
) -> Setup:
    """Load models and data; return everything that a run iterates with.

    Args:
        experiment: All settings.
        session: The run: its seed, checkpoints and tracker.
        runtime: How the models compute.
        provenance: What the published models are made of: upstream artifacts, and where to publish.
        given: Where each kind of data is.
        kept: The stage's cache, for encoded prompts and documents.
        confirm_folders: Raises UserError if files of named reward models have changed meanwhile.
    """
    c = experiment.ppo
    drawn = drawn_before(session, c)
    updates = total_updates(session, c, drawn)

    start = start_folder(provenance.inputs["sft"], has_ppo_init=experiment.sft.ppo_init is not None)
    check_context(session, c, start, *(["ptx_length"] if c.ptx_coef else []))
    trust = {"trust_remote_code": runtime.trust_remote_code}
    reader = own_text_reader(start, provenance.inputs, experiment, **trust)
    folders = role_folders(start, provenance.inputs, experiment, reads_texts=reader is not None, **trust)
    roles = load_models(session, folders, runtime, adapter_settings(provenance.model), c.max_length)
    confirm_folders()  # the named ones have been loaded
    name = c.rollout.engine
    spec = engine_spec(
        name,
        folders.policy,
        runtime,
        experiment.launch,
        work=session.checkpoints.folder.parent,
        pad_id=roles.tokenizer.pad_token_id,
        max_length=c.max_length,
        batch_size=c.local_rollout_forward_batch_size,
    )
    rewards = [settings for _, _, settings in named_rewards(c)]
    text_models = {}
    if reader is not None:
        text_models = {
            name: load_text_model(provenance.inputs, settings, runtime, reader)
            for _, name, settings in named_rewards(c)
            if isinstance(settings, ModelScorer) and settings.is_own()
        }
        session.say(text_reward_line(has_value_model(c)))
    scorer = make_scorers(
        roles,
        rewards,
        c.per_device_train_batch_size,
        shows_parts=c.rewards is not None,
        text_models=text_models,
        records=session.checkpoints.folder / "scores",
        say=session.say,
        trust_remote_code=runtime.trust_remote_code,
    )
    rules = engine_rules(c.rollout)
    sampler = make_sampler(roles, scorer, sampling_options(c), rules, session.seed, name, spec, session.say)

    cache = RowCache(kept, folders.policy, session.tracker, partial(session.leave_if_requested, 0, 0))
    train, held_out = load_prompts(session, c, roles.tokenizer, given["prompts"], cache)
    refuse_rows(rewards, train, held_out)
    drawn = refuse_other_prompts(drawn, train)
    ptx_rows: Sequence[list[int]] = []
    ptx = None
    if c.ptx_coef:
        fraction = experiment.data.validation_fraction
        ptx_rows = load_ptx_rows(c, roles.tokenizer, given["documents"], fraction, cache)
        ptx = Stream(len(ptx_rows), derive_seed(session.seed, "ptx"), cursor=drawn.ptx_rows)
    prompts = Stream(len(train), derive_seed(session.seed, "prompts"), cursor=drawn.prompts)
    answer_tokens = provenance.manifests["sft"]["metrics"].get("answer_tokens", [])
    if line := answer_lengths.warning(answer_tokens, c.response_length):
        session.say(line)
    return Setup(
        run=new_run(session, c, roles, updates, drawn),
        sampler=sampler,
        streams=Streams(train, prompts, ptx_rows, ptx),
        held_out=held_out,
        publication=Publication(provenance, folders, c.temperature),
        runtime=runtime,
    )


def begin(setup: Setup, c: PPOSettings) -> int:
    """Resume the run if it was interrupted, start the engine, and check its numbers.

    Returns:
        The number of updates that the run has taken.
    """
    run, sampler, streams, session = setup.run, setup.sampler, setup.streams, setup.run.session
    session.say(
        f"{len(streams.train)} prompts, {len(setup.held_out)} held out; {run.updates} updates of {c.batch_size} "
        f"episodes, {steps_per_update(c)} optimizer steps each"
    )
    if unused := unused_settings(c):
        session.say(f"not used with ppo.advantage {advantage_method(c)}: {', '.join(unused)}")
    if c.rewards is not None and c.missing_eos_score is not None and "missing_eos_score" not in c.model_fields_set:
        session.say(
            f"a response that is cut off gets {c.missing_eos_score:g} (ppo.missing_eos_score), whatever the scorers "
            f"say; that should be less than finished responses get"
        )
    provenance = setup.publication.provenance
    if provenance.model.peft is not None:
        rates = ["learning_rate"] + (["value_learning_rate"] if has_value_model(c) else [])
        note_default_rate(session, c, *rates)
    trained = sampler.roles.trained()
    published = trained + ([sampler.roles.policy] if c.publish_ema else [])
    sets = (1 if c.keep == "best" else 0) + (1 if c.publish_ema else 0)
    say_written(session, provenance, published, trained, run.updates, sets=sets)

    step = resume(run)

    def leave() -> None:
        session.leave_if_requested(step, run.updates)  # nothing is new since the checkpoint

    sampler.start(leave)
    computed_on = f"{setup.runtime.accelerator.device.type} {setup.runtime.dtype}"
    if sampler.is_external:
        computed_on += f" {sampler.name}"
    # if the run was begun elsewhere, it was other kernels whose results agreed
    if run.computed_on != computed_on:
        few = streams.drawn(range(len(streams.train))[: 2 * c.per_device_train_batch_size])
        run.recompute = preflight(
            sampler,
            few,
            dtype=setup.runtime.dtype,
            max_length=c.max_length,
            step=step,
            poll=leave,
            from_reference=c.start_from is None,
        )
        run.computed_on = computed_on
    return step


def sample(run: Run, sampler: Sampler, streams: Streams, indices: list[int], step: int) -> Rollout:
    """Sample the episodes of an update.

    The weights have not changed since the update before, so a signal need not wait until all is
    sampled.

    Args:
        run: Saves that update if a signal comes, or the engine or a scorer is lost.
        sampler: Samples the responses.
        streams: Holds the prompts.
        indices: Which of them.
        step: Index of the update.
    """
    prompts = streams.drawn(indices)
    try:
        return sampler.rollout(prompts, step, recompute=run.recompute, poll=run.poll(step - 1))
    except (EngineLost, ScorerLost):
        run.save_before_failure(step - 1)
        raise
    except UserError:  # of a function that scores: with on_error: score the run can go on
        if step > 1:
            run.save_before_failure(step - 1)
        raise


def reward(rollout: Rollout, kl_coef: float, kl_estimator: str, whiten: bool) -> Tensor:
    """Return the reward of each token (B, R).

    Args:
        rollout: B episodes.
        kl_coef: β of this update.
        kl_estimator: How KL is estimated at a token: k1 or k3.
        whiten: Whether rewards are scaled to a standard deviation of 1; their mean stays.
    """
    mask = rollout.mask
    kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs, kl_estimator)
    rewards = token_rewards(rollout.scores, kl, mask, kl_coef)
    if whiten:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    return rewards


def advantage(rollout: Rollout, rewards: Tensor, options: AdvantageOptions, kl_coef: float) -> Batch:
    """Return what an update learns from: advantages (B, R), and returns if there is a value model.

    Args:
        rollout: B episodes.
        rewards: (B, R).
        options: How advantages are computed.
        kl_coef: β of this update; GRPO has the KL penalty in its loss.
    """
    mask, n = rollout.mask, options.samples_per_prompt
    if options.method == "rloo":
        return Batch(rollout, rloo(rewards, mask, n), None)
    if options.method == "grpo":
        return Batch(rollout, grpo(rollout.scores, mask, n, options.grpo_scale), None, kl_coef=kl_coef)
    advantages, returns = gae(rewards, rollout.values, mask, options.lam, options.gamma)
    if options.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    return Batch(rollout, advantages, returns)


def correct(batch: Batch, correction: Correction | None) -> tuple[Batch, dict[str, float]]:
    """Weigh what another engine sampled; return the batch with weights, and their figures.

    Args:
        batch: Episodes, advantages and returns.
        correction: How they are weighed; None: not at all.
    """
    if correction is None:
        return batch, {}
    rollout = batch.rollout
    # the policy's own samples, whose log-probabilities were not computed again, have weight 1
    sampled = rollout.logprobs if rollout.sampler_logprobs is None else rollout.sampler_logprobs
    weights, is_outlier = importance_weights(
        rollout.logprobs,
        sampled,
        rollout.mask,
        correction.level,
        clip_max=correction.clip_max,
        clip_min=correction.clip_min,
        outliers=correction.outliers,
    )
    figures = importance_figures(weights, is_outlier, rollout.mask, correction.level)
    return replace(batch, weights=weights), figures


def learn(setup: Setup, batch: Batch, options: UpdateOptions, step: int, rates: Rates) -> dict[str, float]:
    """Update policy and value model, or skip the update if one of its numbers is not finite.

    Args:
        setup: What trains, and what pretraining rows are drawn from.
        batch: Episodes, advantages and returns.
        options: How the update learns.
        step: Index of the update.
        rates: Learning rates of the update.

    Returns:
        Metrics of the update; NaN where it was skipped.
    """
    run, streams, say = setup.run, setup.streams, setup.run.session.say
    if problem := not_finite_episodes(batch.rollout, batch.advantages, step):
        say(run.learners.skips.skip(problem))
        names = OF_UPDATE
        if run.learners.value is not None:
            names += OF_VALUES
        if batch.kl_coef is not None:
            names += OF_KL
        if streams.ptx is not None:
            names += OF_PTX
            # draw the rows that the update would have taken, so that those of later updates stay
            # the same
            optimizer_steps = options.batch_size // options.mini_batch_size * options.epochs
            streams.ptx.take(optimizer_steps * options.ptx.rows)
        return dict.fromkeys(names, math.nan) | run.learners.scaling.figures()
    next_texts = streams.next_texts if streams.ptx is not None else None
    learned = update(
        setup.sampler.roles, run.learners, batch, options, step=step, rates=rates, next_texts=next_texts, say=say
    )
    setup.sampler.weights_changed = True
    return learned


def count_draws(setup: Setup, c: PPOSettings) -> None:
    """Record what an update has drawn, which a resumed run starts from."""
    run, streams = setup.run, setup.streams
    run.drawn = replace(
        run.drawn,
        episodes=run.drawn.episodes + c.batch_size,
        prompts=streams.prompts.cursor,
        ptx_rows=run.drawn.ptx_rows if streams.ptx is None else streams.ptx.cursor,
        optimizer_steps=run.drawn.optimizer_steps + steps_per_update(c),
    )


def finish(setup: Setup, c: PPOSettings, kl: KlControl, step: int) -> dict:
    """Publish the models; return the figures of the published policy.

    Args:
        setup: The run at its end.
        c: The stage's settings.
        kl: Weight and estimator of KL, should an evaluation be missing.
        step: Updates of the run.
    """
    run, sampler = setup.run, setup.sampler
    # settings that were overridden may have ended the run at its checkpoint, or ask for the best
    # policy of a run that kept none
    if str(step) not in run.evaluations or (c.keep == "best" and not run.best.tensors):
        evaluate(run, sampler, setup.held_out, kl, step)
    sampler.close()
    before = run.evaluations["0"]
    after = run.evaluations[str(run.best.step if c.keep == "best" else step)]
    figures = {**after, **{f"{name}_before": figure for name, figure in before.items()}}
    figures |= {"updates": step, "best_step": run.best.step}
    figures |= {"skipped_steps": run.learners.skips.count, "alarms": run.alarms.count}
    figures |= run.learners.scaling.skips()
    publication = replace(setup.publication, figures=figures)
    publish(publication, sampler.roles, run, c.keep == "best", step)
    return figures

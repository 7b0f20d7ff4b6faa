"""ppo: prompts, a reward model and pretraining text → a better policy, by PPO-ptx (InstructGPT, eq. 2).

    maximise  E[ r(x, y) − β log( π(y|x) / π_SFT(y|x) ) ]  +  γ E[ log π(x_pretrain) ]      β = kl_coef, γ = ptx_coef

Read `run`: one iteration is the numbered list 1 … 7.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data import answer_lengths
from data.documents import wrap_documents
from data.encode import decode_response
from data.records import prompt_key
from data.streams import Stream, derive_seed, held_out
from pipeline.errors import TrainingStopped, UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun
from pipeline.store import files
from stages.models.adapters import is_adapted, plain, trainable
from stages.models.families import is_own_head
from stages.models.forward import response_logprobs, response_values, score_all, text_logprobs
from stages.models.roles import NamedFolder, RoleFolders, RoleOptions, Roles, load_roles
from stages.models.sharding import is_sharded, publishable
from stages.objectives.advantages import gae
from stages.objectives.control import adaptive_kl_coef
from stages.objectives.losses import policy_loss, value_loss
from stages.objectives.masked import masked_mean, masked_sum, masked_whiten
from stages.objectives.rewards import final_scores, kl_per_token, token_rewards
from stages.ppo.alarms import Alarms
from stages.ppo.sampling import engine_of, start_engine
from stages.rollouts.collect import collect
from stages.rollouts.rollout import Rollout
from stages.rollouts.vllm import EngineLost
from stages.settings.experiment import Experiment
from stages.settings.ppo import PPOSettings, named_folders, ptx_batch_size, steps_per_update
from stages.shared.cards import ANSWER, ModelCard
from stages.shared.disk import say_written
from stages.shared.inputs import LengthLimit, fit_prompts, load_placed_records, split_documents
from stages.shared.provenance import provenance_of
from stages.shared.publishing import adapter_base, publish_model
from stages.shared.runtime import (
    adapter_settings,
    bound_of_short_rows,
    can_pack_rows,
    check_context,
    device_of,
    dtype_of,
    is_sharding,
    make_accelerator,
    note_default_rate,
)
from stages.training.batching import in_micro_batches, micro_batches, share_groups
from stages.training.checkpoint import TrainingState, has_current_settings, load_checkpoint, save_checkpoint
from stages.training.schedule import learning_rate_at
from stages.training.selection import Best
from stages.training.session import session_of
from stages.training.trainee import (
    Average,
    Skips,
    Trainee,
    gradient_cosine,
    gradient_norm,
    gradient_problem,
    make_trainee,
    optimizer_step,
)

SKIPPED = (  # figures of an update that a number which is not finite kept from happening
    "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio",
    "grad_norm/ppo", "grad_norm/value",
)  # fmt: skip
PTX = ("loss/ptx", "grad_norm/ptx", "grad_cosine")  # and of its pretraining text, where there is some
HELD_OUT = {"score": "scores", "kl": "kl", "rlhf_reward": "rlhf_reward", "length": "length", "eos_rate": "eos_rate",
            "entropy": "entropy"}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """How far a run has come, counted in what it draws and not in updates, whose size may change. prompts_digest: of
    the prompts that it draws from; None where that was not recorded."""

    episodes: int = 0
    prompts: int = 0
    ptx_rows: int = 0
    optimizer_steps: int = 0
    prompts_digest: str | None = None


@dataclass
class Run:
    """A run of PPO: what trains, and what goes on from update to update; its checkpoints hold all of it."""

    ctx: StageRun
    updates: int
    drawn: Drawn
    policy: Trainee
    value: Trainee
    best: Best
    average: Average
    skips: Skips
    alarms: Alarms
    state: dict = field(default_factory=dict)  # kl_coef, recompute, place, and looks: update → held-out figures
    raised: list[str] = field(default_factory=list)  # alarms that ppo.on_alarm has yet to act on

    def save(self, at: int, owes_look: bool = False) -> None:
        """A checkpoint of update `at`; with owes_look, one that says that its held-out look is yet to come."""
        if at == 0:
            return  # nothing to go on from
        kept = {"skipped": self.skips.count, "alarms": self.alarms.state(), "owes_look": owes_look}
        kept["raised"] = list(self.raised) if owes_look else []  # others have been acted on
        kept["drawn"] = asdict(self.drawn)
        trainees = [self.policy, self.value]
        save_checkpoint(
            session_of(self.ctx), at, self.updates, TrainingState(trainees, self.best, self.average), self.state | kept
        )

    def poll(self, at: int, owes_look: bool = False) -> Callable[[], None]:
        """What is called in the middle of work: a signal saves update `at` and ends the run. Where processes share
        weights, all save together, and between updates alone."""
        return session_of(self.ctx).interrupt(at, self.updates, partial(self.save, at, owes_look))

    def save_what_is_done(self, at: int, owes_look: bool = False) -> None:
        """Where vLLM is lost; a signal that has come meanwhile goes first (exit 75)."""
        self.save(at, owes_look)
        session_of(self.ctx).stop_if_requested(at, self.updates, lambda: None)


def run(ctx: StageRun[PPOSettings, Experiment]) -> dict:
    """→ model/ (policy), value_model/, and model_ema/ if asked for."""
    c = ctx.config
    drawn = drawn_before(ctx)
    updates = updates_in_all(ctx, drawn)
    roles = load(ctx)
    train, held = load_prompts(ctx, roles.tokenizer)
    drawn = refuse_other_prompts(drawn, train)
    ptx_rows = load_ptx(ctx, roles.tokenizer)
    if line := answer_lengths.warning(ctx.manifests["sft"]["metrics"].get("answer_tokens", []), c.response_length):
        ctx.tracker.say(f"ppo: {line}")
    run = begin(ctx, roles, updates, drawn)
    ctx.tracker.say(
        f"ppo: {len(train)} prompts, {len(held)} held out; {run.updates} updates of {c.batch_size} episodes, "
        f"{steps_per_update(c)} optimizer steps each"
    )
    if ctx.experiment.model.peft is not None:
        note_default_rate(session_of(ctx), c, "learning_rate", "value_learning_rate")
    trained = [roles.policy, roles.value_model]
    published = trained + [roles.policy] * c.publish_ema
    say_written(
        session_of(ctx), provenance_of(ctx), published, trained, run.updates, sets=(c.keep == "best") + c.publish_ema
    )
    step = resume(ctx, roles, run, train[: 2 * c.per_device_train_batch_size])
    prompts_per_update, rows_per_update = c.batch_size // c.samples_per_prompt, steps_per_update(c) * ptx_batch_size(c)
    prompts = Stream(len(train), derive_seed(ctx.seed, "prompts"), cursor=drawn.prompts)
    ptx = Stream(len(ptx_rows), derive_seed(ctx.seed, "ptx"), cursor=drawn.ptx_rows) if ptx_rows else None
    if step == 0 or run.state.get("owes_look"):
        look(ctx, roles, run, held, step)
    with ctx.tracker.progress(run.updates, "ppo", step) as progress:
        while step < run.updates and not run.best.exhausted:
            step, began = step + 1, time.perf_counter()
            kl_coef = run.state["kl_coef"] if c.kl_target is not None else c.kl_coef
            # 1 prompts
            indices = prompts.take(prompts_per_update)
            asked = [train[i] for i in indices]
            # 2 sample, and what every model says of the samples; nothing has changed since the update before, so a
            # signal need not wait until all is sampled
            try:
                options = {"recompute": run.state["recompute"], "poll": run.poll(step - 1)}
                rollout = rollout_of(ctx, roles, asked, indices, step, **options)
            except EngineLost:
                run.save_what_is_done(step - 1)
                raise
            mask = rollout.mask
            # 3 reward: the score at the last token, minus kl_coef · KL at each
            kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs, c.kl_estimator)
            rewards = token_rewards(rollout.scores, kl, mask, kl_coef)
            if c.whiten_rewards:
                rewards = masked_whiten(rewards, mask, shift_mean=False)
            # 4 advantage
            advantages, returns = gae(rewards, rollout.values, mask, c.lam, c.gamma)
            if c.whiten_advantages:
                advantages = masked_whiten(advantages, mask)
            # 5 update
            rate, value_rate = (
                learning_rate_at(step, run.updates, peak, c.lr_scheduler_type, c.warmup_steps, warmup_from=0.1)
                for peak in (c.learning_rate, c.value_learning_rate)
            )
            if problem := not_finite_episodes(rollout, advantages, step):
                ctx.tracker.say(f"ppo: {run.skips.skip(problem)}")
                learned = dict.fromkeys(SKIPPED + PTX * bool(ptx), math.nan)
                if ptx:
                    ptx.take(rows_per_update)
            else:
                learned = update(
                    ctx,
                    roles,
                    run.policy,
                    run.value,
                    rollout,
                    advantages,
                    returns,
                    step=step,
                    rate=rate,
                    value_rate=value_rate,
                    ptx_batch=lambda n: [ptx_rows[i] for i in ptx.take(n)] if ptx else None,
                    average=run.average,
                    skips=run.skips,
                )
                if roles.engine is not None:
                    roles.engine.stale = True
            # 6 keep
            run.drawn = replace(
                run.drawn,
                episodes=run.drawn.episodes + c.batch_size,
                prompts=prompts.cursor,
                ptx_rows=ptx.cursor if ptx else run.drawn.ptx_rows,
                optimizer_steps=run.drawn.optimizer_steps + steps_per_update(c),
            )
            row = {
                **describe(rollout, returns, kl_coef, c.kl_estimator),
                **learned,
                "kl_coef": kl_coef,
                "eps": c.batch_size / (time.perf_counter() - began),
                "lr": rate,
                "episode": run.drawn.episodes,
            }
            ctx.tracker.log(step, row, c.batch_size / row["eps"], sum(rollout.lengths()))
            progress.update(step, score=row["objective/scores"], kl=row["objective/kl"])
            if c.kl_target is not None and math.isfinite(row["objective/kl"]):
                steered = adaptive_kl_coef(kl_coef, row["objective/kl"], c.kl_target, c.batch_size, c.kl_horizon)
                run.state["kl_coef"] = steered
            run.raised += sound(ctx, run.alarms.watch(step, row))
            if step % c.eval_steps == 0 or step == run.updates:
                look(ctx, roles, run, held, step)
            if session_of(ctx).save_is_due(step) and step < run.updates:
                run.save(step)
            stop_at(ctx, run, step)
            if step < run.updates:
                session_of(ctx).stop_if_requested(step, run.updates, partial(run.save, step))

    # 7 publish
    # settings that were overridden ended the run at its checkpoint, or want its best, of which it has kept none
    if str(step) not in run.state["looks"] or (c.keep == "best" and not run.best.tensors):
        look(ctx, roles, run, held, step)
    if roles.engine is not None:
        roles.engine.close()
        roles.engine.log.unlink(missing_ok=True)
    looks = run.state["looks"]
    before, after = looks["0"], looks[str(run.best.step if c.keep == "best" else step)]
    figures = {**after, **{f"{k}_before": v for k, v in before.items()}, "updates": step, "best_step": run.best.step}
    figures |= {"skipped_steps": run.skips.count, "alarms": run.alarms.count}
    publish(ctx, roles, run, step, figures)
    return figures


def drawn_before(ctx: StageRun) -> Drawn:
    """Return what the newest checkpoint says was drawn. Of an older version's, which does not count, the settings of
    today give it, if it was made with them; UserError otherwise."""
    c, found = ctx.config, ctx.checkpoints.newest()
    if found is None:
        return Drawn()
    if "drawn" in found.state:
        return Drawn(**found.state["drawn"])
    if not has_current_settings(session_of(ctx), found):
        raise UserError(
            "ppo: the checkpoint was written by an older version, which did not count what it drew; go on with the "
            "settings that it was made with, or --restart"
        )
    steps = found.step * steps_per_update(c)
    episodes = found.step * c.batch_size
    return Drawn(episodes, episodes // c.samples_per_prompt, steps * ptx_batch_size(c) * bool(c.ptx_coef), steps)


def updates_in_all(ctx: StageRun, drawn: Drawn) -> int:
    """Return the number of updates until `total_episodes`, those before the newest checkpoint included. UserError where
    updates of today's size cannot end there."""
    c, found = ctx.config, ctx.checkpoints.newest()
    left = c.total_episodes - drawn.episodes
    if left < 0:
        raise UserError(
            f"ppo.total_episodes: {drawn.episodes} episodes are done and the settings now ask for {c.total_episodes}; "
            f"ask for more, or --restart"
        )
    if left % c.batch_size:
        raise UserError(
            f"ppo.batch_size: {drawn.episodes} of {c.total_episodes} episodes are done, and batches of {c.batch_size} "
            f"do not end there; choose a divisor of {math.gcd(left, c.total_episodes)}, or --restart"
        )
    return (found.step if found else 0) + left // c.batch_size


def refuse_other_prompts(drawn: Drawn, train: list[list[int]]) -> Drawn:
    """Return `drawn` with the digest of the prompts to draw from. UserError if the run drew from others before: their
    order is another, and some would come again."""
    digest = files.sha256_json(train)
    if drawn.prompts_digest not in (None, digest):
        raise UserError(
            "ppo: the prompts that are left within the limits are not those that the interrupted run draws from; set "
            "ppo.max_length, ppo.response_length and ppo.on_too_long back, or --restart"
        )
    return replace(drawn, prompts_digest=digest)


def begin(ctx: StageRun, roles: Roles, updates: int, drawn: Drawn) -> Run:
    """A run before its first update, or before its checkpoint is loaded. updates: in all; drawn: before that
    checkpoint."""
    c, found = ctx.config, ctx.checkpoints.newest()
    left = (updates - (found.step if found else 0)) * steps_per_update(c)
    trainee = partial(make_trainee, steps=drawn.optimizer_steps + left, max_grad_norm=c.max_grad_norm)
    return Run(
        ctx,
        updates,
        drawn,
        trainee("policy", roles.policy, learning_rate=c.learning_rate),
        trainee("value_model", roles.value_model, learning_rate=c.value_learning_rate),
        Best(c.keep, c.patience, higher_is_better=True),
        Average(c.ema_decay if c.publish_ema else None),
        Skips(c.max_skipped_steps),
        Alarms(c.alarm_kl, c.alarm_entropy, c.response_length),
    )


def resume(ctx: StageRun, roles: Roles, run: Run, prompts: list[list[int]]) -> int:
    """→ the update that the run has come to, as its newest checkpoint says; 0 where there is none. prompts: what the
    preflight samples from, where it has not yet (or on another device)."""
    step, state = load_checkpoint(
        session_of(ctx), TrainingState([run.policy, run.value], run.best, run.average), run.updates
    )
    place = f"{roles.accelerator.device.type} {dtype_of(ctx.experiment)}"
    leave = partial(session_of(ctx).leave_if_requested, step, run.updates)
    if roles.engine is not None:
        place += " vllm"
        start_engine(ctx, roles, leave)
    if step == 0:
        state = {"kl_coef": ctx.config.kl_coef, "looks": {}}
    elif not {"skipped", "alarms", "recompute", "looks", "kl_coef"} <= state.keys():
        raise UserError("ppo: the checkpoint was written by another version of this stage; start again with --restart")
    else:
        run.skips.count, run.raised = state["skipped"], state.get("raised", [])
        run.alarms.restore(state["alarms"])
    if state.get("place") != place:  # begun elsewhere, other kernels agreed with each other
        state |= {"recompute": preflight(ctx, roles, prompts, step, leave), "place": place}
    run.state = state
    return step


def look(ctx: StageRun, roles: Roles, run: Run, held: list[tuple], at: int) -> None:
    """Held-out figures of update `at`, and the alarms that they raise. A signal in it ends in a checkpoint that says
    that it is owed."""
    try:
        figures = held_out_figures(ctx, roles, run, held, at)
    except EngineLost:
        run.save_what_is_done(at, owes_look=True)
        raise
    run.state["looks"][str(at)] = figures
    run.raised += sound(ctx, run.alarms.look(at, figures))


def publish(ctx: StageRun, roles: Roles, run: Run, step: int, figures: dict) -> None:
    """model/, value_model/ and, if asked for, model_ema/. figures: what the policy's card says was measured."""
    if ctx.config.publish_ema:
        publish_average(ctx, roles, run.policy, run.average)
    if ctx.config.keep == "best" and run.best.step != step:
        run.policy.load(run.best.tensors)
    for folder, role, what, use in (
        ("model", "policy", "a policy trained by PPO-ptx", ANSWER),
        ("value_model", "value_model", "PPO's value model", ""),
    ):
        model = publishable(getattr(roles, role), roles.reload[role])
        save(ctx, model, roles.tokenizer, ctx.publish / folder, what, use, figures if use else None)


def save(ctx: StageRun, model, tokenizer, folder: Path, what: str, use: str, figures: dict | None = None) -> None:
    """Write a policy (`use`: how it is used) or the value model to `folder`. what, figures: for its card."""
    source = start_folder(ctx)
    trunk = source if use else ctx.inputs["sft"] / "model"
    base = adapter_base(provenance_of(ctx), folder, trunk)
    if base is not None and not use and ctx.config.reward_model is not None:
        base = ("", None)  # its adapter is on that reward model, which lies outside
    card = ModelCard(
        what,
        use,
        figures=figures or {},
        source=source,
        adapter=base,
        own_head=is_own_head(plain(model)),
        is_scalar=not use,
    )
    temperature = ctx.config.temperature if use else None
    publish_model(provenance_of(ctx), model, tokenizer, folder, card, temperature=temperature)


def load(ctx: StageRun) -> Roles:
    """Policy and reference from sft (from its ppo_init/, if there is one); reward model from rm."""
    m = ctx.experiment.model
    start = start_folder(ctx)
    check_context(session_of(ctx), ctx.config, start, *["ptx_length"] * bool(ctx.config.ptx_coef))
    given, climbed, looks_on = named_folders(ctx.experiment), "ppo.reward_model", "ppo.held_out_reward_model"
    own_reward_model = NamedFolder("rm", ctx.inputs["rm"] / "model") if climbed not in given else None
    folders = RoleFolders(
        policy=start,
        reward_model=own_reward_model or NamedFolder(climbed, given[climbed]),
        trunk=None if climbed in given else ctx.inputs["sft"] / "model",
        judge=NamedFolder(looks_on, given[looks_on]) if looks_on in given else None,
        ensemble=ctx.config.reward_ensemble,
    )
    options = RoleOptions(
        gradient_checkpointing=m.gradient_checkpointing,
        attn_implementation=m.attn_implementation,
        trust_remote_code=ctx.trust_remote_code,
        max_length=ctx.config.max_length,
        sharded=is_sharding(ctx.experiment),
        policy_seed=derive_seed(ctx.seed, "policy"),
        value_seed=derive_seed(ctx.seed, "value"),
    )
    accelerator = make_accelerator(device_of(ctx.experiment), dtype_of(ctx.experiment))
    roles = load_roles(folders, accelerator, adapter_settings(m), options)
    ctx.confirm_folders()  # named ones are loaded
    return replace(
        roles,
        packed=can_pack_rows(session_of(ctx), list(roles.models()), ctx.config.max_length),
        engine=engine_of(ctx, start),
    )


def start_folder(ctx: StageRun) -> Path:
    return ctx.inputs["sft"] / ("model" if ctx.experiment.sft.ppo_init is None else "ppo_init")


def load_prompts(ctx: StageRun, tokenizer) -> tuple[list[list[int]], list[tuple]]:
    """Prompt ids for training and, split off by the prompt's text, (prompt, its ids) for the held-out figures."""
    c = ctx.config
    records, places = load_placed_records("prompts", ctx.source("prompts"))
    if len(records) < 2:
        raise UserError([f"data.prompts: {len(records)} prompt; PPO needs at least 2, one of them to hold out"])
    kept, ids, report = fit_prompts(
        tokenizer,
        (r.prompt for r in records),
        places,
        LengthLimit(c.max_length, c.on_too_long, "ppo"),
        c.response_length,
    )
    ctx.tracker.say(f"ppo: {report.line('prompts')}")
    train, held = held_out(
        [prompt_key(records[i].prompt) for i in kept], 0.0, least=max(1, min(c.eval_prompts, len(ids) // 5))
    )
    if not held:
        raise UserError(
            [
                f"data.prompts: one prompt is left within {c.max_length - c.response_length} tokens; PPO needs at "
                f"least 2, one of them to hold out"
            ]
        )
    return [ids[i] for i in train], [(records[kept[i]].prompt, ids[i]) for i in held]


def load_ptx(ctx: StageRun, tokenizer) -> list[list[int]] | None:
    """Packed pretraining rows from the training part of the documents; None for plain PPO."""
    c = ctx.config
    if not c.ptx_coef:
        return None
    train, _ = split_documents(ctx.source("documents"), ctx.experiment.data.validation_fraction)
    rows = wrap_documents(tokenizer, train, length=c.ptx_length)
    if not rows:
        raise UserError(
            [
                f"data.documents: fewer than ppo.ptx_length = {c.ptx_length} tokens of pretraining text; "
                f"lower it, give more text, or set ppo.ptx_coef: 0"
            ]
        )
    return rows


def rollout_of(
    ctx: StageRun,
    roles: Roles,
    prompts,
    prompt_ids,
    step: int,
    stream: str = "rollout",
    n: int | None = None,
    recompute: bool = False,
    poll: Callable[[], None] = lambda: None,
) -> Rollout:
    """n responses a prompt and what every model says of them. Randomness: (run, stream, update, prompt, sample). Where
    vLLM fails: without it from now on, or an EngineLost, as ppo.rollout.on_failure says."""
    c = ctx.config
    collected = partial(
        collect,
        roles,
        prompts,
        prompt_ids,
        samples_per_prompt=n or c.samples_per_prompt,
        seed=(ctx.seed, stream, step),
        response_length=c.response_length,
        temperature=c.temperature,
        sample_size=c.local_rollout_forward_batch_size,
        micro_size=c.per_device_train_batch_size,
        missing_eos_score=c.missing_eos_score,
        score_clip=c.score_clip,
        length_penalty=c.length_penalty,
        poll=poll,
    )
    engine = roles.engine
    if engine is None or not engine.running:
        return collected(recompute=recompute)
    try:
        engine.follow(roles.policy)
        rollout = collected(recompute=True, by_engine=True)
        # one judgement for all; log-probs of the policy that are not finite are not vLLM's fault
        off = parallel.from_rank_zero(lambda: rollout.engine_kl)
        if not off <= c.rollout.max_engine_kl and masked_sum(rollout.logprobs, rollout.mask).isfinite():
            raise EngineLost(
                f"vLLM samples from another distribution: KL to the policy is {off:.2g} nats a token "
                f"(ppo.rollout.max_engine_kl: {c.rollout.max_engine_kl:g})"
            )
        return rollout
    except EngineLost as lost:
        engine.close()
        if c.rollout.on_failure == "stop":
            remedy = "run again to go on, also with ppo.rollout.engine=transformers --override-config"
            where = f"update {step}" if stream == "rollout" else f"{stream} samples"
            raise EngineLost(f"{where}: {lost}; {remedy}") from lost
        ctx.tracker.say(f"ppo: {lost}; sampling goes on without it")
        return collected(recompute=True)


def preflight(ctx: StageRun, roles: Roles, prompts, step: int = 0, poll: Callable[[], None] = lambda: None) -> bool:
    """The update repeats the rollout's numbers (ratio 1), and before the first one KL to the reference is 0; or refuse.

    → whether log-probs must be computed again after sampling, the sampler's own not being the update's.
    """
    c = ctx.config
    limit = 1e-4 if dtype_of(ctx.experiment) == "float32" else 2e-2
    bound, remedy = bound_of_short_rows(roles.policy.config.to_dict()), ""
    eager = "use model.attn_implementation: eager"
    if bound is not None and c.max_length > bound:
        remedy = f"set ppo.max_length: {bound}; beyond that the positions of this model change all along a row"
    for recompute in (False, True) if roles.engine is None else (True,):
        asked = (prompts, range(len(prompts)), step, "preflight")
        rollout = rollout_of(ctx, roles, *asked, recompute=recompute, poll=poll)
        n, size = c.samples_per_prompt, c.per_device_train_batch_size
        again = torch.zeros_like(rollout.logprobs)  # as the update does it: other rows together, and with gradients
        with roles.accelerator.autocast():
            for index in in_micro_batches(rollout.lengths(), range(len(again))[::-1], n, size, roles.most_tokens()):
                rows = rollout.rows(index, roles.tokenizer.pad_token_id, roles.packed)
                logprobs = response_logprobs(roles.policy, rows, c.temperature).detach()
                again[torch.tensor(index, device=again.device), : logprobs.shape[1]] = logprobs
        drift = masked_mean(((again - rollout.logprobs).exp() - 1).abs(), rollout.mask).item()
        drift = parallel.from_rank_zero(lambda found=drift: found)  # one judgement, should others differ in a last bit
        if drift <= limit:
            break
        if not recompute and not drift <= 10 * limit:
            raise UserError(
                f"ppo preflight: the sampler's probabilities are off by {drift:.2g} a token from the model's (limit "
                f"{10 * limit:g}): it draws from another distribution; {remedy or eager}"
            )
    else:
        raise UserError(
            f"ppo preflight: the ratio at the first minibatch would be off by {drift:.2g} a token (limit {limit:g}): "
            f"the forward is not repeatable; {remedy or f'{eager} or model.dtype: float32'}"
        )
    kl = masked_mean((rollout.logprobs - rollout.ref_logprobs).abs(), rollout.mask).item()
    if step == 0 and not kl <= limit:
        raise UserError(
            f"ppo preflight: KL to the reference is {kl:.2g} nats a token before the first update, 0 is right: "
            f"policy and reference are not the same model; make sft anew (--force) and run again"
        )
    if recompute and roles.engine is None:
        ctx.tracker.say("ppo: the sampler's log-probs are not the update's; they are computed again after sampling")
    return recompute


def not_finite_episodes(rollout: Rollout, advantages: Tensor, step: int) -> str | None:
    """Which of an update's numbers are not finite, and on which prompts; None if all are."""
    parts = {key: getattr(rollout, key) for key in ("logprobs", "ref_logprobs", "values", "scores")}
    bad = {key: ~x.isfinite().reshape(len(x), -1).all(-1) for key, x in (parts | {"advantages": advantages}).items()}
    names = [key for key in bad if bad[key].any()]
    if not names:
        return None
    names = [key for key in names if key in parts] or names  # advantages follow from the others, over a whole batch
    rows = torch.stack([bad[key] for key in names]).any(0).nonzero().flatten().tolist()
    prompts = sorted({rollout.prompt_ids[i] for i in rows})
    shown = ", ".join(map(str, prompts[:5])) + ", …" * (len(prompts) > 5)
    return f"update {step}: {' and '.join(names)} not finite on prompts {shown}"


def sound(ctx: StageRun, lines: list[str]) -> list[str]:
    """Say the alarms."""
    for line in lines:
        ctx.tracker.say(f"ppo: alarm at {line}")
    return lines


def stop_at(ctx: StageRun, run: Run, step: int) -> None:
    """With on_alarm: stop, and an alarm: save and end with TrainingStopped (exit 3)."""
    if run.raised and ctx.config.on_alarm == "stop" and step < run.updates:
        run.save(step)
        raise TrainingStopped(
            f"ppo.on_alarm: stop; {run.raised[0]}. A checkpoint stands: run again to go on as it is, or with changed "
            f"settings and --override-config"
        )


def kept_together(c: PPOSettings) -> int:
    """How many samples of a prompt stay in one minibatch: all, if whole prompts fill it, else each is on its own."""
    return c.samples_per_prompt if c.mini_batch_size % c.samples_per_prompt == 0 else 1


def minibatches(ctx: StageRun, step: int, epoch: int) -> list[list[int]]:
    """A batch's episodes in minibatches, drawn anew each epoch; the samples of a prompt stay together if they fit."""
    c, n = ctx.config, kept_together(ctx.config)
    generator = torch.Generator().manual_seed(derive_seed(ctx.seed, "minibatches", step, epoch))
    groups = torch.randperm(c.batch_size // n, generator=generator).tolist()
    return list(micro_batches([g * n + k for g in groups for k in range(n)], c.mini_batch_size))


def update(
    ctx: StageRun,
    roles: Roles,
    policy: Trainee,
    value: Trainee,
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor,
    *,
    step: int,
    rate: float,
    value_rate: float,
    ptx_batch: Callable[[int], list[list[int]] | None],
    average: Average,
    skips: Skips,
) -> dict[str, float]:
    """All inner epochs over a batch: per minibatch one policy step (PPO gradient + ptx_coef · ptx gradient, the sum
    clipped) and one value step. → metrics averaged over the optimizer steps."""
    c = ctx.config
    totals: dict[str, float] = {}
    steps = 0
    for epoch in range(c.num_ppo_epochs):
        for mini in minibatches(ctx, step, epoch):
            figures = ppo_gradients(ctx, roles, rollout, advantages, returns, mini)
            figures["grad_norm/ppo"] = gradient_norm(policy.parameters.values())
            rows = ptx_batch(ptx_batch_size(c))
            if rows is not None:
                figures |= ptx_gradient(ctx, roles, policy, rows)
            figures["grad_norm/value"] = gradient_norm(value.parameters.values())
            if problem := gradient_problem(policy, step) or gradient_problem(
                value, step
            ):  # neither steps if one cannot
                for trainee in (policy, value):
                    trainee.optimizer.zero_grad(set_to_none=True)
                ctx.tracker.say(f"ppo: {skips.skip(problem)}")
            else:
                optimizer_step(policy, rate, step)
                optimizer_step(value, value_rate, step)
                average.step(policy)
            steps += 1
            for key, number in figures.items():
                totals[key] = totals.get(key, 0.0) + number
    return {key: number / steps for key, number in totals.items()}


def ppo_gradients(
    ctx: StageRun, roles: Roles, rollout: Rollout, advantages, returns, mini: list[int]
) -> dict[str, float]:
    """Accumulate the gradients of policy and value loss over one minibatch: sums over its tokens, over their count."""
    c, pad_id = ctx.config, roles.tokenizer.pad_token_id
    tokens = sum(len(rollout.responses[i]) for i in mini)
    figures: dict[str, float] = {}
    lengths, n = rollout.lengths(), kept_together(c)
    own, size = share_groups(lengths, mini, n), c.per_device_train_batch_size
    parts = in_micro_batches(lengths, own, n, size, roles.most_tokens())
    for index, mine in parallel.padded_micro_batches(parts, roles.spare()):
        rows = rollout.rows(index, pad_id, roles.packed)
        mask, at = rows.response_mask, torch.tensor(index, device=rollout.mask.device)
        old_logprobs, old_values, advantage, target = (
            x[at, : mask.shape[1]] for x in (rollout.logprobs, rollout.values, advantages, returns)
        )
        with roles.accelerator.autocast():
            logprobs = response_logprobs(roles.policy, rows, c.temperature)
        loss, sums = policy_loss(logprobs, old_logprobs, advantage, mask, c.cliprange, tokens)
        roles.accelerator.backward(loss if mine else 0.0 * loss)
        with roles.accelerator.autocast():
            values = response_values(roles.value_model, rows)
        v_loss, v_sums = value_loss(values, old_values, target, mask, c.cliprange_value, tokens)
        roles.accelerator.backward(v_loss if mine else 0.0 * v_loss)
        if not mine:
            continue
        for key, number in (
            ("loss/policy_avg", loss),
            ("loss/value_avg", v_loss),
            ("val/ratio", sums["ratio"] / tokens),
            ("policy/clipfrac_avg", sums["clipped"] / tokens),
            ("policy/approxkl_avg", sums["approxkl"] / tokens),
            ("val/clipfrac_avg", v_sums["clipped"] / tokens),
        ):
            figures[key] = figures.get(key, 0.0) + number.item()
    for model in (roles.policy, roles.value_model):
        parallel.all_reduce_gradients(trainable(model).values())
    return parallel.all_reduce_figures(figures)


def ptx_gradient(ctx: StageRun, roles: Roles, policy: Trainee, rows: list[list[int]]) -> dict[str, float]:
    """Add ptx_coef times the gradient of the mean cross-entropy a token over `rows` to the policy's gradients.

    A backward of its own, so that both norms and their cosine are known before they are summed.
    """
    c, parameters = ctx.config, list(policy.parameters.values())
    ppo = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    tokens, total = len(rows) * (len(rows[0]) - 1), 0.0
    parts = list(micro_batches(parallel.rows_of_this_rank(rows, [1] * len(rows)), c.per_device_train_batch_size))
    for part, mine in parallel.padded_micro_batches(parts, rows[:1] if roles.spare() else None):
        ids = torch.tensor(part, device=roles.accelerator.device)
        with roles.accelerator.autocast():
            loss = -text_logprobs(roles.policy, ids).sum() / tokens
        total += loss.item() if mine else 0.0
        roles.accelerator.backward((c.ptx_coef if mine else 0.0) * loss)
    parallel.all_reduce_gradients(parameters)
    total = parallel.all_reduce_figures({"loss": total})["loss"]
    ptx = [p.grad for p in parameters]
    figures = {"loss/ptx": total, "grad_norm/ptx": gradient_norm(parameters), "grad_cosine": gradient_cosine(ppo, ptx)}
    for p, one, other in zip(parameters, ppo, ptx, strict=True):
        p.grad = one if other is None else other if one is None else one.add_(other)
    return figures


def publish_average(ctx: StageRun, roles: Roles, policy: Trainee, average: Average) -> None:
    """model_ema/: the policy with its averaged weights. The policy stays on the CPU, which has room for a copy."""
    if not is_sharded(roles.policy):
        if not parallel.is_rank_zero():
            return
        roles.policy.cpu()  # before two more sets of what trains
    last = {name: tensor.clone() for name, tensor in policy.tensors().items()}
    policy.load(average.tensors)
    model = publishable(roles.policy, roles.reload["policy"])
    if model is roles.policy and is_adapted(model):
        model = copy.deepcopy(model)  # saving ends the adapter
    save(ctx, model, roles.tokenizer, ctx.publish / "model_ema", "the average of PPO's policies", ANSWER)
    policy.load(last)


def describe(rollout: Rollout, returns: Tensor, kl_coef: float, kl_estimator: str) -> dict[str, float]:
    """The figures of a rollout, under their usual names."""
    mask = rollout.mask
    kl = torch.where(mask, kl_per_token(rollout.logprobs, rollout.ref_logprobs), 0.0).sum(-1).mean().item()
    k3 = torch.where(mask, kl_per_token(rollout.logprobs, rollout.ref_logprobs, "k3"), 0.0).sum(-1).mean().item()
    error = masked_mean((returns - rollout.values - masked_mean(returns - rollout.values, mask)) ** 2, mask)
    spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    scores = rollout.scores.mean().item()
    return {
        "objective/kl": kl,
        "objective/kl_k3": k3,
        "objective/entropy": masked_mean(rollout.entropy, mask).item(),
        "objective/scores": scores,
        "objective/rlhf_reward": scores - kl_coef * (k3 if kl_estimator == "k3" else kl),
        "objective/length": mask.sum(-1).float().mean().item(),
        "objective/eos_rate": rollout.finished.float().mean().item(),
        "val/engine_kl": rollout.engine_kl,
        "val/explained_variance": (1 - error / spread.clamp(min=1e-12)).item(),
    }


def held_out_figures(ctx: StageRun, roles: Roles, run: Run, held: list[tuple], step: int) -> dict[str, float]:
    """Held-out prompts, one sample each, the same seeds every time; the two best and worst are kept as text."""
    c = ctx.config
    prompts = [ids for _, ids in held]
    asked, poll = (prompts, range(len(prompts)), 0, "held-out", 1), run.poll(step, owes_look=True)
    rollout = rollout_of(ctx, roles, *asked, recompute=run.state["recompute"], poll=poll)
    figures = describe(rollout, rollout.values, c.kl_coef, c.kl_estimator)  # the same yardstick at every look
    figures = {name: figures[f"objective/{key}"] for name, key in HELD_OUT.items()}
    if roles.judge is not None:
        look_on = partial(
            score_all,
            roles.judge,
            rollout.prompts,
            rollout.responses,
            pad_id=roles.tokenizer.pad_token_id,
            batch_size=c.per_device_train_batch_size,
            accelerator=roles.accelerator,
            packed=roles.packed,
        )
        if is_sharded(roles.judge):  # it takes all processes
            look_on = partial(Tensor.clone, look_on())
        scores = parallel.from_rank_zero(look_on)  # what is kept, and when to stop, hangs on them
        lengths = rollout.mask.sum(-1).cpu()
        options = {"lengths": lengths, "score_clip": c.score_clip, "length_penalty": c.length_penalty}
        scores = final_scores(scores, rollout.finished.cpu(), c.missing_eos_score, **options)
        figures["held_out_score"] = scores.mean().item()
    ctx.tracker.evaluation(step, figures)
    judged = figures.get("held_out_score", figures["score"])
    run.best.offer(figures["rlhf_reward"] - figures["score"] + judged, step, run.policy)
    mask = rollout.mask
    kl = torch.where(mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(-1).tolist()
    order = rollout.scores.argsort().tolist()
    rows = [
        {"prompt": held[i][0],
         "response": decode_response(roles.tokenizer, rollout.responses[i]),
         "score": rollout.scores[i].item(), "kl": kl[i]}
        for i in dict.fromkeys([*order[-2:], *order[:2]])
    ]  # fmt: skip
    ctx.tracker.samples(step, rows)
    return figures

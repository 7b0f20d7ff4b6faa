"""Hold the state of a PPO run between updates, save it in checkpoints, and resume from them."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from data.prompt_rows import PromptRows
from pipeline.errors import TrainingStopped, UserError
from pipeline.store import integrity
from stages.models.roles import Roles
from stages.ppo.alarms import Alarms
from stages.ppo.update import Learners
from stages.settings.ppo import PPOSettings, ptx_batch_size, steps_per_update
from stages.training.checkpoint import TrainingState, has_current_settings, load_checkpoint, save_checkpoint
from stages.training.scaling import new_scaling
from stages.training.selection import Best
from stages.training.session import PendingEvaluation, Session
from stages.training.trainee import Average, Skips, make_trainee

SAVED_KEYS = {"skipped", "alarms", "recompute", "looks", "kl_coef"}  # that every checkpoint of this version has


@dataclass(frozen=True)
class Drawn:
    """Count what a run has drawn so far: updates may change their size on a resume."""

    episodes: int = 0
    """Episodes sampled."""
    prompts: int = 0
    """Prompts drawn."""
    ptx_rows: int = 0
    """Pretraining rows drawn."""
    optimizer_steps: int = 0
    """Optimizer steps taken."""
    prompts_digest: str | None = None
    """Digest of the prompts that are drawn from; None in checkpoints that did not record it."""


@dataclass
class Run:
    """The trained models, and everything else that carries on from one update to the next."""

    session: Session
    """Checkpoints, tracker and the request to stop."""
    updates: int
    """Updates of the whole run."""
    drawn: Drawn
    """What has been drawn so far."""
    learners: Learners
    """Policy, value model, average and skipped steps."""
    best: Best
    """The best held-out evaluation, and its weights if they are kept."""
    alarms: Alarms
    """Watches the figures of the run."""
    kl_coef: float
    """β of the next update, if it is steered to a target."""
    recompute: bool = False
    """Whether log-probabilities are computed again after sampling."""
    computed_on: str = ""
    """Device, dtype and engine that the preflight was passed on."""
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    """Update → held-out figures after it."""
    raised: list[str] = field(default_factory=list)
    """Alarms that `ppo.on_alarm` has not acted on yet."""
    pending: PendingEvaluation = field(default_factory=PendingEvaluation)
    """Whether the held-out evaluation after this update is not finished."""

    def save(self, step: int) -> None:
        """Save a checkpoint of `step` updates; at 0 there is nothing to save."""
        if step == 0:
            return
        state = {
            "kl_coef": self.kl_coef,
            "looks": self.evaluations,
            "recompute": self.recompute,
            "place": self.computed_on,
            "skipped": self.learners.skips.count,
            "alarms": self.alarms.state(),
            # otherwise they have been acted on before the checkpoint
            "raised": list(self.raised) if self.pending.owed else [],
            "drawn": asdict(self.drawn),
        } | self.pending.state()
        save_checkpoint(self.session, step, self.updates, self.training_state(), state)

    def training_state(self) -> TrainingState:
        """Return what a checkpoint holds the tensors of."""
        learners = self.learners
        return TrainingState(learners.trainees(), self.best, learners.average, scaling=learners.scaling)

    def poll(self, step: int) -> Callable[[], None]:
        """Return a function for the middle of work: on a signal it saves `step` and leaves."""
        return self.session.interrupt(step, self.updates, partial(self.save, step))

    def save_before_failure(self, step: int) -> None:
        """Save because the engine is lost. A signal that has come meanwhile ends the run first."""
        self.save(step)
        self.session.finish_saves()
        self.session.stop_if_requested(step, self.updates, lambda: None)

    def sound(self, lines: list[str]) -> None:
        """Print alarms, and remember them for `stop_on_alarm`."""
        for line in lines:
            self.session.say(f"alarm at {line}")
        self.raised += lines

    def stop_on_alarm(self, step: int) -> None:
        """Save and end the run if an alarm was raised (`ppo.on_alarm: stop`).

        Raises:
            TrainingStopped: Unless the run is at its end anyway.
        """
        if self.raised and step < self.updates:
            self.save(step)
            self.session.finish_saves()
            raise TrainingStopped(
                f"ppo.on_alarm: stop; {self.raised[0]}. A checkpoint is saved: run again to resume as it is, or with "
                f"changed settings and --override-config"
            )


def drawn_before(session: Session, c: PPOSettings) -> Drawn:
    """Return what was drawn before the newest checkpoint.

    A checkpoint of an older version has no counts. If it was made with today's settings, these give
    them.

    Raises:
        UserError: If an older version's checkpoint was made with other settings.
    """
    checkpoint = session.checkpoints.newest()
    if checkpoint is None:
        return Drawn()
    if "drawn" in checkpoint.state:
        return Drawn(**checkpoint.state["drawn"])
    if not has_current_settings(session, checkpoint):
        raise UserError(
            "ppo: the checkpoint was written by an older version, which did not count what it drew; resume with the "
            "settings that it was made with, or --restart"
        )
    steps = checkpoint.step * steps_per_update(c)
    episodes = checkpoint.step * c.batch_size
    return Drawn(
        episodes=episodes,
        prompts=episodes // c.samples_per_prompt,
        ptx_rows=steps * ptx_batch_size(c) if c.ptx_coef else 0,
        optimizer_steps=steps,
    )


def total_updates(session: Session, c: PPOSettings, drawn: Drawn) -> int:
    """Return how many updates the whole run takes, those before the newest checkpoint included.

    Raises:
        UserError: If updates of today's size cannot end at `total_episodes`.
    """
    checkpoint = session.checkpoints.newest()
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
    done = checkpoint.step if checkpoint else 0
    return done + left // c.batch_size


def refuse_other_prompts(drawn: Drawn, train: PromptRows) -> Drawn:
    """Return `drawn` with the digest of the training prompts.

    Raises:
        UserError: If the run has drawn from other prompts so far: their order would be another one,
            and some would be drawn twice.
    """
    digest = integrity.sha256_json_list(map(train.ids, range(len(train))))
    if drawn.prompts_digest not in (None, digest):
        raise UserError(
            "ppo: the prompts within the limits are not those that the interrupted run draws from; set ppo.max_length, "
            "ppo.response_length and ppo.on_too_long back, or --restart"
        )
    return replace(drawn, prompts_digest=digest)


def new_run(session: Session, c: PPOSettings, roles: Roles, updates: int, drawn: Drawn) -> Run:
    """Return a run before its first update, or before its checkpoint is loaded.

    Args:
        session: Checkpoints, tracker and the request to stop.
        c: The stage's settings.
        roles: The models.
        updates: Updates of the whole run.
        drawn: What was drawn before the newest checkpoint.
    """
    checkpoint = session.checkpoints.newest()
    updates_left = updates - (checkpoint.step if checkpoint else 0)
    optimizer_steps = drawn.optimizer_steps + updates_left * steps_per_update(c)
    trainee = partial(make_trainee, steps=optimizer_steps, max_grad_norm=c.max_grad_norm, layout=roles.layout)
    learners = Learners(
        policy=trainee("policy", roles.policy, learning_rate=c.learning_rate),
        value=None
        if roles.value_model is None
        else trainee("value_model", roles.value_model, learning_rate=c.value_learning_rate),
        average=Average(c.ema_decay if c.publish_ema else None),
        skips=Skips(c.max_skipped_steps),
        scaling=new_scaling(roles.accelerator),
    )
    return Run(
        session=session,
        updates=updates,
        drawn=drawn,
        learners=learners,
        best=c.selection("rlhf_reward", higher_is_better=True).start(),
        alarms=Alarms(c.alarm_kl, c.alarm_entropy, c.response_length),
        kl_coef=c.kl_coef,
    )


def resume(run: Run) -> int:
    """Restore a run from its newest checkpoint, if there is one.

    Returns:
        The update that the run has come to; 0 without a checkpoint.

    Raises:
        UserError: If the checkpoint was written by another version of this stage.
    """
    step, state = load_checkpoint(run.session, run.training_state(), run.updates)
    if step == 0:
        return 0
    if SAVED_KEYS - state.keys():
        raise UserError("ppo: the checkpoint was written by another version of this stage; start again with --restart")
    restore(run, state)
    return step


def restore(run: Run, state: dict[str, Any]) -> None:
    """Set a run's fields from the state of a checkpoint, whose keys older versions share."""
    run.kl_coef = state["kl_coef"]
    run.evaluations = state["looks"]
    run.recompute = state["recompute"]
    run.computed_on = state.get("place", "")
    run.raised = state.get("raised", [])
    run.pending.restore(state)
    run.learners.skips.count = state["skipped"]
    run.alarms.restore(state["alarms"])

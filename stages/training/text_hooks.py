"""Act between the steps of trl's trainer: rates, metrics, evaluations, checkpoints, stopping."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.streams import ORDER_VERSION, derive_seed
from pipeline.errors import Interrupted
from pipeline.launch import parallel
from pipeline.store.optimizer_state import optimizer_tensors
from stages.models.adalora import triplets_of
from stages.models.adapters import trainable_parameters
from stages.training.checkpoint import save_groups
from stages.training.loop import Phase
from stages.training.scaling import Scaling
from stages.training.schedule import Schedule
from stages.training.selection import Best
from stages.training.session import PendingEvaluation, Session
from stages.training.trainee import Trainee, gradient_norm, stop_training

WEIGHTS, OPTIMIZER = "model", "model_optimizer"
"""Groups of tensors in the checkpoints that all processes save."""


class EvaluationCutShort(Exception):
    """A signal ended a held-out evaluation; nothing of it is kept, and it is owed."""


class NoStepLeft(Exception):
    """The evaluation that a resumed run owed has exhausted `patience`: no step is taken."""


def perplexity_of(loss: float) -> float:
    """Return exp of a mean cross-entropy in nats; infinity where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass
class TextHooks:
    """What happens between the steps of a training; `callback` connects it to transformers."""

    session: Session
    """The run."""
    phase: Phase
    """The place of this training in its stage."""
    schedule: Schedule
    """The learning rate, and the number of steps."""
    best: Best
    """The best evaluation so far."""
    eval_steps: int
    """Optimizer steps between two evaluations."""
    held_out_loss: Callable[[nn.Module, Callable[[], bool]], float]
    """(model, whether to leave) → held-out loss; raises EvaluationCutShort."""
    step_tokens: Callable[[int], int]
    """Tokens of the batch of a step."""
    autocast: Callable[[], AbstractContextManager]
    """The context that a forward pass computes in."""
    samples: Callable[[nn.Module], list[dict]] | None
    """Return rows for samples.jsonl; None: no samples."""
    pending: PendingEvaluation
    """Whether an evaluation is owed."""
    draws: bool = False
    """Whether steps draw random numbers for dropout or noise, apart from an adapter's dropout."""
    scaling: Scaling = field(default_factory=Scaling)
    """The gradient scaler of float16."""
    scale_before: float = 1.0
    """The scale that the present step began with."""
    overflowed: bool = False
    """Whether the scaler has skipped the last step."""
    progress: Any = None
    """The progress line, while the training runs."""
    step_began: float = 0.0
    """When the present step began, in seconds."""
    step_seconds: float = 0.0
    """How long the last step took."""

    @property
    def total(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.phase.last(self.schedule.total)

    def stage_step(self, state: Any) -> int:
        """Return the step of the stage, which may have trained before, by transformers' state."""
        return self.phase.first + state.global_step

    def before_optimizer_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Any) -> None:
        """Refuse a gradient that is not finite, and set the learning rate.

        The rate is set at every step: transformers' scheduler writes a constant there after each.
        """
        self.scale_before = self.scaling.scale
        # the scaler skips the step of such a gradient by itself
        if self.scaling.scaler is None and not math.isfinite(gradient_norm(model.parameters())):
            step = self.stage_step(state) + 1
            stop_training(f"{self.session.stage}: the gradient at step {step} is not finite")
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.rate_at(state.global_step + 1)

    def seed_dropout(self, state: Any) -> None:
        """Let dropout and noise depend on the step and the rank only.

        A resumed run then draws what an uninterrupted one would have drawn.
        """
        world_size = parallel.rank_and_world_size()[1]
        # Ranks that hold a model together drop the same numbers.
        rank = parallel.rank_and_world_size()[0] // parallel.arrangement().tensor
        # Of an adapter's dropout in one process, transformers' checkpoint restores the generator.
        if world_size > 1 or self.draws:
            step = self.stage_step(state)
            torch.manual_seed(derive_seed(self.session.seed, self.session.stage, "dropout", step, rank))

    def log(self, logs: dict[str, Any], state: Any) -> None:
        """Write the metrics of a step."""
        if "loss" not in logs:  # transformers' summary of the run
            return
        rate, tokens = self.schedule.rate_at(state.global_step), self.step_tokens(state.global_step)
        norm = math.nan if self.overflowed else logs.get("grad_norm")
        row = {"loss": logs["loss"], "grad_norm": norm, "lr": rate} | self.scaling.figures()
        self.session.tracker.log(self.stage_step(state), row, self.step_seconds, tokens)
        self.progress.update(self.stage_step(state), loss=logs["loss"])

    def evaluate(self, model: nn.Module, state: Any, control: Any) -> None:
        """Compute the held-out loss and show samples; end the training where patience is exhausted.

        Raises:
            EvaluationCutShort: A signal came. After the last step, signals are not heeded.
        """
        stop, tracker, step = self.session.stop, self.session.tracker, self.stage_step(state)
        with self.pending.running():
            loss = self.held_out_loss(model, lambda: stop.requested and state.global_step < self.schedule.total)
        tracker.evaluation(step, {"loss": loss, "perplexity": perplexity_of(loss)})
        self.best.offer(loss, state.global_step, weights_of(model))
        if self.samples is not None:
            training = model.training
            model.eval()
            with self.autocast():
                tracker.samples(step, self.samples(model))
            model.train(training)
        if self.best.exhausted:
            control.should_training_stop = True

    def before_training(self, model: nn.Module, state: Any, control: Any) -> None:
        """Evaluate before the first step of the stage, and where a resumed run owes an evaluation.

        Raises:
            Interrupted: A signal came; the run resumes from what is on disk already.
            NoStepLeft: Patience is exhausted.
        """
        # Before step 0 nothing is saved, so nothing can be owed: that evaluation is always taken.
        if self.stage_step(state) > 0 and not self.pending.owed:
            return
        try:
            self.evaluate(model, state, control)
        except EvaluationCutShort:
            # No step was taken, so there is nothing new to save.
            raise Interrupted(self.stage_step(state), self.total) from None
        if self.best.exhausted:
            raise NoStepLeft

    def after_step(self, model: nn.Module, state: Any, control: Any) -> None:
        """Evaluate, save and stop where that is due.

        Raises:
            TrainingStopped: The gradient overflows float16 at any scale.
        """
        self.step_seconds = time.perf_counter() - self.step_began
        self.overflowed = self.scaling.lost(self.scale_before)
        if self.overflowed and (problem := self.scaling.problem(self.stage_step(state))):
            stop_training(f"{self.session.stage}: {problem}")
        if state.global_step % self.eval_steps == 0 or state.global_step == self.schedule.total:
            with suppress(EvaluationCutShort):  # the checkpoint below says that it is owed
                self.evaluate(model, state, control)
        if state.global_step >= self.schedule.total or self.best.exhausted:
            control.should_save = False  # the artifact is written next
            return
        control.should_save = self.session.save_is_due(state.global_step)
        if self.session.stop_is_requested():
            # transformers saves first and then leaves its loop
            control.should_save = control.should_training_stop = True
        if control.should_save and not self.session.collective:
            self.require_space(model)

    def require_space(self, model: nn.Module) -> None:
        """Check that a checkpoint fits on the disk, before transformers writes it.

        It holds the weights that train and AdamW's two moments (and AdaLoRA's two averages).
        """
        times = 5 if triplets_of(model) else 3
        self.session.checkpoints.require_space(times * sum(p.nbytes for p in trainable_parameters(model).values()))

    def after_save(self, args: Any, state: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Move the folder that transformers wrote into our store of checkpoints.

        Where all processes save, it has neither weights nor optimizer: they are saved here.
        """
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if parallel.is_rank_zero():
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that is never read
        # What transformers does not know of: earlier trainings of the stage, and the best weights.
        tensors = dict(self.phase.tensors)
        if self.best.tensors:
            tensors["best"] = self.best.tensors
        saved_state = self.phase.state | {"best": self.best.state(), "row_order": ORDER_VERSION}
        saved_state |= self.pending.state() | self.scaling.state()
        if self.session.collective:
            tensors[WEIGHTS] = weights_of(model).tensors()
            tensors[OPTIMIZER], saved_state[OPTIMIZER] = optimizer_tensors(optimizer)
        save_groups(self.session, self.stage_step(state), self.total, tensors, saved_state, trainer=folder)

    def callback(self) -> Any:
        """Return the transformers callback that calls the methods above."""
        from transformers import TrainerCallback

        hooks = self

        class Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                hooks.before_training(model, state, control)

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                hooks.step_began = time.perf_counter()
                hooks.seed_dropout(state)

            def on_pre_optimizer_step(
                self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
            ) -> None:
                hooks.before_optimizer_step(model, optimizer, state)

            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                hooks.after_step(model, state, control)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                hooks.log(logs or {}, state)

            def on_save(
                self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
            ) -> None:
                # after the last step the artifact is written instead
                if state.global_step < hooks.schedule.total:
                    hooks.after_save(args, state, model, optimizer)

        return Callback()


def weights_of(model: nn.Module) -> Trainee:
    """Return a view of the weights that train, without an optimizer."""
    return Trainee("model", model, trainable_parameters(model), None, 0.0)

"""Train a model on batches of rows: the loop that the reward model and DPO share.

PPO has a loop of its own, of the same pieces.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from data.streams import ORDER_VERSION
from pipeline.launch import parallel
from stages.models.sharding import is_sharded, reducing_last, whole
from stages.training.checkpoint import TrainingState, check_row_order, load_checkpoint, save_checkpoint
from stages.training.readings import Figure, detached, read_sums
from stages.training.scaling import Scaling, new_scaling
from stages.training.schedule import Schedule
from stages.training.selection import Selection
from stages.training.session import PendingEvaluation, Session
from stages.training.trainee import Trainee, clipped_step, gradients_of, norm_problem, stop_training, total_norm


@dataclass(frozen=True)
class Task:
    """Define what a training computes: its batches, their loss, and the held-out evaluation."""

    order: Sequence[int]
    """Indices of the rows of all batches, in order."""
    batch_size: int
    """Rows of a batch, on all ranks together."""
    costs: Sequence[int]
    """Tokens of each row, by index; batches are shared among the ranks by them."""
    cut: Callable[[list[int]], Iterable[list[int]]]
    """Rows of a batch on this rank → its micro-batches."""
    loss: Callable[[list[int], Sequence[int]], tuple[Tensor, dict[str, Figure]]]
    """(rows of a micro-batch, rows of the batch) → (share of the loss, figures to sum and log,
    which stay on the device).

    The shares of all micro-batches add up to the batch's loss, however it is cut."""
    evaluate: Callable[[Callable[[], None]], dict[str, float]]
    """Evaluate on held-out rows, and call the argument between two forward passes: it may raise."""
    samples: Callable[[], list[dict]] | None = None
    """Return rows for samples.jsonl, after each evaluation; None: no samples."""
    prepare: Callable[[Sequence[int]], None] | None = None
    """Rows of the batch → what its micro-batches need of the whole of it, computed on all ranks
    together before the first of them; None: nothing."""


@dataclass(frozen=True)
class Phase:
    """The place of a training in a stage that trains several times."""

    first: int = 0
    """Optimizer steps that earlier trainings of the stage took."""
    total: int | None = None
    """Optimizer steps of the whole stage; None: this training is the only one."""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Groups of tensors of earlier trainings, which checkpoints carry on."""
    state: dict[str, Any] = field(default_factory=dict)
    """JSON of earlier trainings, which checkpoints carry on."""

    def last(self, steps: int) -> int:
        """Return the steps of the whole stage, where this training takes `steps`."""
        return steps if self.total is None else self.total


WHOLE_STAGE = Phase()


def fit(
    session: Session,
    accelerator: Any,
    trainee: Trainee,
    task: Task,
    schedule: Schedule,
    selection: Selection,
    phase: Phase = WHOLE_STAGE,
) -> dict:
    """Train a model; resume from the newest checkpoint, and save and stop when that is due.

    Args:
        session: The run.
        accelerator: accelerate's Accelerator, for the backward pass.
        trainee: The model with its optimizer.
        task: Batches, loss and evaluation.
        schedule: The learning rate; its total is this training's number of steps.
        selection: How evaluations choose the published weights and end the training.
        phase: The place of this training in its stage.

    Returns:
        The held-out figures of the chosen weights, with `best_step` and `steps`.
    """
    steps, first, total = schedule.total, phase.first, phase.last(schedule.total)
    best, pending = selection.start(), PendingEvaluation()
    scaling = new_scaling(accelerator)
    training = TrainingState([trainee], best, carried=phase.tensors, scaling=scaling)
    step, saved_state = load_checkpoint(session, training, steps, first)
    if step > 0:
        check_row_order(session.stage, saved_state)
    pending.restore(saved_state)

    def save() -> None:
        state = phase.state | pending.state() | {"row_order": ORDER_VERSION}
        if first + step:  # otherwise there is nothing to resume from
            save_checkpoint(session, first + step, total, training, state)

    def evaluate() -> dict[str, float]:
        # A signal between two forward passes saves and leaves: the evaluation is then owed.
        with pending.running():
            figures = task.evaluate(session.interrupt(first + step, total, save))
        session.tracker.evaluation(first + step, figures)
        best.offer(figures[selection.judge], step, trainee)
        if task.samples is not None:
            session.tracker.samples(first + step, task.samples())
        return figures

    # an overridden `keep` may ask for the best weights of a run that has kept none
    best_is_missing = selection.keep == "best" and step == steps and not best.tensors
    figures = evaluate() if first + step == 0 or pending.owed or best_is_missing else {}
    with session.tracker.progress(total, session.stage, first + step) as progress:
        while step < steps and not best.exhausted:
            step, began = step + 1, time.perf_counter()
            batch = task.order[(step - 1) * task.batch_size : step * task.batch_size]
            rate = schedule.rate_at(step)
            parts = accumulate_gradients(accelerator, trainee, task, batch, is_sharded(trainee.model))
            logged = read_and_step(trainee, scaling, parts, rate, step) | scaling.figures()
            tokens = sum(task.costs[i] for i in batch)
            session.tracker.log(first + step, logged | {"lr": rate}, time.perf_counter() - began, tokens)
            progress.update(first + step, **{k: v for k, v in logged.items() if k in ("loss", selection.judge)})
            if step % selection.eval_steps == 0 or step == steps:
                figures = evaluate()
            # After the last step neither is of use: the artifact is written next.
            if session.save_is_due(first + step) and step < steps:
                save()
            if step < steps:
                session.stop_if_requested(first + step, total, save)
    session.finish_saves()
    if selection.keep == "best" and best.step != step:
        trainee.load(best.tensors)
        figures = {}  # the last evaluation's are those of other weights
    figures = figures or task.evaluate(lambda: None)
    return {**figures, "best_step": best.step, "steps": step, **scaling.skips()}


def read_and_step(
    trainee: Trainee, scaling: Scaling, parts: Sequence[dict[str, Figure]], learning_rate: float, step: int
) -> dict[str, float]:
    """Take an optimizer step, or skip it if its gradient overflows float16.

    The device is read once, before the step (with float16, the scaler reads it too).

    Args:
        trainee: The model, with its gradient.
        scaling: How the loss was scaled.
        parts: The figures of this rank's micro-batches.
        learning_rate: The rate of this step.
        step: The step's index, for the error line.

    Returns:
        The sums of the figures over the batch, and `grad_norm`: the gradient's norm before
        clipping; NaN of a step that was skipped.

    Raises:
        TrainingStopped: The gradient is not finite, at any scale; no step is taken.
    """
    overflowed = scaling.overflow([trainee])
    norm = total_norm(gradients_of(trainee.parameters.values()))
    figures, (number,) = read_sums(parts, whole(norm))
    figures = parallel.all_reduce_figures(figures)
    if overflowed:
        if problem := scaling.problem(step):
            stop_training(f"{trainee.name}: {problem}")
        return figures | {"grad_norm": math.nan}
    if problem := norm_problem(trainee, number, step):
        trainee.zero_grad()
        stop_training(problem)
    clipped_step(trainee, norm, learning_rate)
    return figures | {"grad_norm": number}


def accumulate_gradients(
    accelerator: Any, trainee: Trainee, task: Task, batch: Sequence[int], collective: bool
) -> list[dict[str, Figure]]:
    """Compute the gradient of a batch's loss, micro-batch by micro-batch, summed over all ranks.

    Args:
        accelerator: accelerate's Accelerator.
        trainee: The model; its gradients are added to.
        task: The loss.
        batch: Rows of the batch.
        collective: Whether every forward and backward pass takes all ranks (sharded weights).

    Returns:
        The loss's figures of each micro-batch of this rank.
    """
    figures: list[dict[str, Figure]] = []
    if task.prepare is not None:
        task.prepare(batch)
    parts = list(task.cut(parallel.rows_of_this_rank(batch, [task.costs[i] for i in batch])))
    # Sharded weights are all-gathered in each pass: a rank that has fewer micro-batches than others
    # joins in with a spare one of weight 0.
    passes = parallel.padded_micro_batches(parts, batch[:1] if collective else None)
    for rows, own in reducing_last([trainee.model], passes):
        share, sums = task.loss(rows, batch)
        accelerator.backward(parallel.for_sum(share if own else 0.0 * share))
        if own:
            figures.append(detached(sums))
    # Once a step: reducing at every micro-batch would send the same bytes many times.
    parallel.all_reduce_gradients(trainee.parameters.values())
    return figures

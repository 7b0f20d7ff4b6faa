"""Save and load the tensors of a training: weights, optimizers, best weights, averages.

A checkpoint holds whole tensors, whether or not ranks hold shards of them, so that a run may resume
with another number of processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.streams import ORDER_VERSION
from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.store.checkpoints import Checkpoint
from stages.models.sharding import gather_tensors, is_sharded, shard_like
from stages.training.scaling import Scaling
from stages.training.selection import Best
from stages.training.session import Session
from stages.training.trainee import Average, Trainee, parameter_groups


@dataclass(frozen=True)
class TrainingState:
    """The objects of a training whose tensors a checkpoint holds."""

    trainees: Sequence[Trainee]
    """The models that train."""
    best: Best
    """The best evaluation so far; its weights are the first trainee's."""
    average: Average | None = None
    """An average of the first trainee's weights; None: the stage has none."""
    carried: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Groups of tensors that an earlier training of the same stage left, by name."""
    scaling: Scaling = field(default_factory=Scaling)
    """The gradient scaler of float16."""


def save_checkpoint(session: Session, step: int, total: int, training: TrainingState, state: dict) -> None:
    """Save a checkpoint atomically: tensors as safetensors, the rest as JSON.

    Args:
        session: The run.
        step: Steps of the stage that have been taken.
        total: Steps of the whole stage.
        training: What holds the tensors. Of sharded models, all ranks must call this.
        state: Further JSON to save; it is not changed.
    """
    from pipeline.store.optimizer_state import optimizer_tensors

    # Copies: both are added to below, and belong to the caller.
    tensors, state = dict(training.carried), dict(state)
    if training.average is not None and training.average.tensors:
        tensors["average"] = training.average.tensors
    for trainee in training.trainees:
        tensors[trainee.name] = trainee.tensors()
        tensors[f"{trainee.name}_optimizer"], state[f"{trainee.name}_optimizer"] = optimizer_tensors(trainee.optimizer)
    state["best"] = training.best.state()
    state |= training.scaling.state()
    if training.best.tensors:
        tensors["best"] = training.best.tensors
    # check the disk before all-gathering shards, which takes a while
    if any(is_sharded(trainee.model) for trainee in training.trainees) and parallel.is_rank_zero():
        session.checkpoints.require_space(sum(x.nbytes for group in tensors.values() for x in group.values()))
    session.checkpoints.save(step, {name: gather_tensors(group) for name, group in tensors.items()}, state, total)


def load_checkpoint(session: Session, training: TrainingState, total: int, first: int = 0) -> tuple[int, dict]:
    """Resume from the newest valid checkpoint.

    Args:
        session: The run.
        training: What the tensors are loaded into.
        total: Steps of this training.
        first: Steps that earlier trainings of the stage took.

    Returns:
        The steps that this training has taken, and the JSON that was saved; (0, {}) without a
        checkpoint of this training.

    Raises:
        UserError: The checkpoint is of another model, or more steps are done than `total`.
    """
    from pipeline.store.optimizer_state import load_optimizer

    average, checkpoint = training.average, session.checkpoints.newest()
    # A checkpoint from before `first` is of an earlier training of the stage.
    if checkpoint is None or checkpoint.step <= first:
        if average is not None:
            average.start(training.trainees[0])
        return 0, {}
    check_steps_left(session.stage, checkpoint.step - first, total)
    for trainee in training.trainees:
        trainee.load(checkpoint.tensors(trainee.name))
        name = f"{trainee.name}_optimizer"
        tensors, saved = regroup_optimizer(trainee, checkpoint.tensors(name), checkpoint.state[name])
        with keep_optimizer_settings(trainee.optimizer):
            load_optimizer(trainee.optimizer, shard_optimizer_tensors(trainee.optimizer, tensors), saved)
    training.best.restore(checkpoint)
    training.scaling.restore(checkpoint.state)
    if average is not None and average.decay is not None:
        if (checkpoint.path / "average.safetensors").is_file():
            parameters = training.trainees[0].parameters
            average.tensors = {
                name: shard_like(parameters[name], x) for name, x in checkpoint.tensors("average").items()
            }
        else:  # no average was asked for until now: it starts here
            average.start(training.trainees[0])
    return checkpoint.step - first, checkpoint.state


def check_row_order(stage: str, saved_state: dict) -> None:
    """Refuse a checkpoint whose run draws its rows in an order that this version does not give.

    Args:
        stage: Name of the stage.
        saved_state: JSON of the checkpoint.

    Raises:
        UserError: An older version began the run.
    """
    if saved_state.get("row_order") != ORDER_VERSION:
        raise UserError(
            f"{stage}: an older version began the interrupted run, and draws its rows in another order; --restart "
            f"starts again"
        )


@contextmanager
def keep_optimizer_settings(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep the optimizer's present betas and weight decay while a saved state is loaded into it.

    A resumed run follows the settings of today: they may differ from those of the checkpoint
    (--override-config).
    """
    # Not the learning rate, which every step sets.
    current = [{name: group[name] for name in ("betas", "weight_decay")} for group in optimizer.param_groups]
    yield
    for group, options in zip(optimizer.param_groups, current, strict=True):
        group.update(options)


def regroup_optimizer(trainee: Trainee, tensors: dict[str, Tensor], saved: dict) -> tuple[dict[str, Tensor], dict]:
    """Rearrange a saved optimizer state into today's parameter groups.

    There are one or two groups (`parameter_groups`), depending on weight_decay being 0, which may
    have changed since the checkpoint; parameters are numbered in the order of the groups.

    Args:
        trainee: The model, with today's optimizer.
        tensors: As `optimizer_tensors` gives them, by "INDEX.name".
        saved: The state that goes with them.

    Returns:
        Tensors and state in the present groups.
    """
    current, before = trainee.optimizer.state_dict()["param_groups"], saved["param_groups"]
    if len(current) == len(before):
        return tensors, saved
    old_order, new_order = (
        [name for group in parameter_groups(trainee.model, trainee.parameters, len(groups)) for name in group]
        for groups in (before, current)
    )

    def renumber(items: dict) -> dict:
        renumbered = {}
        for key, value in items.items():
            index, name = key.split(".", 1)
            renumbered[f"{new_order.index(old_order[int(index)])}.{name}"] = value
        return renumbered

    # All settings are the first old group's: `keep_optimizer_settings` puts today's back.
    groups = [before[0] | {"params": group["params"]} for group in current]
    return renumber(tensors), {"scalars": renumber(saved["scalars"]), "param_groups": groups}


def shard_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take this rank's shard of a whole optimizer state where the parameters are sharded.

    Args:
        optimizer: The optimizer that the state is for.
        tensors: Whole tensors by "INDEX.name", INDEX being the parameter's in the optimizer.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {}
    for key, x in tensors.items():
        parameter = parameters[int(key.split(".")[0])]
        is_shard = isinstance(parameter, DTensor) and x.dim()  # a scalar is the same on all ranks
        sharded[key] = shard_like(parameter, x) if is_shard else x
    return sharded


def has_current_settings(session: Session, checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint was made with the settings and inputs of this run."""
    # Rank 0 decides for all, so that no rank takes another branch than the others.
    return parallel.from_rank_zero(lambda: checkpoint.fingerprint == session.checkpoints.fingerprint)


def check_steps_left(stage: str, step: int, total: int) -> None:
    """Raise UserError if more steps have been taken than the settings now ask for."""
    if step > total:
        raise UserError(
            f"{stage}: {step} steps are done and the settings now ask for {total}; ask for more, or --restart"
        )

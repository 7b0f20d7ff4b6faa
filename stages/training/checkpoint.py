"""Save and load the tensors of a training: weights, optimizers, best weights, averages.

Where ranks hold shards, each saves its own while training goes on, and nothing is gathered. A
resumed run reads the slices that its ranks hold, so it may have another number of processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.streams import ORDER_VERSION
from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.store import together
from pipeline.store.checkpoints import Checkpoint
from pipeline.store.shares import StoredTensor
from stages.models.sharding import gather_tensors, shard_like
from stages.models.shares import own_bytes, own_share, read_like
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

    Raises:
        UserError: As `save_groups` does.
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
    save_groups(session, step, total, tensors, state)


def save_groups(
    session: Session,
    step: int,
    total: int,
    groups: dict[str, dict[str, Tensor]],
    state: dict,
    trainer: Path | None = None,
) -> None:
    """Save groups of tensors in a checkpoint; where all ranks save, each writes what it holds.

    Then it returns when the tensors are copied to the CPU's memory, and threads write them:
    `Session.finish_saves` waits for them, as the next save does.

    Args:
        session: The run.
        step: Steps of the stage that have been taken.
        total: Steps of the whole stage.
        groups: Tensors by name, by the name of their group; the same names of groups on all ranks.
        state: JSON to save.
        trainer: What the transformers Trainer has written (`CheckpointStore.adopt`).

    Raises:
        UserError: The disk has too little free space, the save before has failed, or ranks have no
            common file system.
    """
    store = session.checkpoints
    if not session.collective:
        whole = {name: gather_tensors(group) for name, group in groups.items()}
        if trainer is None:
            store.save(step, whole, state, total)
        else:
            store.adopt(trainer, step, total, state, whole)
        return
    store.start_clock()
    session.finish_saves()
    needed = sum(parallel.all_gather(sum(own_bytes(x) for group in groups.values() for x in group.values())))
    if not parallel.from_rank_zero(lambda: store.begin_shares(step, needed, trainer)):
        return
    if not all(parallel.all_gather(together.sees(store.staged(step)))):
        raise UserError(
            f"{store.folder}: not every process sees this folder. Each writes its share of a checkpoint there: put "
            f"--artifacts on a file system that all machines share, or set checkpoints.every=0"
        )
    shares = {}
    for name, group in groups.items():
        stored = {key: own_share(x) for key, x in group.items()}
        shares[name] = {key: share for key, share in stored.items() if share is not None}
    store.write_shares(step, shares, state, total, parallel.rank_and_world_size())


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
        trainee.load(checkpoint.stored(trainee.name))
        name = f"{trainee.name}_optimizer"
        stored, saved = regroup_optimizer(trainee, checkpoint.stored(name), checkpoint.state[name])
        with keep_optimizer_settings(trainee.optimizer):
            load_optimizer(trainee.optimizer, shard_optimizer_tensors(trainee.optimizer, stored), saved)
    training.best.restore(checkpoint, lambda: read_weights(training.trainees[0], checkpoint, "best"))
    training.scaling.restore(checkpoint.state)
    if average is not None and average.decay is not None:
        if checkpoint.has("average"):
            parameters, stored = training.trainees[0].parameters, checkpoint.stored("average")
            average.tensors = {name: shard_like(parameters[name], x) for name, x in stored.items()}
        else:  # no average was asked for until now: it starts here
            average.start(training.trainees[0])
    return checkpoint.step - first, checkpoint.state


def read_weights(trainee: Trainee, checkpoint: Checkpoint, group: str) -> dict[str, Tensor]:
    """Read weights in shards, as a trainee's are; those that it does not have in shards, whole.

    Args:
        trainee: The model.
        checkpoint: The checkpoint.
        group: Name of the group of tensors.
    """
    parameters, whole = trainee.parameters, torch.empty(0)
    return {name: read_like(parameters.get(name, whole), x) for name, x in checkpoint.stored(group).items()}


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


def regroup_optimizer(
    trainee: Trainee, tensors: dict[str, StoredTensor], saved: dict
) -> tuple[dict[str, StoredTensor], dict]:
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


def shard_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor | StoredTensor]
) -> dict[str, Tensor]:
    """Take this rank's shard of a whole optimizer state where the parameters are sharded.

    Args:
        optimizer: The optimizer that the state is for.
        tensors: Whole tensors, or those of a checkpoint, by "INDEX.name", INDEX being the
            parameter's in the optimizer.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {}
    for key, x in tensors.items():
        parameter = parameters[int(key.split(".")[0])]
        is_shard = isinstance(parameter, DTensor) and x.dim()  # a scalar is the same on all ranks
        if isinstance(x, StoredTensor):
            x = read_like(parameter, x)
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

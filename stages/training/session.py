"""Connect a training loop to its run: checkpoints, the tracker and the request to stop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.errors import Interrupted, UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun, StopFlag
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tracking import Tracker
from stages.shared.data_notes import DataNotes
from stages.shared.runtime import saves_together


@dataclass(frozen=True)
class Session:
    """What a training loop needs of its run, and nothing else of it."""

    stage: str
    """Name of the stage, for lines and error messages."""
    seed: int
    """The experiment's seed."""
    checkpoints: CheckpointStore
    """Where checkpoints are saved, and resumed from."""
    tracker: Tracker
    """Where metrics, held-out figures, samples and lines go."""
    stop: StopFlag
    """Whether a signal has asked the run to stop. Only rank 0 hears signals."""
    collective: bool
    """Whether every rank takes part in a save because each holds a shard of something (fsdp2).

    All ranks then save, and stop, between the same two steps; no forward pass can be cut short."""
    notes: DataNotes = field(default_factory=DataNotes)
    """Where it is said what was not taken of the data."""

    def say(self, line: str) -> None:
        """Print a line that starts with the stage's name."""
        self.tracker.say(f"{self.stage}: {line}")

    def save_is_due(self, step: int) -> bool:
        """Return whether to save after `step` steps; where all ranks save, the answer of rank 0.

        Raises:
            UserError: Where all ranks save: the save that is under way has failed.
        """
        if self.collective:
            self.confirm_save()
            return parallel.from_rank_zero(lambda: self.checkpoints.due(step))
        return self.checkpoints.due(step)

    def stop_is_requested(self) -> bool:
        """Return whether a signal has come; where all ranks save, the answer of rank 0."""
        if self.collective:
            return parallel.from_rank_zero(lambda: self.stop.requested)
        return self.stop.requested

    def confirm_save(self) -> None:
        """Learn, on all ranks, whether the save that is under way is over, or has failed.

        Raises:
            UserError: It has failed, on any rank.
        """
        save = self.checkpoints.shared
        if save is None:
            return
        is_over = save.is_over  # first: a thread that fails says so before it ends
        reports = parallel.all_gather((save.problem, is_over))
        if problems := [problem for problem, _ in reports if problem is not None]:
            save.give_up()
            self.checkpoints.shared = None
            raise UserError(f"{self.stage}: a checkpoint is not saved: {problems[0]}")
        if all(is_over for _, is_over in reports):
            self.checkpoints.shared = None

    def finish_saves(self) -> None:
        """Wait, on all ranks, until the save that is under way is complete.

        Raises:
            UserError: It has failed, on any rank.
        """
        save = self.checkpoints.shared
        if save is None:
            return
        save.wait_for_share()
        self.confirm_save()  # before rank 0 waits for the others: one of them may have failed
        if self.checkpoints.shared is not None:
            save.join()
            self.confirm_save()

    def stop_if_requested(self, step: int, total: int, save: Callable[[], None]) -> None:
        """Save and leave with Interrupted (exit code 75) if a signal has asked the run to stop.

        Args:
            step: Steps taken so far.
            total: Steps of the whole run.
            save: Saves a checkpoint of `step`.

        Raises:
            Interrupted: After the checkpoint is saved.
        """
        if self.stop_is_requested():
            save()
            self.finish_saves()
            raise Interrupted(step, total)

    def leave_if_requested(self, step: int, total: int) -> None:
        """Leave with Interrupted, without saving, if a signal has asked this rank to stop.

        For work before the first step, or whose results are kept elsewhere.

        Args:
            step: Steps taken so far.
            total: Steps of the whole run.
        """
        if self.stop.requested:
            raise Interrupted(step, total)

    def interrupt(self, step: int, total: int, save: Callable[[], None]) -> Callable[[], None]:
        """Return a function to call between two forward passes of a long evaluation or rollout.

        It saves and leaves as `stop_if_requested` does. Where every rank takes part in a save, it
        does nothing: the ranks are not at the same forward pass, so they finish the step first.
        """
        if self.collective:
            return lambda: None
        return lambda: self.stop_if_requested(step, total, save)


@dataclass
class PendingEvaluation:
    """Remember a held-out evaluation that a signal cut short, for the resumed run to make up for.

    Every checkpoint that is saved while an evaluation runs says that it is owed.
    """

    owed: bool = False
    """Whether an evaluation of the present weights was begun and not finished."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Owe an evaluation until the block ends; an exception leaves it owed."""
        self.owed = True
        yield
        self.owed = False

    def state(self) -> dict[str, bool]:
        """Return what a checkpoint records."""
        return {"owes_look": self.owed}

    def restore(self, state: dict) -> None:
        """Continue as a checkpoint's JSON says; {} where there is no checkpoint."""
        self.owed = state.get("owes_look", False)


def session_of(ctx: StageRun, trains: bool = True) -> Session:
    """Return the session of a stage's run.

    Args:
        ctx: The run.
        trains: Whether the stage trains. rankings and evaluate do not: what they save has no
            weights, so rank 0 saves it alone.
    """
    return Session(
        stage=ctx.stage,
        seed=ctx.seed,
        checkpoints=ctx.checkpoints,
        tracker=ctx.tracker,
        stop=ctx.stop,
        collective=trains and saves_together(ctx.experiment),
        notes=DataNotes(lambda line: ctx.tracker.say(f"{ctx.stage}: {line}"), ctx.publish),
    )

"""Let the policies answer one after the other; then the reference and each judge read the answers.

One model at a time is on the device. A checkpoint follows each of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.errors import UserError
from pipeline.store.checkpoints import CheckpointStore
from stages.evaluation.forms import DESCRIPTIONS, form_of_base
from stages.evaluation.judges import REWARD_MODEL
from stages.evaluation.measuring import Answered, answer_prompts, measured_of, with_best, with_judge, with_reference
from stages.evaluation.prompts import EvaluationPrompts
from stages.evaluation.results import Measured
from stages.evaluation.tools import Tools
from stages.settings.evaluate import EvaluateSettings
from stages.settings.experiment import Experiment
from stages.training.session import Session


@dataclass
class Work:
    """Count what is done of a run, and keep it in checkpoints."""

    session: Session
    """The run."""
    total: int
    """Models that have their turn: the policies, the reference and the judges."""
    done: int = 0
    """How many of them have had it."""

    def poll(self) -> Callable[[], None]:
        """Return what raises if the run is to stop."""
        return partial(self.session.leave_if_requested, self.done, self.total)

    def finish(self, state: dict[str, Any] | None) -> None:
        """Keep in a checkpoint what is known after one more model, unless it was the last.

        Args:
            state: All that is known; None: no more than before.
        """
        self.done += 1
        if state is not None and self.done < self.total:
            self.session.checkpoints.save(self.done, {}, state, self.total)
            self.session.leave_if_requested(self.done, self.total)


def measure_all(
    work: Work,
    tools: Tools,
    prompts: EvaluationPrompts,
    text_rows: Sequence[list[int]],
    settings: EvaluateSettings,
    names: Sequence[str],
    experiment: Experiment,
) -> dict[str, Measured]:
    """Measure all policies, with a checkpoint after each model.

    A resumed run may know more policies than it compares now: evaluate.policies can change.

    Args:
        work: The run, and what is done of it.
        tools: The sampler, and how models are loaded.
        prompts: The evaluation prompts.
        text_rows: Packed rows of held-out pretraining text.
        settings: The section evaluate.
        names: The policies.
        experiment: All settings.
    """
    session, answered = work.session, answered_before(work.session.checkpoints)

    def let_speak(policies: Sequence[str], ask: Callable[[str], Answered]) -> None:
        """Let one model say what it makes of some policies, and keep it in a checkpoint."""
        for name in policies:
            answered[name] = ask(name)
        state = {"answered": {name: own.state() for name, own in answered.items()}}
        work.finish(state if policies else None)
        progress.update(work.done)

    def answer(name: str) -> Answered:
        form = form_of_base(settings.base_prompt, experiment.model.name_or_path) if name == "base" else "chat"
        if form != "chat":
            session.say(f"base is prompted {DESCRIPTIONS[form]}")
        return answer_prompts(tools, name, form, prompts, text_rows, settings, seed=session.seed, poll=work.poll())

    def ask_reference(name: str) -> Answered:
        return with_reference(tools, answered[name], prompts, settings.temperature, work.poll())

    def ask_judge(name: str, judge: str) -> Answered:
        own = answered[name]
        if judge not in own.raw_scores:
            own = with_judge(tools, own, judge, prompts, work.poll())
        return own if own.kept else with_best(tools, own, prompts, work.poll())

    judges = sorted(tools.judges, key=lambda judge: judge != REWARD_MODEL)  # it chooses the best of n samples
    with session.tracker.progress(len(names) + 1 + len(judges), "evaluate", len(answered)) as progress:
        for name in names:
            let_speak([] if name in answered else [name], answer)
        let_speak([name for name in names if answered[name].lacks_reference], ask_reference)
        for judge in judges:
            lacking = [name for name in names if judge not in answered[name].raw_scores or not answered[name].kept]
            let_speak(lacking, partial(ask_judge, judge=judge))
        for name in [name for name in names if not answered[name].kept]:  # no reward model, but a selector
            answered[name] = with_best(tools, answered[name], prompts, work.poll())
    if tools.selector is not None:
        tools.selector.scorer.close()
    return {name: measured_of(tools, answered[name], prompts) for name in names}


def answered_before(checkpoints: CheckpointStore) -> dict[str, Answered]:
    """Return what an interrupted run knows of each policy."""
    checkpoint = checkpoints.newest()
    if checkpoint is None:
        return {}
    if "answered" not in checkpoint.state:
        raise UserError("evaluate: the checkpoint was written by another version; start again with --restart")
    return {name: Answered(**state) for name, state in checkpoint.state["answered"].items()}

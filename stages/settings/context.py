"""Find the lengths of a whole config that are over its model's context, before anything runs."""

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.chain import wanted_stages
from stages.settings import evaluate, ppo
from stages.settings.checks import folder_context, prefix_tokens, too_long_for
from stages.settings.experiment import STAGES
from stages.settings.reward_base import has_own_base, trains_sft, with_own_base

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment


def lengths_over_context(experiment: "Experiment", artifacts: str | Path = "artifacts") -> list[str]:
    """Return a line for each length over the context of a model that is on this machine.

    Each stage checks its own lengths when it is about to run. A model that is trained from scratch
    is checked when the config is loaded.

    Args:
        experiment: The validated experiment.
        artifacts: The folder of all experiments, where `base` may have published the model.
    """
    of_rm = lengths_over_own_base(experiment, artifacts)
    if experiment.model.name_or_path is None:
        return of_rm
    context = folder_context(experiment.model.name_or_path)
    if context is None:
        context = folder_context(str(Path(artifacts) / experiment.name / "base" / "model"))
    lengths = {
        "rankings": [],
        "sft": [],
        "rm": [],
        "ppo": ppo.text_lengths(experiment.ppo),
        "dpo": [],
        "evaluate": evaluate.text_lengths(experiment),
    }
    if experiment.data.rankings is not None:
        del lengths["rankings"]  # nothing is sampled
    if has_own_base(experiment):
        del lengths["rm"]
    wanted = wanted_stages(experiment, STAGES)
    lines = []
    for stage, names in lengths.items():
        if stage in wanted:
            ahead = prefix_tokens(experiment, stage)
            lines += too_long_for(context, getattr(experiment, stage), stage, *names, ahead=ahead)
    return lines + of_rm


def lengths_over_own_base(experiment: "Experiment", artifacts: str | Path) -> list[str]:
    """Return a line for each length over the context of the reward model's own base.

    Args:
        experiment: The validated experiment.
        artifacts: The folder of all experiments, where `rm_base` may have published the model.
    """
    seen, wanted = with_own_base(experiment), wanted_stages(experiment, STAGES)
    if not has_own_base(experiment) or seen.model.name_or_path is None or "rm" not in wanted:
        return []
    context = folder_context(seen.model.name_or_path)
    if context is None:
        context = folder_context(str(Path(artifacts) / experiment.name / "rm_base" / "model"))
    lines = too_long_for(context, seen.rm, "rm", ahead=prefix_tokens(experiment, "rm"))
    if trains_sft(experiment):
        lines += too_long_for(context, seen.sft, "rm.base.sft", ahead=prefix_tokens(experiment, "sft"))
    return lines

"""Find the lengths of a whole config that are over its model's context, before anything runs."""

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.chain import wanted_stages
from stages.settings import evaluate, ppo
from stages.settings.checks import folder_context, prefix_tokens, too_long_for
from stages.settings.experiment import STAGES

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
    if experiment.model.name_or_path is None:
        return []
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
    wanted = wanted_stages(experiment, STAGES)
    lines = []
    for stage, names in lengths.items():
        if stage in wanted:
            ahead = prefix_tokens(experiment, stage)
            lines += too_long_for(context, getattr(experiment, stage), stage, *names, ahead=ahead)
    return lines

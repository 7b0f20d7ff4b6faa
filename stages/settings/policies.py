"""Decide which policies an experiment compares and which models it needs, from the data it has.

A chain need not be complete. Without rankings there is neither a reward model nor DPO, and without
prompts there is no PPO. A reward model only for the sake of the report is trained only on request.
"""

from typing import TYPE_CHECKING

from stages.settings.scorers.scorer import scorer_stages

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment


def simulates_labelers(experiment: "Experiment") -> bool:
    """Return whether simulated labelers rank: they know only the world's prompts."""
    if experiment.data.rankings is not None or ranks_by_scorers(experiment):
        return False
    return experiment.data.prompts == "world"


def ranks_by_scorers(experiment: "Experiment") -> bool:
    """Return whether scorers rank responses of SFT (rankings.scorer)."""
    return experiment.rankings.scorer is not None and experiment.data.rankings is None


def has_rankings(experiment: "Experiment") -> bool:
    """Return whether there are rankings: by people, by scorers or by simulated labelers."""
    if ranks_by_scorers(experiment):
        return experiment.data.prompts is not None
    return experiment.data.rankings is not None or simulates_labelers(experiment)


def compared_policies(experiment: "Experiment") -> list[str]:
    """Return the policies that evaluate compares.

    Returns:
        `evaluate.policies` if the config sets it; otherwise the policies that the data allow.
    """
    section = experiment.evaluate
    if "policies" in section.model_fields_set:
        return list(section.policies)
    prompts = experiment.data.prompts is not None
    allowed = {
        "ppo": prompts and (has_rankings(experiment) or not climbs_own_model(experiment)),
        "dpo": has_rankings(experiment),
        "best_of_n": prompts and has_rankings(experiment),
    }
    return [name for name in section.policies if allowed.get(name, True)]


def trained_policies(experiment: "Experiment") -> list[str]:
    """Return the policies with a model of their own that evaluate compares, SFT among them."""
    policies = compared_policies(experiment)
    return [name for name in ("base", "sft", "ppo", "dpo") if name in policies or name == "sft"]


def climbs_own_model(experiment: "Experiment") -> bool:
    """Return whether PPO is scored by the reward model of the stage rm, alone or among others."""
    settings = experiment.ppo
    if settings.rewards is not None:
        return "rm" in scorer_stages(settings.rewards)
    return settings.reward_model is None


def needs_reward_model(experiment: "Experiment") -> bool:
    """Return whether rm's reward model scores the policies.

    It does where the data allow PPO, and where a policy that needs it is named.
    """
    policies = compared_policies(experiment)
    if "best_of_n" in policies:
        return True
    if "ppo" in policies and climbs_own_model(experiment):
        return True
    return experiment.data.prompts is not None and has_rankings(experiment)


def reward_models(experiment: "Experiment") -> list[str]:
    """Return the folders of the models that rm trains: model, ensemble/1, …, held_out/model."""
    settings = experiment.rm
    folders = ["model"] + [f"ensemble/{index}" for index in range(1, settings.ensemble)]
    held_out = settings.held_out
    if held_out is None:
        held_out = experiment.data.rankings is not None
    if held_out:
        folders.append("held_out/model")
    return folders

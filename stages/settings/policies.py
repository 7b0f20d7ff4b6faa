"""Decide which policies an experiment compares and which models it needs, from the data it has.

A chain need not be complete. Without rankings there is neither a reward model nor DPO, and without
prompts there is no PPO. A reward model only for the sake of the report is trained only on request.
"""

from typing import TYPE_CHECKING

from stages.settings.scorers.scorer import scorer_stages

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

JUDGE_SHARE = 0.2
"""The share of people's rankings that is kept to train a judge, where it is not set."""


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
        "best_of_n": prompts and (has_rankings(experiment) or section.best_of_by is not None),
    }
    return [name for name in section.policies if allowed.get(name, True)]


def trained_policies(experiment: "Experiment") -> list[str]:
    """Return the policies with a model of their own that evaluate compares, SFT among them."""
    policies = compared_policies(experiment)
    return [name for name in ("base", "sft", "ppo", "dpo") if name in policies or name == "sft"]


def climbs_own_model(experiment: "Experiment") -> bool:
    """Return whether PPO climbs the reward model of the stage rm, alone or among others.

    One of weight 0 is only watched.
    """
    settings = experiment.ppo
    if settings.rewards is not None:
        return "rm" in scorer_stages([scorer for scorer in settings.rewards if scorer.weight])
    return settings.reward_model is None


def needs_reward_model(experiment: "Experiment") -> bool:
    """Return whether rm's reward model scores the policies.

    It does where the data allow PPO, and where a policy that needs it is named.
    """
    policies = compared_policies(experiment)
    if "best_of_n" in policies and experiment.evaluate.best_of_by is None:
        return True
    if "ppo" in policies and climbs_own_model(experiment):
        return True
    return experiment.data.prompts is not None and has_rankings(experiment)


def judge_share(experiment: "Experiment") -> float:
    """Return the share of prompts whose rankings are kept to train a judge; 0: none.

    Where it is not set, rankings by people are kept where a policy is compared that climbs the
    reward model: by that model alone nobody could tell whether the policy became better.
    """
    share = experiment.rankings.judge_fraction
    if share is not None:
        return share
    climbs = {"ppo", "best_of_n"} & set(compared_policies(experiment))
    return JUDGE_SHARE if climbs and experiment.data.rankings is not None else 0.0


def reward_models(experiment: "Experiment", has_judge: bool) -> list[str]:
    """Return the folders of the models that rm trains.

    These are model, ensemble/1, …, held_out/model and judge/model. Without a choice, the held-out
    model is trained where nothing better shows over-optimisation: no gold scorer, no judge.

    Args:
        experiment: The validated experiment.
        has_judge: Whether rankings were kept to train a judge.
    """
    settings = experiment.rm
    folders = ["model"] + [f"ensemble/{index}" for index in range(1, settings.ensemble)]
    held_out = settings.held_out
    if held_out is None:
        held_out = experiment.data.rankings is not None and not has_judge
    if held_out:
        folders.append("held_out/model")
    if has_judge:
        folders.append("judge/model")
    return folders

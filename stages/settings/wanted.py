"""What an experiment's data allow: which policies are compared, and whether a reward model judges them.

A chain need not be whole. Without rankings there is neither reward model nor DPO, without prompts no PPO; a reward
model is trained for the report's sake alone only where it is asked for.
"""


def simulates(experiment) -> bool:
    """Whether simulated labelers rank SFT's responses: they know the embedded world's prompts only."""
    return experiment.data.rankings is None and experiment.data.prompts == "world"


def ranks(experiment) -> bool:
    """Whether there are rankings, people's or simulated ones."""
    return experiment.data.rankings is not None or simulates(experiment)


def policies(experiment) -> list[str]:
    """Return the policies that are compared.

    Returns:
        `evaluate.policies` as the config names them; where it names none, those that its data allow.
    """
    section = experiment.evaluate
    if "policies" in section.model_fields_set:
        return list(section.policies)
    prompts = experiment.data.prompts is not None
    allowed = {
        "ppo": prompts and (ranks(experiment) or experiment.ppo.reward_model is not None),
        "dpo": ranks(experiment),
        "best_of_n": prompts and ranks(experiment),
    }
    return [name for name in section.policies if allowed.get(name, True)]


def judges(experiment) -> bool:
    """Return whether rm's reward model scores the policies: where the data allow PPO, or where a policy that needs it
    is named."""
    named = policies(experiment)
    needed = "best_of_n" in named or ("ppo" in named and experiment.ppo.reward_model is None)
    return needed or (experiment.data.prompts is not None and ranks(experiment))

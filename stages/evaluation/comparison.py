"""Compare the measured policies: the contents of results.json. Pure."""

from collections.abc import Collection
from typing import Any

from stages.evaluation import overoptimisation
from stages.evaluation.prompts import EvaluationPrompts
from stages.evaluation.results import Measured, order_by_gold, summarise
from stages.settings.evaluate import RM_FIGURES


def compare(
    prompts: EvaluationPrompts, measured: dict[str, Measured], climbed: Collection[str], rm_figures: dict[str, Any]
) -> dict:
    """Compare the policies with SFT.

    Args:
        prompts: The evaluation prompts.
        measured: What was measured of each policy.
        climbed: The policies that were trained to please the judge, or selected by it.
        rm_figures: The figures of the stage rm; {} if there is none.

    Returns:
        results.json, without the settings that it repeats.
    """
    sft, clusters, known = measured["sft"], prompts.clusters, prompts.known_tasks
    judge = "gold" if prompts.world is not None else "reward_model" if sft.scores is not None else None
    entries = {
        name: summarise(
            of_policy,
            sft,
            clusters,
            known,
            judge_climbed=name in climbed,
            selected=name in climbed and name == "best_of_n",
        )
        for name, of_policy in measured.items()
    }
    reward_model = {key: rm_figures.get(key) for key in RM_FIGURES}
    reward_model["orders_as_gold"] = order_by_gold(sft, clusters, known)
    return {
        "judge": judge,
        "leaked": sum(prompts.leaked),
        "leaked_by": "near copy" if prompts.world is None else "task",
        "prompts": len(prompts.prompts),
        "samples_per_prompt": len(sft.responses[0]),
        "clusters": len(set(clusters)),
        "policies": entries,
        "reward_model": reward_model,
        "overoptimisation": {
            name: overoptimisation.check(of_policy, sft, clusters) for name, of_policy in measured.items()
        },
    }


def manifest_figures(results: dict, name: str) -> dict:
    """Return the figures that the manifest records: those of one policy, and of the prompts."""
    entry = results["policies"][name]
    win_rate, gold = entry["win_rate_vs_sft"], entry["gold"]
    judged = "by the reward model that it was trained to please or selected by" if entry["judge_climbed"] else None
    return {
        "policy": name,
        "judged": judged,
        "score": entry["score"],
        "win_rate_vs_sft": win_rate and win_rate["value"],
        "gold": gold and gold["overall"],
        "eos_rate": entry["eos_rate"],
        "prompts": results["prompts"],
        "leaked": results["leaked"],
    }

"""Compare the measured policies: the contents of results.json. Pure."""

from collections.abc import Sequence
from typing import Any

from stages.evaluation import overoptimisation
from stages.evaluation.judges import REWARD_MODEL, Judge
from stages.evaluation.prompts import EvaluationPrompts
from stages.evaluation.results import Measured, order_by_gold, summarise
from stages.settings.evaluate import RM_FIGURES


def compare(
    prompts: EvaluationPrompts,
    measured: dict[str, Measured],
    judges: Sequence[Judge],
    rm_figures: dict[str, Any],
    panel: dict[str, Any] | None = None,
) -> dict:
    """Compare the policies with SFT.

    Args:
        prompts: The evaluation prompts.
        measured: What was measured of each policy.
        judges: The judges; the first one decides.
        rm_figures: The figures of the stage rm; {} if there is none.
        panel: What the judges of the settings are worth (`panel_results.py`); None without any.

    Returns:
        results.json, without the settings that it repeats.
    """
    sft, clusters, known = measured["sft"], prompts.clusters, prompts.known_tasks
    orders = {judge.name: order_by_gold(judge.name, sft, clusters, known) for judge in judges}
    reward_model = {key: rm_figures.get(key) for key in RM_FIGURES}
    return {
        "judge": judges[0].kind if judges else None,
        "judge_name": judges[0].name if judges else None,
        "judges": {
            judge.name: {
                "climbed": sorted(judge.climbed),
                "selected": sorted(judge.selected),
                **judge.figures,
                "orders_as_gold": orders[judge.name],
            }
            for judge in judges
        },
        "leaked": sum(prompts.leaked),
        "leaked_by": "near copy" if prompts.world is None else "task",
        "prompts": len(prompts.prompts),
        "samples_per_prompt": len(sft.responses[0]),
        "clusters": len(set(clusters)),
        "policies": {
            name: summarise(name, of_policy, sft, clusters, known, judges) for name, of_policy in measured.items()
        },
        "reward_model": reward_model | {"orders_as_gold": orders.get(REWARD_MODEL)},
        "overoptimisation": {
            name: overoptimisation.check(of_policy, sft, clusters) for name, of_policy in measured.items()
        },
    } | ({} if panel is None else {"panel": panel})


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

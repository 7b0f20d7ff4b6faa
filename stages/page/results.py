"""Complete results.json, so that the page can rely on every key."""

import copy
from typing import Any

NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO", "dpo": "DPO", "best_of_n": "best of n"}
"""Policy → its name on the page."""
POLICY = {
    "asked": "chat", "judge_climbed": False, "ci95": {},
    **dict.fromkeys((
        "score", "kl_to_sft", "length", "eos_rate", "pretrain_perplexity", "win_rate_vs_sft", "difference_to_sft",
        "gold", "gold_known_tasks", "gold_held_out_tasks",
    )),
}  # fmt: skip
"""Every figure of a policy that the page may show → its value where it was not measured."""
INTERVALS = ("score", "kl_to_sft", "length", "eos_rate", "pretrain_perplexity")
"""The figures of a policy that have a 95 % interval."""
REWARD_MODEL = ("accuracy", "accuracy_ci95", "accuracy_ceiling", "n_pairs", "labeler_agreement", "ece",
                "orders_as_gold")  # fmt: skip
"""The figures of the reward model."""
CHECKS = ("length", "cut", "held_out")
"""The checks for over-optimisation."""
WHOLE = ("judge", "leaked", "leaked_by", "prompts", "samples_per_prompt", "clusters", "missing_eos_score",
         "response_length")  # fmt: skip
"""The figures of the evaluation as a whole."""
PROMPTED = {"chat": "", "plain": "prompted in plain text", "few_shot": "prompted in plain text after a few examples"}
"""A policy's `asked` → how it was prompted, as a clause."""


def complete(results: dict[str, Any]) -> dict[str, Any]:
    """Return results.json with a null for every figure that it lacks.

    SFT and DPO without PPO have no reward model and may have no pretraining text, and older
    versions measured less. The page leaves out what is null.
    """
    whole = dict.fromkeys(WHOLE) | copy.deepcopy(results)
    whole["reward_model"] = dict.fromkeys(REWARD_MODEL) | (results.get("reward_model") or {})
    checks = results.get("overoptimisation") or {}
    whole["overoptimisation"] = {name: dict.fromkeys(CHECKS) | check for name, check in checks.items() if check}
    for name, measured in results["policies"].items():
        known = {k: v for k, v in measured.items() if v is not None or k not in ("asked", "ci95")}
        policy = copy.deepcopy(POLICY) | known
        policy["ci95"] = dict.fromkeys(INTERVALS) | policy["ci95"]
        whole["policies"][name] = policy
    return whole


def quality(policy: dict[str, Any]) -> float | None:
    """Return the judge's value of a policy: overall gold, otherwise the score, if there is one."""
    return policy["gold"]["overall"] if policy["gold"] else policy["score"]

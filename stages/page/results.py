"""Complete results.json, so that the page can rely on every key."""

import copy
from typing import Any

NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO", "dpo": "DPO", "best_of_n": "best of n"}
"""Policy → its name on the page."""
POLICY = {
    "asked": "chat", "judge_climbed": False, "ci95": {}, "se": {}, "differences_to_sft": {},
    "judges": {},
    **dict.fromkeys((
        "score", "kl_to_sft", "length", "eos_rate", "pretrain_perplexity", "win_rate_vs_sft", "difference_to_sft",
        "gold", "gold_known_tasks", "gold_held_out_tasks",
    )),
}  # fmt: skip
"""Every figure of a policy that the page may show → its value where it was not measured."""
INTERVALS = ("score", "kl_to_sft", "length", "eos_rate", "pretrain_perplexity")
"""The figures of a policy that have a 95 % interval."""
DIFFERENCES = ("score", "length", "eos_rate", "pretrain_perplexity")
"""The figures of a policy whose difference to SFT's is given."""
REWARD_MODEL = (
    "accuracy", "accuracy_ci95", "accuracy_ceiling", "accuracy_ceiling_ci95", "n_pairs", "labeler_agreement",
    "labeler_agreement_ci95", "ece", "ece_ci95", "orders_as_gold",
)  # fmt: skip
"""The figures of the reward model."""
JUDGES = {"gold": "gold scorer", "reward_model": "reward model", "kept": "kept judge", "held_out": "held-out model"}
"""Judge → its name on the page; others have the name that the settings give them."""
VERDICT = {"climbed": False, **dict.fromkeys(("score", "win_rate_vs_sft", "difference_to_sft"))}
"""What a judge says of a policy → its value where it was not measured."""
JUDGE = {
    "climbed": [], "selected": [],
    **dict.fromkeys(("accuracy", "accuracy_ci95", "n_pairs", "rankings", "labelers_apart", "orders_as_gold")),
}  # fmt: skip
"""What is known of a judge → its value where it was not measured."""
CHECKS = ("length", "cut", "held_out")
"""The checks for over-optimisation."""
WHOLE = ("judge", "judge_name", "judges", "best_of_by", "panel", "leaked", "leaked_by", "prompts",
         "samples_per_prompt", "clusters",
         "missing_eos_score", "response_length", "temperature", "differs_from_training")  # fmt: skip
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
        known = {
            k: v
            for k, v in measured.items()
            if v is not None or k not in ("asked", "ci95", "se", "differences_to_sft", "judges")
        }
        policy = copy.deepcopy(POLICY) | known
        policy["ci95"] = dict.fromkeys(INTERVALS) | policy["ci95"]
        policy["se"] = dict.fromkeys(INTERVALS) | policy["se"]
        policy["differences_to_sft"] = dict.fromkeys(DIFFERENCES) | policy["differences_to_sft"]
        whole["policies"][name] = policy
    if whole["judges"] is None:
        take_older(whole)
    whole["judges"] = {name: copy.deepcopy(JUDGE) | (judge or {}) for name, judge in whole["judges"].items()}
    for policy in whole["policies"].values():
        policy["judges"] = {name: VERDICT | (policy["judges"].get(name) or {}) for name in whole["judges"]}
    return whole


def take_older(whole: dict[str, Any]) -> None:
    """Add what the only judge says, where an older version wrote no verdicts by judge."""
    judge = whole["judge"]
    whole["judge_name"], whole["judges"] = judge, {judge: {}} if judge else {}
    for policy in whole["policies"].values():
        if judge is not None:
            gold = policy["gold"] or {}
            value, ci95 = policy["score"], policy["ci95"]["score"]
            if judge == "gold":
                value, ci95 = gold.get("overall"), gold.get("ci95")
            policy["judges"][judge] = {
                "score": {"value": value, "ci95": ci95},
                "win_rate_vs_sft": policy["win_rate_vs_sft"],
                "difference_to_sft": policy["difference_to_sft"],
                "climbed": policy["judge_climbed"],
            }


def quality(policy: dict[str, Any], judge: str | None) -> float | None:
    """Return the value that a judge gives a policy; None where nothing was judged.

    Args:
        policy: The policy's entry in results.json, completed.
        judge: The judge, `judge_name` of the results for the one that decides.
    """
    score = policy["judges"].get(judge, VERDICT)["score"]
    return score["value"] if score else None


def judge_name(judge: str | None) -> str:
    """Return a judge's name in a sentence."""
    if judge is None:
        return "nobody"
    return f"the {JUDGES[judge]}" if judge in JUDGES else judge

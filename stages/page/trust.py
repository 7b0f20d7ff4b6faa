"""Say whether the score still measures what it should, in sentences and tables.

Four signs need no gold scorer: another reward model, the length of responses, responses that were
cut off, and the reward model's own accuracy. Where there is gold, it is compared with the score.
"""

from dataclasses import dataclass
from typing import Any

from stages.evaluation.statistics import correlation_estimate, share_estimate
from stages.page.numbers import NONE, capitalised, fixed, interval, number, percent
from stages.page.table import Cell, Table, dense, estimate_cell, policy_cell, share_cell, value_cell

Results = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    text: str
    """A sentence."""
    is_warning: bool = False
    """Whether it speaks against the score."""


# -- sentences -----------------------------------------------------------------------------------


def sentences(results: Results, names: dict[str, str]) -> list[str]:
    """Return what the checks that need no gold found, of the policies whose score was raised.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.
    """
    texts = [finding.text for finding in findings(results, names)]
    has_held_out = any((checks or {}).get("held_out") for checks in results["overoptimisation"].values())
    if has_held_out:
        texts.append("The held-out model learned from the same rankings, so both share the mistakes in them.")
    if kept := results["judges"].get("kept"):
        others = "other rankings, by other labelers" if kept["labelers_apart"] else "other rankings"
        texts.append(f"The kept judge learned from {others}; what all labelers get wrong it gets wrong too.")
    elif texts and not has_held_out:
        texts.append("No other reward model was trained to judge; rankings.judge_fraction keeps rankings for one.")
    return texts


def warnings(results: Results, names: dict[str, str]) -> list[str]:
    """Return only those sentences that speak against the score."""
    return [finding.text for finding in findings(results, names) if finding.is_warning]


def findings(results: Results, names: dict[str, str]) -> list[Finding]:
    """Return what each check found, policy by policy."""
    everything = []
    for name in ("ppo", "dpo", "best_of_n"):
        if results["overoptimisation"].get(name) is not None:
            shown = capitalised(names[name])
            checks = (by_kept, by_held_out, by_length, by_ends)
            found = [check(results, name, shown) for check in checks]
            everything += [finding for finding in found if finding is not None]
    return everything


def by_kept(results: Results, name: str, shown: str) -> Finding | None:
    """Compare a policy's win rate by the reward model with that by the kept judge.

    Scores of two models have different scales, so wins are compared and not gains.

    Args:
        results: results.json, completed.
        name: The policy.
        shown: Its name at the beginning of a sentence.

    Returns:
        What was found, or None without a kept judge.
    """
    judges = results["policies"][name]["judges"]
    rate = (judges.get("kept") or {}).get("win_rate_vs_sft")
    if rate is None or not rate["ci95"]:
        return None
    own = judges.get("reward_model") or {}
    by_own = ""
    if own.get("win_rate_vs_sft"):
        climbed = ", which it climbed," if own["climbed"] else ""
        by_own = (
            f"{percent(own['win_rate_vs_sft']['value'])} of the comparisons with SFT by the reward model{climbed} and "
        )
    low, high = rate["ci95"]
    text = (
        f"{shown} wins {by_own}{percent(rate['value'])}{'' if by_own else ' of the comparisons with SFT'} by the kept "
        f"judge (95\u00a0% interval {interval(low, high)})"
    )
    if low <= 0.5:
        return Finding(
            f"{text}: no clear gain, so the score may come from the first model's mistakes.", is_warning=True
        )
    return Finding(f"{text}.")


def by_held_out(results: Results, name: str, shown: str) -> Finding | None:
    """Compare a policy's gain over SFT by the reward model with its gain by the held-out one.

    Args:
        results: results.json, completed.
        name: The policy.
        shown: Its name at the beginning of a sentence.

    Returns:
        What was found, or None where either gain is unknown.
    """
    held_out = results["overoptimisation"][name]["held_out"]
    score, sft_score = (number(results["policies"][policy]["score"]) for policy in (name, "sft"))
    if held_out is None or held_out["difference_to_sft"] is None or score is None or sft_score is None:
        return None
    gain, other = score - sft_score, held_out["difference_to_sft"]
    other_text = f"{fixed(other['value'])} by the held-out one"
    if other["ci95"]:
        other_text += f" ({span(other)})"
    if gain < 0:
        text = f"{shown} loses {fixed(-gain)} against SFT by the reward model; its gain is {other_text}."
        return Finding(text, is_warning=True)
    text = f"{shown} gains {fixed(gain)} over SFT by the reward model, and {other_text}"
    if gain == 0:
        return Finding(f"{text}.")
    lowest = (other["ci95"] or [other["value"]])[0]
    if lowest <= 0:
        text += ": no clear gain, so the score may come from the first model's mistakes."
        return Finding(text, is_warning=True)
    confirmed = "all" if other["value"] >= gain else percent(other["value"] / gain)
    return Finding(f"{text}, which confirms {confirmed} of it.")


def by_length(results: Results, name: str, shown: str) -> Finding | None:
    """Say whether a policy's gain over SFT goes with longer responses.

    Args:
        results: results.json, completed.
        name: The policy.
        shown: Its name at the beginning of a sentence.

    Returns:
        What was found, or None where the correlation is unknown.
    """
    check = results["overoptimisation"][name]["length"]
    gain = check["gain"] if check else None
    length, sft_length = (number(results["policies"][policy]["length"]) for policy in (name, "sft"))
    if not gain or gain["ci95"] is None or length is None or sft_length is None:
        return None
    correlation = f"rank correlation {fixed(gain['value'])}, {span(gain)}"
    if gain["ci95"][0] <= 0:
        return Finding(f"{shown}'s gain does not clearly go with longer responses ({correlation}).")
    if length <= sft_length:
        return Finding(f"{shown}'s gain goes with length ({correlation}), but its mean response did not grow longer.")
    text = (
        f"{shown}'s responses gain most where they grew longest ({correlation}), and their mean length grew from "
        f"{fixed(sft_length, 1)} to {fixed(length, 1)} tokens: length alone may explain part of the gain."
    )
    return Finding(text, is_warning=True)


def by_ends(results: Results, name: str, shown: str) -> Finding | None:
    """Warn where the reward model scores cut-off responses at least as high as finished ones.

    Args:
        results: results.json, completed.
        name: The policy.
        shown: Its name at the beginning of a sentence.

    Returns:
        The warning, or None where there is no reason for one.
    """
    difference = (results["overoptimisation"][name]["cut"] or {}).get("difference")
    if difference is None or difference["ci95"] is None or difference["value"] < 0:
        return None
    penalty = results["missing_eos_score"]
    if penalty is None:
        safeguard = "nothing keeps a policy from never ending"
    else:
        safeguard = f"only missing_eos_score {fixed(penalty, 1)} keeps a policy from never ending"
    text = (
        f"The reward model does not score {shown}'s cut-off responses lower than its finished ones (difference "
        f"{fixed(difference['value'])}, {span(difference)}): {safeguard}."
    )
    return Finding(text, is_warning=True)


def span(estimate: dict[str, Any]) -> str:
    """Return "95 % interval a to b" of an estimate that has one."""
    return f"95\u00a0% interval {fixed(estimate['ci95'][0])} to {fixed(estimate['ci95'][1])}"


# -- tables --------------------------------------------------------------------------------------


def tables(results: Results, names: dict[str, str]) -> list[Table]:
    """Return the checks that need no gold as tables, policies in rows.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.

    Returns:
        A table for each check that could be made.
    """
    checks = {name: found for name, found in results["overoptimisation"].items() if found is not None}
    held_out = [held_out_row(results, names, name) for name, check in checks.items() if check["held_out"]]
    lengths = [length_row(results, names, name) for name, check in checks.items() if check["length"]]
    cut = [cut_row(results, names, name) for name, check in checks.items() if check["cut"]]
    candidates = [
        Table("Against a reward model of another seed",
              ("policy", "score of the reward model", "score of the held-out one", "gain over SFT, by the first",
               "gain over SFT, by the held-out one", "wins against SFT by the held-out one"), tuple(held_out)),
        Table("Score against length, responses that ended",
              ("policy", "mean length, all responses", "rank correlation of score and length",
               "rank correlation of the gains over SFT in both, by prompt"), tuple(lengths)),
        Table("Responses that were cut off",
              ("policy", "cut off", "mean score of finished ones",
               "mean score of cut-off ones (before missing_eos_score)", "difference, cut off less finished"),
              tuple(cut)),
    ]  # fmt: skip
    return [dense(table) for table in candidates if table.rows]


def held_out_row(results: Results, names: dict[str, str], name: str) -> tuple[Cell, ...]:
    """Return a policy's row of the comparison with the held-out reward model."""
    held_out = results["overoptimisation"][name]["held_out"]
    score, sft_score = (number(results["policies"][policy]["score"]) for policy in (name, "sft"))
    gain = results["policies"][name]["differences_to_sft"]["score"]
    if gain is None and name != "sft" and score is not None and sft_score is not None:
        gain = {"value": score - sft_score}  # an older version gives no interval
    rate = held_out["win_rate_vs_sft"] or {}
    return (
        policy_cell(name, names),
        value_cell(score, 2, results["policies"][name]["ci95"]["score"]),
        estimate_cell(held_out["score"], 2),
        estimate_cell(gain, 2),
        estimate_cell(held_out["difference_to_sft"], 2),
        share_cell(rate.get("value"), rate.get("ci95")),
    )


def length_row(results: Results, names: dict[str, str], name: str) -> tuple[Cell, ...]:
    """Return a policy's row of the correlation of score and length."""
    check = results["overoptimisation"][name]["length"]
    policy = results["policies"][name]
    length = value_cell(policy["length"], 1, policy["ci95"]["length"])
    return (policy_cell(name, names), length, estimate_cell(check["within"], 2), estimate_cell(check["gain"], 2))


def cut_row(results: Results, names: dict[str, str], name: str) -> tuple[Cell, ...]:
    """Return a policy's row of the scores of cut-off and finished responses."""
    cut = results["overoptimisation"][name]["cut"]
    ci95 = cut.get("ci95") or {}
    share = share_cell(cut["share"], ci95.get("share"))
    return (
        policy_cell(name, names),
        Cell(share.text, f"{cut['n']:,}; {share.small}" if share.small else f"{cut['n']:,}"),
        value_cell(cut["finished_score"], 2, ci95.get("finished_score")),
        value_cell(cut["cut_score"], 2, ci95.get("cut_score")),
        estimate_cell(cut["difference"], 2),
    )


def gold_table(samples: list[dict[str, Any]], results: Results, names: dict[str, str]) -> list[Table]:
    """Compare score and gold over each policy's samples.

    The columns are Spearman's ρ of score and gold, and how often both prefer the same response when
    a policy's responses are compared with SFT's to the same prompt.

    Args:
        samples: Rows of responses.jsonl.
        results: results.json, completed.
        names: Policy → its name on the page.

    Returns:
        The table, or none where there is no gold or no score.
    """
    if results["judge"] != "gold":
        return []
    sft_prompts = by_prompt(samples, "sft")
    rows = []
    for name in results["policies"]:
        prompts = by_prompt(samples, name)
        scored = [row for rows_of_prompt in prompts for row in rows_of_prompt if number(row.get("score")) is not None]
        rho = correlation_estimate(
            [row["score"] for row in scored],
            [row["gold"]["overall"] for row in scored],
            [cluster_of(r) for r in scored],
        )
        same = agreement(prompts, sft_prompts) or {}
        rows.append(
            (policy_cell(name, names), estimate_cell(rho, 2), share_cell(same.get("value"), same.get("ci95"), 0))
        )
    if all(row[1].text == NONE for row in rows):
        return []
    head = ("policy", "rank correlation of score and gold", "prefer the same response, against SFT's")
    return [Table("Score and gold", head, tuple(rows))]


def agreement(prompts: list[list[dict[str, Any]]], sft_prompts: list[list[dict[str, Any]]]) -> dict[str, Any] | None:
    """Estimate how often score and gold prefer the same response, a policy's or SFT's.

    Args:
        prompts: The policy's rows of responses.jsonl, grouped by prompt.
        sft_prompts: SFT's rows, in the same groups.

    Returns:
        The share of all comparisons in which neither is a tie, as from `share_estimate`; None where
        there are none.
    """
    decided, clusters = [], []
    for ours, theirs in zip(prompts, sft_prompts, strict=True):
        for a in ours:
            for b in theirs:
                if number(a.get("score")) is None or number(b.get("score")) is None:
                    continue
                product = (a["score"] - b["score"]) * (a["gold"]["overall"] - b["gold"]["overall"])
                if product != 0:
                    decided.append(float(product > 0))
                    clusters.append(cluster_of(a))
    return share_estimate(decided, clusters) if decided else None


def cluster_of(row: dict[str, Any]) -> str:
    """Return the independent unit of a response: its task where it is known, or its prompt."""
    return row.get("cluster") or str(row["prompt"])


def by_prompt(samples: list[dict[str, Any]], policy: str) -> list[list[dict[str, Any]]]:
    """Return a policy's rows of responses.jsonl, grouped by prompt: each begins at sample 0."""
    groups: list[list[dict[str, Any]]] = []
    for row in samples:
        if row["policy"] == policy:
            if row["sample"] == 0:
                groups.append([])
            groups[-1].append(row)
    return groups

"""Put the results into sentences, for the page and for the terminal."""

from typing import Any

from stages.page.numbers import capitalised, fixed, interval, listed, number, percent
from stages.page.results import PROMPTED, judge_name, quality
from stages.settings.evaluate import difference_lines

MANY_CUT = 1 / 3
"""Share of cut-off responses above which the page warns."""


def judge_of(results: dict[str, Any]) -> str:
    """Return the name of the judge that decides."""
    return judge_name(results["judge_name"])


def marks(policy: dict[str, Any]) -> str:
    """Return the marks after a policy's name in a table, which `notes` explains."""
    text = ""
    if policy["asked"] != "chat":
        text += " *"
    if policy["judge_climbed"]:
        text += " †"
    return text


def notes(results: dict[str, Any]) -> list[str]:
    """Return the notes below the tables: units, the judge and what the marks mean.

    Args:
        results: results.json, completed.
    """
    policies = results["policies"]
    units = "KL in nats and length in tokens, both per response"
    if any(policy["win_rate_vs_sft"] for policy in policies.values()):
        units = f"win rates with 95 % intervals, ties count as half; {units}"
    lines = [units]
    if results["judge"] == "gold":
        lines.append("gold is the embedded world's own scorer, from 0 to 1; new tasks are those not in training data")
    elif results["judge_name"] == "kept":
        lines.append("judged by the kept judge, a reward model that learned from rankings which train nothing else")
    elif results["judge_name"] is not None:
        lines.append(f"judged by {judge_of(results)}")
    else:
        lines.append("no reward model judged the responses")
    prompted = {policy["asked"] for policy in policies.values()} - {"chat"}
    lines += [f"* {PROMPTED[form]}, not through the chat template" for form in sorted(prompted)]
    climbed = any(verdict["climbed"] for policy in policies.values() for verdict in policy["judges"].values())
    if climbed and (len(results["judges"]) > 1 or any(policy["judge_climbed"] for policy in policies.values())):
        lines.append("† trained on the judge's score or selected by it, so the judge overrates it")
    lines += difference_lines(results["differs_from_training"] or [])
    return lines


def cut_sentences(results: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Warn about policies with more than a third of their responses cut off.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.

    Returns:
        One sentence, or none.
    """
    rates = {name: number(policy["eos_rate"]) for name, policy in results["policies"].items()}
    cut = [f"{names.get(name, name)} ({percent(1 - rate)})" for name, rate in rates.items()
           if rate is not None and 1 - rate > MANY_CUT]  # fmt: skip
    if not cut:
        return []
    length, score = results["response_length"], results["missing_eos_score"]
    where = "" if length is None else f" at {length} tokens"
    penalty = "" if score is None or results["judge"] is None else f", and each of these scores {fixed(score, 1)}"
    return [
        f"More than a third of the responses of {listed(cut)} are cut off{where}{penalty}: the figures of such a "
        f"policy describe the beginnings of responses. Raise evaluate.response_length, or train it to end."
    ]


def summary(results: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Return the sentences of the page's first paragraph on the results.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.
    """
    policies, judge = results["policies"], results["judge_name"]
    what = "mean gold quality (0 to 1)" if judge == "gold" else f"the mean score of {judge_of(results)}"
    scores = {name: quality(policy, judge) for name, policy in policies.items()}
    values = [f"{fixed(score)} for {names[name]}" for name, score in scores.items() if score is not None]
    if values:
        sentences = [f"On {results['prompts'] or 'the evaluation'} prompts, {what} is {listed(values)}."]
    else:
        sentences = [
            f"Each policy responded to {results['prompts'] or 'the evaluation'} prompts; no reward model judged the "
            f"responses, so read the samples below."
        ]
    sentences += held_out_sentences(results, names)
    for name in ("base", "ppo", "dpo"):
        comparison = against_sft(results, names, name)
        if comparison is not None:
            sentences.append(comparison)
    return sentences + judge_sentence(results, names) + cut_sentences(results, names) + accuracy_sentence(results)


def held_out_sentences(results: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Say how far the evaluation prompts are held out, and give gold on those that are.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.
    """
    leaked, prompts = results["leaked"], results["prompts"]
    if leaked is None or prompts is None:
        return []
    if results["leaked_by"] != "task":
        if not leaked:
            return ["None of these prompts is a near copy of a training prompt."]
        near_copies = "1 is a near copy" if leaked == 1 else f"{leaked} are near copies"
        return [f"Of these prompts {near_copies} of training prompts, so results on them partly measure memory."]
    sentences = [
        f"{leaked} of the prompts set tasks that also occur in training data, in other words; the tasks of the other "
        f"{prompts - leaked} do not."
    ]
    held_out = {n: p["gold_held_out_tasks"] for n, p in results["policies"].items() if p["gold_held_out_tasks"]}
    if held_out:
        values = [f"{fixed(gold['overall'])} for {names[name]}" for name, gold in held_out.items()]
        sentences.append(f"On the held-out tasks only, gold is {listed(values)}.")
    return sentences


def against_sft(results: dict[str, Any], names: dict[str, str], name: str) -> str | None:
    """Compare a policy with SFT by the interval of its win rate.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.
        name: The policy.

    Returns:
        A sentence, or None where there is no win rate.
    """
    policy = results["policies"].get(name)
    if policy is None or policy["win_rate_vs_sft"] is None:
        return None
    low, high = policy["win_rate_vs_sft"]["ci95"]
    if low > 0.5:
        verdict = "better than"
    elif high < 0.5:
        verdict = "worse than"
    else:
        verdict = "not clearly different from"
    prompted = f" ({PROMPTED[policy['asked']]})" if PROMPTED[policy["asked"]] else ""
    kl = policy["kl_to_sft"]
    distance = "" if number(kl) is None else f" at a KL of {fixed(kl, 1)} nats per response"
    return (
        f"{capitalised(names[name])}{prompted} is {verdict} SFT: it wins {percent(policy['win_rate_vs_sft']['value'])} "
        f"of the comparisons (95\u00a0% interval {interval(low, high)}){distance}."
    )


def judge_sentence(results: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Name the policies for which the judge is not independent; no sentence where it is for all.

    Of the kept judge its accuracy is given: its verdicts are worth as much.
    """
    maximisers = [names[name] for name, policy in results["policies"].items() if policy["judge_climbed"]]
    if not maximisers:
        return kept_sentence(results)
    verb, pronoun = ("was", "it") if len(maximisers) == 1 else ("were", "them")
    return [
        f"The judge is the reward model itself, which {' and '.join(maximisers)} {verb} trained on or selected by, so "
        f"it overrates {pronoun}."
    ]


def kept_sentence(results: dict[str, Any]) -> list[str]:
    """Say how good the kept judge is, where it decides."""
    if results["judge_name"] != "kept":
        return []
    judge = results["judges"]["kept"]
    what = "The kept judge is a reward model that no policy was trained on or selected by"
    if number(judge["accuracy"]) is None:
        return [f"{what}."]
    span = f" (95\u00a0% interval {interval(*judge['accuracy_ci95'])})" if judge["accuracy_ci95"] else ""
    return [
        f"{what}; it agrees with the labeler on {percent(judge['accuracy'])}{span} of {judge['n_pairs'] or 'the'} "
        f"held-out pairs."
    ]


def accuracy_sentence(results: dict[str, Any]) -> list[str]:
    """Give the reward model's accuracy on held-out pairs; no sentence where it was not measured."""
    reward_model = results["reward_model"]
    if number(reward_model["accuracy"]) is None:
        return []
    references = []
    if number(reward_model["labeler_agreement"]) is not None:
        references.append(f"two labelers agree on {percent(reward_model['labeler_agreement'], 1)}")
    if number(reward_model["accuracy_ceiling"]) is not None:
        references.append(f"the best possible scorer would reach {percent(reward_model['accuracy_ceiling'], 1)}")
    comparison = f"; {' and '.join(references)}" if references else ""
    return [
        f"The reward model agrees with the labeler on {percent(reward_model['accuracy'], 1)} of "
        f"{reward_model['n_pairs'] or 'the'} held-out pairs{comparison}."
    ]


def tiles(results: dict[str, Any], names: dict[str, str]) -> list[tuple[str, str, str]]:
    """Choose the figures that the page shows first.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.

    Returns:
        (label, value, note) of each.
    """
    policies, reward_model = results["policies"], results["reward_model"]
    trained = [name for name in ("ppo", "dpo") if name in policies]
    chosen = []
    for name in trained:
        chosen += policy_tiles(results, names, name)
    accuracy = number(reward_model["accuracy"])
    if accuracy is not None:
        parts = []
        if number(reward_model["accuracy_ceiling"]) is not None:
            parts.append(f"{percent(reward_model['accuracy_ceiling'], 1)} is the best possible")
        if reward_model["accuracy_ci95"]:
            parts.append(f"95\u00a0% interval {interval(*reward_model['accuracy_ci95'])}")
        chosen.append(("reward model accuracy", percent(accuracy, 1), "; ".join(parts)))
    shown = ["sft", *trained[:1]]
    perplexities = [policies[name]["pretrain_perplexity"] for name in shown]
    if len(shown) > 1 and number(perplexities[0]) is not None:
        note = f"SFT → {names[shown[1]]}; lower is better"
        chosen.append(("pretraining perplexity", " → ".join(map(fixed, perplexities)), note))
    if accuracy is None and number(policies["sft"]["eos_rate"]) is not None:
        rates = [percent(policies[name]["eos_rate"]) for name in shown]
        chosen.append(("responses that end", " → ".join(rates), " → ".join(names[name] for name in shown)))
    return chosen


def policy_tiles(results: dict[str, Any], names: dict[str, str], name: str) -> list[tuple[str, str, str]]:
    """Return the (label, value, note) of what a trained policy gained over SFT.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.
        name: The policy.
    """
    sft, policy = results["policies"]["sft"], results["policies"][name]
    gain, rate = policy["difference_to_sft"], policy["win_rate_vs_sft"]
    judge = results["judge_name"]
    value, sft_value = quality(policy, judge), quality(sft, judge)
    if value is None or gain is None:
        distance = f"{fixed(policy['kl_to_sft'], 1)} nats"
        return [(f"KL, SFT → {names[name]}", distance, "per response: how far it has moved")]
    note = f"difference {fixed(gain['value'])}"
    if policy["judge_climbed"]:
        note = f"by the model it maximised; {note}"
    if gain["ci95"]:
        note += f", 95\u00a0% interval {fixed(gain['ci95'][0])} to {fixed(gain['ci95'][1])}"
    unit = {"gold": "gold", "reward_model": "score"}.get(judge, f"score of {judge_of(results)}")
    chosen = [(f"{unit}, SFT → {names[name]}", f"{fixed(sft_value)} → {fixed(value)}", note)]
    if rate is not None:
        note = f"95\u00a0% interval {interval(*rate['ci95'])}"
        if policy["judge_climbed"]:
            note += "; judged by the model it maximised"
        chosen.append((f"{names[name]} against SFT", f"{percent(rate['value'])} won", note))
    return chosen

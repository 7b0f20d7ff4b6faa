"""What the report says in words: results.json in, numbers as people read them, sentences and tiles out. Pure."""

import copy
import math
from datetime import datetime

NONE = "–"
"""What stands where there is no number."""
NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO", "dpo": "DPO", "best_of_n": "best of n"}
MANY_CUT = 1 / 3
"""Share of cut answers above which the page says so."""
POLICY = {  # every figure of a policy that the page may show
    "asked": "chat", "judge_climbed": False, "ci95": {},
    **dict.fromkeys((
        "score", "kl_to_sft", "length", "eos_rate", "pretrain_perplexity", "win_rate_vs_sft", "difference_to_sft",
        "gold", "gold_known_tasks", "gold_held_out_tasks",
    )),
}  # fmt: skip
INTERVALS = ("score", "kl_to_sft", "length", "eos_rate", "pretrain_perplexity")
REWARD_MODEL = ("accuracy", "accuracy_ci95", "accuracy_ceiling", "n_pairs", "labeler_agreement", "ece",
                "orders_as_gold")  # fmt: skip
CHECKS = ("length", "cut", "held_out")
WHOLE = ("judge", "leaked", "leaked_by", "prompts", "samples_per_prompt", "clusters", "missing_eos_score",
         "response_length")  # fmt: skip
ASKED = {"chat": "", "plain": "asked in plain text", "few_shot": "asked in plain text after a few examples"}
"""How a policy was asked, as a clause."""


def complete(results: dict) -> dict:
    """Return results.json with a null for every figure that it lacks.

    SFT and DPO alone have no reward model and maybe no pretraining text, and older versions measured less: what was
    not measured is absent or null, and the page leaves it out.
    """
    made = dict.fromkeys(WHOLE) | copy.deepcopy(results)
    made["reward_model"] = dict.fromkeys(REWARD_MODEL) | (results.get("reward_model") or {})
    checks = results.get("overoptimisation") or {}
    made["overoptimisation"] = {name: dict.fromkeys(CHECKS) | found for name, found in checks.items() if found}
    for name, found in results["policies"].items():
        policy = copy.deepcopy(POLICY) | {k: v for k, v in found.items() if v is not None or k not in ("asked", "ci95")}
        policy["ci95"] = dict.fromkeys(INTERVALS) | policy["ci95"]
        made["policies"][name] = policy
    return made


def number(value) -> float | None:
    """Return a finite number, or None: journals hold "NaN" and null too."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def fixed(value, digits: int = 2) -> str:
    """A number with so many decimals, a real minus sign, "–" where there is none."""
    value = number(value)
    if value is None:
        return NONE
    text = f"{value:.{digits}f}".replace("-", "−")
    return text.removeprefix("−") if not text.strip("−0.") else text


def percent(value, digits: int = 0) -> str:
    return NONE if number(value) is None else f"{fixed(100 * value, digits)}\u00a0%"


def interval(low: float, high: float, digits: int = 0) -> str:
    """Of shares, in percent: 60 to 70."""
    return f"{fixed(100 * low, digits)} to {fixed(100 * high, digits)}"


def moment(text: str) -> str:
    """When, in the manifest's own time zone (UTC), so that a page does not depend on who renders it."""
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC"


def duration(seconds: float) -> str:
    """Say how long something took: 41 s, 4 min 33 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def listed(parts: list[str]) -> str:
    """Join words as a sentence does: a, b and c."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else "".join(parts)


def judge_of(results: dict) -> str:
    """Say who judges."""
    return {"gold": "the gold scorer", "reward_model": "the reward model"}.get(results["judge"], "nobody")


def marks(policy: dict) -> str:
    """Return the marks behind a policy's name in the table; `notes` says what they mean."""
    return " *" * (policy["asked"] != "chat") + " †" * bool(policy["judge_climbed"])


def notes(results: dict) -> list[str]:
    """Say below the table what its columns and marks mean, and what to be careful with."""
    policies = results["policies"]
    lines = ["KL in nats and length in tokens a response"]
    if any(p["win_rate_vs_sft"] for p in policies.values()):
        lines[0] = f"win rates with 95 % intervals, ties half; {lines[0]}"
    if results["judge"] == "gold":
        lines.append("gold is the world's own scorer, 0 to 1; new tasks: over prompts whose task no training data set")
    elif results["judge"] == "reward_model":
        lines.append("judged by the reward model")
    else:
        lines.append("no reward model judged the answers")
    asked = {p["asked"] for p in policies.values()} - {"chat"}
    lines += [f"* {ASKED[form]}, not through the chat template" for form in sorted(asked)]
    if any(p["judge_climbed"] for p in policies.values()):
        lines.append("† trained to please the judge, or selected by it: what the judge says of it is too good")
    return lines


def cut_sentences(results: dict, names: dict[str, str]) -> list[str]:
    """Say of which policies more than a third of the answers are cut off; no sentence where of none."""
    rates = {n: number(p["eos_rate"]) for n, p in results["policies"].items()}
    cut = [f"{names.get(n, n)} ({percent(1 - rate)})" for n, rate in rates.items()
           if rate is not None and 1 - rate > MANY_CUT]  # fmt: skip
    if not cut:
        return []
    length, score = results["response_length"], results["missing_eos_score"]
    at = "" if length is None else f" at {length} tokens"
    what = "" if score is None or results["judge"] is None else f", and each of these scores {fixed(score, 1)}"
    return [
        f"More than a third of the answers of {listed(cut)} are cut off{at}{what}: figures of such a policy are of "
        f"beginnings of answers. Raise evaluate.response_length, or teach it to end."
    ]


def quality(policy: dict) -> float | None:
    """Return what the judge says: gold overall where there is gold, otherwise the reward model's score, if any."""
    return policy["gold"]["overall"] if policy["gold"] else policy["score"]


def summary(results: dict, names: dict[str, str]) -> list[str]:
    """Say in sentences what the measured numbers say.

    Args:
        results: results.json.
        names: Policy → its name on the page.

    Returns:
        Sentences for one paragraph.
    """
    policies, rm = results["policies"], results["reward_model"]
    what = "mean gold quality (0 to 1)" if results["judge"] == "gold" else "the mean reward model score"
    each = [f"{fixed(quality(p))} for {names[n]}" for n, p in policies.items() if quality(p) is not None]
    if each:
        says = [f"On {results['prompts'] or 'the evaluation'} prompts, {what} is {listed(each)}."]
    else:
        says = [
            f"{results['prompts'] or 'The evaluation'} prompts were put to each policy; no reward model judged the "
            f"answers: read the samples below."
        ]
    says += held_out_sentences(results, names)
    says += [sentence for name in ("base", "ppo", "dpo") if (sentence := against_sft(results, names, name))]
    says += climbed_sentence(results, names) + cut_sentences(results, names)
    if number(rm["accuracy"]) is not None:
        beside = [
            f"{text} {percent(rm[key], 1)}"
            for key, text in (
                ("labeler_agreement", "two labelers agree on"),
                ("accuracy_ceiling", "the best scorer would reach"),
            )
            if number(rm[key]) is not None
        ]
        says.append(
            f"The reward model sides with the labeler on {percent(rm['accuracy'], 1)} of "
            f"{rm['n_pairs'] or 'the'} held-out pairs" + (f"; {' and '.join(beside)}" if beside else "") + "."
        )
    return says


def held_out_sentences(results: dict, names: dict[str, str]) -> list[str]:
    """Say how far the evaluation prompts are held out from training, and how the policies do on those that are."""
    leaked, prompts = results["leaked"], results["prompts"]
    if leaked is None or prompts is None:
        return []
    if results["leaked_by"] != "task":
        if leaked:
            which = "1 is a near copy" if leaked == 1 else f"{leaked} are near copies"
            return [f"Of these prompts {which} of training prompts: what is measured on them is memory too."]
        return ["None of these prompts is a near copy of a training prompt."]
    says = [
        f"{leaked} of the prompts set tasks that training data set too, in other words; {prompts - leaked} set tasks "
        f"that no training data set."
    ]
    new = {n: p["gold_held_out_tasks"] for n, p in results["policies"].items() if p["gold_held_out_tasks"]}
    if new:
        each = [f"{fixed(gold['overall'])} for {names[name]}" for name, gold in new.items()]
        says.append(f"On the held-out tasks alone gold is {listed(each)}.")
    return says


def against_sft(results: dict, names: dict[str, str], name: str) -> str | None:
    """Compare a policy with SFT in a sentence, by the interval of its win rate; None where there is none."""
    p = results["policies"].get(name)
    if p is None or p["win_rate_vs_sft"] is None:
        return None
    low, high = p["win_rate_vs_sft"]["ci95"]
    verdict = "better than" if low > 0.5 else "worse than" if high < 0.5 else "not clearly different from"
    asked = f" ({ASKED[p['asked']]})" if ASKED[p["asked"]] else ""
    kl = "" if number(p["kl_to_sft"]) is None else f" at {fixed(p['kl_to_sft'], 1)} nats of KL a response"
    return (
        f"{names[name][:1].upper()}{names[name][1:]}{asked} is {verdict} SFT: it wins "
        f"{percent(p['win_rate_vs_sft']['value'])} of the comparisons (95\u00a0% interval {interval(low, high)}){kl}."
    )


def climbed_sentence(results: dict, names: dict[str, str]) -> list[str]:
    """Say for which policies the judge is not independent; no sentence where it is for all."""
    climbed = [names[name] for name, p in results["policies"].items() if p["judge_climbed"]]
    if not climbed:
        return []
    was, them = ("was", "it") if len(climbed) == 1 else ("were", "them")
    return [
        f"The judge is the reward model itself, which {' and '.join(climbed)} {was} trained to please or selected by: "
        f"what it says of {them} is too good."
    ]


def tiles(results: dict, names: dict[str, str]) -> list[tuple[str, str, str]]:
    """Choose the figures to see first.

    Returns:
        (label, value, note) of each.
    """
    policies, rm = results["policies"], results["reward_model"]
    sft, out = policies["sft"], []
    unit = "gold" if results["judge"] == "gold" else "score"
    for name in (n for n in ("ppo", "dpo") if n in policies):
        p = policies[name]
        gain = p["difference_to_sft"]
        if quality(p) is None or gain is None:
            kl = f"{fixed(p['kl_to_sft'], 1)} nats"
            out.append((f"KL, SFT → {names[name]}", kl, "a response: how far it has gone"))
            continue
        note = f"difference {fixed(gain['value'])}"
        if p["judge_climbed"]:
            note = f"by the model it climbed; {note}"
        if gain["ci95"]:
            note += f", 95\u00a0% interval {fixed(gain['ci95'][0])} to {fixed(gain['ci95'][1])}"
        out.append((f"{unit}, SFT → {names[name]}", f"{fixed(quality(sft))} → {fixed(quality(p))}", note))
        rate = p["win_rate_vs_sft"]
        if rate is not None:
            judge = "; judged by the model it climbed" if p["judge_climbed"] else ""
            note = f"95\u00a0% interval {interval(*rate['ci95'])}{judge}"
            out.append((f"{names[name]} against SFT", f"{percent(rate['value'])} won", note))
    if number(rm["accuracy"]) is not None:
        ceiling = number(rm["accuracy_ceiling"])
        beside = [f"of {percent(ceiling, 1)} reachable"] if ceiling is not None else []
        beside += [f"95\u00a0% interval {interval(*rm['accuracy_ci95'])}"] if rm["accuracy_ci95"] else []
        out.append(("reward model accuracy", percent(rm["accuracy"], 1), "; ".join(beside)))
    trained = next((name for name in ("ppo", "dpo") if name in policies), None)
    if trained and number(sft["pretrain_perplexity"]) is not None:
        before, after = (fixed(policies[name]["pretrain_perplexity"]) for name in ("sft", trained))
        out.append(("pretraining perplexity", f"{before} → {after}", f"SFT → {names[trained]}; lower is better"))
    if number(rm["accuracy"]) is None and number(sft["eos_rate"]) is not None:
        ends = [percent(policies[name]["eos_rate"]) for name in ("sft", *[trained] * bool(trained))]
        out.append(("answers that end", " → ".join(ends), " → ".join(names[n] for n in ("sft", trained) if n)))
    return out

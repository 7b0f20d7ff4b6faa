"""What the report says in words: results.json in, numbers as people read them, sentences and tiles out. Pure."""

from datetime import datetime

from stages.report_plots import number

ASKED = {"chat": "", "plain": "asked in plain text", "few_shot": "asked in plain text after a few examples"}
"""How a policy was asked, as a clause."""


def fixed(value, digits: int = 2) -> str:
    """A number with so many decimals, a real minus sign, "–" where there is none."""
    value = number(value)
    if value is None:
        return "–"
    text = f"{value:.{digits}f}".replace("-", "−")
    return text.removeprefix("−") if not text.strip("−0.") else text


def percent(value, digits: int = 0) -> str:
    return "–" if number(value) is None else f"{fixed(100 * value, digits)}\u00a0%"


def interval(low: float, high: float, digits: int = 0) -> str:
    """Of shares, in percent: 60 to 70."""
    return f"{fixed(100 * low, digits)} to {fixed(100 * high, digits)}"


def moment(text: str) -> str:
    """When, in the manifest's own time zone (UTC), so that a page does not depend on who renders it."""
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC"


def quality(policy: dict) -> float | None:
    """Return what the judge says: gold overall where there is gold, otherwise the reward model's score; None where
    nothing judges."""
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
    each = [f"{fixed(quality(policies[p]))} for {names[p]}" for p in policies]
    listed = f"{', '.join(each[:-1])} and {each[-1]}" if each[1:] else each[0]
    says = [f"On {results['prompts']} prompts, {what} is {listed}."]
    if results["judge"] is None:
        says = [f"{results['prompts']} prompts were put to each policy; no reward model judged the answers."]
    says += held_out_sentences(results, names)
    says += [sentence for name in ("base", "ppo", "dpo") if (sentence := against_sft(results, names, name))]
    says += climbed_sentence(results, names)
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
            f"{rm['n_pairs']} held-out pairs" + (f"; {' and '.join(beside)}" if beside else "") + "."
        )
    return says


def held_out_sentences(results: dict, names: dict[str, str]) -> list[str]:
    """Say how far the evaluation prompts are held out from training, and how the policies do on those that are."""
    leaked, prompts = results["leaked"], results["prompts"]
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
        says.append(f"On the held-out tasks alone gold is {', '.join(each[:-1])} and {each[-1]}." if each[1:] else
                    f"On the held-out tasks alone gold is {each[0]}.")  # fmt: skip
    return says


def against_sft(results: dict, names: dict[str, str], name: str) -> str | None:
    """Compare a policy with SFT in a sentence, by the interval of its win rate; None where there is none."""
    p = results["policies"].get(name)
    if p is None or p["win_rate_vs_sft"] is None:
        return None
    low, high = p["win_rate_vs_sft"]["ci95"]
    verdict = "better than" if low > 0.5 else "worse than" if high < 0.5 else "not clearly different from"
    asked = f" ({ASKED[p['asked']]})" if ASKED[p["asked"]] else ""
    kl = "" if p["kl_to_sft"] is None else f" at {fixed(p['kl_to_sft'], 1)} nats of KL a response"
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
        if gain is None:  # nothing judges
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
        beside = f"95\u00a0% interval {interval(*rm['accuracy_ci95'])}"
        if ceiling is not None:
            beside = f"of {percent(ceiling, 1)} reachable; {beside}"
        out.append(("reward model accuracy", percent(rm["accuracy"], 1), beside))
    if "ppo" in policies and number(sft["pretrain_perplexity"]) is not None:
        before, after = (fixed(policies[name]["pretrain_perplexity"]) for name in ("sft", "ppo"))
        out.append(("pretraining perplexity", f"{before} → {after}", "SFT → PPO; lower is better"))
    return out

"""Choose the plots of what training gained, and at what price."""

import math
from collections.abc import Sequence

from stages.page.curves import Journal
from stages.page.numbers import listed, number
from stages.page.plot import Curves, Dots, Key, Label, Line, Mark, Plot, Point, RowMark, Rows, Spans
from stages.page.sentences import judge_of

PARTS = ("helpful", "honest", "harmless", "overall")
"""The parts of gold."""


def win_rates(results: dict, names: dict[str, str]) -> list[Plot]:
    """Return the win rates against SFT; no plot where there are none.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.
    """
    rows = []
    for name, policy in results["policies"].items():
        rate = policy["win_rate_vs_sft"]
        if name != "sft" and rate:
            rows.append((names[name], [RowMark(rate["value"], name, f"{rate['value']:.3f}", rate["ci95"])]))
    if not rows:
        return []
    caption = (
        f"Share of evaluation prompts on which {judge_of(results)} prefers the policy's response to SFT's. A tie "
        f"counts as half. Bars are 95 % intervals; one that crosses the dashed line could be chance."
    )
    judged_by_own = [names[n] for n, p in results["policies"].items() if p["judge_climbed"] and p["win_rate_vs_sft"]]
    if judged_by_own:
        caption += f" The judge is the model that {' and '.join(judged_by_own)} maximised, which flatters it."
    drawing = Rows(rows, "win rate against SFT", reference=0.5)
    return [Plot("win-rates", "Win rates", caption, drawing, size="large")]


def gold_parts(results: dict, names: dict[str, str]) -> list[Plot]:
    """Return each part of gold, and gold on known and on held-out tasks; no plot without gold.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.
    """
    gold = {name: policy["gold"] for name, policy in results["policies"].items() if policy["gold"]}
    if not gold:
        return []
    rows = []
    for part in PARTS:
        marks = [RowMark(values[part], n, f"{names[n]} {values[part]:.3f}", interval_of(values, part))
                 for n, values in gold.items()]  # fmt: skip
        rows.append((part, marks))
    caption = "Each row is one part of gold and each dot a policy, with 95 % intervals. Further right is better."
    halves = {
        "known tasks": {name: results["policies"][name]["gold_known_tasks"] for name in gold},
        "held-out tasks": {name: results["policies"][name]["gold_held_out_tasks"] for name in gold},
    }
    complete = {title: half for title, half in halves.items() if all(half.values())}
    for title, half in complete.items():
        marks = [RowMark(values["overall"], n, f"{names[n]} {values['overall']:.3f}", values["ci95"])
                 for n, values in half.items()]  # fmt: skip
        rows.append((title, marks))
    if len(complete) == len(halves):
        caption += (
            " The last two rows are overall gold for tasks that also occur in training and for tasks that do not."
        )
    keys = tuple(Key(names[name], name, "dot") for name in gold)
    drawing = Rows(rows, "mean gold, 0 to 1", labelled=False)
    return [Plot("gold-by-part", "Where quality comes from", caption, drawing, keys, size="large")]


def interval_of(gold: dict, part: str) -> list[float] | None:
    """Return the interval of a part of gold; None where an older version gave none."""
    return gold["ci95"] if part == "overall" else (gold.get("parts_ci95") or {}).get(part)


def frontier(results: dict, journal: Journal | None, best_of: int, names: dict[str, str]) -> list[Plot]:
    """Return score and gold of every policy against its KL to SFT.

    Args:
        results: results.json, completed.
        journal: PPO's journal, whose held-out evaluations are drawn as a path; None without PPO.
        best_of: The n of best of n.
        names: Policy → its name on the page.
    """
    policies = results["policies"]
    kl = {name: number(policy["kl_to_sft"]) for name, policy in policies.items()}
    note = ""
    if "best_of_n" in policies:
        note = " Best of n is drawn at its theoretical KL, ln n − (n − 1)/n."
        if kl["best_of_n"] is None:
            kl["best_of_n"] = math.log(best_of) - (best_of - 1) / best_of
    scores = {name: number(policy["score"]) for name, policy in policies.items()}
    gold = {name: number((policy["gold"] or {}).get("overall")) for name, policy in policies.items()}
    score_spans = spans_of(kl, {name: policy["ci95"]["score"] for name, policy in policies.items()})
    gold_spans = spans_of(kl, {name: (policy["gold"] or {}).get("ci95") for name, policy in policies.items()})
    path = path_of(journal.evaluations) if journal else []
    score_caption = (
        "Up is a higher score, right is further from SFT; bars are 95 % intervals."
        f"{maximiser_warning(policies, names)}{note}"
    )
    gold_caption = (
        "The same with the truth in place of the reward model. A gain in score that gold does not follow comes from "
        f"the reward model's mistakes.{note}"
    )
    plots = []
    if len(labels := labels_of(kl, scores, names)) > 1:
        keys = (Key("PPO during training, held out", "ppo", "faint"),) if path else ()
        drawing = against_kl(labels, "score of the reward model", score_spans, path)
        plots.append(Plot("score-against-kl", "Reward against KL", score_caption, drawing, keys, size="large"))
    if len(labels := labels_of(kl, gold, names)) > 1:
        drawing = against_kl(labels, "gold, overall (0 to 1)", gold_spans)
        plots.append(Plot("gold-against-kl", "Gold against KL", gold_caption, drawing, size="large"))
    return plots


def maximiser_warning(policies: dict[str, dict], names: dict[str, str]) -> str:
    """Return a sentence on the policies that maximise the score; "" where none does."""
    maximisers = [
        names[name]
        for name in ("ppo", "best_of_n")
        # best of n may be selected by another scorer
        if name in policies and policies[name]["judges"].get("reward_model", {}).get("climbed", True)
    ]
    if not maximisers:
        return ""
    verb = "maximise" if len(maximisers) > 1 else "maximises"
    return f" {listed(maximisers)} {verb} this score, so a higher value need not mean better responses."


def labels_of(kl: dict[str, float | None], values: dict[str, float | None], names: dict[str, str]) -> list[Label]:
    """Return the label of every policy whose KL and value are known.

    Args:
        kl: Policy → its KL to SFT.
        values: Policy → its score or gold.
        names: Policy → its name on the page.
    """
    labels = []
    for policy, x in kl.items():
        y = values[policy]
        if x is not None and y is not None:
            labels.append(Label(x, y, names[policy], policy))
    return labels


def spans_of(kl: dict[str, float | None], intervals: dict[str, Sequence[float] | None]) -> list[Spans]:
    """Return the vertical interval of each policy whose KL and interval are known.

    Args:
        kl: Policy → its KL to SFT.
        intervals: Policy → the 95 % interval of its value.
    """
    spans = []
    for policy, ends in intervals.items():
        x = kl[policy]
        if x is not None and ends is not None:
            spans.append(Spans([(x, ends[0], ends[1])], policy))
    return spans


def against_kl(labels: Sequence[Label], unit: str, spans: Sequence[Spans], path: Sequence[Point] = ()) -> Curves:
    """Return a drawing of one value of every policy against its KL to SFT.

    Args:
        labels: The name of each policy, where it is drawn.
        unit: What the y axis shows.
        spans: The interval of each policy's value.
        path: KL and value of PPO while it trained.
    """
    marks: list[Mark] = [*spans]
    if path:
        marks += [Line(path, "ppo", faint=True), Dots(path, "ppo", 4)]
    for label in labels:
        tip = f"{label.text}: {label.y:.3f} at {label.x:.2f} nats"
        marks.append(Dots([(label.x, label.y)], label.tone, 10, [tip]))
    return Curves([*marks, *labels], "KL to SFT, nats per response (√ axis)", unit, root_x=True)


def path_of(evaluations: Sequence[dict]) -> list[Point]:
    """Return KL and score of each held-out evaluation of PPO."""
    return [(number(row.get("kl")), number(row.get("score"))) for row in evaluations]

"""Does the score still mean what it should? With a gold scorer and without: samples and figures of `evaluate` in;
figures, tables and sentences of the page out. Pure."""

from collections.abc import Sequence

import numpy as np

from stages.evaluation.statistics import mean_estimate, rank_correlation, share_estimate
from stages.page.svg import Axes, Figure
from stages.page.table import Cell, Table, cell, dense, policy, share
from stages.page.words import NONE, fixed, number, percent

LARGE = {"width": 520, "height": 320}


# -- without gold ------------------------------------------------------------------------------------------


def sentences(results: dict, names: dict[str, str]) -> list[str]:
    """Say what the checks that need no gold found, of the policies whose score was raised.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.
    """
    says = [sentence for _, sentence in findings(results, names)]
    if any((found or {}).get("held_out") for found in results["overoptimisation"].values()):
        says.append("The held-out model learned from the same rankings: what these teach wrongly, both have learned.")
    elif says:
        says.append("There is no held-out reward model to ask; rm.held_out: true trains one.")
    return says


def warnings(results: dict, names: dict[str, str]) -> list[str]:
    """Return those sentences that speak against the score."""
    return [sentence for is_warning, sentence in findings(results, names) if is_warning]


def findings(results: dict, names: dict[str, str]) -> list[tuple[bool, str]]:
    """Return (whether it speaks against the score, sentence) of each thing that the checks found."""
    found = []
    for name in ("ppo", "dpo", "best_of_n"):
        if results["overoptimisation"].get(name) is not None:
            who = names[name][:1].upper() + names[name][1:]
            found += by_held_out(results, name, who) + by_length(results, name, who) + by_ends(results, name, who)
    return found


def by_held_out(results: dict, name: str, who: str) -> list[tuple[bool, str]]:
    """Compare a policy's gain over SFT by the reward model with its gain by the held-out one."""
    held = results["overoptimisation"][name]["held_out"]
    own, sft = (number(results["policies"][n]["score"]) for n in (name, "sft"))
    if held is None or held["difference_to_sft"] is None or own is None or sft is None:
        return []
    gain, seen = own - sft, held["difference_to_sft"]
    low = (seen["ci95"] or [seen["value"]])[0]
    text = (
        f"{who} gains {fixed(gain)} over SFT by the reward model, and {fixed(seen['value'])} by the held-out one"
        f"{f' ({span(seen)})' if seen['ci95'] else ''}"
    )
    if gain < 0:
        text = text.replace(f"gains {fixed(gain)} over SFT", f"loses {fixed(-gain)} against SFT")
        return [(True, text.replace(", and ", "; its gain is ") + ".")]
    if gain == 0:
        return [(False, f"{text}.")]
    if low <= 0:
        return [(True, f"{text}: no clear gain, and the score may have been won from the first one's mistakes.")]
    holds = "all" if seen["value"] >= gain else percent(seen["value"] / gain)
    return [(False, f"{text}: {holds} of it holds.")]


def by_length(results: dict, name: str, who: str) -> list[tuple[bool, str]]:
    """Say whether a policy's gain over SFT goes with longer answers."""
    found = results["overoptimisation"][name]["length"]
    gain = found and found["gain"]
    ours, sft = (number(results["policies"][n]["length"]) for n in (name, "sft"))
    if not gain or gain["ci95"] is None or ours is None or sft is None:
        return []
    rho = f"rank correlation {fixed(gain['value'])}, {span(gain)}"
    if gain["ci95"][0] > 0 and ours > sft:
        text = (
            f"{who}'s answers gain most where they grew longest ({rho}), and their mean length grew from "
            f"{fixed(sft, 1)} to {fixed(ours, 1)} tokens: part of the gain may be length alone."
        )
        return [(True, text)]
    if gain["ci95"][0] > 0:
        return [(False, f"{who}'s gain goes with length ({rho}), but its answers did not grow longer on average.")]
    return [(False, f"{who}'s gain does not clearly go with longer answers ({rho}).")]


def by_ends(results: dict, name: str, who: str) -> list[tuple[bool, str]]:
    """Warn where the reward model likes answers that never end at least as much as others."""
    gap = (results["overoptimisation"][name]["cut"] or {}).get("difference")
    if gap is None or gap["ci95"] is None or gap["value"] < 0:
        return []
    score = results["missing_eos_score"]
    but = "nothing keeps a policy from never ending" if score is None else (
        f"only missing_eos_score {fixed(score, 1)} keeps a policy from never ending"
    )  # fmt: skip
    text = (
        f"The reward model does not like {who}'s cut answers less than its finished ones (difference "
        f"{fixed(gap['value'])}, {span(gap)}): {but}."
    )
    return [(True, text)]


def span(found: dict) -> str:
    """Return "95 % interval a to b" of an estimate that has one."""
    return f"95\u00a0% interval {fixed(found['ci95'][0])} to {fixed(found['ci95'][1])}"


def tables(results: dict, names: dict[str, str]) -> list[Table]:
    """Return the three checks as tables, policies in rows; a check that could not be made gives none."""
    checks = {n: found for n, found in results["overoptimisation"].items() if found is not None}
    held, lengths, ends = [], [], []
    for name, found in checks.items():
        p, own = results["policies"][name], found["held_out"]
        if own:
            gain, rate = own["difference_to_sft"] or {}, own["win_rate_vs_sft"] or {}
            sft = number(results["policies"]["sft"]["score"])
            ours = None if name == "sft" or None in (number(p["score"]), sft) else p["score"] - sft
            held.append((policy(name, names), cell(p["score"], 2), cell(own["score"]["value"], 2, own["score"]["ci95"]),
                         cell(ours, 2), cell(gain.get("value"), 2, gain.get("ci95")),
                         share(rate.get("value"), rate.get("ci95"))))  # fmt: skip
        if within := found["length"]:
            parts = [within["within"], within["gain"] or {}]
            lengths.append((policy(name, names), cell(p["length"], 1),
                            *(cell(part.get("value"), 2, part.get("ci95")) for part in parts)))  # fmt: skip
        if not (cut := found["cut"]):
            continue
        gap = cut["difference"] or {}
        ends.append((policy(name, names), Cell(f"{cut['n']:,}", percent(cut["share"], 1)),
                     cell(cut["finished_score"], 2), cell(cut["cut_score"], 2),
                     cell(gap.get("value"), 2, gap.get("ci95"))))  # fmt: skip
    heads = (
        ("Against a reward model of another seed", ("policy", "score of the reward model", "of the held-out one",
         "gain over SFT, by the first", "gain over SFT, by the held-out one", "wins against SFT by the held-out one")),
        ("Score against length, answers that ended", ("policy", "mean length, all answers",
         "rank correlation of score and length", "of the gains over SFT in both, by prompt")),
        ("Answers that were cut off", ("policy", "cut", "finished ones score", "cut ones score (before "
         "missing_eos_score)", "cut less finished")),
    )  # fmt: skip
    parts = zip(heads, (held, lengths, ends), strict=True)
    found = [Table(label, head, tuple(rows)) for (label, head), rows in parts]
    return [dense(table) for table in found if table.rows]


def length_figures(samples: list[dict], policies: Sequence[str], names: dict[str, str]) -> list[Figure]:
    """Score against length over the answers that ended; [] for samples of an older version, or without scores."""
    rows = [r for r in samples if r.get("finished") and number(r.get("score")) is not None and "length" in r]
    points = {n: [(r["length"], r["score"], cluster_of(r)) for r in rows if r["policy"] == n] for n in policies}
    points = {n: some for n, some in points.items() if len(some) >= 10}
    if not points:
        return []
    curves = {n: binned(some, 5, mean_estimate) for n, some in points.items()}
    xs = [b[0] for c in curves.values() for b in c]
    axes = Axes(xs, [y for c in curves.values() for b in c for y in b[1:]], "length, tokens", "score", **LARGE)
    for n, curve in curves.items():
        axes.line([b[:2] for b in curve], n, "faint" if n == "base" else "line")
        for x, mean, low, high in curve:
            axes.bar(x, low, high, n)
            axes.dots([(x, mean)], n, 3.4, f"{names[n]}: mean score {mean:.2f} at {x:.1f} tokens")
    figure = Figure(
        "Score against length",
        axes.svg("mean score against length, for each policy"),
        "Five equal groups of each policy's finished answers by length, with 95 % intervals. A line that climbs "
        "steeply says that the reward model pays for length.",
        tuple((names[n], n, "dot") for n in curves),
    )
    return [figure]


def cluster_of(row: dict) -> str:
    """Return what counts as one independent unit: the task where it is known, otherwise the prompt."""
    return row.get("cluster") or str(row["prompt"])


# -- with gold ---------------------------------------------------------------------------------------------


def gold_table(samples: list[dict], results: dict, names: dict[str, str]) -> list[Table]:
    """Compare score and gold over each policy's samples; [] where there is no gold.

    The columns: Spearman's ρ of score and gold, and the share of the comparisons with SFT's responses to the same
    prompts on which both prefer the same side.
    """
    if results["judge"] != "gold":
        return []
    out = []
    for name in results["policies"]:
        mine = by_prompt(samples, name)
        pairs = [(r["score"], r["gold"]["overall"]) for own in mine for r in own if number(r.get("score")) is not None]
        agree = [
            (a["score"] - b["score"]) * (a["gold"]["overall"] - b["gold"]["overall"])
            for own, theirs in zip(mine, by_prompt(samples, "sft"), strict=True)
            for a in own
            for b in theirs
            if number(a.get("score")) is not None and number(b.get("score")) is not None
        ]
        decided = [product > 0 for product in agree if product != 0]
        same = sum(decided) / len(decided) if decided else None
        rho = rank_correlation(*zip(*pairs, strict=True)) if pairs else None
        out.append((policy(name, names), cell(rho, 2), Cell(percent(same))))
    if all(row[1].text == NONE for row in out):
        return []
    head = ("policy", "rank correlation of score and gold", "prefer the same, against SFT's response")
    return [Table("Score and gold", head, tuple(out))]


def by_prompt(samples: list[dict], policy: str) -> list[list[dict]]:
    """Return a policy's rows of responses.jsonl, grouped by prompt: a new prompt begins at sample 0."""
    groups: list[list[dict]] = []
    for row in samples:
        if row["policy"] == policy:
            if row["sample"] == 0:
                groups.append([])
            groups[-1].append(row)
    return groups


def gold_figures(samples: list[dict], policies: Sequence[str], names: dict[str, str]) -> list[Figure]:
    """Gold against score over all samples of `evaluate` (rows {policy, score, gold})."""
    rows = [r for r in samples if r.get("gold") and number(r.get("score")) is not None]
    if not rows:
        return []
    policies = [n for n in policies if any(r["policy"] == n for r in rows)]
    points = {
        n: [(r["score"], r["gold"]["overall"], cluster_of(r)) for r in rows if r["policy"] == n] for n in policies
    }
    everything = [p for n in policies for p in points[n]]
    labels, size = ("score of the reward model", "gold, overall (0 to 1)"), LARGE
    plain = Axes([x for x, _, _ in everything], [0.0, 1.0], *labels, **size)
    for n in policies:
        plain.cloud([p[:2] for p in points[n]], n)
    for x, mean, low, high in binned(everything, 10):
        plain.bar(x, low, high, "ink")
        plain.dots([(x, mean)], "ink", 4, f"mean gold {mean:.3f} at score {x:.2f}")
    plain.line([(x, mean) for x, mean, _, _ in binned(everything, 10)], "ink")
    means = {n: tuple(np.mean([p[:2] for p in points[n]], axis=0)) for n in policies}
    first = Figure(
        "Gold against score, all samples",
        plain.svg("gold against reward model score"),
        "Each small dot is a response; the line is mean gold in ten equal groups by score, with "
        "95 % intervals. It should rise all the way: where it bends down, a higher score means a "
        "worse response.",
        tuple((names[n], n, "dot") for n in policies),
    )
    curves = {n: binned(points[n], 5) for n in policies}
    xs = [b[0] for c in curves.values() for b in c] + [m[0] for m in means.values()]
    ys = [b[1] for c in curves.values() for b in c] + [m[1] for m in means.values()]
    each = Axes(xs, ys, *labels, **size)
    for n in policies:
        each.line([b[:2] for b in curves[n]], n, "faint" if n == "base" else "line")
        each.dots([b[:2] for b in curves[n]], n, 2.6)
    for n in policies:
        each.dots([means[n]], n, 7, f"{names[n]}: mean gold {means[n][1]:.3f}, mean score {means[n][0]:.2f}")
    each.names([(*means[n], names[n], n) for n in policies])
    second = Figure(
        "The same, policy by policy",
        each.svg("gold against score for each policy"),
        "Five equal groups of each policy's samples, and its mean as the large dot. Where a "
        "trained policy's line runs below SFT's, the reward model overrates it at the same "
        "score: over-optimisation.",
    )
    return [first, second]


def calibration(rm: dict) -> list[Figure]:
    """How often the reward model is right: by how sure it is, and by how far apart the labeler ranked the two. rm: its
    manifest's metrics; [] where an older one lacks them."""
    figures, size = [], LARGE
    if curve_points := rm.get("reliability"):
        points = [(b["confidence"], b["accuracy"]) for b in curve_points]
        labels = ("how sure it is: σ(score difference)", "share of pairs right")
        axes = Axes([0.5, 1.0], [0.4, 1.0, *(y for _, y in points)], *labels, **size)
        axes.line([(0.5, 0.5), (1.0, 1.0)], "soft", "faint")
        axes.line(points, "rm")
        for (x, y), b in zip(points, curve_points, strict=True):
            axes.dots([(x, y)], "rm", 4, f"right on {y:.1%} of {b['n_pairs']} pairs at confidence {x:.3f}")
        figures.append(
            Figure(
                "Is the reward model as sure as it should be?",
                axes.svg("reliability of the reward model"),
                "Held-out pairs in groups by confidence: on the faint line it is right as often as it says; below it, "
                "it is too sure.",
                (("reward model", "rm", "line"), ("as sure as right", "soft", "faint")),
            )
        )
    by_distance = rm.get("accuracy_by_rank_distance") or {}
    if len(by_distance) > 1:
        points = [(float(d), b["accuracy"]) for d, b in by_distance.items()]
        labels = ("ranks apart", "share of pairs right")
        axes = Axes([x for x, _ in points], [0.5, 1.0, *(y for _, y in points)], *labels, **size)
        axes.line(points, "rm")
        for (x, y), b in zip(points, by_distance.values(), strict=True):
            axes.dots([(x, y)], "rm", 4, f"right on {y:.1%} of {b['n_pairs']} pairs {x:g} apart")
        figures.append(
            Figure(
                "Accuracy by rank distance",
                axes.svg("accuracy by rank distance"),
                "Neighbours in a ranking are the hard pairs, the first and the last of it the easy ones.",
            )
        )
    return figures


def binned(
    points: Sequence[tuple[float, float, str]], bins: int, estimate=share_estimate
) -> list[tuple[float, float, float, float]]:
    """Group points by x and estimate the mean of y in each group.

    Args:
        points: (x, y, cluster) of each; y in [0, 1] where the estimate is a share's.
        bins: How many groups of equal size.
        estimate: `share_estimate` or `mean_estimate`.

    Returns:
        (mean x, mean y, ends of the 95 % interval of the mean of y over clusters), a group each; both ends are the
        mean where there is no interval.
    """
    ordered = sorted(points)
    out = []
    for part in np.array_split(np.arange(len(ordered)), min(bins, len(ordered))):
        xs, ys, clusters = zip(*(ordered[i] for i in part), strict=True)
        found = estimate(ys, clusters)
        out.append((float(np.mean(xs)), found["value"], *(found["ci95"] or [found["value"]] * 2)))
    return out

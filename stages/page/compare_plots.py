"""Choose the plots that lay the curves of several experiments over each other."""

from collections.abc import Sequence
from dataclasses import dataclass

from stages.page.compare_pairs import judges_of, same_judge
from stages.page.compare_read import Side
from stages.page.compare_results import group_label
from stages.page.curves import HELD_OUT, LOSSES, PPO, Journal, episodes_by_step, series
from stages.page.numbers import listed, number
from stages.page.palette import RUNS
from stages.page.plot import Curves, Dots, Key, Label, Line, Mark, Plot, Point, RowMark, Rows, smooth, thin
from stages.page.results import JUDGES, NAMES


@dataclass(frozen=True)
class Overlay:
    """Describe a plot with a curve for each experiment."""

    stage: str
    """The stage that logged it."""
    metric: str
    """Its name in metrics.jsonl."""
    held_out: str
    """Its name in evaluations.jsonl; "" if it has none there."""
    title: str
    """The heading."""
    unit: str
    """The unit of the y axis."""
    log_y: bool = False
    """Whether the y axis is logarithmic."""


LOSS_OVERLAYS = tuple(
    Overlay(text.stage, "loss", "loss", text.title, text.unit, text.stage == "base") for text in LOSSES
)
OVERLAYS = (
    *(
        Overlay("ppo", text.traces[0].metric, text.traces[0].held_out or "", text.title, text.unit, text.log_y)
        for text in PPO
    ),
    Overlay("dpo", "rewards/accuracies", "rewards/accuracies", "DPO accuracy", "share of pairs"),
    Overlay("dpo", "rewards/margins", "rewards/margins", "DPO margin", "β · log-ratio in nats"),
    Overlay("rm", "accuracy", "accuracy", "Reward model accuracy", "share of pairs"),
    *reversed(LOSS_OVERLAYS),
)
"""The plots, those of what was trained last first."""


def tones_of(groups: Sequence[Sequence[int]]) -> list[str]:
    """Return the tone of each experiment; experiments that differ only by seed share one."""
    tones = {index: f"run{position % RUNS + 1}" for position, group in enumerate(groups) for index in group}
    return [tones[index] for index in sorted(tones)]


def overlays(sides: Sequence[Side], groups: Sequence[Sequence[int]], tones: Sequence[str]) -> list[Plot]:
    """Return a plot for each metric that two different artifacts logged.

    Args:
        sides: The experiments.
        groups: The experiments that differ by nothing but the seed.
        tones: Tone of each experiment.
    """
    plots = []
    for overlay in OVERLAYS:
        chosen = [index for index in distinct(sides, overlay.stage) if has(sides[index], overlay)]
        if len(chosen) >= 2:
            own = [[index for index in group if index in chosen] for group in groups]
            plots.append(overlay_plot(overlay, sides, [group for group in own if group], tones))
    return plots


def distinct(sides: Sequence[Side], stage: str) -> list[int]:
    """Return the experiments that have a stage, the first of those that have the same artifact."""
    seen: dict[str, int] = {}
    for index, side in enumerate(sides):
        if stage in side.manifests:
            seen.setdefault(side.manifests[stage]["digest"], index)
    return sorted(seen.values())


def has(side: Side, overlay: Overlay) -> bool:
    """Return whether an experiment logged a metric, with a finite value at least once."""
    points = points_of(side.journals[overlay.stage], overlay.stage, overlay.metric)
    return any(y is not None for _, y in points)


def points_of(journal: Journal, stage: str, metric: str) -> list[Point]:
    """Return a metric over the optimizer steps, for PPO over the episodes."""
    return series(journal.metrics, metric, "episode" if stage == "ppo" else "step")


def held_out_of(journal: Journal, stage: str, metric: str) -> list[Point]:
    """Return the held-out values of a metric, over the same axis as `points_of`."""
    if not metric:
        return []
    if stage != "ppo":
        return series(journal.evaluations, metric)
    episodes = episodes_by_step(journal)
    rows = [row | {"episode": episodes[row["step"]]} for row in journal.evaluations if row["step"] in episodes]
    return series(rows, metric, "episode")


def overlay_plot(
    overlay: Overlay, sides: Sequence[Side], groups: Sequence[Sequence[int]], tones: Sequence[str]
) -> Plot:
    """Return one plot: of a group with several seeds each run is pale and their mean is strong."""
    marks: list[Mark] = []
    keys = []
    is_dotted = False
    for group in groups:
        tone = tones[group[0]]
        raw = [points_of(sides[index].journals[overlay.stage], overlay.stage, overlay.metric) for index in group]
        marks += [Line(thin(smooth(points) if len(group) > 1 else points), tone, faint=True) for points in raw]
        marks.append(Line(thin(smooth(mean_curve(raw))), tone))
        for index in group:
            dots = held_out_of(sides[index].journals[overlay.stage], overlay.stage, overlay.held_out)
            tips = [f"{sides[index].label}: {y:.4g} at {x:g}" if y is not None else "" for x, y in dots]
            if any(y is not None for _, y in dots):
                marks.append(Dots(dots, tone, 5.5, tips))
                is_dotted = True
        keys.append(Key(group_label(sides, group), tone))
    x_label = "episodes" if overlay.stage == "ppo" else "optimizer step"
    several = any(len(group) > 1 for group in groups)
    caption = "Pale: each seed; strong: their mean." if several else "Pale: each step; strong: the moving average."
    if is_dotted:
        caption += f" Markers: {HELD_OUT} data."
    drawing = Curves(marks, x_label, overlay.unit, log_y=overlay.log_y)
    name = f"{overlay.stage}-{overlay.metric}".replace("/", "-")
    return Plot(name, overlay.title, caption, drawing, tuple(keys), (overlay.metric,))


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the mean of curves at the x that all of them have."""
    if len(curves) == 1:
        return list(curves[0])
    values = [{x: y for x, y in curve if y is not None} for curve in curves]
    common = sorted(x for x in set(values[0]).intersection(*values[1:]) if x is not None)
    return [(x, sum(own[x] for own in values) / len(values)) for x in common]


# -- results -------------------------------------------------------------------------------------


def result_plots(sides: Sequence[Side], policy: str, tones: Sequence[str]) -> list[Plot]:
    """Return the plots of a policy's results: quality, and quality against the KL to SFT."""
    measured = [(side, tone) for side, tone in zip(sides, tones, strict=True) if policy in side.policies]
    return quality_plot(measured, policy) + frontier_plot(measured, policy)


def quality_plot(measured: Sequence[tuple[Side, str]], policy: str) -> list[Plot]:
    """Return gold, or else the win rate against SFT, of each experiment as a row."""
    name = NAMES.get(policy, policy)
    for figure, title in (("gold", f"Gold of {name}"), ("win_rate_vs_sft", f"Win rate of {name} against SFT")):
        entries = [(side, tone, side.policies[policy][figure]) for side, tone in measured]
        known = [(side, tone, entry) for side, tone, entry in entries if entry]
        if len(known) < 2:
            continue
        rows = []
        for side, tone, entry in known:
            value = entry["overall"] if figure == "gold" else entry["value"]
            rows.append((side.label, [RowMark(value, tone, f"{value:.3f}", entry["ci95"])]))
        label = "mean gold, 0 to 1" if figure == "gold" else "win rate"
        caption = "Bars are 95 % intervals of each experiment alone; the differences, paired, are in the table."
        drawing = Rows(rows, label, reference=None if figure == "gold" else 0.5)
        return [Plot(f"quality-{policy}", title, caption, drawing, size="large")]
    return []


def frontier_plot(measured: Sequence[tuple[Side, str]], policy: str) -> list[Plot]:
    """Return the quality against the KL to SFT, by the most trusted judge that all share."""
    if len(measured) < 2:
        return []
    first = measured[0][0]
    for judge in judges_of(first):
        if judge != "gold" and not all(same_judge(first, side) for side, _ in measured[1:]):
            continue
        marks: list[Mark] = []
        for side, tone in measured:
            entry = side.policies[policy]
            verdict = entry["judges"].get(judge) or {}
            x, y = number(entry["kl_to_sft"]), number((verdict.get("score") or {}).get("value"))
            if x is not None and y is not None:
                marks.append(Dots([(x, y)], tone, 9, [f"{side.label}: {y:.3g} at {x:.3g} nats"]))
                marks.append(Label(x, y, side.label, tone))
        if len(marks) >= 4:
            caption = "What was gained, and how far the policy moved from SFT for it. Up and to the left is better."
            title = f"{NAMES.get(policy, policy)}: quality and its price"
            drawing = Curves(marks, "KL to SFT, nats per response", f"mean score of the {JUDGES.get(judge, judge)}")
            return [Plot(f"frontier-{policy}", title, caption, drawing, size="large")]
    return []


def same_artifacts(sides: Sequence[Side]) -> str:
    """Return a sentence on the stages that all experiments share; "" if there are none."""
    stages = [stage for stage in sides[0].manifests
              if len({side.manifests.get(stage, {}).get("digest") for side in sides}) == 1]  # fmt: skip
    if not stages:
        return ""
    return f"{listed(stages)} {'is' if len(stages) == 1 else 'are'} the same in all of them, by digest"

"""Build the tables of results: figures side by side, paired differences, and means over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from stages.evaluation.statistics import EDGE, mean_estimate
from stages.page.compare_pairs import Pairing, difference, judges_of, pair, wins_over
from stages.page.compare_read import Row, Side
from stages.page.numbers import NONE, fixed, listed, number
from stages.page.results import JUDGES, NAMES
from stages.page.sentences import marks
from stages.page.table import Cell, Table, dense, estimate_cell, gold_cell, share_cell, value_cell

POLICIES = ("ppo", "dpo", "best_of_n", "sft", "base")
"""The policies in the order of the page: what was trained last comes first."""


@dataclass(frozen=True)
class Figure:
    """Describe a figure of a policy."""

    name: str
    """Its name in the head of a column."""
    read: Callable[[Row], Any]
    """Function of a policy's entry in results.json that returns the figure."""
    digits: int
    """Decimals."""
    is_share: bool = False
    """Whether it lies between 0 and 1."""
    of_sft: bool = True
    """Whether it says anything of SFT itself."""


FIGURES = (
    Figure("gold", lambda policy: (policy["gold"] or {}).get("overall"), 3, is_share=True),
    Figure(
        "gold on held-out tasks", lambda policy: (policy["gold_held_out_tasks"] or {}).get("overall"), 3, is_share=True
    ),
    Figure("score", lambda policy: policy["score"], 2),
    Figure(
        "win rate against SFT",
        lambda policy: (policy["win_rate_vs_sft"] or {}).get("value"),
        3,
        is_share=True,
        of_sft=False,
    ),
    Figure("KL to SFT, nats", lambda policy: policy["kl_to_sft"], 2, of_sft=False),
    Figure("length, tokens", lambda policy: policy["length"], 1),
    Figure("ended by itself", lambda policy: policy["eos_rate"], 3, is_share=True),
    Figure("perplexity", lambda policy: policy["pretrain_perplexity"], 2),
)
"""The figures of which means over seeds are computed, besides those of further judges."""


def further_judges(sides: Sequence[Side]) -> list[str]:
    """Return the judges besides gold and the reward model, which have columns of their own."""
    found = dict.fromkeys(judge for side in sides for judge in judges_of(side))
    return [judge for judge in found if judge not in ("gold", "reward_model")]


def figures_of(sides: Sequence[Side]) -> list[Figure]:
    """Return the figures of a policy, with those of further judges after the score."""
    figures = list(FIGURES)
    place = [figure.name for figure in figures].index("score") + 1
    further = [Figure(JUDGES.get(judge, judge), partial(judged, judge=judge), 2) for judge in further_judges(sides)]
    return figures[:place] + further + figures[place:]


def judged(policy: Row, judge: str) -> Any:
    """Return the mean score that a judge gives a policy; None if it did not judge it."""
    return ((policy["judges"].get(judge) or {}).get("score") or {}).get("value")


def policies_of(sides: Sequence[Side]) -> list[str]:
    """Return the policies that any experiment measured, in the order of the page."""
    found = {name for side in sides for name in side.policies}
    return [name for name in POLICIES if name in found] + sorted(found - set(POLICIES))


def figures_table(sides: Sequence[Side], policy: str, tones: Sequence[str]) -> Table:
    """Return the figures of a policy, a row for each experiment that measured it."""
    rows = []
    further = further_judges(sides)
    for side, tone in zip(sides, tones, strict=True):
        if policy not in side.policies:
            continue
        entry = side.policies[policy]
        ci95, gold = entry["ci95"], gold_cell(entry["gold"])
        rows.append(
            (
                Cell(side.label + marks(entry), tone=tone),
                Cell(gold.text, gold.small, strong=True),
                gold_cell(entry["gold_held_out_tasks"]),
                value_cell(entry["score"], 2, ci95["score"]),
                *(estimate_cell((entry["judges"].get(judge) or {}).get("score"), 2) for judge in further),
                estimate_cell(None if policy == "sft" else entry["win_rate_vs_sft"], 3),
                value_cell(entry["kl_to_sft"], 2, ci95["kl_to_sft"]),
                value_cell(entry["length"], 1, ci95["length"]),
                share_cell(entry["eos_rate"], ci95["eos_rate"]),
                value_cell(entry["pretrain_perplexity"], 2, ci95["pretrain_perplexity"]),
            )
        )
    names = [JUDGES.get(judge, judge) for judge in further]
    columns = ("experiment", "gold, 95 % interval", "gold on held-out tasks", "score", *names, "win rate against SFT",
               "KL to SFT, nats per response", "length, tokens", "ended by itself",
               "pretraining perplexity")  # fmt: skip
    return dense(Table(f"{NAMES.get(policy, policy)} in each experiment", columns, tuple(rows)))


# -- paired by prompt ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """Name two experiments that are compared prompt by prompt."""

    ours: int
    """Index of the one."""
    theirs: int
    """Index of the other, which is the baseline."""


def contrasts_of(sides: Sequence[Side], groups: Sequence[Sequence[int]]) -> list[Contrast]:
    """Choose which experiments are compared prompt by prompt.

    Each is compared with the first one; where experiments come in several seeds, with the one of
    the first group that has the same seed, since another seed may mean other prompts.

    Args:
        sides: The experiments.
        groups: The experiments that differ by nothing but the seed.
    """
    if all(len(group) == 1 for group in groups):
        return [Contrast(index, 0) for index in range(1, len(sides))]
    first = {sides[index].seed: index for index in groups[0]}
    others = [index for group in groups[1:] for index in group]
    return [Contrast(index, first[sides[index].seed]) for index in others if sides[index].seed in first]


def paired_table(
    sides: Sequence[Side], contrasts: Sequence[Contrast], policy: str, tones: Sequence[str]
) -> tuple[Table | None, list[tuple[str, str]]]:
    """Return the differences of a policy between experiments, paired by prompt.

    Returns:
        The table, or None where nothing can be paired; and what `remarks_on` says of each pair.
    """
    rows, said, by = [], [], set()
    further = further_judges(sides)
    for contrast in contrasts:
        ours, theirs = sides[contrast.ours], sides[contrast.theirs]
        if policy not in ours.policies or policy not in theirs.policies:
            continue
        pairing = pair(ours, theirs, policy)
        said += remarks_on(pairing, ours, theirs)
        if len(pairing.ours) < 2:
            continue
        wins = wins_over(pairing, [judge for judge in judges_of(ours, policy) if judge in judges_of(theirs, policy)])
        by |= set() if wins is None else {JUDGES.get(wins["by"], wins["by"])}
        rows.append(
            (
                Cell(f"{ours.label} − {theirs.label}", tone=tones[contrast.ours]),
                strong(signed_cell(difference(pairing, "gold"), 3)),
                signed_cell(difference(pairing, "reward_model"), 2),
                *(signed_cell(difference(pairing, judge), 2) for judge in further),
                Cell(NONE) if wins is None else share_cell(wins["value"], wins["ci95"]),
                signed_cell(difference(pairing, "length"), 1),
                signed_cell(difference(pairing, "finished"), 3),
                Cell(f"{len(pairing.ours)} of {pairing.total}"),
            )
        )
    if not rows:
        return None, said
    names = [JUDGES.get(judge, judge) for judge in further]
    wins_head = f"preferred to the other's answer, by the {listed(sorted(by))}"
    columns = ("difference", "gold", "score", *names, wins_head, "length, tokens",
               "ended by itself", "common prompts")  # fmt: skip
    table = Table(f"{NAMES.get(policy, policy)}: differences, paired by prompt", columns, tuple(rows))
    return dense(table), said


def remarks_on(pairing: Pairing, ours: Side, theirs: Side) -> list[tuple[str, str]]:
    """Return what a reader must know of a comparison: (the remark, the two experiments) of each."""
    both, common = f"{ours.label} and {theirs.label}", len(pairing.ours)
    if common < 2:
        shared = "no evaluation prompts" if common == 0 else "one evaluation prompt"
        return [(f"{shared} in common, so the figures are not paired", both)]
    found = []
    if common < pairing.total:
        found.append((f"compared on the {common} prompts that both answered, of {pairing.total}", both))
    if not pairing.same_judge and pairing.ours[0].values("reward_model") is not None:
        found.append(("scored by different reward models, so the scores are not compared", both))
    return found + [(f"sampled differently: {problem}", both) for problem in pairing.problems]


def sentences(remarks: Sequence[tuple[str, str]]) -> list[str]:
    """Return each remark once, with all pairs of experiments that it is about."""
    about: dict[str, list[str]] = {}
    for remark, both in remarks:
        if both not in about.setdefault(remark, []):
            about[remark].append(both)
    return [f"{'; '.join(pairs)}: {remark}" for remark, pairs in about.items()]


def signed_cell(estimate: dict[str, Any] | None, digits: int) -> Cell:
    """Return a cell with a difference, its sign, and its 95 % interval below it."""
    if estimate is None or number(estimate["value"]) is None:
        return Cell(NONE)
    text = signed(estimate["value"], digits)
    ci95 = estimate["ci95"]
    if ci95 is None or is_point(ci95):
        return Cell(text)
    return Cell(text, f"{signed(ci95[0], digits)} to {signed(ci95[1], digits)}")


def is_point(ci95: Sequence[float]) -> bool:
    """Return whether an interval has no width but for rounding."""
    return ci95[1] - ci95[0] < EDGE


def strong(cell: Cell) -> Cell:
    """Return a cell in bold."""
    return Cell(cell.text, cell.small, strong=True)


def signed(value: float, digits: int) -> str:
    """Return a number with its sign; 0 has none."""
    text = fixed(value, digits)
    return text if text.startswith("−") or not text.strip("0.") else f"+{text}"


# -- over seeds ----------------------------------------------------------------------------------


def seeds_table(
    sides: Sequence[Side], groups: Sequence[Sequence[int]], policy: str, tones: Sequence[str]
) -> Table | None:
    """Return means over seeds and differences between groups, with the seed as the unit.

    Args:
        sides: The experiments.
        groups: The experiments that differ by nothing but the seed.
        policy: The policy.
        tones: Tone of each experiment; those of a group have the same.

    Returns:
        The table; None if no group has two seeds.
    """
    rows = []
    figures = [figure for figure in figures_of(sides) if figure.of_sft or policy != "sft"]
    measured = [[index for index in group if policy in sides[index].policies] for group in groups]
    for group in measured:
        if len(group) >= 2:
            cells = [mean_cell([figure.read(sides[i].policies[policy]) for i in group], figure) for figure in figures]
            rows.append((Cell(group_label(sides, group), tone=tones[group[0]]), *cells, Cell(str(len(group)))))
    if not rows:
        return None
    for group in measured[1:]:
        pairs = seed_pairs(sides, group, measured[0])
        if len(pairs) < 2:
            continue
        cells = []
        for figure in figures:
            both = [[number(figure.read(sides[i].policies[policy])) for i in ends] for ends in pairs]
            known = [ours - theirs for ours, theirs in both if ours is not None and theirs is not None]
            estimate = mean_estimate(known, range(len(known))) if len(known) == len(pairs) else None
            cells.append(signed_cell(estimate, figure.digits))
        name = f"{group_label(sides, group)} − {group_label(sides, measured[0])}"
        rows.append((Cell(name, "paired by seed", tone=tones[group[0]]), *cells, Cell(str(len(pairs)))))
    columns = ("settings", *(figure.name for figure in figures), "seeds")
    return dense(Table(f"{NAMES.get(policy, policy)}: means over seeds", columns, tuple(rows)))


def seed_pairs(sides: Sequence[Side], group: Sequence[int], baseline: Sequence[int]) -> list[tuple[int, int]]:
    """Return the experiments of a group, each with the one of the baseline that has its seed."""
    by_seed = {sides[index].seed: index for index in baseline}
    return [(index, by_seed[sides[index].seed]) for index in group if sides[index].seed in by_seed]


def without_seeds(sides: Sequence[Side], groups: Sequence[Sequence[int]]) -> list[str]:
    """Return a sentence for each group that cannot be compared with the first by seed."""
    if all(len(group) == 1 for group in groups):
        return []
    said = []
    for group in groups[1:]:
        common = len(seed_pairs(sides, group, groups[0]))
        if common < 2:
            count = "no seed" if common == 0 else "one seed"
            named = f"{group_label(sides, group)} and {group_label(sides, groups[0])}"
            said.append(f"{named} have {count} in common, so no difference over seeds can be computed")
    return said


def mean_cell(values: Sequence[Any], figure: Figure) -> Cell:
    """Return a cell with a mean over seeds and its 95 % interval; empty if a seed has no value."""
    known = [value for value in map(number, values) if value is not None]
    if len(known) < len(values):
        return Cell(NONE)
    estimate = mean_estimate(known, range(len(known)))
    low, high = estimate["ci95"]
    if is_point([low, high]):  # equal in all seeds: their spread is unknown
        return value_cell(estimate["value"], figure.digits)
    ci95 = [max(0.0, low), min(1.0, high)] if figure.is_share else [low, high]
    return value_cell(estimate["value"], figure.digits, ci95)


def group_label(sides: Sequence[Side], group: Sequence[int]) -> str:
    """Return the name of experiments that differ by nothing but the seed."""
    labels = [sides[index].label for index in group]
    if len(labels) == 1:
        return labels[0]
    parts = [label.split("--") for label in labels]
    shared = [part for part in parts[0] if all(part in own for own in parts[1:])]
    if shared:
        return "--".join(shared)
    length = next((i for i, letters in enumerate(zip(*labels, strict=False)) if len(set(letters)) > 1), len(labels[0]))
    return labels[0][:length].rstrip("-_.0123456789") or f"{labels[0]} and other seeds"


def climbed_note(sides: Sequence[Side]) -> list[str]:
    """Return a sentence if a judge scored what it had trained or selected."""
    named = [NAMES.get(name, name) for name in policies_of(sides)
             if any(side.policies.get(name, {}).get("judge_climbed") for side in sides)]  # fmt: skip
    if not named:
        return []
    return [f"{listed(named)} maximised the reward model that judges here, which flatters them"]

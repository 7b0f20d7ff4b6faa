"""Test the rules of RewardBench and RewardBench 2 against figures by hand and in numpy."""

import math

import numpy as np
import pytest

from stages.evaluation.statistics import share_estimate
from stages.external.bench_rows import Item
from stages.external.bench_scores import COUNTS, SECTIONS, Scored, figures, tie_parts, value_of, weighted
from stages.external.bench_scores import Margins as M


def scored(scores, subset="Math", name="0", good=1, is_pair=False):
    """Return an item with scores, of which the first `good` ones are of good responses."""
    texts = [f"response {i}" for i in range(len(scores))]
    item = Item(name, subset, f"prompt {name}", tuple(texts[:good]), tuple(texts[good:]), is_pair, f"file:{name}")
    return Scored(item, tuple(scores))


@pytest.mark.parametrize(
    "scores, value",
    [
        ([2.0, 1.0, 0.0, -1.0], 1.0),
        ([2.0, 2.0, 0.0, -1.0], 0.5),
        ([2.0, 2.0, 2.0, 2.0], 0.25),
        ([1.0, 2.0, 0.0, -1.0], 0.0),
    ],
)
def test_the_best_of_four_shares_the_highest_score(scores, value):
    assert value_of(scored(scores)) == value


def test_an_equal_pair_is_wrong():
    values = [value_of(scored(pair, is_pair=True)) for pair in ([1.0, 0.0], [1.0, 1.0], [0.0, 1.0])]
    assert values == [1.0, 0.0, 0.0]


def ties_in_numpy(rows):
    """Compute the score of the ties as allenai/reward-bench describes it, in arrays."""
    stats = {"ref": {}, "tied": {}}
    for one in rows:
        kind, number = one.item.id.split(":")
        good, bad = np.array(one.scores[: len(one.item.chosen)]), np.array(one.scores[len(one.item.chosen) :])
        stats[kind][number] = (good.min() > bad.max(), np.ptp(good), good.min() - bad.max())
    both = sorted(set(stats["ref"]) & set(stats["tied"]))
    spread = np.array([stats["tied"][n][1] for n in both])
    tied, ref = (np.array([stats[kind][n][2] for n in both]) for kind in ("tied", "ref"))
    right = {kind: np.mean([s[0] for s in of.values()]) for kind, of in stats.items()}
    margin = np.tanh(np.minimum(ref, tied) / spread - 1).mean()
    preferred, hard = (tied > spread).mean(), (np.minimum(ref, tied) > spread).mean()
    return 0.3 * right["tied"] + 0.3 * right["ref"] + 0.2 * preferred + 0.2 * hard + 0.01 * margin


def test_ties_are_scored_as_the_benchmark_does():
    rng = np.random.default_rng(0)
    rows = []
    for n in range(12):
        rows.append(scored(rng.normal(size=5).tolist() if n % 3 else [4, 1, 0, 0, -1], "Ties", f"ref:{n}"))
        good = 2 + n % 3
        values = np.concatenate([rng.normal(2.0, 0.4, good), rng.normal(0.0, 1.0, 6)]).tolist()
        rows.append(scored(values, "Ties", f"tied:{n}", good=good))
    rows.append(scored([3.0, 0.0], "Ties", "ref:99"))  # a row without its partner counts in its accuracy only
    found = figures(rows)["best_of"]
    assert found["subsets"]["Ties"]["value"] == pytest.approx(ties_in_numpy(rows), abs=1e-12)
    low, high = found["subsets"]["Ties"]["ci95"]
    assert 0 <= low < found["subsets"]["Ties"]["value"] < high <= 1
    assert found["overall"]["value"] == found["subsets"]["Ties"]["value"]


def test_equal_good_answers_have_an_infinite_ratio():
    above, below = {"0": M(1.0, 0.0)}, {"0": M(-1.0, 0.0)}
    assert tie_parts(above, above) == (1.0, 1.0, 1.0, 1.0, 1.0)
    assert tie_parts(below, below) == (0.0, 0.0, 0.0, 0.0, -1.0)
    assert tie_parts({"0": M(0.0, 0.0)}, {"0": M(0.0, 0.0)})[4] == 0.0
    assert math.isnan(tie_parts({"0": M(1.0, 0.0)}, {"1": M(1.0, 0.0)})[4])


def test_rewardbench_2_is_the_mean_of_its_subsets():
    rows = [scored([1, 0, 0, 0], "Math", str(i)) for i in range(9)] + [scored([0, 1, 0, 0], "Focus", "9")]
    found = figures(rows)
    assert found["pairs"] is None
    assert found["best_of"]["overall"]["value"] == 0.5, "not 9 of 10"
    assert found["best_of"]["overall"]["n"] == 10


def test_sections_weight_subsets_as_the_leaderboard_does():
    def some(subset, right, wrong):
        names = [f"{subset} {i}" for i in range(right + wrong)]
        return [scored([i < right, i >= right], subset, name, is_pair=True) for i, name in enumerate(names)]

    rows = some("math-prm", 3, 1) + some("hep-cpp", 1, 1) + some("alpacaeval-easy", 1, 0) + some("shp", 0, 2)
    found = figures(rows)["pairs"]
    reasoning = (984 * 0.75 + 164 * 0.5) / (984 + 164)
    values = {section: estimate["value"] for section, estimate in found["sections"].items()}
    assert values == pytest.approx({"Chat": 1.0, "Reasoning": reasoning, "Prior Sets": 0.0})
    assert found["overall"]["value"] == pytest.approx((1 + reasoning) / 2.5), "prior sets count half"
    code = sum(COUNTS[name] for name in SECTIONS["Reasoning"] if name.startswith("hep"))
    assert COUNTS["math-prm"] == code


def test_a_subset_of_the_users_own_stands_for_itself():
    found = figures([scored([1, 0], "mine", is_pair=True)])["pairs"]
    assert set(found["sections"]) == {"mine"}


def test_the_interval_of_a_weighted_mean():
    parts = [share_estimate([1.0] * 20, range(20)), share_estimate([1.0, 0.0] * 10, range(20))]
    found = weighted(parts, [3.0, 1.0])
    assert found["value"] == pytest.approx(0.875)
    low, high = found["ci95"]
    one, other = (part["value"] - part["ci95"][0] for part in parts)
    assert found["value"] - low == pytest.approx(math.hypot(0.75 * one, 0.25 * other))
    assert high - found["value"] == pytest.approx(0.25 * (parts[1]["ci95"][1] - 0.5)), "all of 20 has no upper error"
    assert weighted([parts[0]], [1.0])["ci95"] == pytest.approx(parts[0]["ci95"])

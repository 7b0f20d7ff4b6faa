"""Check how often the intervals contain the true value, on simulated evaluations.

`tests/benchmarks/coverage.py` tries more of them.
"""

import pytest

from tests.stages.simulated import (
    CASES,
    coverage,
    difference_case,
    gold_case,
    harder_tasks_asked_more_case,
    pairs_case,
    seeds_case,
    wins_case,
)

FEW = [wins_case(8, 0.7), wins_case(8, 0.97), gold_case(8, 0.9), difference_case(8), pairs_case(8, 0.75)]
MANY = [
    wins_case(16, 0.9),
    wins_case(16, 0.7, one_large=True),
    wins_case(47, 0.97),
    wins_case(47, 0.9, ties=0.9, samples=1),
    wins_case(74, 0.5),
    harder_tasks_asked_more_case(47),
    gold_case(16, 0.9),
    gold_case(74, 0.7),
    difference_case(47),
    pairs_case(16, 0.9),
    pairs_case(100, 0.6),
]
SEEDS = [seeds_case(3), seeds_case(3, share=True), seeds_case(5)]


def name(case):
    return case.name


@pytest.mark.parametrize("case", FEW + SEEDS, ids=name)
def test_with_few_clusters_at_least_90_of_100_intervals_hold_the_truth(case):
    assert 0.90 <= coverage(case, 400)["coverage"] <= 1.0


@pytest.mark.parametrize("case", MANY, ids=name)
def test_with_15_clusters_and_more_about_95_of_100_do(case):
    assert 0.92 <= coverage(case, 400)["coverage"] <= 0.995


@pytest.mark.parametrize(
    "case", [wins_case(74, 0.7), gold_case(47, 0.7), pairs_case(16, 0.75), seeds_case(5)], ids=name
)
def test_observations_taken_for_independent_hold_it_less_often(case):
    """A bootstrap over prompts, pairs or the prompts of all seeds covers at most 85 %, not 95 %."""
    found = coverage(case, 200, naive=True)
    assert found["naive_coverage"] <= 0.85 < 0.9 <= found["coverage"]


def test_the_benchmark_tries_all_of_these():
    assert {case.name for case in FEW + MANY + SEEDS} <= {case.name for case in CASES}

"""Test the reward model's accuracy by source, and the accuracy of preferring longer responses."""

from data.groups import PromptGroup
from data.records import Ranking
from stages.evaluation.trust import MANY_SOURCES, trust


def figures(sources: list[str | None]) -> dict:
    """Return the figures of one pair a source.

    The better response is scored higher; it is longer in every pair but the first.
    """
    rankings = [Ranking(str(i), f"p{i}", ("a", "b"), (1, 2), source=s) for i, s in enumerate(sources)]
    groups = [PromptGroup([1], [[2, 3] if i else [2], [4] if i else [4, 5]], (1, 2), str(i), (), (None,), (0.0,))
              for i in range(len(sources))]  # fmt: skip
    owners = [(i, pair) for i, group in enumerate(groups) for pair in group.pairs()]
    return trust([1.0] * len(owners), owners, groups, rankings, {r.id: r.id for r in rankings})


def test_accuracy_and_length_by_source():
    found = figures(["people", "people", "models", None])
    assert found["longer_wins"]["accuracy"] == 0.75 and found["longer_wins"]["n_pairs"] == 4
    assert {name: part["n_pairs"] for name, part in found["accuracy_by_source"].items()} == {
        "models": 1,
        "people": 2,
        "unnamed": 1,
    }
    assert {name: part["accuracy"] for name, part in found["longer_wins_by_source"].items()} == {
        "models": 1.0,
        "people": 0.5,
        "unnamed": 1.0,
    }
    assert all(part["accuracy"] == 1.0 for part in found["accuracy_by_source"].values())


def test_one_source_and_a_source_a_row_are_not_broken_down():
    for sources in (["one"] * 3, [None, None], [str(i) for i in range(MANY_SOURCES + 1)]):
        assert "accuracy_by_source" not in figures(sources)

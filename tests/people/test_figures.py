"""The lead's figures: each simulated labeler is shown for what it is, and nobody else is."""

import random
from dataclasses import replace

import pytest

from stages.people.rank import figures, lead, progress
from stages.people.rank.imports import add_verdict
from stages.people.rank.judged import Facts, Judged, read_judged
from stages.people.rank.lead_figures import overview, read_all
from stages.people.rank.outliers import is_below, widening
from stages.people.rank.rules import Rules
from stages.people.rank.snapshots import rankings
from stages.people.store.database import open_database
from stages.people.store.rows import read_tasks
from tests.people.simulated import NOW, all_equal, at_random, careful, first_shown, longest, simulate, tasks

RULES = Rules(overlap=1.0, overlap_labelers=5, repeat=0.15, known_share=0.15)
FACTS = Facts(lengths={1: 10, 2: 20, 3: 30, 4: 40}, known={7: ((1,), (2, 3), (4,))})


def judged(tiers, shown=(1, 2, 3, 4), **more):
    """Return one ranking."""
    fields = {"assignment": 1, "labeler": 1, "task": 1, "reason": "first", "skipped": None}
    fields |= {"seconds": 10.0, "made": NOW, "decision": "pending"}
    return Judged(shown=shown, tiers=tiers, **{**fields, **more})


@pytest.fixture
def show(tmp_path):
    """Return what simulates people, and gives what the page is told."""
    opened = []

    def run(people, rules=RULES, count=45, known=8, before=None):
        database = open_database(tmp_path, "test")
        opened.append(database)
        labelers = simulate(database, rules, people, tasks(count, known))
        if before is not None:
            with database.transaction() as connection:
                before(connection, labelers)
        with database.read_beside() as connection:
            *parts, so_far = read_all(connection, rules, NOW)
        found = overview(*parts, with_excluded=False)
        return {one["code"]: one for one in found["labelers"]}, {**found, "progress": so_far}

    yield run
    for database in opened:
        database.close()


def test_each_labeler_is_shown_for_what_it_is(show):
    people = {
        "ada": (careful, 40),
        "ben": (careful, 50),
        "cleo": (first_shown, 40),
        "dan": (at_random, 5),
        "eve": (longest, 40),
    }
    by_code, found = show(people)
    why = {code: " | ".join(one["outliers"]) for code, one in by_code.items()}
    assert why["ada"] == why["ben"] == ""
    assert "ranks the answer that is shown first best more often than chance: 100 %" in why["cleo"]
    assert "seconds a task" in why["dan"] and "shown first" not in why["dan"] and "longest" not in why["dan"]
    assert "ranks the longest answer best in 100 %" in why["eve"] and "shown first" not in why["eve"]
    of = {code: one["figures"] for code, one in by_code.items()}
    assert of["ada"]["known_accuracy"]["value"] > 0.85 > 0.7 > of["dan"]["known_accuracy"]["value"]
    assert of["ada"]["self_agreement"]["value"] > 0.75 > of["cleo"]["self_agreement"]["value"]
    assert of["eve"]["self_agreement"]["value"] == 1 and of["eve"]["length_correlation"]["value"] > 0.99
    assert abs(of["ada"]["length_correlation"]["value"]) < 0.3
    low, high = of["ada"]["first_best"]["ci95"]
    assert low < of["ada"]["first_best"]["expected"] == 0.25 < high
    assert 30 < of["ada"]["seconds"]["median"] < 50 and of["dan"]["seconds"]["median"] < 8
    pairs = {tuple(pair["labelers"]): pair for pair in found["pairs"]}
    low, high = pairs["ada", "ben"]["ci95"]
    assert low > 0.8 and pairs["ada", "dan"]["ci95"][0] < 0.5 < pairs["ada", "dan"]["ci95"][1]
    low, high = found["kendall"]["ci95"]
    assert 0 < low < found["kendall"]["value"] < high < 0.5
    assert found["progress"]["finished"] == 37 and found["progress"]["made"] == 5 * 37


def test_a_labeler_who_guesses_stands_out_among_careful_ones(show):
    by_code, _ = show({"ada": (careful, 40), "ben": (careful, 40), "dan": (at_random, 40)})
    assert any("agrees with others on" in reason for reason in by_code["dan"]["outliers"])
    assert by_code["ada"]["outliers"] == by_code["ben"]["outliers"] == []
    assert by_code["ada"]["figures"]["agreement_of_others"]["value"] < 0.6


def test_who_skips_and_who_ties_everything_stands_out(show):
    by_code, found = show({"ada": (careful, 40), "ben": (careful, 40), "gus": (None, 40), "tia": (all_equal, 40)})
    assert "skips 100 %" in by_code["gus"]["outliers"][0]
    assert "gives the same place to 100 %" in " ".join(by_code["tia"]["outliers"])
    assert by_code["tia"]["figures"]["agreement"] is None, "ties are left out of agreement"
    assert found["skips"][0]["reason"] == "I do not know enough about this"
    assert by_code["gus"]["figures"]["seconds"] is None and found["progress"]["decisions"]["skipped"] > 20


def test_careful_labelers_are_left_in_peace(show):
    by_code, _ = show({f"c{number}": (careful, 30 + number) for number in range(10)}, count=30)
    assert not [code for code, one in by_code.items() if one["outliers"]]


def test_what_is_excluded_is_in_no_figure_and_trains_nothing(show):
    def exclude(connection, labelers):
        assert lead.judge_all(connection, labelers["dan"].id, "excluded", "by a coin") > 30
        assert "dan" not in {row.labeler for row in rankings(connection)}

    by_code, found = show({"ada": (careful, 40), "ben": (careful, 40), "dan": (at_random, 40)}, before=exclude)
    assert by_code["dan"]["figures"]["agreement"] is None and by_code["dan"]["decisions"]["excluded"] > 30
    assert [pair["labelers"] for pair in found["pairs"]] == [["ada", "ben"]]
    assert found["agreement"]["value"] > 0.8 and found["kendall"]["value"] > 0.7
    assert found["progress"]["made"] == 2 * 37


def test_nothing_yet(show):
    by_code, found = show({}, count=3, known=0)
    assert by_code == {} and found["agreement"] is None and found["kendall"] is None and found["pairs"] == []
    assert found["progress"]["tasks"] == 3 and found["progress"]["finished"] == 0
    assert len(found["progress"]["days"]) == progress.DAYS


def test_imported_rankings_have_no_order_and_no_time(tmp_path):
    database = open_database(tmp_path, "test")
    labelers = simulate(database, RULES, {"ada": (careful, 40)}, tasks(5), most=5)
    with database.transaction() as connection:
        (first, *_) = rankings(connection)
        add_verdict(connection, read_tasks(connection)[1], replace(first, labeler="else"), NOW)
        rows = read_judged(connection)
    database.close()
    other = [row for row in rows if row.labeler != labelers["ada"].id]
    assert len(other) == 1 and figures.seconds(other) is None and figures.first_best(other) is None
    assert figures.ties(other) == {"1": (0.0, 6)}


def test_known_answers_ties_count_half():
    right = figures.known_accuracy([judged(((1,), (2, 3), (4,)), task=7, reason="known")], FACTS.known)
    assert right == {"7": (5.0, 5)}, "the pair that is tied in truth is not asked"
    tied = figures.known_accuracy([judged(((1, 2), (3,)), task=7, reason="known")], FACTS.known)
    assert tied == {"7": (1.5, 2)}
    assert figures.known_accuracy([judged(((1,), (2,)), task=7)], FACTS.known) == {}


def test_first_place_is_shared_by_a_tie():
    row = judged(((1, 2), (3,)), shown=(1, 2, 3, 4))  # 4 cannot be judged
    assert figures.first_best([row]) | {"ci95": None, "se": None} == {
        "value": 0.5, "expected": pytest.approx(1 / 3), "n": 1, "clusters": 1, "ci95": None, "se": None,
    }  # fmt: skip
    assert figures.first_best([judged(((1,), (2,)), shown=(4, 1, 2, 3))]) is None, "the first one was not judged"
    assert figures.longest_best([row], FACTS.lengths) == [("1", 0.0, pytest.approx(1 / 3))]


def test_repetitions_are_compared_with_the_first_ranking():
    rows = [judged(((1,), (2,), (3,))), judged(((2,), (1,), (3,)), reason="repeat", assignment=2)]
    assert figures.self_agreement(rows) == {"1": (2, 3)}
    assert figures.self_agreement([rows[1]]) == {}


def test_the_interval_of_a_correlation_stays_within_its_bounds():
    from stages.evaluation.statistics import mean_estimate

    few = figures.mean_correlation([1.0, -1.0, 0.2], [1, 2, 3])
    plain = mean_estimate([1.0, -1.0, 0.2], [1, 2, 3])
    assert few["value"] == pytest.approx(plain["value"]) and few["se"] == pytest.approx(plain["se"])
    assert plain["ci95"][0] < -1 and -1 <= few["ci95"][0] < few["value"] < few["ci95"][1] <= 1
    alike = figures.mean_correlation([1.0] * 5, [1, 2, 3, 4, 5])
    assert alike["value"] == 1 and alike["ci95"][0] < 0.8 and alike["ci95"][1] == 1
    assert figures.mean_correlation([0.5], [1])["value"] == pytest.approx(0.5)


def test_kendall_is_zero_by_chance_and_counts_ties():
    order = ((1,), (2,), (3,), (4,))
    same = [judged(order, task=task, labeler=who) for task in range(4) for who in (1, 2)]
    assert figures.kendall(same)["value"] == pytest.approx(1)
    half = [judged(order, labeler=1), judged(((1,), (2,), (4,), (3,)), labeler=2)]
    assert figures.kendall(half)["value"] == pytest.approx((5 - 1) / 6)
    tied = [judged(order, labeler=1), judged(((1, 2), (3, 4)), labeler=2)]
    assert figures.kendall(tied)["value"] == pytest.approx(4 / (6 * 4) ** 0.5)
    assert figures.kendall([judged(order), judged(((1, 2, 3, 4),), labeler=2)]) is None
    rng = random.Random(0)
    coins = [tuple((one,) for one in rng.sample((1, 2, 3, 4), 4)) for _ in range(400)]
    drawn = [judged(order, task=number // 2, labeler=number % 2) for number, order in enumerate(coins)]
    low, high = figures.kendall(drawn)["ci95"]
    assert low < 0 < high < 0.15


def test_a_mean_rank_is_shared_by_a_tie():
    assert figures.mean_ranks(((1, 2), (3,), (4,)), {1, 2, 4}) == {1: 1.5, 2: 1.5, 4: 3}


def test_intervals_are_wider_among_more_labelers():
    assert widening(1) == pytest.approx(1) and widening(50) > widening(5) > 1.2
    low, high = {"value": 0.5, "ci95": [0.45, 0.55]}, {"value": 0.7, "ci95": [0.6, 0.8]}
    assert is_below(low, high, 1.0) and not is_below(low, high, 1.5) and not is_below(high, low, 1.0)
    assert not is_below(None, high, 1.0)

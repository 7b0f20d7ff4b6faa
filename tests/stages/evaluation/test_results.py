"""Check the entries of results.json: figures recomputed by hand, halves, and judges."""

import math

import numpy as np
import pytest

from stages.evaluation.judges import Judge
from stages.evaluation.results import (
    GOLD,
    Measured,
    order_by_gold,
    perplexity_difference,
    perplexity_estimate,
    summarise,
)

TASKS = ["a", "a", "b", "b", "c", "d", "e", "f"]
KNOWN = [True, True, True, True, False, False, False, False]


BY_GOLD, BY_REWARD_MODEL = [Judge("gold"), Judge("reward_model")], [Judge("reward_model")]


def measured(rng, shift=0.0, samples=3, gold=True, best_of_n=False):
    def rows(make):
        return [[make() for _ in range(1 if best_of_n else samples)] for _ in TASKS]

    return Measured(
        asked="chat",
        responses=rows(lambda: "x"),
        finished=rows(lambda: bool(rng.random() < 0.8)),
        scores={"reward_model": rows(lambda: float(rng.normal() + shift))},
        kl=None if best_of_n else rows(lambda: float(rng.random())),
        lengths=rows(lambda: int(rng.integers(3, 20))),
        gold=rows(lambda: {name: float(np.clip(rng.random() + shift / 4, 0, 1)) for name in GOLD}) if gold else None,
        text_losses=None if best_of_n else [float(x) for x in rng.random(10) + 1],
    )


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return measured(rng, 1.0), measured(rng)


def test_every_mean_is_the_plain_mean_over_all_samples(pair):
    own, sft = pair
    found = summarise("ppo", own, sft, TASKS, KNOWN, BY_GOLD)
    measured_rows = {
        "score": own.scores["reward_model"],
        "kl_to_sft": own.kl,
        "length": own.lengths,
        "eos_rate": own.finished,
    }
    for key, rows in measured_rows.items():
        assert found[key] == pytest.approx(np.mean(rows))
        assert found["ci95"][key][0] <= found[key] <= found["ci95"][key][1]
    assert found["pretrain_perplexity"] == pytest.approx(math.exp(np.mean(own.text_losses)))
    for name in GOLD:
        assert found["gold"][name] == pytest.approx(np.mean([[g[name] for g in row] for row in own.gold]))


def test_the_two_halves_are_reported_apart_and_make_up_the_whole(pair):
    own, sft = pair
    found = summarise("ppo", own, sft, TASKS, KNOWN, BY_GOLD)
    overall = np.array([[g["overall"] for g in row] for row in own.gold])
    assert found["gold_known_tasks"]["overall"] == pytest.approx(overall[:4].mean())
    assert found["gold_held_out_tasks"]["overall"] == pytest.approx(overall[4:].mean())
    assert (found["gold_known_tasks"]["n"], found["gold_known_tasks"]["clusters"]) == (4, 2)
    assert (found["gold_held_out_tasks"]["n"], found["gold_held_out_tasks"]["clusters"]) == (4, 4)
    assert summarise("ppo", own, sft, TASKS, [True] * 8, BY_GOLD)["gold_held_out_tasks"] is None
    assert summarise("ppo", own, sft, TASKS, None, BY_GOLD)["gold_known_tasks"] is None


def test_the_win_rate_compares_every_sample_with_every_sample_of_the_same_prompt(pair):
    own, sft = pair
    wins = [
        (a["overall"] > b["overall"]) + 0.5 * (a["overall"] == b["overall"])
        for ours, theirs in zip(own.gold, sft.gold, strict=True)
        for a in ours
        for b in theirs
    ]
    assert summarise("ppo", own, sft, TASKS, KNOWN, BY_GOLD)["win_rate_vs_sft"]["value"] == pytest.approx(np.mean(wins))
    other = summarise("sft", sft, own, TASKS, KNOWN, BY_GOLD)["win_rate_vs_sft"]["value"]
    assert other == pytest.approx(1 - np.mean(wins))


def test_without_gold_the_reward_model_judges_and_says_whether_it_was_climbed():
    rng = np.random.default_rng(1)
    own, sft = measured(rng, 1.0, gold=False), measured(rng, gold=False)
    found = summarise("ppo", own, sft, TASKS, None, [Judge("reward_model", climbed=frozenset({"ppo"}))])
    assert found["gold"] is None and found["gold_held_out_tasks"] is None
    assert found["judge_climbed"] and found["win_rate_vs_sft"]["value"] > 0.5
    assert found["difference_to_sft"]["value"] == pytest.approx(
        np.mean(own.scores["reward_model"]) - np.mean(sft.scores["reward_model"])
    )


def test_best_of_n_that_its_judge_selected_has_no_win_rate():
    """Whatever the scores are worth: the best of n beats one more draw n times in n + 1."""
    rng = np.random.default_rng(2)
    draws = rng.random((20_000, 16))
    assert np.mean(draws.max(1) > rng.random(20_000)) == pytest.approx(16 / 17, abs=0.01)
    own, sft = measured(rng, gold=False, best_of_n=True), measured(rng, gold=False)
    both = frozenset({"best_of_n"})
    found = summarise("best_of_n", own, sft, TASKS, None, [Judge("reward_model", climbed=both, selected=both)])
    assert found["win_rate_vs_sft"] is None and found["judge_climbed"]
    assert found["kl_to_sft"] is None and found["pretrain_perplexity"] is None


def test_differences_are_paired_on_the_same_prompts():
    """Prompts of varied difficulty widen the interval of a mean, not of a difference."""
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 10, len(TASKS))
    better, baseline = ([[float(h + offset + rng.normal(0, 0.01))] for h in hard] for offset in (1.0, 0.0))

    def make(scores):
        return Measured("chat", [["x"]] * 8, [[True]] * 8, {"reward_model": scores}, None, [[3]] * 8, None, None)

    found = summarise("ppo", make(better), make(baseline), TASKS, None, BY_REWARD_MODEL)
    low, high = found["difference_to_sft"]["ci95"]
    assert 0.9 < low <= 1.0 <= high < 1.1
    assert found["ci95"]["score"][1] - found["ci95"]["score"][0] > 5


def test_perplexity_has_an_interval_over_rows():
    assert perplexity_estimate(None) is None and perplexity_estimate([]) is None
    found = perplexity_estimate([1.0, 2.0, 3.0])
    assert found["value"] == pytest.approx(math.exp(2.0))
    assert found["ci95"][0] < found["value"] < found["ci95"][1]
    assert perplexity_estimate([1e4, 1e4])["value"] == math.inf


def test_a_checkpoint_carries_what_was_measured(pair):
    own, _ = pair
    assert Measured(**own.state()) == own


def test_the_reward_model_is_held_to_gold_on_both_halves():
    """By hand: pairs of equal gold do not count, and equal scores count half."""
    gold = [[{"overall": x} for x in row] for row in ([0.1, 0.5, 0.5], [0.9, 0.2, 0.4])]
    scores = [[0.0, 1.0, 0.0], [3.0, 2.0, 1.0]]
    sft = Measured("chat", [["x"] * 3] * 2, [[True] * 3] * 2, {"reward_model": scores}, None, [[3] * 3] * 2, gold, None)
    found = order_by_gold("reward_model", sft, ["a", "b"], [True, False])
    assert found["known_tasks"]["value"] == pytest.approx((1 + 0.5) / 2)  # right, a toss-up; one pair is equal in gold
    assert found["held_out_tasks"]["value"] == pytest.approx(2 / 3)  # 0.9 first, but 0.2 before 0.4
    assert order_by_gold("reward_model", sft, ["a", "b"], [True, True])["held_out_tasks"] is None
    assert order_by_gold("reward_model", sft, ["a", "b"], None) is None


def test_differences_that_are_all_equal_are_no_certainty():
    """Gold is bounded, so its interval has a width; equal scores have no interval."""
    same = [[{name: 0.5 for name in GOLD}]] * 8

    def make(gold):
        return Measured("chat", [["x"]] * 8, [[True]] * 8, {"reward_model": [[-1.0]] * 8}, None, [[3]] * 8, gold, None)

    own, sft = make(same), make(same)
    low, high = summarise("ppo", own, sft, TASKS, KNOWN, BY_GOLD)["difference_to_sft"]["ci95"]
    assert -1 < low < -0.1 and 0.1 < high < 1
    own, sft = make(None), make(None)
    found = summarise("ppo", own, sft, TASKS, None, BY_REWARD_MODEL)
    assert found["difference_to_sft"] == {"value": 0.0, "ci95": None} and found["ci95"]["score"] is None
    assert summarise("sft", sft, sft, TASKS, None, BY_REWARD_MODEL)["difference_to_sft"] is None


def test_every_judge_gives_a_verdict_and_the_first_one_decides():
    """Best of n has a win rate by judges that did not select it."""
    rng = np.random.default_rng(4)
    own, sft = measured(rng, 1.0), measured(rng)
    for policy in (own, sft):
        policy.scores["kept"] = [[-score for score in row] for row in policy.scores["reward_model"]]
    both = frozenset({"best_of_n"})
    judges = [Judge("kept"), Judge("reward_model", climbed=both, selected=both)]
    found = summarise("best_of_n", own, sft, TASKS, None, judges)
    kept, climbed = found["judges"]["kept"], found["judges"]["reward_model"]
    assert climbed["win_rate_vs_sft"] is None and climbed["climbed"] and not kept["climbed"]
    assert found["win_rate_vs_sft"] == kept["win_rate_vs_sft"] and not found["judge_climbed"]
    assert found["difference_to_sft"]["value"] == pytest.approx(-climbed["difference_to_sft"]["value"])
    assert found["score"] == pytest.approx(climbed["score"]["value"]) == pytest.approx(-kept["score"]["value"])
    assert kept["score"]["ci95"][0] < kept["score"]["value"] < kept["score"]["ci95"][1]
    win = lambda judge: summarise("ppo", own, sft, TASKS, None, [Judge(judge)])["win_rate_vs_sft"]["value"]  # noqa: E731
    assert win("kept") == pytest.approx(1 - win("reward_model")) and win("kept") < 0.5
    assert summarise("ppo", own, sft, TASKS, None, [])["win_rate_vs_sft"] is None, "nobody judges"


def test_every_figure_has_an_interval_a_standard_error_and_a_paired_difference(pair):
    own, sft = pair
    found = summarise("ppo", own, sft, TASKS, KNOWN, BY_GOLD)
    for key in ("score", "kl_to_sft", "length", "eos_rate", "pretrain_perplexity"):
        low, high = found["ci95"][key]
        assert low < found[key] < high and 0 < found["se"][key] < high - low
    for key, rows in (("length", (own.lengths, sft.lengths)), ("eos_rate", (own.finished, sft.finished))):
        gap = found["differences_to_sft"][key]
        assert gap["value"] == pytest.approx(np.mean(rows[0]) - np.mean(rows[1]))
        assert gap["ci95"][0] < gap["value"] < gap["ci95"][1]
    one, other = np.mean(own.text_losses), np.mean(sft.text_losses)
    gap = found["differences_to_sft"]["pretrain_perplexity"]
    assert gap["value"] == pytest.approx(math.exp(one) - math.exp(other))
    assert gap["ci95"][0] < gap["value"] < gap["ci95"][1]
    for part in ("helpful", "honest", "harmless"):
        low, high = found["gold"]["parts_ci95"][part]
        assert low < found["gold"][part] < high
    assert summarise("sft", sft, sft, TASKS, KNOWN, BY_GOLD)["differences_to_sft"] is None


def test_perplexities_of_the_same_rows_are_compared_row_by_row():
    """Rows of varied difficulty widen the interval of a perplexity, not of a difference."""
    rng = np.random.default_rng(5)
    hard = rng.normal(3.0, 1.0, 40)
    found = perplexity_difference((hard + 0.1).tolist(), hard.tolist())
    expected = math.exp(hard.mean() + 0.1) - math.exp(hard.mean())
    assert found["value"] == pytest.approx(expected) and found["ci95"][0] > 0
    wide = perplexity_estimate(hard.tolist())["ci95"]
    assert found["ci95"][1] - found["ci95"][0] < 0.2 * (wide[1] - wide[0])
    assert perplexity_difference(None, [1.0]) is None and perplexity_difference([1e4], [1.0]) is None

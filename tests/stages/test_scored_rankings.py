"""Test rankings by scorers: what is ranked, what is a tie, and that rm and dpo learn from it."""

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from data.records import Ranking
from pipeline import fingerprints
from pipeline.errors import UserError
from stages.rankings import MANY_UNFINISHED, ceiling_figures
from stages.scorers.labels import finished_only, with_noise

SMALL = ["data.rankings=null", "rankings.samples_per_prompt=4", "rankings.response_length=6", "rankings.max_length=64"]
BY_WORDS = (
    "rankings.scorer=[{rule: words, at_most: 2, tolerance: 8}, "
    "{rule: word_list, words: [fox], score: any, weight: -1.0}]"
)


def scores_of(response):
    words = response.replace("?", " ").replace(".", " ").split()
    return 1 - min(8, max(0, len(words) - 2)) / 8 - ("fox" in words)


def test_responses_are_ranked_by_the_weighted_sum(chain, tmp_path):
    """Equal sums are a tie; the split is by prompt, and no labeler is named."""
    done = chain.run("rankings", tmp_path / "rankings", *SMALL, BY_WORDS)
    rows = [*done.rows("train.jsonl"), *done.rows("validation.jsonl")]
    prompts = {row["prompt"] for row in rows}
    assert prompts == {row["prompt"] for row in chain.rows("prompts.jsonl")} and len(rows) == len(prompts)
    for row in rows:
        scores = [scores_of(response) for response in row["responses"]]
        assert row["scores"] == pytest.approx(scores, abs=1e-6) and len(scores) == 4
        assert row["ranks"] == [1 + sum(other > score + 1e-6 for other in scores) for score in scores]
        assert "labeler" not in row and len(row["finished"]) == 4
    assert done.figures["score"] == pytest.approx(sum(sum(row["scores"]) for row in rows) / len(rows) / 4, abs=1e-5)
    cut_off = 1 - sum(sum(row["finished"]) for row in rows) / len(rows) / 4
    assert cut_off == pytest.approx(done.figures["unfinished"]) and cut_off > MANY_UNFINISHED
    assert f"{cut_off:.0%} of the responses were cut off; raise rankings.response_length" in done.said


def test_scores_that_are_near_are_tied(chain, tmp_path):
    done = chain.run("rankings", tmp_path / "rankings", *SMALL, BY_WORDS, "rankings.tie_within=0.3")
    for row in done.rows("train.jsonl"):
        for i, one in enumerate(row["scores"]):
            for j, other in enumerate(row["scores"]):
                assert row["ranks"][i] != row["ranks"][j] or abs(one - other) <= 0.3 + 1e-6


def test_some_are_kept_for_a_judge_where_that_is_asked(chain, tmp_path):
    """Prompts are on one side only, and validation is what it is without a judge."""
    kept = chain.run("rankings", tmp_path / "kept", *SMALL, BY_WORDS, "rankings.judge_fraction=0.4")
    none = chain.run("rankings", tmp_path / "none", *SMALL, BY_WORDS)
    assert not (none.folder / "judge.jsonl").exists() and "judge" not in none.figures
    assert kept.rows("validation.jsonl") == none.rows("validation.jsonl")
    sides = [kept.rows(f"{name}.jsonl") for name in ("train", "judge")]
    assert kept.figures["judge"] == len(sides[1]) > 0
    by_prompt = sorted(sides[0] + sides[1], key=lambda row: row["prompt"])
    assert by_prompt == sorted(none.rows("train.jsonl"), key=lambda row: row["prompt"])


def test_labelers_who_see_the_score_with_noise_agree_as_often_as_asked(chain, tmp_path):
    """Two rank what is held out, one the rest; nobody but the scorer knows the scores."""
    exact = chain.run("rankings", tmp_path / "exact", *SMALL, BY_WORDS)
    done = chain.run("rankings", tmp_path / "noisy", *SMALL, BY_WORDS, "rankings.scorer_agreement=0.6")
    assert done.figures["expected_agreement"] == pytest.approx(0.6, abs=1e-4) and done.figures["noise"] > 0
    for name, labelers in (("train", ["labeler 1"]), ("validation", ["labeler 1", "labeler 2"])):
        rows, known = done.rows(f"{name}.jsonl"), exact.rows(f"{name}.jsonl")
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in known for _ in labelers]
        assert [row["labeler"] for row in rows] == labelers * len(known) and not any("scores" in row for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)
    assert done.figures["rankings"] == len(done.rows("train.jsonl")) + len(done.rows("validation.jsonl"))
    assert 0 <= done.figures["labeler_agreement"] <= 1 and "labeler_agreement" not in exact.figures
    right = []  # who goes by the score itself, on the pairs that are published
    for row in done.rows("validation.jsonl"):
        scores, ranks = [scores_of(response) for response in row["responses"]], row["ranks"]
        for i, j in itertools.permutations(range(4), 2):
            if ranks[i] < ranks[j]:
                right.append(0.5 if abs(scores[i] - scores[j]) < 1e-6 else float(scores[i] > scores[j]))
    assert done.figures["accuracy_ceiling"] == pytest.approx(sum(right) / len(right)) and 0 < sum(right) < len(right)
    low, high = done.figures["accuracy_ceiling_ci95"]
    assert 0 <= low < done.figures["accuracy_ceiling"] < high <= 1 and "accuracy_ceiling" not in exact.figures
    again = chain.run("rankings", tmp_path / "again", *SMALL, BY_WORDS, "rankings.scorer_agreement=0.6")
    assert again.rows("train.jsonl") == done.rows("train.jsonl")


def test_several_labelers_rank_a_prompt_and_what_was_cut_off_can_stay_unjudged(chain, tmp_path):
    """Rows of one prompt have the same responses, so a model reads them once; ranks may differ."""
    settings = [*SMALL, BY_WORDS, "rankings.scorer_agreement=0.6", "rankings.response_length=6"]
    whole = chain.run("rankings", tmp_path / "whole", *settings)
    done = chain.run(
        "rankings", tmp_path / "done", *settings, "rankings.labelers_per_prompt=3", "rankings.rank_unfinished=false"
    )
    rows = done.rows("train.jsonl")
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    assert all([row["labeler"] for row in some] == [f"labeler {k}" for k in (1, 2, 3)] for some in by_prompt.values())
    assert all(len({tuple(row["responses"]) for row in some}) == 1 for some in by_prompt.values())
    assert any(len({tuple(row["ranks"]) for row in some}) > 1 for some in by_prompt.values())
    seen = rows + done.rows("validation.jsonl")
    assert {flag for row in seen for flag in row["finished"]} == {True, False}
    for row in seen:
        assert [rank is None for rank in row["ranks"]] == [not ended for ended in row["finished"]]
        judged = sorted(rank for rank in row["ranks"] if rank is not None)
        assert judged[:1] in ([], [1]), "the best of those that are judged is first"
    assert not any(None in row["ranks"] for row in whole.rows("train.jsonl"))
    assert 0 < done.figures["accuracy_ceiling"] <= 1 and done.figures["unfinished"] == whole.figures["unfinished"]
    assert "rank_unfinished=false" in whole.said and "rank_unfinished=false" not in done.said
    by_score = chain.run(
        "rankings", tmp_path / "scores", *SMALL, BY_WORDS, settings[-1], "rankings.rank_unfinished=false"
    )
    for row in by_score.rows("train.jsonl"):
        assert [score is None for score in row["scores"]] == [not ended for ended in row["finished"]]
    trained = chain.run(
        "rm", tmp_path / "rm", *settings, "rm.max_steps=2", "rm.max_length=64", inputs={"rankings": done.folder}
    )
    assert len(trained.rows("metrics.jsonl")) == 2


def ranking(index, scores):
    responses = tuple(f"{index} {k}" for k in range(len(scores)))
    ranks = tuple(1 + sum(other > score for other in scores) for score in scores)
    return Ranking(f"{index}", f"prompt {index}", responses, ranks, scores=tuple(scores))


def test_the_agreement_of_noisy_labelers_is_what_their_noise_says():
    """Counted over many pairs of labelers; and they follow the score as often as is expected."""
    drawn = random.Random(0)
    rankings = [ranking(i, [drawn.gauss(0, 1) for _ in range(4)]) for i in range(1500)]
    noisy, figures = with_noise(rankings, [2] * len(rankings), 0.726, seed=0)
    same, right, pairs = 0, 0, 0
    for known, (one, other) in zip(rankings, noisy, strict=True):
        for i, j in itertools.combinations(range(4), 2):
            first, second = one.ranks[i] < one.ranks[j], other.ranks[i] < other.ranks[j]
            same, pairs = same + (first == second), pairs + 1
            right += first == (known.scores[i] > known.scores[j])
    assert same / pairs == pytest.approx(0.726, abs=0.015)
    rows, seen = [one for one, _ in noisy], [np.array([one.scores]) for one in rankings]
    ceiling = ceiling_figures(seen, rows, [one.prompt for one in rows], figures["noise"])
    assert right / pairs == pytest.approx(ceiling["accuracy_ceiling"])
    assert right / pairs == pytest.approx(ceiling["expected_accuracy_ceiling"], abs=0.015)
    assert figures["expected_agreement"] == pytest.approx(0.726, abs=1e-6) and figures["equal_scores"] == 0
    half = [ranking(i, [0.0, 0.0, 1.0, 1.0]) for i in range(20)]
    assert with_noise(half, [1] * 20, 0.7, seed=0)[1]["equal_scores"] == pytest.approx(1 / 3)


def test_responses_that_nobody_judges_do_not_count_in_the_agreement():
    """Each fourth response has a score far above the others, and no rank."""
    drawn = random.Random(0)
    rankings = [ranking(i, [drawn.gauss(0, 1) for _ in range(3)] + [50.0]) for i in range(1500)]
    unjudged = [replace(one, finished=(True, True, True, False)) for one in rankings]
    noisy, figures = with_noise([finished_only(one) for one in unjudged], [2] * len(rankings), 0.726, seed=0)
    assert all(one.ranks[3] is None and sorted(one.ranks[:3]) == [1, 2, 3] for some in noisy for one in some)
    pairs = [(one, other, i, j) for one, other in noisy for i, j in itertools.combinations(range(3), 2)]
    same = sum((one.ranks[i] < one.ranks[j]) == (other.ranks[i] < other.ranks[j]) for one, other, i, j in pairs)
    assert same / len(pairs) == pytest.approx(0.726, abs=0.02)
    assert figures["expected_agreement"] == pytest.approx(0.726, abs=1e-6)


def test_a_ranking_of_the_finished_responses_has_their_order():
    one = replace(ranking(0, [3.0, 2.0, 2.0, 1.0]), finished=(False, True, True, True))
    some = finished_only(one)
    assert some.ranks == (None, 1, 1, 3) and some.scores == (None, 2.0, 2.0, 1.0)
    assert finished_only(replace(one, finished=(False,) * 4)).ranks == (None,) * 4


def test_where_no_finished_responses_differ_it_says_what_to_do(chain, tmp_path):
    settings = [*SMALL, BY_WORDS, "rankings.response_length=1", "rankings.rank_unfinished=false"]
    with pytest.raises(UserError) as error:
        chain.run("rankings", tmp_path / "rankings", *settings)
    (line,) = error.value.lines
    assert (
        line.startswith("rankings: the train split")
        and "raise rankings.num_prompts, or rankings.response_length" in line
    )
    assert "% of the responses were cut off), or change rankings.validation_fraction" in line


def test_equal_scores_leave_nothing_to_agree_on():
    with pytest.raises(UserError, match=r"rankings.scorer_agreement: .* choose a scorer that tells more"):
        with_noise([ranking(0, [1.0, 1.0, 1.0])], [2], 0.726, seed=0)


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_what_was_ranked_trains_the_next_stages(chain, tmp_path, stage):
    done = chain.run("rankings", tmp_path / "rankings", *SMALL, BY_WORDS)
    settings = [*SMALL, BY_WORDS, f"{stage}.max_steps=2", f"{stage}.max_length=64"]
    experiment = chain.experiment(*settings)
    assert "world" not in fingerprints.all_needs(chain.stages[stage], experiment)
    trained = chain.run(stage, tmp_path / stage, *settings, inputs={"rankings": done.folder})
    assert len(trained.rows("metrics.jsonl")) == 2


def test_another_reward_model_and_a_function_rank(chain, tmp_path):
    """A function gets the keys of the prompts' rows; both are part of the fingerprint."""
    file, prompts = tmp_path / "reward.py", tmp_path / "prompts.jsonl"
    file.write_text(
        "def score(responses, best):\n    return [float(r.startswith(b)) for r, b in zip(responses, best)]\n"
    )
    rows = [row | {"best": "the"} for row in chain.rows("prompts.jsonl")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = chain.root / "other_rm" / "model"
    scorers = f"rankings.scorer=[{{python: '{file}:score', weight: 100.0}}, {{model: {folder}, name: other}}]"
    settings = [*SMALL, scorers, f"data.prompts={prompts}"]
    found = chain.stages["rankings"].folders(chain.experiment(*settings))
    assert found == {"rankings.scorer[0].python": file, "rankings.scorer[1].model": folder}
    done = chain.run("rankings", tmp_path / "rankings", *settings)
    for row in done.rows("train.jsonl"):
        starts = [response.startswith("the") for response in row["responses"]]
        assert [score > 50 for score in row["scores"]] == starts


@pytest.mark.parametrize(
    "settings, line",
    [
        (["rankings.scorer=[{rule: words, at_most: 3}]"], "rankings.scorer: has no effect beside data.rankings"),
        ([*SMALL, "rankings.scorer=[{model: rm}]"], "rankings.scorer: rm is trained on these rankings"),
        (["rankings.tie_within=0.1"], "rankings.tie_within: has no effect without rankings.scorer"),
        (["rankings.scorer_agreement=0.7"], "rankings.scorer_agreement: has no effect without rankings.scorer"),
        ([*SMALL, BY_WORDS, "rankings.labelers_per_prompt=2"], "rankings.labelers_per_prompt: a scorer without"),
        ([*SMALL, BY_WORDS, "rankings.agreement=0.7"], "rankings.agreement: is that of the embedded world"),
        (
            [*SMALL, BY_WORDS, "rankings.tie_within=0.1", "rankings.scorer_agreement=0.7"],
            "rankings.tie_within: with scorer_agreement",
        ),
        ([*SMALL, "rankings.scorer=[{rule: words}]"], "rankings.scorer[0].rule: words has no limit"),
    ],
)
def test_mistakes_are_lines(chain, settings, line):
    with pytest.raises(UserError) as error:
        chain.experiment(*settings)
    assert any(line in text for text in error.value.lines), error.value.lines


def test_a_row_that_cannot_be_ranked_by_is_a_line(chain, tmp_path):
    with pytest.raises(UserError, match=r"prompts.jsonl:1: the rule exact finds no 'gold'"):
        chain.run("rankings", tmp_path / "rankings", *SMALL, "rankings.scorer=[{rule: exact, answer: gold}]")

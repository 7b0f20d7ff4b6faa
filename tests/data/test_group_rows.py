"""Test prompt groups that are read from encoded rankings, against groups made in plain Python."""

import json
import math
import random

import pytest
import torch

from data import sources
from data.encode import encode_prompts, encode_response
from data.group_rows import count_pairs, most_responses, part_of, tokens_of, widths_of
from data.groups import PromptGroup, batch_groups
from data.length_limit import fit_lengths
from data.records import prompt_key
from data.source import Source
from data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from stages.objectives.losses import ranking_loss
from stages.shared.inputs import LengthLimit, load_groups

WORDS = ["red", "blue", "fox", "hen", "what", "is", "the", "color", "of", "a"]


def text(rng, most):
    return " ".join(rng.choices(WORDS, k=rng.randint(0, most)))


def ranking_rows(rng, prompts):
    """Return rows of rankings with ties, unjudged and equal responses, and several labelers."""
    rows = []
    for i in range(prompts):
        responses = [text(rng, 9) for _ in range(rng.randint(2, 5))]
        finished = [rng.random() < 0.8 for _ in responses]
        for labeler in "ab"[: rng.randint(1, 2)]:
            ranks = [1, *(rng.choice([1, 2, None]) for _ in responses[1:])]
            row = {"id": f"{i}{labeler}", "prompt": f"{i} {text(rng, 4)}", "responses": responses, "ranks": ranks}
            row |= {"prompt": f"what is {i}", "labeler": labeler, "finished": finished}
            if rng.random() < 0.3:
                row["margin"] = rng.random()
            rows.append(row)
    rng.shuffle(rows)
    return rows


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_groups(file, tokenizer, max_length):
    """Return the groups of a file, made with everything in memory."""
    rows = sources.load("rankings", Source(path=file))
    names = [row.id for row in rows]
    prompts = encode_prompts(tokenizer, [row.prompt for row in rows], names)
    answers = [[encode_response(tokenizer, *answer) for answer in row.answers] for row in rows]
    limits = {"max_length": max_length, "on_too_long": "truncate", "section": "rm"}
    kept, prompts, answers, report = fit_lengths(prompts, answers, what="ranking", names=names, **limits)
    members = {}
    for i, prompt, responses in zip(kept, prompts, answers, strict=True):
        members.setdefault((prompt_key(rows[i].prompt), rows[i].answers), []).append((prompt, responses, rows[i]))
    groups = []
    for (prompt, responses, first), *others in members.values():
        rankings = [first, *(row for _, _, row in others)]
        more = tuple(row.ranks for row in rankings[1:])
        names = tuple(row.labeler for row in rankings)
        margins = tuple(row.margin or 0.0 for row in rankings)
        groups.append(PromptGroup(prompt, responses, first.ranks, first.id, more, names, margins))
    return [group for group in groups if group.pairs()], report


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)] * 9, 300)


@pytest.mark.parametrize("prompts", [30, 1500])  # more than a batch of the file
def test_groups_are_those_made_in_memory(tmp_path, tokenizer, prompts):
    file = written(tmp_path / "train.jsonl", ranking_rows(random.Random(prompts), prompts))
    groups, report = load_groups(file, tokenizer, LengthLimit(14, "truncate", "rm"))
    expected, expected_report = plain_groups(file, tokenizer, 14)
    assert list(groups) == expected and len(groups) < prompts  # some have no pair
    assert (report.kept, report.truncated, report.longest) == (
        expected_report.kept,
        expected_report.truncated,
        expected_report.longest,
    )
    assert report.truncated > 0
    assert tokens_of(groups) == tokens_of(expected) and widths_of(groups) == widths_of(expected)
    assert most_responses(groups) == most_responses(expected) and count_pairs(groups) == count_pairs(expected)
    assert groups[-1] == expected[-1] and groups[2:4] == expected[2:4]
    chosen = [len(groups) - 1, 0, 3]
    assert list(part_of(groups, chosen)) == part_of(expected, chosen)
    assert tokens_of(part_of(groups, chosen)) == tokens_of(part_of(expected, chosen))
    with pytest.raises(IndexError):
        groups[len(groups)]


def test_scores_give_each_pair_its_margin(tmp_path, tokenizer):
    """The margin of a pair is the difference of its scores, unless the labeler gave one."""
    scored = {"prompt": "what is red", "responses": ["a fox", "a hen", "the color"], "scores": [2.5, 4.0, None]}
    rows = [scored, scored | {"labeler": "b", "margin": 0.5}, scored | {"prompt": "what is blue", "scores": [7, 6, 1]}]
    groups, _ = load_groups(written(tmp_path / "train.jsonl", rows), tokenizer, LengthLimit(64, "error", "rm"))
    batch = batch_groups(list(groups), 0)
    pairs = list(zip(batch.winners.tolist(), batch.losers.tolist(), batch.pair_margins.tolist(), strict=True))
    assert pairs == [(1, 0, 1.5), (1, 0, 0.5), (3, 4, 1.0), (3, 5, 6.0), (4, 5, 5.0)]  # of the first, two labelers

    # Llama 2, equation 2, with three times the margin: the mean of pairs, then of prompts.
    scores = [0.3, 0.1, -0.2, 1.0, 2.0, -1.5]
    losses = [math.log1p(math.exp(3 * m - scores[i] + scores[j])) for i, j, m in pairs]
    by_hand = (sum(losses[:2]) / 2 + sum(losses[2:]) / 3) / 2
    margins = 3 * batch.pair_margins
    value = ranking_loss(torch.tensor(scores), batch.winners, batch.losers, batch.pair_weights, 2, margins, 0.0)
    assert value.item() == pytest.approx(by_hand)


def test_errors_count_all_rows(tmp_path, tokenizer):
    rows = [{"prompt": f"what is {i}", "responses": ["red " * 30, "a"], "ranks": [1, 2]} for i in range(1100)]
    file = written(tmp_path / "train.jsonl", rows)
    with pytest.raises(UserError) as caught:
        load_groups(file, tokenizer, LengthLimit(20, "error", "rm"))
    assert len(caught.value.lines) == 6 and caught.value.lines[-1].startswith("rm.max_length: 1095 more rows are ")
    with pytest.raises(UserError, match="no ranking is left"):
        load_groups(file, tokenizer, LengthLimit(20, "drop", "rm"))

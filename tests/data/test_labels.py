"""Test labels of single responses: how they are read, kept, and made of ranks."""

import json

import pytest

from data import sources
from data.group_rows import EncodedRanking, count_pairs, groups_of
from data.groups import PromptGroup
from data.labels import LabelledGroups, MismatchedGroups, judgements, labels_of, mismatched
from data.records import Ranking, is_usable, to_json
from data.row_reader import records
from data.source import Loaded, Source
from pipeline.errors import UserError

THUMBS = [
    ("a ?", "yes", True),
    ("a ?", "no", False),
    ("b ?", "one", False),
    ("c ?", "good", True),
    ("c ?", "fine", True),
]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def thumbs(path, rows=THUMBS):
    return written(path, [{"prompt": p, "completion": c, "label": good} for p, c, good in rows])


def read(path, **options):
    loaded = Loaded()
    found = [
        (r.prompt, r.responses, r.ranks, r.labels) for _, r in records("rankings", Source(path, **options), loaded)
    ]
    return found, loaded


def test_marked_rows_keep_one_sided_prompts_by_labels(tmp_path):
    file = thumbs(tmp_path / "thumbs.jsonl")
    found, loaded = read(file, by="labels")
    assert found == [
        ("a ?", ("yes", "no"), (1, 2), (True, False)),
        ("b ?", ("one",), (None,), (False,)),
        ("c ?", ("good", "fine"), (None, None), (True, True)),
    ]
    assert not loaded.errors and not loaded.left_out
    found, loaded = read(file)
    assert found == [("a ?", ("yes", "no"), (1, 2), None)] and sum(loaded.left_out.values()) == 3


def test_a_file_of_thumbs_alone_is_usable_by_labels(tmp_path):
    file = thumbs(tmp_path / "thumbs.jsonl", [(f"{i} ?", "yes", i % 2 == 0) for i in range(5)])
    assert len(sources.load("rankings", Source(file, by="labels"))) == 5
    with pytest.raises(UserError, match="no rows are left"):
        sources.load("rankings", Source(file))


def test_rows_with_labels_make_their_ranks(tmp_path):
    rows = [
        {"prompt": "a ?", "responses": ["x"], "labels": [True]},
        {"prompt": "b ?", "responses": ["x", "y", "z"], "labels": [False, None, True]},
        {"prompt": "c ?", "responses": ["x", "y"], "ranks": [1, 2], "labels": [True, None]},
    ]
    found, loaded = read(written(tmp_path / "own.jsonl", rows))
    assert [one[2:] for one in found] == [
        ((None,), (True,)),
        ((2, None, 1), (False, None, True)),
        ((1, 2), (True, None)),
    ]
    assert not loaded.errors


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"responses": ["x", "y"], "labels": [True]}, "2 responses, 1 labels"),
        ({"responses": ["x"], "labels": [1]}, "label 1 is 1; expected true"),
        ({"responses": ["x", "y"], "ranks": [1, 2], "labels": [False, True]}, "'ranks' and 'labels' contradict"),
        ({"responses": ["x"], "ranks": [1]}, "needs at least 2 responses"),
    ],
)
def test_labels_that_cannot_be_are_refused(row, problem, tmp_path):
    found, loaded = read(written(tmp_path / "bad.jsonl", [{"prompt": "a ?", **row}]))
    assert not found and problem in loaded.errors[0]


def test_a_record_with_labels_reads_back(tmp_path):
    before = Ranking("1", "a ?", ("x",), (None,), labels=(False,))
    (after,) = sources.load("rankings", Source(written(tmp_path / "one.jsonl", [to_json(before)])))
    assert after == before and is_usable(after)
    assert not is_usable(Ranking("1", "a ?", ("x",), (None,), labels=(None,)))
    assert "labels" not in to_json(Ranking("1", "a ?", ("x", "y"), (1, 2)))


def test_ranks_stand_for_labels_of_the_first_and_the_last():
    group = PromptGroup([1], [[2], [3], [4], [5]], (2, 1, None, 3), more_ranks=((1, 1, 1, 1),))
    assert labels_of(group) == [(None, True, None, False), (None,) * 4]
    equal = PromptGroup([1], [[2], [3], [2]], (1, 2, 2))
    assert labels_of(equal) == [(True, False, None)]  # the same response is not bad as well
    said = PromptGroup([1], [[2], [3]], (1, 2), more_ranks=((1, 2),), labels=((True, True), None))
    assert labels_of(said) == [(True, True), (True, False)]


def test_groups_have_labelled_responses_only():
    group = PromptGroup([1], [[2], [3], [4]], (1, 2, 3), more_ranks=((3, 1, 2),))
    labelled = LabelledGroups([group, PromptGroup([6], [[7], [8], [9]], (None,) * 3, labels=((None, False, None),))])
    assert [g.responses for g in labelled] == [[[2], [3], [4]], [[8]]]
    # labeler by labeler
    assert judgements(labelled) == [(0, True), (2, False), (0, False), (1, True), (3, False)]


def test_each_prompt_gets_the_responses_to_the_one_before():
    assert mismatched([4, 2, 7]) == [(4, 7), (2, 4), (7, 2)]
    groups = [PromptGroup([1, 1], [[5, 6, 7]]), PromptGroup([2, 2, 2], [[8], [9, 9, 9]])]
    found = MismatchedGroups(groups, mismatched(range(2)), max_length=4)
    assert [(g.prompt, g.responses) for g in found] == [([1, 1], [[8], [9, 9]]), ([2, 2, 2], [[5]])]


def test_encoded_rankings_keep_labels_of_every_labeler():
    def row(prompt, responses, ranks, labels=None, labeler=None):
        ranking = Ranking("-", prompt, tuple(map(str, responses)), ranks, labels=labels, labeler=labeler)
        return EncodedRanking([1], [[r] for r in responses], ranking)

    rows = [
        row("a", [2], (None,), (True,), "ann"),
        row("b", [2, 3], (1, 2)),
        row("a", [2], (None,), (False,), "ben"),
        row("c", [2, 3], (1, 1)),
    ]
    labelled = groups_of(rows, with_labels=True)
    assert [g.labels for g in labelled] == [((True,), (False,)), ()]
    assert judgements(LabelledGroups(labelled)) == [(0, True), (0, False), (1, True), (2, False)]
    assert len(groups_of(rows)) == 1 == count_pairs(labelled) and len(groups_of(rows, with_ties=True)) == 2

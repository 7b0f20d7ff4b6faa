"""Test prompt groups: which pairs count, what they weigh, and how rows are laid out."""

from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.groups import PromptGroup, batch_groups, make_rows

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def group(ranks, first=10):
    return PromptGroup([1, 2], [[first + i] * (i + 1) for i in range(len(ranks))], tuple(ranks))


def ends(g):
    """Return (winner, loser) of each pair."""
    return [pair[:2] for pair in g.pairs()]


class TestPairs:
    def test_every_pair_of_a_strict_ranking_counts_once_best_first(self):
        ranks = (3, 1, 4, 2)
        pairs = ends(group(ranks))
        assert len(pairs) == comb(4, 2) and all(ranks[a] < ranks[b] for a, b in pairs)
        assert {frozenset(p) for p in pairs} == {frozenset(p) for p in combinations(range(4), 2)}

    def test_ties_and_unjudged_responses_make_no_pair(self):
        assert ends(group((1, 1, 2, None))) == [(0, 2), (1, 2)]
        assert group((None, None)).pairs() == [] and group((2, 2, 2)).pairs() == []

    def test_identical_responses_make_no_pair(self):
        """Check that no rank makes a pair of a text and itself."""
        same = PromptGroup([1], [[5], [5], [6]], (1, 2, 3))
        assert ends(same) == [(0, 2), (1, 2)]

    def test_the_weight_is_one_over_the_pairs_of_judged_responses(self):
        for ranks, right in (((1, 2), 1.0), (range(1, 10), 1 / 36), ((1, None, 2, 3), 1 / 3), ((1, 1, 2), 1 / 3)):
            found = [pair.weight for pair in group(ranks).pairs()]
            assert found and found == pytest.approx([right] * len(found))
        assert group((1, None)).pairs() == []

    def test_several_labelers_weigh_as_one(self):
        """Check weights of 1/C(K,2) over the labelers, and both directions where they differ."""
        both = PromptGroup([1], [[5], [6], [7]], (1, 2, 3), more_ranks=((2, 1, None),))
        assert both.pairs() == [
            (0, 1, 0, pytest.approx(1 / 6)),
            (0, 2, 0, pytest.approx(1 / 6)),
            (1, 2, 0, pytest.approx(1 / 6)),
            (1, 0, 1, pytest.approx(1 / 2)),
        ]

    def test_responses_ranked_first_share_a_weight_of_one(self):
        """Check that ties share a labeler's weight, and that judging nothing gives none."""
        several = PromptGroup([1], [[5], [6], [7]], (2, 1, 1), more_ranks=((None, 3, 2), (None, None, None)))
        third = pytest.approx(1 / 3)
        assert several.first() == [(1, pytest.approx(1 / 6)), (2, pytest.approx(1 / 6)), (2, third)]

    def test_a_fully_judged_strict_ranking_weighs_one_in_all(self):
        for k in range(2, 10):
            g = group(range(1, k + 1))
            assert sum(pair.weight for pair in g.pairs()) == pytest.approx(1.0)


class TestBatch:
    def test_rows_pairs_and_weights_of_mixed_groups(self):
        """Check K = 3, 2 and an unjudged pair: indices point to rows of the whole batch."""
        groups = [group((2, 1, 3)), group((1, 2), 20), group((None, 1), 30)]
        batch = batch_groups(groups, pad_id=0)
        assert batch.groups == 3 and len(batch.rows.input_ids) == 7
        assert list(zip(batch.winners.tolist(), batch.losers.tolist(), strict=True)) == [(0, 2), (1, 0), (1, 2), (3, 4)]
        assert batch.pair_weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
        assert batch.pair_group.tolist() == [0, 0, 0, 1]

    def test_pairs_of_one_winner_by_one_labeler_are_one_choice(self):
        """Check the choices of two labelers and of a tie, with weights of 1/(K − 1)."""
        both = PromptGroup([1], [[5], [6], [7]], (1, 2, 3), more_ranks=((2, 1, None),), margins=(0.5, 2.0))
        batch = batch_groups([both, group((1, 1, 2), 20)], pad_id=0)
        chosen: dict = {}
        pairs = (x.tolist() for x in (batch.winners, batch.losers, batch.choice))
        for winner, loser, choice in zip(*pairs, strict=True):
            chosen.setdefault(choice, (winner, []))[1].append(loser)
        assert list(chosen.values()) == [(0, [1, 2]), (1, [2]), (1, [0]), (3, [5]), (4, [5])]
        assert batch.choice_weights.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2, 1 / 2, 1 / 2])
        assert batch.pair_margins.tolist() == [0.5, 0.5, 0.5, 2.0, 0.0, 0.0]
        assert batch.first.tolist() == [0, 1, 3, 4] and batch.first_weights.tolist() == [0.5] * 4

    def test_packing_changes_the_rows_and_not_the_pairs(self):
        groups = [group((2, 1, 3)), group((1, 2), 20)]
        rows, shared = batch_groups(groups, pad_id=0), batch_groups(groups, pad_id=0, packed=True)
        assert len(shared.rows.input_ids) == 1 and len(rows.rows.input_ids) == 5
        assert shared.rows.responses.tolist() == rows.rows.responses.tolist()
        for name in ("winners", "losers", "pair_weights", "pair_group", "choice", "choice_weights", "first"):
            assert torch.equal(getattr(shared, name), getattr(rows, name))

    def test_a_batch_without_pairs_has_empty_indices(self):
        batch = batch_groups([group((1, 1))], pad_id=0)
        assert batch.winners.tolist() == [] and batch.winners.dtype == torch.long and len(batch.pair_weights) == 0


@st.composite
def ragged(draw):
    ids = st.integers(0, 9)
    n = draw(st.integers(1, 5))
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=6), min_size=n, max_size=n))
    responses = draw(st.lists(st.lists(ids, max_size=6), min_size=n, max_size=n))
    return prompts, responses


def seen(rows, n, column):
    """Return the ids that the token at (n, column) may attend to, itself included."""
    if rows.sequences is None:
        return rows.input_ids[n][: column + 1].tolist()
    i, place = divmod(rows.home[column].item(), rows.sequences.shape[1])
    tokens = rows.sequences[i, : place + 1]
    assert rows.position_ids[0][tokens].tolist() == list(range(place + 1)) and tokens[-1] == column
    return rows.input_ids[0][tokens].tolist()


class TestRows:
    def test_layout(self):
        rows = make_rows([[1, 2, 3], [4]], [[5], [6, 7]], pad_id=0)
        assert rows.input_ids.tolist() == [[1, 2, 3, 5], [4, 6, 7, 0]]
        assert rows.sequences is None and rows.position_ids is None
        assert rows.responses.tolist() == [[5, 0], [6, 7]]
        assert rows.response_mask.tolist() == [[True, False], [True, True]]
        assert rows.before[rows.response_mask].tolist() == [2, 4, 5] and rows.last.tolist() == [3, 6]

    def test_packed_layout(self):
        """Check that packing has no padding and each prompt once, with attention in own rows."""
        rows = make_rows([[1, 2], [1, 2], [3]], [[5], [6, 7], [8]], pad_id=0, packed=True)
        assert rows.input_ids.tolist() == [[1, 2, 5, 6, 7, 3, 8]]
        assert rows.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
        assert rows.responses.tolist() == [[5, 0], [6, 7], [8, 0]]
        assert rows.sequences.tolist() == [[0, 1, 2, 2], [0, 1, 3, 4], [5, 6, 6, 6]]
        assert rows.home.tolist() == [0, 1, 2, 6, 7, 8, 9]
        assert rows.before[rows.response_mask].tolist() == [1, 1, 3, 5] and rows.last.tolist() == [2, 4, 6]

    @pytest.mark.parametrize("packed", [False, True])
    def test_each_response_token_sees_its_prompt_and_earlier_tokens(self, packed):
        """Check that the token before it sees only prompt + earlier response tokens.

        Positions are 0, 1, …; masks go by position, so ids that equal the pad id are included.
        """

        @SETTINGS
        @given(ragged())
        def see(data):
            prompts, responses = data
            prompts = [p for p in prompts for _ in range(3)]
            responses = [x for r in responses for x in (r, r[::-1], [9, 9])]
            rows = make_rows(prompts, responses, pad_id=0, packed=packed)
            width = rows.input_ids.shape[1]
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                assert rows.responses[i][rows.response_mask[i]].tolist() == response
                for t in range(len(response)):
                    assert seen(rows, *divmod(int(rows.before[i, t]), width)) == prompt + response[:t]
                assert seen(rows, *divmod(int(rows.last[i]), width)) == prompt + response
            if packed:  # nothing is computed twice
                unlike = [p for i, p in enumerate(prompts) if i == 0 or p != prompts[i - 1]]
                assert rows.input_ids.shape == (1, sum(map(len, unlike)) + sum(map(len, responses)))

        see()

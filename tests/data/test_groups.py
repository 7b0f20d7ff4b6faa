"""Prompt groups: which pairs count, what they weigh, and how rows are laid out."""

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


class TestPairs:
    def test_every_pair_of_a_strict_ranking_counts_once_best_first(self):
        ranks = (3, 1, 4, 2)
        pairs = group(ranks).pairs()
        assert len(pairs) == comb(4, 2) and all(ranks[a] < ranks[b] for a, b in pairs)
        assert {frozenset(p) for p in pairs} == {frozenset(p) for p in combinations(range(4), 2)}

    def test_ties_and_unjudged_responses_make_no_pair(self):
        assert group((1, 1, 2, None)).pairs() == [(0, 2), (1, 2)]
        assert group((None, None)).pairs() == [] and group((2, 2, 2)).pairs() == []

    def test_identical_responses_make_no_pair(self):
        """Whatever their ranks: a model cannot prefer a text to itself."""
        same = PromptGroup([1], [[5], [5], [6]], (1, 2, 3))
        assert same.pairs() == [(0, 2), (1, 2)]

    def test_the_weight_is_one_over_the_pairs_of_judged_responses(self):
        assert group((1, 2)).pair_weight() == 1.0
        assert group(range(1, 10)).pair_weight() == pytest.approx(1 / 36)
        assert group((1, None, 2, 3)).pair_weight() == pytest.approx(1 / 3)
        assert group((1, None)).pair_weight() == 0.0

    def test_a_fully_judged_strict_ranking_weighs_one_in_all(self):
        for k in range(2, 10):
            g = group(range(1, k + 1))
            assert g.pair_weight() * len(g.pairs()) == pytest.approx(1.0)


class TestBatch:
    def test_rows_pairs_and_weights_of_mixed_groups(self):
        """K = 3, 2 and an unjudged pair: indices point to rows over the whole batch."""
        groups = [group((2, 1, 3)), group((1, 2), 20), group((None, 1), 30)]
        batch = batch_groups(groups, pad_id=0)
        assert batch.groups == 3 and len(batch.rows.input_ids) == 7
        assert list(zip(batch.winners.tolist(), batch.losers.tolist(), strict=True)) == [
            (0, 2),
            (1, 0),
            (1, 2),
            (3, 4),
        ]
        assert batch.pair_weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
        assert batch.pair_group.tolist() == [0, 0, 0, 1]

    def test_a_batch_without_pairs_has_empty_indices(self):
        batch = batch_groups([group((1, 1))], pad_id=0)
        assert (
            batch.winners.tolist() == []
            and batch.winners.dtype == torch.long
            and len(batch.pair_weights) == 0
        )


@st.composite
def ragged(draw):
    ids = st.integers(0, 9)
    n = draw(st.integers(1, 5))
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=6), min_size=n, max_size=n))
    responses = draw(st.lists(st.lists(ids, max_size=6), min_size=n, max_size=n))
    return prompts, responses


class TestRows:
    def test_layout(self):
        rows = make_rows([[1, 2, 3], [4]], [[5], [6, 7]], pad_id=0)
        assert rows.input_ids.tolist() == [[1, 2, 3, 5, 0], [0, 0, 4, 6, 7]]
        assert rows.attention_mask.tolist() == [[True] * 4 + [False], [False] * 2 + [True] * 3]
        assert rows.position_ids.tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]
        assert rows.prompt_width == 3 and rows.responses.tolist() == [[5, 0], [6, 7]]
        assert rows.response_mask.tolist() == [[True, False], [True, True]]

    def test_whatever_goes_in_comes_out_by_the_masks(self):
        """Ids that equal the pad id included: the mask goes by position."""

        @SETTINGS
        @given(ragged())
        def come_out(data):
            prompts, responses = data
            rows = make_rows(prompts, responses, pad_id=0)
            p = rows.prompt_width
            for i in range(len(prompts)):
                assert rows.responses[i][rows.response_mask[i]].tolist() == responses[i]
                assert rows.input_ids[i, :p][rows.attention_mask[i, :p]].tolist() == prompts[i]
                real = rows.position_ids[i][rows.attention_mask[i]].tolist()
                assert real == list(range(len(prompts[i]) + len(responses[i])))

        come_out()

    def test_given_widths_widen_and_change_nothing_else(self):
        rows = make_rows([[1, 2], [4]], [[5], [6, 7]], pad_id=0, prompt_width=4, response_width=5)
        assert rows.input_ids.shape == (2, 9) and rows.prompt_width == 4
        assert rows.input_ids[0].tolist() == [0, 0, 1, 2, 5, 0, 0, 0, 0]

    def test_selected_rows_keep_their_padding(self):
        rows = make_rows([[1, 2, 3], [4]], [[5], [6, 7]], pad_id=0)
        picked = rows.select(torch.tensor([1]))
        assert picked.input_ids.tolist() == [[0, 0, 4, 6, 7]] and picked.prompt_width == 3
        assert picked.response_mask.tolist() == [[True, True]]

"""Check inverse-transform sampling of one token: quantiles in, tokens out."""

import math

import pytest
import torch

from stages.rollouts.transformers import draw, truncated

P = torch.tensor([0.1, 0.4, 0.2, 0.3])
BELOW_ONE = math.nextafter(1.0, 0.0)


def at(uniform, probabilities=P, **options):
    uniform = torch.tensor([uniform], dtype=torch.float64)
    return draw(probabilities.log().unsqueeze(0), uniform, **options).item()


@pytest.mark.parametrize(
    "uniform, token", [(0.0, 0), (0.09, 0), (0.11, 1), (0.49, 1), (0.51, 2), (0.69, 2), (0.71, 3), (BELOW_ONE, 3)]
)
def test_a_quantile_picks_its_token(uniform, token):
    """Each token has an interval as long as its probability, in the order of ids."""
    assert at(uniform) == token


def test_zero_never_picks_a_token_of_probability_zero():
    """A uniform of exactly 0 comes once in 2²⁴ draws; it must not give an impossible token."""
    assert at(0.0, torch.tensor([0.0, 0.0, 0.7, 0.3])) == 2


def test_just_below_one_never_picks_a_token_of_probability_zero():
    assert at(BELOW_ONE, torch.tensor([0.7, 0.3, 0.0, 0.0])) == 1
    assert at(1 - 2**-24, torch.tensor([0.7, 0.3, 0.0, 0.0])) == 1


def test_rounding_in_a_large_vocabulary_leaves_every_quantile_a_token():
    """10⁵ equal probabilities do not sum to 1 in fp32; the last quantile still gives a token."""
    logits = torch.zeros(3, 100_000)
    tokens = draw(logits, torch.tensor([0.0, 0.5, BELOW_ONE], dtype=torch.float64)).tolist()
    assert tokens[0] == 0 and abs(tokens[1] - 50_000) <= 1 and tokens[2] == 99_999


def test_rows_are_drawn_independently():
    logits = torch.stack([P, P.flip(0)]).log()
    assert draw(logits, torch.tensor([0.45, 0.45])).tolist() == [1, 1]
    assert draw(logits, torch.tensor([0.05, 0.05])).tolist() == [0, 0]


@pytest.mark.parametrize(
    "top_p, allowed",
    [
        (0.05, {1}),
        (0.39, {1}),
        (0.45, {1, 3}),
        (0.65, {1, 3}),
        (0.75, {1, 2, 3}),
        (0.95, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_nucleus_that_reaches_it(top_p, allowed):
    """The nucleus: most probable first, until their mass is at least top_p; never empty."""
    drawn = {at(u / 1000, top_p=top_p) for u in range(1000)}
    assert drawn == allowed


def test_inside_the_nucleus_the_odds_are_kept():
    """top_p = 0.65 keeps 0.4 and 0.3: they are drawn 4 to 3."""
    drawn = [at((u + 0.5) / 7000, top_p=0.65) for u in range(7000)]
    assert drawn.count(1) == pytest.approx(4000, abs=2) and drawn.count(3) == pytest.approx(3000, abs=2)


@pytest.mark.parametrize(
    "top_k, allowed", [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (4, {0, 1, 2, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_keeps_the_likeliest_tokens(top_k, allowed):
    assert {at(u / 1000, top_k=top_k) for u in range(1000)} == allowed


def test_tokens_that_tie_with_the_last_one_stay():
    """No sort decides between equal tokens."""
    assert {at(u / 1000, torch.tensor([0.2, 0.2, 0.4, 0.2]), top_k=2) for u in range(1000)} == {0, 1, 2, 3}


@pytest.mark.parametrize("top_p, allowed", [(0.4, {1}), (0.75, {1, 3}), (0.8, {1, 2, 3}), (1.0, {1, 2, 3})])
def test_top_p_counts_within_what_top_k_leaves(top_p, allowed):
    """top_k = 3 leaves 0.4, 0.3 and 0.2 of 0.9: at 0.75 the nucleus is 0.675 of all."""
    assert {at(u / 1000, top_k=3, top_p=top_p) for u in range(1000)} == allowed


def test_top_k_and_top_p_are_those_of_transformers():
    """Compare the sets with transformers' processors, on random rows."""
    from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 2
    for top_k, top_p in [(5, None), (None, 0.7), (8, 0.6), (40, 0.99), (1, 0.5)]:
        warpers = [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p else []
        theirs = LogitsProcessorList(warpers)(None, logits.clone()).softmax(-1)
        ours = truncated(logits.softmax(-1), top_k, top_p)
        torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), theirs)


def test_nothing_left_out_is_the_same_tensor():
    probs = P.unsqueeze(0)
    assert truncated(probs, None, None) is probs and truncated(probs, 4, 1.0) is probs


def test_certainty_is_certain():
    """A temperature near 0 makes logits of ±1e6: the largest wins at any quantile."""
    logits = torch.tensor([[0.0, 1e6, 9e5]])
    for u in (0.0, 0.5, BELOW_ONE):
        assert draw(logits, torch.tensor([u], dtype=torch.float64)).item() == 1

"""Test losses that count ties against sums over all outcomes, and against published estimates."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from data.groups import PromptGroup, batch_groups
from data.ties import compare
from stages.objectives.losses import plackett_luce_loss, ranking_loss
from stages.objectives.ties import (
    davidson_logprobs,
    davidson_loss,
    davidson_luce_logprobs,
    davidson_luce_loss,
    log_symmetric_sums,
)

# Ties of two and three, an unjudged response, all tied, one judged alone, no tie.
RANKS = [(1, 1), (2, 1, 2, 4), (1, 1, 2, 1, 2), (1, None, 3, 1, None), (1, 1, 1), (3, 1, 2)]
COUNT = len(RANKS)
SIZES = [len(r) for r in RANKS]
STRENGTHS = torch.tensor([0.8, 0.3], dtype=torch.float64).log()


def numbers(seed, scale=1.0):
    return scale * torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups_of(ranks):
    return [PromptGroup([1], [[2 + i] for i in range(len(r))], r) for r in ranks]


def davidson_of(utilities, log_strength=STRENGTHS[0], ranks=RANKS):
    said = compare(groups_of(ranks))
    pairs = (said.first, said.second, said.tied, said.pair_weights.double())
    return davidson_loss(utilities, *pairs, log_strength, len(ranks))


def luce_of(utilities, log_strengths=STRENGTHS, ranks=RANKS, by_choices=False):
    said = compare(groups_of(ranks), by_choices=by_choices)
    choices = (said.alternatives, said.is_open, said.chosen, said.choice_weights.double())
    return davidson_luce_loss(utilities, *choices, log_strengths, len(ranks))


def davidson_by_hand(utilities):
    """Return the mean over prompts of 1/C(K, 2) Σ_pairs −log P, from the worths themselves."""
    worths, strength, total, start = np.exp(utilities.numpy()), math.exp(STRENGTHS[0]), 0.0, 0
    for ranks in RANKS:
        judged = [i for i, rank in enumerate(ranks) if rank is not None]
        for i, j in itertools.combinations(judged, 2):
            a, b = worths[start + i], worths[start + j]
            tie = strength * math.sqrt(a * b)
            share = tie if ranks[i] == ranks[j] else a if ranks[i] < ranks[j] else b
            total -= math.log(share / (a + b + tie)) / math.comb(len(judged), 2)
        start += len(ranks)
    return torch.tensor(total / COUNT, dtype=torch.float64)


def probability_by_hand(worths, ranks, strengths):
    """Return P(ranking): each choice's term over the sum of those of all sets that could be chosen.

    Args:
        worths: e^u of each response.
        ranks: The rank of each; None was not judged.
        strengths: δ of 1, 2, … responses.
    """

    def term(chosen):
        return strengths[len(chosen) - 1] * math.prod(worths[i] for i in chosen) ** (1 / len(chosen))

    rest, found = [i for i, rank in enumerate(ranks) if rank is not None], 1.0
    while rest:
        best = min(ranks[i] for i in rest)
        sets = [s for size in range(1, len(strengths) + 1) for s in itertools.combinations(rest, size)]
        found *= term([i for i in rest if ranks[i] == best]) / sum(map(term, sets))
        rest = [i for i in rest if ranks[i] != best]
    return found


def luce_by_hand(utilities):
    worths, total = np.exp(utilities.numpy()), 0.0
    for ranks, own in zip(RANKS, np.split(worths, np.cumsum(SIZES)[:-1]), strict=True):
        judged = sum(rank is not None for rank in ranks)
        total -= math.log(probability_by_hand(own, ranks, [1.0, *STRENGTHS.exp().tolist()])) / (judged - 1)
    return torch.tensor(total / COUNT, dtype=torch.float64)


def weak_orders(k):
    """Return every ranking of k responses with ties, ranks 1, 2, … without gaps."""
    return [r for r in itertools.product(range(1, k + 1), repeat=k) if set(r) == set(range(1, max(r) + 1))]


class TestDavidson:
    def test_is_the_double_loop_over_pairs(self, gradient_of, finite_difference):
        loss, gradient = gradient_of(davidson_of, numbers(1))
        assert loss.item() == pytest.approx(davidson_by_hand(numbers(1)).item(), rel=1e-6)
        torch.testing.assert_close(gradient, finite_difference(davidson_by_hand, numbers(1)), rtol=1e-5, atol=1e-7)

    def test_the_gradient_of_the_tie_strength_is_the_finite_difference(self, gradient_of, finite_difference):
        """At its optimum as many ties are expected as there are: that is what the gradient says."""
        at = STRENGTHS[:1].clone()
        _, gradient = gradient_of(lambda x: davidson_of(numbers(1), x[0]), at)
        by_differences = finite_difference(lambda x: davidson_of(numbers(1), x[0]), at)
        torch.testing.assert_close(gradient, by_differences, rtol=1e-5, atol=1e-8)
        said = compare(groups_of(RANKS))
        _, tie = davidson_logprobs(numbers(1)[said.first] - numbers(1)[said.second], at[0])
        expected = (said.pair_weights * (tie.exp() - said.tied.double())).sum() / COUNT
        assert gradient.item() == pytest.approx(expected.item(), rel=1e-6)

    def test_the_three_outcomes_sum_to_one(self):
        gaps = torch.linspace(-30, 30, 13, dtype=torch.float64)
        better, tie = davidson_logprobs(gaps, torch.tensor(0.4))
        worse, same = davidson_logprobs(-gaps, torch.tensor(0.4))
        torch.testing.assert_close(better.exp() + worse.exp() + tie.exp(), torch.ones_like(gaps))
        torch.testing.assert_close(tie, same)
        # the odds of the two responses are those of the logistic loss, whatever the ties
        torch.testing.assert_close(better - worse, gaps)

    def test_of_equal_responses_the_share_is_nu_over_two_plus_nu(self):
        _, tie = davidson_logprobs(torch.zeros(1), torch.tensor(1.0).log())
        assert tie.exp().item() == pytest.approx(1 / 3)

    def test_without_ties_and_with_a_strength_of_nothing_it_is_the_ranking_loss(self, gradient_of):
        ranks = [(2, 1, 3), (1, 2), (1, None, 2)]
        batch, u = batch_groups(groups_of(ranks), pad_id=0), numbers(1)[:8]
        loss, gradient = gradient_of(lambda x: davidson_of(x, torch.tensor(-60.0), ranks), u)
        weights = batch.pair_weights.double()
        other, other_gradient = gradient_of(lambda x: ranking_loss(x, batch.winners, batch.losers, weights, 3), u)
        torch.testing.assert_close(loss, other, rtol=1e-9, atol=0)
        torch.testing.assert_close(gradient, other_gradient, rtol=1e-9, atol=1e-12)

    def test_a_tie_pulls_scores_together(self, gradient_of):
        _, gradient = gradient_of(lambda u: davidson_of(u, ranks=[(1, 1)]), torch.tensor([2.0, -1.0]))
        assert gradient[0] > 0 > gradient[1] and gradient.sum().abs() < 1e-6
        _, none = gradient_of(lambda u: davidson_of(u, ranks=[(1, 1)]), torch.tensor([2.0, 2.0]))
        assert none.abs().max() == 0

    def test_enormous_gaps_stay_finite(self, gradient_of):
        for function in (davidson_of, luce_of):
            loss, gradient = gradient_of(function, numbers(1, 1e5).float())
            assert loss.isfinite() and gradient.isfinite().all()


class TestDavidsonLuce:
    def test_is_the_sum_over_all_sets(self, gradient_of, finite_difference):
        loss, gradient = gradient_of(luce_of, numbers(1))
        assert loss.item() == pytest.approx(luce_by_hand(numbers(1)).item(), rel=1e-6)
        torch.testing.assert_close(gradient, finite_difference(luce_by_hand, numbers(1)), rtol=1e-5, atol=1e-7)

    def test_the_gradient_of_the_tie_strengths_is_the_finite_difference(self, gradient_of, finite_difference):
        _, gradient = gradient_of(lambda x: luce_of(numbers(1), x), STRENGTHS)
        by_differences = finite_difference(lambda x: luce_of(numbers(1), x), STRENGTHS)
        torch.testing.assert_close(gradient, by_differences, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("k", [2, 3, 4])
    def test_the_probabilities_of_all_rankings_sum_to_one(self, k):
        """Ties of up to k responses: 3, 13 and 75 rankings."""
        utilities, strengths = numbers(4)[:k], torch.tensor([0.7, 0.2, 1.5], dtype=torch.float64).log()[: k - 1]
        orders = weak_orders(k)
        assert len(orders) == {2: 3, 3: 13, 4: 75}[k]
        found = [math.exp(-luce_of(utilities, strengths, [ranks], by_choices=True)) for ranks in orders]
        assert sum(found) == pytest.approx(1.0)

    def test_of_two_responses_it_is_davidsons(self, gradient_of):
        ranks = [(1, 2), (2, 1), (1, 1)]
        one, one_gradient = gradient_of(lambda u: luce_of(u, STRENGTHS[:1], ranks), numbers(1)[:6])
        other, other_gradient = gradient_of(lambda u: davidson_of(u, ranks=ranks), numbers(1)[:6])
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
        torch.testing.assert_close(one_gradient, other_gradient, rtol=1e-10, atol=1e-14)

    def test_without_ties_it_is_plackett_luce(self, gradient_of):
        """In the data and in the model: no strength at all, or strengths of nothing."""
        ranks = [(2, 1, 4, 3), (1, 2), (3, 1, None, 2)]
        batch, u = batch_groups(groups_of(ranks), pad_id=0), numbers(1)[:10]
        choices = (batch.winners, batch.losers, batch.choice, batch.choice_weights.double())
        other, other_gradient = gradient_of(lambda x: plackett_luce_loss(x, *choices, 3), u)
        for strengths in (STRENGTHS[:0], torch.tensor([-60.0, -60.0], dtype=torch.float64)):
            loss, gradient = gradient_of(lambda x, s=strengths: luce_of(x, s, ranks), u)
            torch.testing.assert_close(loss, other, rtol=1e-9, atol=0)
            torch.testing.assert_close(gradient, other_gradient, rtol=1e-9, atol=1e-12)

    def test_a_constant_changes_nothing_and_unjudged_responses_are_unseen(self, gradient_of):
        loss, gradient = gradient_of(luce_of, numbers(1))
        moved, moved_gradient = gradient_of(luce_of, numbers(1) + 100.0)
        torch.testing.assert_close(moved, loss, rtol=1e-9, atol=0)
        torch.testing.assert_close(moved_gradient, gradient, rtol=1e-8, atol=1e-11)
        judged = torch.tensor([r is not None for ranks in RANKS for r in ranks])
        for function in (luce_of, davidson_of):
            loss, gradient = gradient_of(function, numbers(1))
            poisoned, same = gradient_of(function, torch.where(judged, numbers(1), torch.nan))
            assert poisoned == loss
            torch.testing.assert_close(same, gradient, rtol=0, atol=0)

    def test_it_expects_single_choices_as_often_as_all_sets_say(self):
        said = compare(groups_of([(1, 1, 2)]))
        u = numbers(1)[:3]
        choices = (said.alternatives, said.is_open, said.chosen)
        _, single = davidson_luce_logprobs(u, *choices, STRENGTHS)
        worths = u.exp().tolist()
        first = [probability_by_hand(worths, r, [1.0, 0.8, 0.3]) for r in weak_orders(3) if r.count(1) == 1]
        assert single[0].exp().item() == pytest.approx(sum(first))

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_micro_batches_add_up_to_the_whole(self, size, gradient_of):
        def in_parts(u):
            loss, own = 0.0, u.split(SIZES)
            for i in range(0, COUNT, size):
                ranks = RANKS[i : i + size]
                loss = loss + luce_of(torch.cat(own[i : i + size]), ranks=ranks) * len(ranks) / COUNT
            return loss

        whole, gradient = gradient_of(luce_of, numbers(2))
        parts, parts_gradient = gradient_of(in_parts, numbers(2))
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts_gradient, gradient, rtol=1e-12, atol=1e-15)


def test_symmetric_sums_are_those_over_all_sets():
    logs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size in range(1, 6):
        sets = list(itertools.combinations(range(5), size))
        right = torch.stack([logs[:, list(s)].sum(1).exp() for s in sets]).sum(0).log()
        torch.testing.assert_close(log_symmetric_sums(logs, size), right)


def test_the_most_likely_worths_are_those_that_r_finds():
    """The example of R's PlackettLuce (Turner 2020, `?PlackettLuce`, npseudo = 0), as it prints it.

    Six rankings of apple, banana, orange and pear, ties of two and three; every response of an
    item has its worth. Apple's is set to 1.
    """
    rankings = [(1, 2, 0, 0), (4, 1, 2, 3), (2, 1, 1, 1), (1, 2, 3, 0), (2, 1, 1, 0), (1, 0, 3, 2)]
    ranks = [tuple(rank or None for rank in row) for row in rankings]

    def loss(theta):
        x = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        items = torch.cat([torch.zeros(1, dtype=torch.float64), x[:3]])
        value = luce_of(items.repeat(len(ranks)), x[3:], ranks, by_choices=True)
        value.backward()
        return value.item(), x.grad.numpy()

    found = minimize(loss, np.zeros(5), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    assert found == pytest.approx([0.2942875, -0.7335113, -0.1190960, -1.8619467, -0.7369735], abs=2e-5)

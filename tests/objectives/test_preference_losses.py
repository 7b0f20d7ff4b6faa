"""Test the ranking loss and DPO against double loops over the pairs of each prompt."""

import itertools
import math
from typing import get_args

import pytest
import torch

from data.groups import PromptGroup, batch_groups
from stages.dpo import pair_figures
from stages.objectives.losses import chosen_loss, dpo_loss, kto_loss, plackett_luce_loss, ranking_loss
from stages.objectives.pair_losses import PAIR_LOSSES
from stages.settings.dpo import LossType
from stages.settings.training import TIE_LOSSES
from stages.training.readings import read_sums

# Mixed K (2, 4, 9, 5), a tie, an unjudged response, a prompt without any usable pair.
RANKS = [(1, 2), (2, 1, 2, 4), tuple(range(9, 0, -1)), (1, None, 3, 2, None), (1, 1, 1)]
COUNT = len(RANKS)
SIZES = [len(r) for r in RANKS]


def batch_of(ranks):
    return batch_groups([PromptGroup([1], [[2 + i] for i in range(len(r))], r) for r in ranks], pad_id=0)


def numbers(seed, scale=1.0):
    return scale * torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def over_pairs(pair_loss):
    """Return the mean over prompts of 1/C(K, 2) Σ pair_loss(i, j) over pairs with i preferred to
    j.
    """
    total, start = 0.0, 0
    for ranks in RANKS:
        k = sum(r is not None for r in ranks)
        for i, first in enumerate(ranks):
            for j, second in enumerate(ranks):
                if first is not None and second is not None and first < second:
                    total += pair_loss(start + i, start + j) / math.comb(k, 2)
        start += len(ranks)
    return total / COUNT


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def ranking_by_hand(scores):
    s = scores.tolist()
    return torch.tensor(over_pairs(lambda i, j: -log_sigmoid(s[i] - s[j])), dtype=torch.float64)


def dpo_by_hand(logps, ref, beta, loss_type, smoothing):
    p, q = logps.tolist(), ref.tolist()

    def pair(i, j):
        h = (p[i] - p[j]) - (q[i] - q[j])
        if loss_type == "sigmoid":
            return -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)
        if loss_type == "robust":
            kept, flipped = -log_sigmoid(beta * h), -log_sigmoid(-beta * h)
            return ((1 - smoothing) * kept - smoothing * flipped) / (1 - 2 * smoothing)
        return (h - 1 / (2 * beta)) ** 2 if loss_type == "ipo" else max(0.0, 1 - beta * h)

    return torch.tensor(over_pairs(pair), dtype=torch.float64)


def ranking_of(scores, batch=None):
    batch = batch or batch_of(RANKS)
    return ranking_loss(scores, batch.winners, batch.losers, batch.pair_weights, COUNT)


DPO = [("sigmoid", 0.0), ("sigmoid", 0.1), ("robust", 0.0), ("robust", 0.2), ("ipo", 0.0), ("hinge", 0.0)]


def dpo_of(logps, ref, loss_type, smoothing, beta=0.3):
    batch = batch_of(RANKS)
    return dpo_loss(logps, ref, batch.winners, batch.losers, batch.pair_weights, beta, COUNT, loss_type, smoothing)


class TestRanking:
    def test_is_the_double_loop_over_pairs(self):
        assert ranking_of(numbers(1)).item() == pytest.approx(ranking_by_hand(numbers(1)).item(), rel=1e-6)

    def test_gradient_is_the_finite_difference_of_the_loop(self, gradient_of, finite_difference):
        _, gradient = gradient_of(ranking_of, numbers(1))
        torch.testing.assert_close(gradient, finite_difference(ranking_by_hand, numbers(1)), rtol=1e-5, atol=1e-8)

    def test_only_differences_of_scores_count(self, gradient_of):
        """The same constant on all scores changes neither loss nor gradient, and the gradient sums
        to 0.
        """
        loss, gradient = gradient_of(ranking_of, numbers(1))
        moved, moved_gradient = gradient_of(ranking_of, numbers(1) + 17.0)
        torch.testing.assert_close(moved, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(moved_gradient, gradient, rtol=1e-10, atol=1e-14)
        assert gradient.sum().abs() < 1e-12

    def test_the_order_of_responses_does_not_count(self):
        """Responses (with their ranks and scores) permuted within each prompt, and prompts among
        themselves."""
        scores = numbers(1).split(SIZES)
        ranks, moved = [], []
        for g in reversed(range(COUNT)):
            order = torch.randperm(SIZES[g], generator=torch.Generator().manual_seed(g)).tolist()
            ranks.append(tuple(RANKS[g][i] for i in order))
            moved.append(scores[g][order])
        torch.testing.assert_close(
            ranking_of(torch.cat(moved), batch_of(ranks)), ranking_of(numbers(1)), rtol=1e-12, atol=0
        )

    def test_every_prompt_weighs_the_same_whatever_its_k(self):
        """With equal scores each pair costs log 2, so each prompt costs log 2 (ties: its untied
        share of it).
        """
        for k in (2, 4, 9):
            batch = batch_of([tuple(range(1, k + 1))])
            loss = ranking_loss(torch.zeros(k, dtype=torch.float64), batch.winners, batch.losers, batch.pair_weights, 1)
            assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
            assert len(batch.winners) == math.comb(k, 2)

    def test_unjudged_and_tied_responses_get_no_gradient_from_what_they_lack(self, gradient_of):
        """NaN as the score of an unjudged response, or of a prompt with ties only, is unseen."""
        judged = torch.tensor([r is not None and len(set(ranks)) > 1 for ranks in RANKS for r in ranks])
        loss, gradient = gradient_of(ranking_of, numbers(1))
        poisoned, poisoned_gradient = gradient_of(ranking_of, torch.where(judged, numbers(1), torch.nan))
        assert poisoned == loss
        torch.testing.assert_close(poisoned_gradient, gradient, rtol=0, atol=0)
        assert (gradient[~judged] == 0).all()

    def test_without_any_pair_loss_and_gradient_are_zero(self, gradient_of):
        batch = batch_of([(1, 1), (None, 1)])
        loss, gradient = gradient_of(
            lambda s: ranking_loss(s, batch.winners, batch.losers, batch.pair_weights, 2), torch.ones(4)
        )
        assert loss == 0 and (gradient == 0).all()

    def test_enormous_margins_stay_finite(self, gradient_of):
        """A margin of −1e4 costs 1e4, with a gradient of at most 1; log(sigmoid) would be −∞."""
        batch = batch_of([(1, 2)])
        loss, gradient = gradient_of(
            lambda s: ranking_loss(s, batch.winners, batch.losers, batch.pair_weights, 1), torch.tensor([-1e4, 0.0])
        )
        assert loss.item() == pytest.approx(1e4) and gradient.tolist() == [-1.0, 1.0]

    def test_smoothing_and_margins_are_the_double_loop_with_them(self, gradient_of, finite_difference):
        """ℓ(d) = −(1−s) log σ(d) − s log σ(−d) at d = r_i − r_j − m, a margin a ranking."""
        margins = [0.0, 0.5, 2.0, 0.25, 1.0]
        owner = [g for g, size in enumerate(SIZES) for _ in range(size)]
        groups = [
            PromptGroup([1], [[2 + i] for i in range(len(r))], r, margins=(m,))
            for r, m in zip(RANKS, margins, strict=True)
        ]
        batch = batch_groups(groups, pad_id=0)

        def by_hand(scores):
            s = scores.tolist()
            gap = lambda i, j: s[i] - s[j] - 3.0 * margins[owner[i]]  # noqa: E731
            pair = lambda i, j: -0.9 * log_sigmoid(gap(i, j)) - 0.1 * log_sigmoid(-gap(i, j))  # noqa: E731
            return torch.tensor(over_pairs(pair), dtype=torch.float64)

        def ours(scores):
            pairs = (batch.winners, batch.losers, batch.pair_weights)
            return ranking_loss(scores, *pairs, COUNT, 3.0 * batch.pair_margins, 0.1)

        loss, gradient = gradient_of(ours, numbers(1))
        assert loss.item() == pytest.approx(by_hand(numbers(1)).item(), rel=1e-6)
        torch.testing.assert_close(gradient, finite_difference(by_hand, numbers(1)), rtol=1e-5, atol=1e-8)


def orders_by_hand(utilities):
    """Return −log P of the order of each prompt, a mean over its K − 1 choices and over prompts.

    Each response is chosen out of itself and all that are ranked below it.
    """
    u, total, start = utilities.tolist(), 0.0, 0
    for ranks in RANKS:
        k = sum(r is not None for r in ranks)
        for i, rank in enumerate(ranks):
            below = [j for j, other in enumerate(ranks) if None not in (rank, other) and other > rank]
            others = sum(math.exp(u[start + j]) for j in below)
            if below:
                total -= math.log(math.exp(u[start + i]) / (math.exp(u[start + i]) + others)) / (k - 1)
        start += len(ranks)
    return torch.tensor(total / COUNT, dtype=torch.float64)


def orders_of(utilities, batch=None):
    batch = batch or batch_of(RANKS)
    return plackett_luce_loss(utilities, batch.winners, batch.losers, batch.choice, batch.choice_weights, COUNT)


class TestPlackettLuce:
    def test_is_the_loop_over_choices(self, gradient_of, finite_difference):
        loss, gradient = gradient_of(orders_of, numbers(1))
        assert loss.item() == pytest.approx(orders_by_hand(numbers(1)).item(), rel=1e-6)
        torch.testing.assert_close(gradient, finite_difference(orders_by_hand, numbers(1)), rtol=1e-5, atol=1e-8)

    def test_the_probabilities_of_all_orders_sum_to_one(self):
        """exp(−(K − 1) · loss) of one strict ranking is its probability: over all 24 orders of 4 it
        sums to 1.
        """
        u = numbers(4)[:4]
        loss = lambda order: (  # noqa: E731
            lambda b: plackett_luce_loss(u, b.winners, b.losers, b.choice, b.choice_weights, 1).item()
        )(batch_of([order]))
        assert sum(math.exp(-3 * loss(order)) for order in itertools.permutations((1, 2, 3, 4))) == pytest.approx(1.0)

    def test_of_two_responses_it_is_the_ranking_loss(self, gradient_of):
        batch = batch_of([(1, 2), (2, 1), (1, 1)])
        one, one_gradient = gradient_of(
            lambda u: plackett_luce_loss(u, batch.winners, batch.losers, batch.choice, batch.choice_weights, 3),
            numbers(1)[:6],
        )
        other, other_gradient = gradient_of(
            lambda u: ranking_loss(u, batch.winners, batch.losers, batch.pair_weights, 3), numbers(1)[:6]
        )
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
        torch.testing.assert_close(one_gradient, other_gradient, rtol=1e-12, atol=1e-15)

    def test_a_constant_changes_nothing_and_enormous_gaps_stay_finite(self, gradient_of):
        loss, gradient = gradient_of(orders_of, numbers(1))
        moved, moved_gradient = gradient_of(orders_of, numbers(1) + 300.0)
        torch.testing.assert_close(moved, loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(moved_gradient, gradient, rtol=1e-8, atol=1e-12)
        loss, gradient = gradient_of(orders_of, numbers(1, 1e5))
        assert loss.isfinite() and gradient.isfinite().all()

    def test_unjudged_responses_and_prompts_without_a_pair_are_unseen(self, gradient_of):
        judged = torch.tensor([r is not None and len(set(ranks)) > 1 for ranks in RANKS for r in ranks])
        loss, gradient = gradient_of(orders_of, numbers(1))
        poisoned, poisoned_gradient = gradient_of(orders_of, torch.where(judged, numbers(1), torch.nan))
        assert poisoned == loss
        torch.testing.assert_close(poisoned_gradient, gradient, rtol=0, atol=0)
        batch = batch_of([(1, 1), (None, 1)])
        nothing, none = gradient_of(lambda u: orders_of(u, batch), torch.ones(4))
        assert nothing == 0 and (none == 0).all()


def test_sft_is_the_cross_entropy_a_token_of_those_put_first():
    """By hand: log-probs −3 over 2 tokens, and a tie of −4 and −6 over 1 and 3: (3 + ½·4 + ½·6) /
    (2 + ½·1 + ½·3).
    """
    groups = [PromptGroup([1], [[5, 6], [7]], (1, 2)), PromptGroup([1], [[5], [6, 7, 8]], (1, 1))]
    batch, logps = batch_groups(groups, pad_id=0), torch.tensor([-3.0, -9.0, -4.0, -6.0])
    tokens = sum(weight * len(g.responses[i]) for g in groups for i, weight in g.first())
    assert tokens == 4.0
    assert chosen_loss(logps, batch.first, batch.first_weights, tokens).item() == pytest.approx(8.0 / 4.0)


class TestDPO:
    @pytest.mark.parametrize("loss_type, smoothing", DPO)
    def test_is_the_double_loop_over_pairs(self, loss_type, smoothing):
        logps, ref = numbers(2, 3.0), numbers(3, 3.0)
        right = dpo_by_hand(logps, ref, 0.3, loss_type, smoothing)
        assert dpo_of(logps, ref, loss_type, smoothing).item() == pytest.approx(right.item(), rel=1e-6)

    @pytest.mark.parametrize("loss_type, smoothing", DPO)
    def test_gradient_is_the_finite_difference_of_the_loop(self, loss_type, smoothing, gradient_of, finite_difference):
        logps, ref = numbers(2, 3.0), numbers(3, 3.0)
        _, gradient = gradient_of(lambda x: dpo_of(x, ref, loss_type, smoothing), logps)
        by_differences = finite_difference(lambda x: dpo_by_hand(x, ref, 0.3, loss_type, smoothing), logps)
        torch.testing.assert_close(gradient, by_differences, rtol=1e-5, atol=1e-7)

    def test_at_the_reference_the_sigmoid_loss_is_log_two(self):
        """h = 0 for every pair: log 2 a prompt, times the untied share of its pairs."""
        shares = over_pairs(lambda i, j: 1.0)
        assert dpo_of(numbers(2), numbers(2), "sigmoid", 0.0).item() == pytest.approx(math.log(2) * shares, rel=1e-6)

    def test_its_gradient_raises_winners_and_lowers_losers(self, gradient_of):
        """One pair: d loss / d logp = −β σ(−βh) for the winner, the opposite for the loser
        (Rafailov 2023, eq. 7).
        """
        batch, beta = batch_of([(2, 1)]), 0.5
        logps, ref = (torch.tensor([-4.0, -6.0], dtype=torch.float64), torch.tensor([-5.0, -5.0], dtype=torch.float64))
        _, gradient = gradient_of(
            lambda x: dpo_loss(x, ref, batch.winners, batch.losers, batch.pair_weights, beta, 1), logps
        )
        h = (-6.0 + 5.0) - (-4.0 + 5.0)
        push = beta / (1 + math.exp(beta * h))
        assert gradient.tolist() == pytest.approx([push, -push], rel=1e-6)

    def test_without_smoothing_an_enormous_margin_is_finite(self, gradient_of):
        batch = batch_of([(1, 2)])
        for sign in (1, -1):
            loss, gradient = gradient_of(
                lambda x: dpo_loss(x, torch.zeros(2), batch.winners, batch.losers, batch.pair_weights, 0.1, 1),
                torch.tensor([sign * 1e5, 0.0]),
            )
            assert torch.isfinite(loss) and torch.isfinite(gradient).all()

    def test_an_unknown_loss_is_refused(self):
        with pytest.raises(ValueError, match="sigmoid, robust, ipo, hinge"):
            dpo_of(numbers(2), numbers(3), "exo", 0.0)

    def test_the_setting_names_every_loss_of_the_table(self):
        """All others of dpo.loss_type read whole rankings, ties or single responses."""
        assert {*get_args(LossType)} - {"plackett_luce", "sft", "kto", *TIE_LOSSES} == set(PAIR_LOSSES)
        assert {name for name, _ in DPO} == set(PAIR_LOSSES)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_of_prompts_add_up_to_the_whole(size, gradient_of):
    """Loss and gradient of both losses, prompts cut into micro-batches of any size."""
    ref = numbers(3)

    def in_parts(function):
        def total(x):
            loss, rows, refs = 0.0, x.split(SIZES), ref.split(SIZES)
            for i in range(0, COUNT, size):
                loss = loss + function(
                    torch.cat(rows[i : i + size]), torch.cat(refs[i : i + size]), batch_of(RANKS[i : i + size])
                )
            return loss

        return total

    for function in (
        lambda x, _, b: ranking_loss(x, b.winners, b.losers, b.pair_weights, COUNT),
        lambda x, r, b: dpo_loss(x, r, b.winners, b.losers, b.pair_weights, 0.3, COUNT),
        lambda x, r, b: plackett_luce_loss(x - r, b.winners, b.losers, b.choice, b.choice_weights, COUNT),
    ):
        whole, gradient = gradient_of(lambda x, f=function: f(x, ref, batch_of(RANKS)), numbers(2))
        parts, parts_gradient = gradient_of(in_parts(function), numbers(2))
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts_gradient, gradient, rtol=1e-12, atol=1e-15)


class TestKTO:
    """Test the loss on single responses."""

    good = torch.tensor([True, False, True, False, False])
    ratios = torch.tensor([0.4, -1.2, -0.3, 2.0, 0.1], dtype=torch.float64)

    def loss(self, ratios, kl=0.7):
        return kto_loss(ratios, self.good, kl, 0.5, 0.8, 1.3, 5)

    def test_by_hand(self, gradient_of):
        """The gradient of w (1 − σ(x)) is −w σ(x) σ(−x) times that of x."""
        found, gradient = gradient_of(self.loss, self.ratios)
        total, slopes = 0.0, []
        for ratio, good in zip(self.ratios.tolist(), self.good.tolist(), strict=True):
            weight, sign = (0.8, 1) if good else (1.3, -1)
            value = 1 / (1 + math.exp(-sign * 0.5 * (ratio - 0.7)))
            total += weight * (1 - value) / 5
            slopes.append(-weight * value * (1 - value) * sign * 0.5 / 5)
        assert found.item() == pytest.approx(total, rel=1e-12)
        torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-12, atol=0)

    def test_enormous_ratios_are_finite(self, gradient_of):
        found, gradient = gradient_of(self.loss, 1e6 * self.ratios)
        assert torch.isfinite(found) and torch.isfinite(gradient).all()


class TestFigures:
    """Test DPO's figures beside its loss."""

    ranks = ((1, 2), (2, 1, 4, 3), (1, 3, 2))
    logps = torch.tensor([-1.0, -3.0, -2.0, -1.0, -9.0, -4.0, -1.5, -1.0, -2.5])

    def figures(self, ranks, logps, share):
        figures = pair_figures(torch.tensor(0.7), logps, torch.full_like(logps, -2.0), batch_of(ranks), 0.5, share)
        return read_sums([figures])[0]

    def test_by_hand_for_one_prompt(self):
        """K = 2: rewards are β (log π − log π_ref), the winner's higher."""
        found = self.figures([(1, 2)], torch.tensor([-1.0, -4.0]), 1.0)
        assert found == pytest.approx(
            {
                "loss": 0.7,
                "rewards/chosen": 0.5,
                "rewards/rejected": -1.0,
                "rewards/accuracies": 1.0,
                "rewards/margins": 1.5,
                "logps/chosen": -1.0,
                "logps/rejected": -4.0,
            }
        )

    def test_they_do_not_depend_on_the_micro_batch(self):
        """Prompts of 1, 6 and 3 pairs, cut in three ways: held-out figures are the same."""
        found = []
        for cuts in ([0, 3], [0, 1, 3], [0, 1, 2, 3]):
            sums = {}
            for a, b in itertools.pairwise(cuts):
                first, last = (sum(map(len, self.ranks[:i])) for i in (a, b))
                for key, value in self.figures(self.ranks[a:b], self.logps[first:last], (b - a) / 3).items():
                    sums[key] = sums.get(key, 0.0) + value
            del sums["loss"]
            found.append(sums)
        assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])

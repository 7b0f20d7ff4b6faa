"""Test token rewards, scores without EOS and the KL estimators against their formulas."""

import math

import pytest
import torch

from stages.objectives.rewards import final_scores, kl_per_token, token_rewards

P = [0.5, 0.3, 0.15, 0.05]  # the policy
Q = [0.4, 0.2, 0.1, 0.3]  # the reference


def logs(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimators_follow_their_formulas(estimator):
    found = kl_per_token(logs(P), logs(Q), estimator).tolist()
    for p, q, k in zip(P, Q, found, strict=True):
        right = math.log(p / q) if estimator == "k1" else q / p - 1 - math.log(q / p)
        assert k == pytest.approx(right, abs=1e-14)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimators_are_unbiased(estimator):
    """Their expectation under the policy, summed over the whole alphabet, is the KL divergence."""
    kl = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))
    mean = sum(p * k for p, k in zip(P, kl_per_token(logs(P), logs(Q), estimator).tolist(), strict=True))
    assert mean == pytest.approx(kl, abs=1e-14)


def test_k3_is_never_negative_and_exact_near_zero():
    """At log-ratios around 1e-6 the naive (ρ − 1) − log ρ loses its digits in fp32; d²/2 is
    exact there.
    """
    d = torch.tensor([-3.0, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 3.0])
    k3 = kl_per_token(d, torch.zeros_like(d), "k3")
    assert (k3 >= 0).all()
    assert k3[d.abs() == torch.tensor(1e-3)].tolist() == pytest.approx([5e-7, 5e-7], rel=1e-2)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k1 or k3"):
        kl_per_token(logs(P), logs(Q), "k2")


@pytest.fixture
def kl():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def test_the_score_is_paid_once_at_the_last_token(kl, prefix_mask):
    """Rewards are −β KL, plus the score at the last response token only."""
    scores, lengths, coef = torch.tensor([10.0, -20.0, 30.0], dtype=torch.float64), [4, 1, 2], 0.1
    rewards = token_rewards(scores, kl, prefix_mask(lengths, 4), coef)
    for b, length in enumerate(lengths):
        for t in range(4):
            right = -coef * kl[b, t].item() if t < length else 0.0
            right += scores[b].item() if t == length - 1 else 0.0
            assert rewards[b, t].item() == pytest.approx(right, abs=1e-14)


def test_rewards_of_a_row_sum_to_score_minus_kl(kl, prefix_mask):
    """Σ_t r_t = r(x, y) − β Σ_t KL_t: InstructGPT's R(x, y)."""
    mask, scores = prefix_mask([4, 1, 2], 4), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    total = token_rewards(scores, kl, mask, 0.3).sum(-1)
    torch.testing.assert_close(total, scores - 0.3 * torch.where(mask, kl, 0.0).sum(-1))


def test_nan_kl_under_the_mask_is_unseen(kl, prefix_mask):
    mask, scores = prefix_mask([4, 1, 2], 4), torch.ones(3, dtype=torch.float64)
    poisoned = token_rewards(scores, torch.where(mask, kl, torch.nan), mask, 0.1)
    torch.testing.assert_close(poisoned, token_rewards(scores, kl, mask, 0.1), rtol=0, atol=0)


def test_token_rewards_leave_their_inputs_alone(kl, prefix_mask):
    """Rewards are a new tensor."""
    scores, before = torch.ones(3, dtype=torch.float64), kl.clone()
    token_rewards(scores, kl, prefix_mask([4, 1, 2], 4), 0.1)
    assert torch.equal(kl, before) and torch.equal(scores, torch.ones(3, dtype=torch.float64))


def test_a_response_without_eos_gets_the_fixed_score():
    scores, finished = torch.tensor([3.0, -5.0]), torch.tensor([True, False])
    assert final_scores(scores, finished, -1.0).tolist() == [3.0, -1.0]
    assert final_scores(scores, finished, None).tolist() == [3.0, -5.0]


class TestFinalScores:
    scores = torch.tensor([0.5, -3.0, 4.0, 0.2])
    finished = torch.tensor([True, True, True, False])

    def test_clip_then_missing_eos_then_length_by_hand(self):
        """±2 clips −3 and 4; the unfinished one gets −1; 0.1 per token is subtracted from all."""
        found = final_scores(
            self.scores, self.finished, -1.0, lengths=torch.tensor([1, 2, 3, 10]), score_clip=2.0, length_penalty=0.1
        )
        assert found.tolist() == pytest.approx([0.4, -2.2, 1.7, -2.0])

    def test_the_score_of_a_missing_eos_is_not_clipped(self):
        assert final_scores(self.scores, self.finished, -5.0, score_clip=1.0).tolist() == [0.5, -1.0, 1.0, -5.0]

    def test_without_settings_the_reward_models_word_stands(self):
        assert torch.equal(final_scores(self.scores, self.finished, None), self.scores)

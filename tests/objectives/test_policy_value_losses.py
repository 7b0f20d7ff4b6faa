"""Test PPO's clipped losses and the language-model loss against their equations in plain loops."""

import math

import pytest
import torch

from stages.objectives.losses import language_model_loss, policy_loss, value_loss

LENGTHS, WIDTH, EPS = [5, 2, 1, 4], 5, 0.2


def numbers(seed, scale=1.0):
    return scale * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def mask(prefix_mask):
    return prefix_mask(LENGTHS, WIDTH)


@pytest.fixture
def ratios():
    """(logprobs, old_logprobs, advantages), with ratios on both sides of both clip edges."""
    old = numbers(1) - 3
    return old + numbers(2, 0.4), old, numbers(3)


@pytest.fixture
def predictions():
    """(values, old_values, returns), with values on both sides of both clip edges."""
    old = numbers(4)
    return old + numbers(5, 0.4), old, numbers(6)


def policy_by_hand(logprobs, old, advantages, count):
    loss = ratio_sum = clipped = kl = 0.0
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            a, d = float(advantages[b, t]), float(logprobs[b, t]) - float(old[b, t])
            ratio = math.exp(d)
            near = min(max(ratio, 1 - EPS), 1 + EPS)
            loss -= min(ratio * a, near * a)  # eq. 7 is a maximum of min(…)
            ratio_sum += ratio
            clipped += near * a < ratio * a
            kl += 0.5 * d * d
    return loss / count, {"ratio": ratio_sum, "clipped": clipped, "approxkl": kl}


def value_by_hand(values, old, returns, count):
    loss = clipped = 0.0
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            v, o, g = float(values[b, t]), float(old[b, t]), float(returns[b, t])
            near = min(max(v, o - EPS), o + EPS)
            loss += 0.5 * max((v - g) ** 2, (near - g) ** 2)
            clipped += (near - g) ** 2 > (v - g) ** 2
    return loss / count, {"clipped": clipped}


@pytest.mark.parametrize(
    "function, by_hand, given", [(policy_loss, policy_by_hand, "ratios"), (value_loss, value_by_hand, "predictions")]
)
class TestBoth:
    def test_equals_a_loop_over_the_equation(self, function, by_hand, given, mask, request):
        """Loss and every sum that is logged; the data clip somewhere and not everywhere."""
        new, old, target = request.getfixturevalue(given)
        loss, sums = function(new, old, target, mask, EPS, 12)
        right, right_sums = by_hand(new, old, target, 12)
        assert loss.item() == pytest.approx(right, rel=1e-12)
        assert {k: v.item() for k, v in sums.items()} == pytest.approx(right_sums, rel=1e-6)
        assert 0 < right_sums["clipped"] < sum(LENGTHS)

    def test_gradient_is_the_finite_difference_of_the_loop(
        self, function, by_hand, given, mask, request, gradient_of, finite_difference
    ):
        """Autograd of ours against differences of the plain Python reading."""
        new, old, target = request.getfixturevalue(given)
        _, gradient = gradient_of(lambda x: function(x, old, target, mask, EPS, 12)[0], new)
        by_differences = finite_difference(lambda x: by_hand(x, old, target, 12)[0], new)
        torch.testing.assert_close(gradient, by_differences, rtol=1e-5, atol=1e-8)

    def test_nan_under_the_mask_changes_neither_loss_nor_gradient(
        self, function, by_hand, given, mask, request, gradient_of
    ):
        """NaN in all inputs at once, wherever the mask is False."""
        clean = request.getfixturevalue(given)
        dirty = [torch.where(mask, x, torch.nan) for x in clean]
        loss, gradient = gradient_of(lambda x: function(x, *clean[1:], mask, EPS, 12)[0], clean[0])
        poisoned_loss, poisoned_gradient = gradient_of(lambda x: function(x, *dirty[1:], mask, EPS, 12)[0], dirty[0])
        assert poisoned_loss == loss
        torch.testing.assert_close(poisoned_gradient, gradient, rtol=0, atol=0)
        sums = [function(*data, mask, EPS, 12)[1] for data in (clean, dirty)]
        assert sums[0] == sums[1]

    def test_infinity_under_the_mask_changes_nothing_either(self, function, by_hand, given, mask, request, gradient_of):
        """exp(∞) under the mask must not reach the gradient as ∞ · 0."""
        clean = request.getfixturevalue(given)
        dirty = torch.where(mask, clean[0], torch.inf)
        loss, gradient = gradient_of(lambda x: function(x, *clean[1:], mask, EPS, 12)[0], clean[0])
        poisoned_loss, poisoned_gradient = gradient_of(lambda x: function(x, *clean[1:], mask, EPS, 12)[0], dirty)
        assert poisoned_loss == loss
        torch.testing.assert_close(poisoned_gradient, gradient, rtol=0, atol=0)

    @pytest.mark.parametrize("size", [1, 3])
    def test_micro_batches_add_up_to_the_whole(self, function, by_hand, given, mask, request, gradient_of, size):
        """Σ over micro-batches of loss and gradient, each divided by the minibatch's count, is the
        whole's."""
        new, *rest = request.getfixturevalue(given)
        count = sum(LENGTHS)

        def in_parts(x):
            cuts = [slice(i, i + size) for i in range(0, len(x), size)]
            return sum(function(x[c], *(r[c] for r in rest), mask[c], EPS, count)[0] for c in cuts)

        whole, gradient = gradient_of(lambda x: function(x, *rest, mask, EPS, count)[0], new)
        parts, parts_gradient = gradient_of(in_parts, new)
        torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)
        torch.testing.assert_close(parts_gradient, gradient, rtol=1e-13, atol=1e-16)


def test_at_the_old_policy_the_ratio_is_one_and_nothing_is_clipped(ratios, mask, gradient_of):
    """First minibatch: the gradient is −A/count at every token, the plain policy gradient."""
    logprobs, _, advantages = ratios
    _, sums = policy_loss(logprobs, logprobs, advantages, mask, EPS, 12)
    assert sums["ratio"] == mask.sum() and sums["approxkl"] == 0 and sums["clipped"] == 0
    _, gradient = gradient_of(lambda x: policy_loss(x, logprobs, advantages, mask, EPS, 12)[0], logprobs)
    torch.testing.assert_close(gradient, torch.where(mask, -advantages / 12, 0.0))


def test_the_clip_stops_the_gradient_only_where_more_would_be_gained():
    """ρ = 1.5, A > 0: stopped. ρ = 1.5, A < 0: pulled back. ρ = 0.5, A > 0: pulled back. ρ = 0.5, A
    < 0: stopped.
    """
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    logprobs = ratio.log().requires_grad_(True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    policy_loss(logprobs, torch.zeros(1, 4, dtype=torch.float64), advantages, mask, 0.2, 1)[0].backward()
    assert logprobs.grad.tolist() == [[0.0, pytest.approx(1.5), pytest.approx(-0.5), 0.0]]


def test_an_enormous_ratio_stays_finite():
    """Float32 log-ratio of 60 with a positive advantage: clipped, its gradient 0."""
    logprobs = torch.tensor([[60.0]], requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), 0.2, 1)
    loss.backward()
    assert loss.item() == pytest.approx(-1.2) and logprobs.grad.item() == 0


class TestBandit:
    """Two arms, one logit each; every number here is known exactly."""

    reward = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def test_the_expected_gradient_is_that_of_the_expected_reward(self):
        """Σ_a π(a) ∇loss(a) = −∇ E[r], whatever baseline is subtracted."""
        theta = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
        probabilities = theta.softmax(-1)
        (truth,) = torch.autograd.grad((probabilities * self.reward).sum(), theta)
        for baseline in (0.0, 0.7):
            gradient = torch.zeros(2, dtype=torch.float64)
            for arm in range(2):
                logprob = theta.log_softmax(-1)[arm].view(1, 1)
                loss, _ = policy_loss(
                    logprob,
                    logprob.detach(),
                    (self.reward[arm] - baseline).view(1, 1),
                    torch.ones(1, 1, dtype=torch.bool),
                    0.2,
                    1,
                )
                gradient += probabilities[arm].detach() * torch.autograd.grad(loss, theta)[0]
            torch.testing.assert_close(gradient, -truth)

    def test_steps_down_the_loss_pull_the_better_arm(self):
        """Twenty sampled updates with whitened advantages: the better arm's probability rises from
        0.5.
        """
        theta, generator = torch.zeros(2, dtype=torch.float64), torch.Generator().manual_seed(0)
        for _ in range(20):
            theta.requires_grad_(True)
            arms = torch.multinomial(theta.detach().softmax(-1), 64, replacement=True, generator=generator)
            advantages = self.reward[arms] - self.reward[arms].mean()
            logprobs = theta.log_softmax(-1)[arms].view(-1, 1)
            loss, _ = policy_loss(
                logprobs, logprobs.detach(), advantages.view(-1, 1), torch.ones(64, 1, dtype=torch.bool), 0.2, 64
            )
            theta = theta.detach() - torch.autograd.grad(loss, theta)[0]
        assert theta.softmax(-1)[1] > 0.8


class TestLanguageModelLoss:
    labels = torch.tensor([[1, 4, -100], [-100, 0, 2]])

    @pytest.fixture
    def logits(self):
        return torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)

    def test_is_the_sum_of_minus_log_p_over_the_count(self, logits):
        right = 0.0
        for b in range(2):
            for t in range(3):
                if (label := self.labels[b, t].item()) != -100:
                    row = [math.exp(x) for x in logits[b, t].tolist()]
                    right -= math.log(row[label] / sum(row))
        assert language_model_loss(logits, self.labels, 7).item() == pytest.approx(right / 7, rel=1e-6)

    def test_gradient_is_softmax_minus_one_hot(self, logits, gradient_of):
        """The closed form of cross-entropy's gradient; 0 where the label is −100."""
        _, gradient = gradient_of(lambda x: language_model_loss(x, self.labels, 7), logits)
        hot = torch.nn.functional.one_hot(self.labels.clamp(min=0), 5)
        right = torch.where((self.labels != -100)[..., None], (logits.softmax(-1) - hot) / 7, 0.0)
        torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-7)

    def test_nan_where_there_is_no_label_changes_neither_loss_nor_gradient(self, logits, gradient_of):
        dirty = torch.where((self.labels != -100)[..., None], logits, torch.nan)
        loss, gradient = gradient_of(lambda x: language_model_loss(x, self.labels, 7), logits)
        poisoned_loss, poisoned_gradient = gradient_of(lambda x: language_model_loss(x, self.labels, 7), dirty)
        assert poisoned_loss == loss
        torch.testing.assert_close(poisoned_gradient, gradient, rtol=0, atol=0)

    def test_micro_batches_add_up_to_the_whole(self, logits):
        whole = language_model_loss(logits, self.labels, 4)
        parts = sum(language_model_loss(logits[i : i + 1], self.labels[i : i + 1], 4) for i in range(2))
        torch.testing.assert_close(parts, whole)

    def test_no_label_at_all_is_zero(self, logits):
        assert language_model_loss(logits, torch.full((2, 3), -100), 1).item() == 0.0

"""Compare importance weights with exact expectations over all responses of a small vocabulary.

The policy π and the sampler μ are tables: a distribution over three tokens after each prefix. Token
0 is EOS, and a response has at most three tokens, so all 15 can be listed.
"""

import itertools
import math

import pytest
import torch

from stages.objectives.importance import importance_figures, importance_weights
from stages.objectives.losses import policy_loss

VOCAB, EOS, LONGEST = 3, 0, 3
NO_LIMIT = 1e9
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def listed() -> list[tuple[int, ...]]:
    """Return every response: up to EOS, or as long as it may be."""
    found = []
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(VOCAB), repeat=length):
            if EOS not in tokens[:-1] and (tokens[-1] == EOS or length == LONGEST):
                found.append(tokens)
    return found


RESPONSES = listed()
PREFIXES = sorted({tokens[:t] for tokens in RESPONSES for t in range(len(tokens))})
MASK = torch.arange(LONGEST) < torch.tensor([len(tokens) for tokens in RESPONSES]).unsqueeze(-1)
REWARD = torch.randn(len(RESPONSES), generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1


def table(seed: int) -> torch.Tensor:
    """Return logits after each prefix, (prefixes, VOCAB)."""
    return torch.randn(len(PREFIXES), VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


POLICY = table(1)
SAMPLER = POLICY + 0.7 * table(2)


def token_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of the tokens of all responses, (B, R); 0 after their end."""
    logp, rows = logits.log_softmax(-1), []
    for tokens in RESPONSES:
        row = [logp[PREFIXES.index(tokens[:t]), token] for t, token in enumerate(tokens)]
        rows.append(torch.stack(row + [logits.new_zeros(())] * (LONGEST - len(row))))
    return torch.stack(rows)


def chances(logits: torch.Tensor) -> torch.Tensor:
    """Return the probability of each response, (B,)."""
    return token_logprobs(logits).sum(-1).exp()


def expected_gradient(level: str | None, **bounds) -> torch.Tensor:
    """Return the mean over μ of the gradient that PPO's loss ascends at ratio 1.

    The loss is linear in the advantages, so each response is weighed by μ(y) through them.
    """
    logits = POLICY.clone().requires_grad_(True)
    logprobs, weights = token_logprobs(logits), None
    if level is not None:
        bounds = {"clip_max": NO_LIMIT} | bounds
        weights, _ = importance_weights(logprobs.detach(), token_logprobs(SAMPLER), MASK, level, **bounds)
    advantages = (chances(SAMPLER) * REWARD).unsqueeze(-1).expand_as(logprobs)
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, MASK, 0.2, 1.0, weights)
    (gradient,) = torch.autograd.grad(-loss, logits)
    return gradient


def gradient_of_mean(coefficients: torch.Tensor) -> torch.Tensor:
    """Return ∇ Σ_y coefficient(y) · log π(y), with constant coefficients."""
    logits = POLICY.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad((coefficients * token_logprobs(logits).sum(-1)).sum(), logits)
    return gradient


def policy_gradient() -> torch.Tensor:
    """Return ∇ Σ_y π(y) R(y)."""
    logits = POLICY.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad((chances(logits) * REWARD).sum(), logits)
    return gradient


def test_the_list_is_complete():
    assert len(RESPONSES) == 1 + 2 + 12 and len(PREFIXES) == 1 + 2 + 4
    for logits in (POLICY, SAMPLER):
        assert chances(logits).sum().item() == pytest.approx(1)


def test_sequence_weights_make_the_gradient_the_policys():
    """Unbiased: the mean over what μ draws is the gradient of the mean reward under π."""
    torch.testing.assert_close(expected_gradient("sequence"), policy_gradient(), **CLOSE)
    without = expected_gradient(None)
    assert (without - policy_gradient()).norm() > 0.1 * policy_gradient().norm()
    torch.testing.assert_close(without, gradient_of_mean(chances(SAMPLER) * REWARD), **CLOSE)


def test_token_weights_correct_each_token_and_not_what_surrounds_it():
    """The closed form: prefixes and continuations by μ, the token itself by π.

    Σ_prefix μ(prefix) ∇ Σ_a π(a | prefix) Q_μ(prefix, a), where Q_μ goes on with μ.
    """
    logp_mu, rewards = SAMPLER.log_softmax(-1), dict(zip(RESPONSES, REWARD, strict=True))

    def value(prefix: tuple[int, ...]) -> float:
        """Return the mean reward of responses that begin with these tokens and go on by μ."""
        if prefix in rewards:
            return rewards[prefix].item()
        return sum(logp_mu[PREFIXES.index(prefix), a].exp().item() * value((*prefix, a)) for a in range(VOCAB))

    def reached(prefix: tuple[int, ...]) -> float:
        """Return the probability under μ of coming to a prefix."""
        return math.exp(sum(logp_mu[PREFIXES.index(prefix[:t]), a].item() for t, a in enumerate(prefix)))

    logits = POLICY.clone().requires_grad_(True)
    total = logits.new_zeros(())
    for i, prefix in enumerate(PREFIXES):
        quality = torch.tensor([value((*prefix, a)) for a in range(VOCAB)], dtype=torch.float64)
        total = total + reached(prefix) * (logits[i].softmax(-1) * quality).sum()
    (right,) = torch.autograd.grad(total, logits)
    found = expected_gradient("token")
    torch.testing.assert_close(found, right, **CLOSE)
    # nearer to the policy's gradient than without weights, and not equal to it
    error, without = ((x - policy_gradient()).norm() for x in (found, expected_gradient(None)))
    assert 0.01 < error < without


@pytest.mark.parametrize("clip_max", [0.7, 1.3, 2.0])
def test_truncated_sequence_weights_have_their_closed_form(clip_max):
    """Σ_y min(π(y), c μ(y)) R(y) ∇ log π(y): biased towards μ, as far as the cap reaches."""
    pi, mu = chances(POLICY), chances(SAMPLER)
    assert 0 < (pi > clip_max * mu).sum() < len(RESPONSES)
    right = gradient_of_mean(torch.minimum(pi, clip_max * mu) * REWARD)
    torch.testing.assert_close(expected_gradient("sequence", clip_max=clip_max), right, **CLOSE)


def test_a_smallest_weight_has_its_closed_form():
    pi, mu = chances(POLICY), chances(SAMPLER)
    right = gradient_of_mean(torch.maximum(torch.minimum(pi, 1.5 * mu), 0.6 * mu) * REWARD)
    torch.testing.assert_close(expected_gradient("sequence", clip_max=1.5, clip_min=0.6), right, **CLOSE)


def test_masked_sequence_weights_leave_outliers_out():
    """Only responses with 0.6 ≤ π/μ ≤ 1.5 count, each as much as under π."""
    pi, mu = chances(POLICY), chances(SAMPLER)
    kept = (pi <= 1.5 * mu) & (pi >= 0.6 * mu)
    assert 0 < kept.sum() < len(RESPONSES)
    right = gradient_of_mean(torch.where(kept, pi, 0.0) * REWARD)
    found = expected_gradient("sequence", clip_max=1.5, clip_min=0.6, outliers="mask")
    torch.testing.assert_close(found, right, **CLOSE)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("outliers", ["truncate", "mask"])
def test_weights_and_figures_are_those_of_a_loop(level, outliers):
    """Each weight, what is out of bounds, and the figures, in plain Python."""
    policy, sampler = token_logprobs(POLICY), token_logprobs(SAMPLER)
    weights, is_outlier = importance_weights(
        policy, sampler, MASK, level, clip_max=1.4, clip_min=0.7, outliers=outliers
    )
    counted, out = [], []
    for b, tokens in enumerate(RESPONSES):
        ratios = [math.exp(policy[b, t].item() - sampler[b, t].item()) for t in range(len(tokens))]
        if level == "sequence":
            ratios = [math.prod(ratios)] * len(tokens)
        for t, ratio in enumerate(ratios):
            outside = not 0.7 <= ratio <= 1.4
            right = min(max(ratio, 0.7), 1.4)
            if outside and outliers == "mask":
                right = 0.0
            assert weights[b, t].item() == pytest.approx(right) and bool(is_outlier[b, t]) == outside
            if level == "token" or t == 0:
                counted.append(right)
                out.append(outside)
        assert not weights[b, len(tokens) :].any() and not is_outlier[b, len(tokens) :].any()
    assert 0 < sum(out) < len(out)
    figures, ratio = importance_figures(weights, is_outlier, MASK, level), "sampling/importance_sampling_ratio"
    assert figures == pytest.approx(
        {
            f"{ratio}/mean": sum(counted) / len(counted),
            f"{ratio}/min": min(counted),
            f"{ratio}/max": max(counted),
            "sampling/importance_sampling_outliers": sum(out) / len(out),
        }
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_what_is_off_the_mask_changes_nothing(level):
    """NaN and infinity after the end of a response change neither weights, loss nor gradient."""
    policy, sampler = token_logprobs(POLICY), token_logprobs(SAMPLER)
    right, _ = importance_weights(policy, sampler, MASK, level, clip_max=3.0)
    for poison in (math.nan, math.inf, -math.inf):
        poisoned = [torch.where(MASK, x, poison) for x in (policy, sampler)]
        found, is_outlier = importance_weights(*poisoned, MASK, level, clip_max=3.0)
        assert torch.equal(found, right) and not is_outlier[~MASK].any()
        new = (policy + 0.1).requires_grad_(True)
        results = []
        for weights in (right, torch.where(MASK, right, poison)):
            loss, _ = policy_loss(new, policy, torch.ones_like(policy), MASK, 0.2, 5.0, weights)
            results.append((loss, *torch.autograd.grad(loss, new)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_gradient_flows_through_the_weights():
    policy = token_logprobs(POLICY).requires_grad_(True)
    sampler = token_logprobs(SAMPLER).requires_grad_(True)
    weights, _ = importance_weights(policy, sampler, MASK, "token", clip_max=3.0)
    assert not weights.requires_grad
    given, new = weights.clone().requires_grad_(True), token_logprobs(POLICY).requires_grad_(True)
    loss, _ = policy_loss(new, policy.detach(), torch.ones_like(weights), MASK, 0.2, 1.0, given)
    assert torch.autograd.grad(loss, given, allow_unused=True) == (None,)


def test_the_same_distribution_has_weight_one_and_the_same_loss():
    policy, advantages = token_logprobs(POLICY), table(5).repeat(3, 1)[: len(RESPONSES)]
    weights, is_outlier = importance_weights(policy, policy, MASK, "sequence", clip_max=3.0)
    assert torch.equal(weights, MASK.to(weights)) and not is_outlier.any()
    new = policy + 0.3 * advantages
    plain, _ = policy_loss(new, policy, advantages, MASK, 0.2, 5.0)
    assert torch.equal(plain, policy_loss(new, policy, advantages, MASK, 0.2, 5.0, weights)[0])


def test_a_long_response_that_the_sampler_would_hardly_draw_has_the_largest_weight():
    """Its ratio is beyond what a float can hold; the weight stays finite."""
    policy, sampler = torch.zeros(1, 400), torch.full((1, 400), -1.0)
    mask = torch.ones(1, 400, dtype=torch.bool)
    weights, is_outlier = importance_weights(policy, sampler, mask, "sequence", clip_max=3.0)
    assert (weights == 3.0).all() and is_outlier.all()
    weights, _ = importance_weights(policy, sampler, mask, "sequence", clip_max=3.0, outliers="mask")
    assert not weights.any()

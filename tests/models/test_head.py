"""Test the chunked head against torch's log-softmax over whole logits, gradients included."""

import pytest
import torch

from stages.models.head import head_logprobs

N, D, V = 37, 8, 50


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(V, (N,), generator=generator), torch.randn(N, generator=generator)


@pytest.mark.parametrize("kept", [0, 2**20], ids=["computed again", "kept"])
@pytest.mark.parametrize("chunk", [1, 7 * V, 2**20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_numbers_and_gradients_are_those_of_whole_logits(data, kept, chunk, temperature):
    """Compare log-probs, and the gradients of a weighted sum of their squares by hidden and weight,
    for every chunk size, with kept and with recomputed log-softmax.
    """
    *tensors, ids, weights = data
    results = []
    for ours in (True, False):
        hidden, weight = (x.clone().requires_grad_(True) for x in tensors)
        if ours:
            logprobs, none = head_logprobs(hidden, weight, ids, temperature, chunk=chunk, kept=kept)
            assert none is None
        else:
            logprobs = (hidden @ weight.T / temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        (weights * logprobs.double() ** 2).sum().backward()
        results.append((logprobs.detach().double(), hidden.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_entropy_is_the_distributions_and_carries_no_gradient(data):
    hidden, weight, ids, _ = data
    logprobs, entropy = head_logprobs(hidden.requires_grad_(True), weight, ids, 0.7, with_entropy=True, chunk=5 * V)
    right = torch.distributions.Categorical(logits=hidden.detach() @ weight.T / 0.7).entropy()
    torch.testing.assert_close(entropy.double(), right, rtol=1e-5, atol=1e-5)
    assert logprobs.requires_grad and not entropy.requires_grad


def test_a_frozen_head_gets_no_gradient(data):
    """Under LoRA the head is frozen."""
    hidden, weight, ids, _ = data
    hidden.requires_grad_(True)
    head_logprobs(hidden, weight, ids)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_under_autocast_products_are_bfloat16_and_results_fp32(data):
    hidden, weight, ids, _ = data
    hidden, weight = hidden.float().requires_grad_(True), weight.float().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = head_logprobs(hidden, weight, ids)
    logprobs.sum().backward()
    right = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    assert logprobs.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(logprobs, right, rtol=3e-2, atol=3e-2)
    assert not torch.allclose(logprobs, right, rtol=1e-5, atol=1e-5)
    (exact,) = torch.autograd.grad(right.sum(), hidden)
    torch.testing.assert_close(hidden.grad, exact, rtol=0.1, atol=0.1)


def test_nothing_of_size_tokens_times_vocabulary_is_allocated():
    """4,000 tokens × 5,000 words would be 80 MB; in chunks of 1 MB the largest allocation stays
    small.
    """
    from torch.profiler import ProfilerActivity, profile

    hidden = torch.randn(4000, 4, requires_grad=True)
    weight, ids = torch.randn(5000, 4, requires_grad=True), torch.zeros(4000, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        head_logprobs(hidden, weight, ids, chunk=2**18, kept=0)[0].sum().backward()
    largest = max((e.self_cpu_memory_usage for e in seen.events()), default=0)
    assert 2**18 <= largest < 8 * 2**20

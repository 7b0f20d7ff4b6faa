"""Test log-probabilities and entropies against plain Python."""

import math

import pytest
import torch

from stages.objectives.logprobs import entropy, sequence_logps, token_logprobs


def softmax(row):
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / sum(weights) for w in weights]


@pytest.fixture
def logits():
    return torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(5)) * 4


def test_token_logprobs_are_logs_of_the_softmax(logits):
    ids = torch.tensor([[0, 6, 3], [2, 2, 5]])
    found = token_logprobs(logits, ids)
    for b in range(2):
        for t in range(3):
            right = math.log(softmax(logits[b, t].tolist())[ids[b, t]])
            assert found[b, t].item() == pytest.approx(right, abs=1e-5)


def test_entropy_is_minus_sum_p_log_p(logits):
    found = entropy(logits)
    for b in range(2):
        for t in range(3):
            right = -sum(p * math.log(p) for p in softmax(logits[b, t].tolist()))
            assert found[b, t].item() == pytest.approx(right, abs=1e-5)


def test_entropy_of_a_uniform_choice_is_its_logarithm():
    assert entropy(torch.zeros(8)).item() == pytest.approx(math.log(8), abs=1e-6)


def test_huge_logits_stay_finite():
    """A temperature near 0 gives logits of 1e6: nothing overflows."""
    logits = torch.tensor([1e6, 0.0, -1e6])
    assert token_logprobs(logits, torch.tensor(0)).item() == 0.0
    assert entropy(logits).item() == 0.0


def test_half_precision_logits_are_read_in_fp32(logits):
    half = logits.bfloat16()
    assert token_logprobs(half, torch.zeros(2, 3, dtype=torch.long)).dtype == torch.float32
    torch.testing.assert_close(entropy(half), entropy(half.float()), rtol=0, atol=0)


def test_sequence_logps_sum_the_response_and_nothing_else(prefix_mask):
    logprobs = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]], dtype=torch.float64)
    mask = prefix_mask([3, 1], 3)
    assert sequence_logps(logprobs, mask).tolist() == [-7.0, -8.0]
    assert sequence_logps(torch.where(mask, logprobs, torch.nan), mask).tolist() == [-7.0, -8.0]


def test_nan_outside_a_response_leaves_the_gradient_of_its_logps_alone(prefix_mask, gradient_of):
    mask = prefix_mask([3, 1], 3)
    poisoned = torch.where(mask, torch.ones(2, 3, dtype=torch.float64), torch.nan)
    _, gradient = gradient_of(lambda x: sequence_logps(x, mask).sum(), poisoned)
    assert torch.equal(gradient, mask.double())

"""Test the adaptive KL coefficient by hand, and the average of weights by its closed form."""

import pytest
import torch

from stages.objectives.control import adaptive_kl_coef, update_average


@pytest.mark.parametrize(
    "kl, right",
    [
        (6.0, 0.1),  # on target: stays
        (6.6, 0.1 * (1 + 0.1 * 512 / 10_000)),  # a tenth above: raised in proportion
        (60.0, 0.1 * (1 + 0.2 * 512 / 10_000)),  # far above: as if a fifth above
        (5.4, 0.1 * (1 - 0.1 * 512 / 10_000)),
        (0.0, 0.1 * (1 - 0.2 * 512 / 10_000)),
        (-1.0, 0.1 * (1 - 0.2 * 512 / 10_000)),  # k1 of a batch can be negative
    ],
)
def test_the_coefficient_follows_its_target(kl, right):
    assert adaptive_kl_coef(0.1, kl, 6.0, 512, 10_000) == pytest.approx(right, rel=1e-12)


def test_it_never_turns_negative():
    """At an error of −0.2 it would take updates of five horizons."""
    coef = 1.0
    for _ in range(1000):
        coef = adaptive_kl_coef(coef, 0.0, 6.0, 10_000, 10_000)
    assert 0 < coef < 1e-50


@pytest.mark.parametrize("decay", [0.5, 0.992])
def test_after_n_steps_the_average_is_its_closed_form(decay):
    """decayⁿ θ₀ + (1 − decay) Σ decayⁿ⁻ⁱ θᵢ, in double precision, for two tensors and 20 steps."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}  # noqa: E731
    first = draw()
    average, steps = {name: x.clone() for name, x in first.items()}, [draw() for _ in range(20)]
    for tensors in steps:
        update_average(average, tensors, decay)
    n = len(steps)
    for name in first:
        weights = [(1 - decay) * decay ** (n - i) for i in range(1, n + 1)]
        right = decay**n * first[name].double()
        right += sum(w * t[name].double() for w, t in zip(weights, steps, strict=True))
        torch.testing.assert_close(average[name].double(), right, rtol=1e-5, atol=1e-6)

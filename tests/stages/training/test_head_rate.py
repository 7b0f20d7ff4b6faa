"""Test that a reward model's head learns at a rate of its own, as a group of AdamW would."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stages.training.trainee import optimizer_step, trainee_of


class Small(nn.Module):
    """A trunk and a head."""

    def __init__(self) -> None:
        """Draw the weights."""
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.score = nn.Linear(3, 4), nn.Linear(4, 1, bias=False)

    def loss(self, step: int) -> torch.Tensor:
        """Return a loss that differs from step to step."""
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (self.score(torch.tanh(self.trunk(x))) - x.sum(-1, keepdim=True)).square().mean()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_head_moves_as_in_a_group_of_its_own(weight_decay):
    section = SimpleNamespace(learning_rate=1e-3, max_grad_norm=1e9, weight_decay=weight_decay, adam_beta2=0.95)
    ours, theirs = Small(), Small()
    trainee = trainee_of(section, ours, 5, head_rate=2e-2)
    decayed = [{"params": [theirs.trunk.weight], "lr": 1e-3}, {"params": [theirs.score.weight], "lr": 2e-2}]
    plain = {"params": [theirs.trunk.bias], "lr": 1e-3, "weight_decay": 0.0}
    peer = torch.optim.AdamW([*decayed, plain], betas=(0.9, 0.95), weight_decay=weight_decay)
    for step in range(5):
        ours.loss(step).backward()
        optimizer_step(trainee, 1e-3, step)
        theirs.loss(step).backward()
        peer.step()
        peer.zero_grad()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, dict(theirs.named_parameters())[name], rtol=1e-5, atol=1e-7)


def test_without_a_rate_of_its_own_nothing_changes():
    section = SimpleNamespace(learning_rate=1e-3, max_grad_norm=1.0, weight_decay=0.0, adam_beta2=0.95)
    assert trainee_of(section, Small(), 5).rate_factors == {}

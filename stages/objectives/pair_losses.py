"""Define the losses of a pair of responses, of which one was preferred: the table PAIR_LOSSES.

A pair loss is a function of two tensors (N,) and returns one number per pair, (N,):

    chosen, rejected: log-ratios log π/π_ref of the preferred response and of the other one, in nats
    beta: β, the strength of the penalty on leaving the reference
    label_smoothing: s, the share of labels assumed to be flipped; ignored where it has no meaning

To add one, write the function, give it a line in PAIR_LOSSES, and add its name to `LossType` in
stages/settings/dpo.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Callable[[Tensor, Tensor, float, float], Tensor]


def smoothed_logistic(gaps: Tensor, label_smoothing: float) -> Tensor:
    """Return −(1−s) log σ(d) − s log σ(−d) for each gap d, (N,)."""
    if label_smoothing == 0.0:
        return -F.logsigmoid(gaps)
    return -(1 - label_smoothing) * F.logsigmoid(gaps) - label_smoothing * F.logsigmoid(-gaps)


def sigmoid(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Return DPO's loss, −(1−s) log σ(βh) − s log σ(−βh) with h = chosen − rejected.

    Rafailov 2023, eq. 7; with s > 0 conservative DPO (Mitchell 2023).
    """
    return smoothed_logistic(beta * (chosen - rejected), label_smoothing)


def robust(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Return (−(1−s) log σ(βh) + s log σ(−βh)) / (1 − 2s) (Chowdhury 2024, eq. 9).

    It is an unbiased estimate of the loss on true labels if a share s of the labels is flipped.
    """
    h, s = chosen - rejected, label_smoothing
    return (-(1 - s) * F.logsigmoid(beta * h) + s * F.logsigmoid(-beta * h)) / (1 - 2 * s)


def ipo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Return (h − 1/(2β))² (Azar 2023, eq. 17)."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Return max(0, 1 − βh) (SLiC, Zhao 2023)."""
    return torch.relu(1 - beta * (chosen - rejected))


PAIR_LOSSES: dict[str, PairLoss] = {"sigmoid": sigmoid, "robust": robust, "ipo": ipo, "hinge": hinge}
"""Name in dpo.loss_type: the loss."""

"""Compute KTO's share of a micro-batch, and its estimate of the KL, which takes the whole batch.

KTO measures a response's gain from what any response gains: KL(policy ‖ reference), estimated by
the mean log-ratio of responses to other prompts of the batch (Ethayarajh 2024, §4.1). trl takes the
rows of one device's micro-batch for it. Here it is one number for the batch of a step, computed
before its micro-batches, so that neither their size nor the number of processes changes it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.groups import PromptGroup, batch_groups, moved
from data.labels import MismatchedGroups, judgements, mismatched
from pipeline.launch import parallel
from stages.models.forward import response_logprobs
from stages.models.sharding import is_sharded
from stages.objectives.logprobs import sequence_logps
from stages.objectives.losses import kto_loss
from stages.settings.dpo import DPOSettings
from stages.shared.runtime import Runtime
from stages.training.batching import GroupBatches
from stages.training.readings import Figure, Share
from stages.training.reference import Reference

FAIR_RATIO = (1.0, 4 / 3)
"""Range in which the paper wants weight times number of good responses over that of bad ones."""


Estimator = Callable[..., None]
"""(indices of a batch's groups, what is called between two forward passes; may be left out)."""


def nothing() -> None:
    """Do nothing between two forward passes."""


class Marks(NamedTuple):
    """Hold how many judgements of a batch are good, and how many bad."""

    good: int
    """Judgements that a response is good."""
    bad: int
    """Judgements that a response is bad."""


def count_marks(groups: Sequence[PromptGroup]) -> Marks:
    """Count the judgements of groups that have labels only."""
    good = bad = 0
    for group in groups:
        for _, is_good in judgements([group]):
            good, bad = good + is_good, bad + (not is_good)
    return Marks(good, bad)


@dataclass
class KTO:
    """Hold what KTO needs beside a micro-batch, and its estimate for the batch at hand."""

    config: DPOSettings
    """The stage's settings."""
    policy: nn.Module
    """The policy that trains."""
    pad_id: int
    """Id of the padding."""
    runtime: Runtime
    """How the stage computes."""
    cut: Callable[[Sequence[PromptGroup]], GroupBatches]
    """Cuts groups into micro-batches."""
    kl: float = 0.0
    """The estimate of the batch that `estimate` was called with last, in nats a response."""

    def estimator(
        self, reference: Reference, split: str, groups: Sequence[PromptGroup], batches: Sequence[Sequence[int]]
    ) -> "Estimator":
        """Return what estimates the KL of each of some batches; log π_ref is computed now.

        Args:
            reference: The reference, while the policy is untrained.
            split: "train" or "validation".
            groups: The groups.
            batches: Indices of the groups of each batch.
        """
        pairs = sorted({pair for batch in batches for pair in mismatched(batch)})
        logps = reference.logps(f"{split}_kl", self.cut(MismatchedGroups(groups, pairs, self.config.max_length)))
        return partial(self.estimate, groups, dict(zip(pairs, logps, strict=True)))

    @torch.no_grad()
    def estimate(
        self,
        groups: Sequence[PromptGroup],
        reference: Mapping[tuple[int, int], Tensor],
        batch: Sequence[int],
        poll: Callable[[], None] = nothing,
    ) -> None:
        """Estimate the KL of a batch, on all ranks together; that of a single prompt is taken as 0.

        Args:
            groups: The groups.
            reference: log π_ref of the responses of each mismatched pair, (K,).
            batch: Indices of the groups of the batch.
            poll: Called between two forward passes; may raise Interrupted.
        """
        self.kl = 0.0
        if len(batch) < 2:
            return
        pairs = mismatched(batch)
        batches = self.cut(MismatchedGroups(groups, pairs, self.config.max_length))
        parts, costs = batches.to_evaluate()
        spare = parts[0] if is_sharded(self.policy) else None
        accelerator, found = self.runtime.accelerator, []
        for rows, is_own in parallel.padded_micro_batches(parallel.rows_of_this_rank(parts, costs), spare):
            poll()
            laid = batch_groups([batches.groups[i] for i in rows], self.pad_id, packed=self.runtime.packed)
            laid = laid.to(accelerator.device)
            with accelerator.autocast():
                logprobs = response_logprobs(self.policy, laid.rows)
            logps = sequence_logps(logprobs, laid.rows.response_mask)
            if is_own:
                found.append((logps, torch.cat([reference[pairs[i]] for i in rows])))
        computed = torch.cat([logps for logps, _ in found]).cpu().split([len(logps) for logps, _ in found])
        total = sum(
            (logps - ref_logps).double().sum().item() for logps, (_, ref_logps) in zip(computed, found, strict=True)
        )
        total = parallel.all_reduce_figures({"kl": total})["kl"]
        self.kl = max(0.0, total / sum(len(groups[i].responses) for i in batch))

    def share(
        self, groups: Sequence[PromptGroup], logps: Tensor, ref_logps: Tensor, whole: Marks
    ) -> tuple[Tensor, dict[str, Figure]]:
        """Compute the share of a micro-batch in the loss of its batch.

        Args:
            groups: The micro-batch.
            logps: log π of each response, (N,).
            ref_logps: log π_ref of each response, (N,).
            whole: The judgements of the batch.

        Returns:
            The loss, and trl's figures to sum over the batch.
        """
        found = judgements(groups)
        marks = {
            "rows": torch.tensor([row for row, _ in found], dtype=torch.long),
            "is_good": torch.tensor([good for _, good in found], dtype=torch.bool),
        }
        marks = moved(marks, logps.device)
        rows, is_good = marks["rows"], marks["is_good"]
        weights = self.config.label_weights()
        ratios = (logps - ref_logps)[rows]
        value = kto_loss(ratios, is_good, self.kl, self.config.beta, *weights, whole.good + whole.bad)
        figures: dict[str, Figure] = {"loss": value, "kl": self.kl * len(found) / (whole.good + whole.bad)}
        rewards, logps = self.config.beta * ratios.detach(), logps.detach()[rows]
        means = []
        for name, mask, count in (("chosen", is_good, whole.good), ("rejected", ~is_good, whole.bad)):
            if count:
                reward = torch.where(mask, rewards, 0.0).sum()
                means.append(reward / count)
                figures[f"rewards/{name}"] = Share(reward, divisor=count)
                figures[f"logps/{name}"] = Share(torch.where(mask, logps, 0.0).sum(), divisor=count)
        if len(means) == 2:
            figures["rewards/margins"] = means[0] - means[1]
        return value, figures


def weight_note(marks: Marks, weights: tuple[float, float]) -> str:
    """Return what to say of weights that leave one side with too much of the loss; "" if none does.

    Args:
        marks: The judgements to train on.
        weights: desirable_weight and undesirable_weight.
    """
    if not marks.good or not marks.bad:
        return ""
    low, high = FAIR_RATIO
    if low <= weights[0] * marks.good / (weights[1] * marks.bad) <= high:
        return ""
    fair = weights[1] * marks.bad / marks.good
    return (
        f"; weights are uneven, and the paper would have dpo.desirable_weight in {low * fair:.2f} to {high * fair:.2f}"
    )

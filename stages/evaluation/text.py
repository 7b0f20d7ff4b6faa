"""Compute a policy's losses on held-out pretraining text, from which perplexity is estimated."""

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.launch import devices, parallel
from stages.models.forward import text_logprobs
from stages.models.sharding import is_sharded
from stages.training.batching import micro_batches


@torch.no_grad()
def text_losses(model: Any, rows: Sequence[list[int]], accelerator: Any, batch_size: int) -> list[float] | None:
    """Compute the mean cross-entropy per token of each packed row, each rank its share of the rows.

    Args:
        model: The policy.
        rows: N rows of T ids.
        accelerator: accelerate's Accelerator: device and autocast.
        batch_size: Rows in a forward pass.

    Returns:
        N losses in nats; None without rows.
    """
    if not rows:
        return None

    def losses_of(own: list[list[list[int]]]) -> list[list[float]]:
        losses = []
        for batch, is_own in parallel.padded_micro_batches(own, batches[0][:1] if sharded else None):
            with accelerator.autocast():
                logprobs = text_logprobs(model, torch.tensor(batch, device=accelerator.device))
            if is_own:
                losses.append((-devices.in_float64(logprobs).mean(-1)).tolist())
        return losses

    sharded = is_sharded(model)
    batches = list(micro_batches(list(rows), batch_size))
    by_batch = parallel.compute_and_all_gather(batches, [len(batch) for batch in batches], losses_of, idle=sharded)
    return [loss for losses in by_batch for loss in losses]

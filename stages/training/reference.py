"""Compute the reference's log-probabilities once, before training, and keep them on disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.groups import PromptGroup, batch_groups
from pipeline.launch import parallel
from pipeline.store.cache import Cache
from pipeline.tracking import Tracker
from stages.models.adapters import adapter_off, is_adapted
from stages.models.forward import response_logprobs
from stages.models.precision import require_finite
from stages.models.sharding import is_sharded
from stages.objectives.logprobs import sequence_logps
from stages.shared.runtime import Runtime
from stages.training.batching import GroupBatches


@dataclass(frozen=True)
class Reference:
    """The reference of DPO: the policy before training, with its adapter switched off."""

    policy: nn.Module
    """The policy, untrained."""
    pad_id: int
    """Id of the padding."""
    runtime: Runtime
    """How the stage computes."""
    cache: Cache
    """Where results are kept, for a run that resumes or starts again with other settings."""
    made_by: Sequence[Any]
    """All that the log-probabilities depend on, besides the responses, as JSON values."""
    tracker: Tracker
    """Shows progress."""
    leave: Callable[[], None]
    """Called between two forward passes; may raise Interrupted."""

    @torch.no_grad()
    def logps(self, split: str, batches: GroupBatches) -> list[Tensor]:
        """Return log π_ref of every response: for each group a tensor (K,), on the CPU.

        Args:
            split: "train" or "validation": the name that the result is kept under.
            batches: The groups, and how they are cut.
        """
        groups, name = batches.groups, f"reference_logps_{split}"
        digest = digest_of(self.made_by, groups)
        sizes = [len(g.responses) for g in groups]
        kept = parallel.from_rank_zero(lambda: self.cache.recall(name, digest))
        if kept is not None:
            return list(kept["logps"].split(sizes))
        parts, costs = batches.to_evaluate()
        spare = parts[0] if is_sharded(self.policy) else None

        def compute(own: list[list[int]]) -> list[Sequence[Tensor]]:
            return self._logps_of(own, groups, spare)

        computed = parallel.compute_and_all_gather(parts, costs, compute, idle=spare is not None)
        by_index: dict[int, Tensor] = {}
        for rows, logps in zip(parts, computed, strict=True):
            by_index.update(zip(rows, logps, strict=True))
        ordered = [by_index[i] for i in range(len(groups))]
        require_finite(torch.cat(ordered), "dpo: log-probabilities of the reference")
        self.cache.remember(name, digest, {"logps": torch.cat(ordered)})
        return ordered

    def _logps_of(
        self, own: list[list[int]], groups: Sequence[PromptGroup], spare: list[int] | None
    ) -> list[Sequence[Tensor]]:
        """Compute the log-probabilities of this rank's micro-batches.

        Args:
            own: The micro-batches: indices of groups.
            groups: All groups.
            spare: A micro-batch for extra forward passes, where each pass takes all ranks.
        """
        results = []
        adapter = adapter_off(self.policy) if is_adapted(self.policy) else nullcontext()
        accelerator = self.runtime.accelerator
        with adapter, self.tracker.progress(len(own), "dpo reference") as progress:
            for done, (rows, is_own) in enumerate(parallel.padded_micro_batches(own, spare), 1):
                self.leave()
                members = [groups[i] for i in rows]
                batch = batch_groups(members, self.pad_id, packed=self.runtime.packed).to(accelerator.device)
                with accelerator.autocast():
                    logprobs = response_logprobs(self.policy, batch.rows)
                if is_own:
                    logps = sequence_logps(logprobs, batch.rows.response_mask).cpu()
                    results.append(logps.split([len(g.responses) for g in members]))
                    progress.update(done)
        return results


def digest_of(made_by: Sequence[Any], groups: Sequence[PromptGroup]) -> str:
    """Return a digest of what log-probabilities depend on.

    Args:
        made_by: As `Reference.made_by`.
        groups: The prompts and responses.
    """
    digest = hashlib.sha256()
    for value in (made_by, *([g.prompt, g.responses] for g in groups)):
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()

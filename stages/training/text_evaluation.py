"""Compute the held-out loss of a language model on rows of text."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.text_rows import lengths_of
from pipeline.launch import parallel
from stages.models.context_parallel import sum_over_group
from stages.models.packing import rows_end_to_end
from stages.models.sharding import is_sharded
from stages.models.soft_prompts import without_soft_prompt
from stages.objectives.losses import language_model_loss
from stages.training.batching import micro_batches
from stages.training.text_hooks import EvaluationCutShort
from stages.training.text_packing import TextPass
from stages.training.text_trainers import own_part_loss


def part_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of some rows, which several processes compute together.

    Args:
        model: The model, which reads packed rows.
        ids: (B, T), padded on the right.
        labels: (B, T − 1): the label of each position but the last; −100 where there is no loss.
    """
    return sum_over_group(own_part_loss(model, ids, labels, 1.0))


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    rows: Sequence[dict],
    pad_id: int,
    batch_size: int,
    accelerator: Any,
    leave: Callable[[], bool],
    how: TextPass,
) -> float:
    """Return the mean cross-entropy of a label, in nats, over all rows and ranks.

    The result does not depend on the batch size.

    Args:
        model: The model.
        rows: {input_ids, labels} of each row.
        pad_id: Id of the padding.
        batch_size: Rows of a forward pass.
        accelerator: accelerate's Accelerator, for autocast and the device.
        leave: Whether to leave, called between two forward passes; not for a sharded model, whose
            forward passes take all ranks.
        how: How the model computes rows of text.

    Raises:
        EvaluationCutShort: On all ranks, if `leave` returned True on any.
    """
    was_training, total, tokens, left = model.training, 0.0, 0, False
    sharded = is_sharded(model)
    collective = sharded or parallel.arrangement().context > 1  # a forward pass takes several ranks
    model.eval()
    # Rows of similar length together need little padding.
    lengths = lengths_of(rows)
    parts = list(micro_batches(sorted(range(len(rows)), key=lengths.__getitem__), batch_size))
    own = parallel.rows_of_this_rank(parts, [sum(lengths[i] for i in part) for part in parts])
    # A sharded forward pass takes all ranks: one that has run out repeats a micro-batch, uncounted.
    for part, is_own in parallel.padded_micro_batches(own, parts[0] if sharded else None):
        if not collective and (left := leave()):
            break  # no exception yet: the other ranks wait in the all-reduce below
        texts = [rows[i] for i in part]
        if how.rows == "packed":
            batch = packed_batch(texts, accelerator.device)
        else:
            batch = padded_batch(texts, pad_id, accelerator.device)
        whole = batch.pop("labels")
        labels = whole[:, 1:]
        with accelerator.autocast():
            if parallel.arrangement().context > 1:
                loss = part_loss(model, batch["input_ids"], labels)
            elif how.labels_only:
                loss = -model(**batch, use_cache=False, labels=whole, label_logprobs=True).sum()
            else:
                logits = without_soft_prompt(model, model(**batch, use_cache=False).logits[:, :-1])
                # Divided by 1, it is a sum: the mean below then weighs every label alike.
                loss = language_model_loss(logits, labels, 1.0)
        if is_own:
            total += loss.item()
            tokens += int((labels != -100).sum())
    model.train(was_training)
    sums = parallel.all_reduce_figures({"loss": total, "tokens": tokens, "left": left})
    if sums["left"]:
        raise EvaluationCutShort
    return sums["loss"] / max(1, sums["tokens"])


def padded_batch(rows: list[dict], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Pad rows on the right to the longest of them.

    Args:
        rows: {input_ids, labels} of each of B rows.
        pad_id: Id of the padding.
        device: Device of the result.

    Returns:
        input_ids, attention_mask and labels, each (B, T); labels are −100 in the padding.
    """
    width = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        length = len(row["input_ids"])
        padding = width - length
        batch["input_ids"].append(row["input_ids"] + [pad_id] * padding)
        batch["attention_mask"].append([True] * length + [False] * padding)
        batch["labels"].append(row["labels"] + [-100] * padding)
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}


def packed_batch(rows: list[dict], device: torch.device) -> dict[str, Any]:
    """Lay rows end to end in one row of T tokens.

    Args:
        rows: {input_ids, labels} of each of B rows.
        device: Device of the result.

    Returns:
        What a model's forward takes, and labels (1, T), which are −100 where a row begins.
    """
    ids = torch.tensor([[token for row in rows for token in row["input_ids"]]], device=device)
    labels = torch.tensor([[x for row in rows for x in (-100, *row["labels"][1:])]], device=device)
    return rows_end_to_end(ids, [len(row["input_ids"]) for row in rows]) | {"labels": labels}

"""Choose how a micro-batch of text goes through a model: the layout of its rows, and its head.

Rows are padded, or lie end to end in one row without padding, each with an attention of its own
(stages/models/packing.py). The head computes only positions with a label, in chunks
(stages/models/label_head.py), or all of them. The loss is the same in each way.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.launch import parallel
from stages.models.adapters import trains_token_rows, unwrapped
from stages.models.forward import head_is_linear
from stages.models.head import CHUNK
from stages.models.packing import can_pack

ROWS = ([1, 2, 3, 4], [5, 3, 1])
SMALL_VOCABULARY = 8192
"""Token ids up to which whole logits are faster than trl's tiles (`with_plain_loss`)."""
MANY_LOGITS = CHUNK["cpu"]
"""Logits of a micro-batch that a CPU computes in one piece (24 MB): up to here there is little to
save."""


@dataclass(frozen=True)
class Wanted:
    """What decides how micro-batches of text are computed, besides the model."""

    packing: bool | None
    """The setting: True, False, or None for whatever pays."""
    has_many_logits: bool
    """Whether a micro-batch has more than MANY_LOGITS logits."""
    is_ragged: bool
    """Whether a micro-batch has several rows, of different lengths."""
    longest: int
    """Tokens of the longest row."""
    adds_noise: bool
    """Whether embeddings get noise (NEFTune)."""
    smooths_labels: bool
    """Whether labels are smoothed."""
    balances_experts: bool
    """Whether the loss has a term over the router's logits."""


@dataclass(frozen=True)
class TextPass:
    """How a micro-batch of text goes through a model."""

    rows: Literal["padded", "packed", "padding_free"] = "padded"
    """packed: end to end with our attention; padding_free: end to end with the mask, or the kernel,
    that transformers makes of position ids."""
    labels_only: bool = False
    """Whether the head computes only positions with a label, in chunks."""
    why: str | None = None
    """Why rows are not packed, though they should be; None: they are, or should not be."""


def has_many_logits(vocabulary: int, rows: int, longest: int) -> bool:
    """Return whether a micro-batch has more logits than a CPU computes in one piece.

    Args:
        vocabulary: Token ids V.
        rows: Rows of the micro-batch.
        longest: Tokens of the longest row.
    """
    return vocabulary * rows * longest > MANY_LOGITS


def choose_pass(model: nn.Module, wanted: Wanted) -> TextPass:
    """Choose how micro-batches of text are computed.

    Args:
        model: The model with its adapter, whole and on the CPU; it is made to read packed rows if
            they are chosen.
        wanted: What decides, besides the model.
    """
    is_lean = wanted.packing or (wanted.packing is None and wanted.has_many_logits)
    if not is_lean:
        return TextPass()
    if parallel.arrangement().together > 1:
        return TextPass(why="processes share the rows, or the weights of the head")
    reads_head_alone = not (wanted.smooths_labels or wanted.balances_experts or trains_token_rows(model))
    labels_only = wanted.has_many_logits and reads_head_alone and head_is_linear(model)
    if not wanted.is_ragged:
        return TextPass("padded", labels_only)
    if wanted.adds_noise:
        return TextPass("padded", labels_only, "the noise of neftune_noise_alpha goes by the length of a row")
    if wanted.balances_experts:
        why = "the loss of router_aux_loss_coef takes no packed rows"
    elif not can_pack(model, wanted.longest):
        why = "this model, or its attention kernel, cannot read packed rows"
    else:
        return TextPass("packed", labels_only)
    return TextPass("padding_free" if wanted.packing else "padded", labels_only, why)


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Check on two short rows that trl's padding_free gives the logits that they have alone.

    trl's collator marks where each row begins by its position 0. Most families build their
    attention mask from that; for others the rows before would be context.

    Args:
        model: The model on a device, whole.

    Raises:
        UserError: They give others, or the model does not take such rows.
    """
    inner = unwrapped(model)
    device, training = next(inner.parameters()).device, inner.training
    inner.eval()
    try:
        alone = [inner(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0] for row in ROWS]
        ids = torch.tensor([[token for row in ROWS for token in row]], device=device)
        positions = torch.tensor([[place for row in ROWS for place in range(len(row))]], device=device)
        together = inner(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        # products in bfloat16 round; a row that sees others has quite other logits
        nearly = 1e-4 if together.dtype == torch.float32 else 0.05 * float(together.abs().max())
        same = torch.allclose(together, torch.cat(alone), rtol=1e-3, atol=nearly)
        problem = None if same else "a row sees those before it"
    except (TypeError, ValueError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    finally:
        inner.train(training)
    if problem is not None:
        raise UserError(
            f"sft.packing: rows of a {type(inner).__name__} cannot lie end to end with this attention kernel "
            f"({problem}); set it to null"
        )

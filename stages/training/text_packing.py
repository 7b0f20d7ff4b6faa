"""Check that rows of one micro-batch can lie end to end in one row, without seeing each other.

trl's collator (`padding_free`) marks where each begins by its position 0. Most families build their
attention mask from that; for others the rows before would be context.
"""

import torch
from torch import nn

from pipeline.errors import UserError
from stages.models.adapters import unwrapped

ROWS = ([1, 2, 3, 4], [5, 3, 1])


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Check on two short rows that packed ones give the logits that they have alone.

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

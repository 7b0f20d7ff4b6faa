"""Let a language model return log-probabilities of labels in place of logits, for base and sft.

Only positions with a label go through the head, in chunks (`head_logprobs`). It happens inside the
model's own forward pass, so that DDP and fsdp2 see an ordinary one; trl's `add_fused_lm_head` does
the same, but on a CPU it computes the head at every position, and twice.
"""

import functools
from types import MethodType
from typing import Any

from torch import Tensor, nn

from stages.models.adapters import unwrapped
from stages.models.head import head_logprobs
from stages.models.soft_prompts import excluded_ids


def add_label_head(model: nn.Module) -> None:
    """Let a model answer `model(…, labels=labels, label_logprobs=True)`.

    The answer is log π(label | before) of each label that is not −100, (n,), in the order of the
    rows. All other calls stay as they are.

    Args:
        model: A causal language model, adapted or not, whose logits are the unembedding times the
            hidden states (`head_is_linear`); changed.
    """
    inner = unwrapped(model)
    forward = inner.forward

    @functools.wraps(type(inner).forward)  # `generate` reads the signature
    def with_labels(
        self: nn.Module, *args: Any, label_logprobs: bool = False, labels: Tensor | None = None, **options: Any
    ) -> Any:
        if not label_logprobs:
            return forward(*args, **options, **({} if labels is None else {"labels": labels}))
        hidden = self.base_model(*args, **options).last_hidden_state[:, :-1]
        labels = labels[:, 1:]  # those at t are predicted at t − 1
        counted = labels != -100
        places = counted.flatten().nonzero().squeeze(-1)
        read = hidden.flatten(0, 1).index_select(0, places)
        weight = self.get_output_embeddings().weight
        return head_logprobs(read, weight, labels[counted], excluded=excluded_ids(self, read.device))[0]

    inner.forward = MethodType(with_labels, inner)

"""A scalar head on the trunk of a causal language model: reward and value models
of families that have no class for them.

The file scalar_head.py of a published folder is this text followed by the class of its model.
Published folders are recognised by the first line above, so it must not change.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class ScalarHead:
    """Put a scalar head on a family's trunk; mixed into the family's pretrained class.

    A subclass names its trunk. The logits are those of the head `score` at the last token of each
    row that is not padding. No cache is used: a score needs one pass.
    """

    trunk_class = None
    trunk_options: ClassVar[dict] = {}  # more arguments of the trunk's constructor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.trunk_class(config, **self.trunk_options))
        self.score = nn.Linear(config.get_text_config().hidden_size, config.num_labels, bias=False)
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:  # otherwise transformers would not initialize buffers of its own trunks
        return cls.trunk_class.is_custom_code()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:  # transformers would look into the source file of the class
        return cls.trunk_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.trunk_class._can_set_experts_implementation()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Score rows.

        Args:
            input_ids: (rows, tokens), padded with config.pad_token_id on either side.
            attention_mask: (rows, tokens), 0 at padding; None: padding is where its id is.
            labels: (rows,) or (rows, labels) for transformers' loss of a sequence classification.
            use_cache: Ignored.
            cache: Ignored.
            past_key_values: Ignored.
            return_dict: False returns a tuple.
            options: For the trunk.

        Returns:
            transformers' output with logits (rows, labels), and the loss if there are labels.
        """
        if attention_mask is not None:
            options["attention_mask"] = attention_mask
        trunk = getattr(self, self.base_model_prefix)
        logits = self.score(trunk(input_ids=input_ids, **options).last_hidden_state)
        pad_id = getattr(self.config.get_text_config(), "pad_token_id", None)
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask.bool()
        elif pad_id is not None and len(logits) > 1:
            real = input_ids != pad_id
        else:
            real = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        last = (torch.arange(logits.shape[1], device=logits.device) * real.to(logits.device)).argmax(-1)
        pooled, loss = logits[torch.arange(len(logits), device=logits.device), last], None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled, config=self.config)
        out = SequenceClassifierOutputWithPast(loss=loss, logits=pooled)
        return out.to_tuple() if return_dict is False else out

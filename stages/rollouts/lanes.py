"""A batch of sequences that grow by a token a step: a model with its cache behind three calls.

start() → logits (B, V) behind the prompts; step(tokens) → logits behind those; keep(index) drops the other rows. wide:
the layers that `weights_first` turns round.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from data.groups import make_rows
from stages.models.adapters import plain
from stages.models.packing import trunk_options

WIDE = 512  # inputs from which on a linear layer counts as large


class PackedLane:
    """For models that pack: each prompt once and without padding, then a cache with room for the whole response.

    Its rows are aligned at the prompts' ends, so that all write the same column; a bias hides what is before a prompt.
    """

    def __init__(self, model, prompts, response_length: int, pad_id: int):
        self.model, self.room, self.wide = model, response_length, wide_layers(model)
        self.rows = make_rows(prompts, [[] for _ in prompts], pad_id, packed=True).to(model.device)

    def start(self) -> Tensor:
        rows, cache = self.rows, DynamicCache()
        options = trunk_options(rows) | {"past_key_values": cache, "use_cache": True}
        hidden = self._trunk(rows.input_ids, options)[0].index_select(0, rows.last)
        lengths = rows.position_ids[0][rows.prompt_end] + 1
        width = int(lengths.max())
        columns = torch.arange(width, device=hidden.device) - (width - lengths).unsqueeze(-1)  # < 0 before a prompt
        index = rows.sequences.gather(-1, columns.clamp(min=0))
        self.cache = Cache([_Column.of(layer, index, self.room) for layer in cache.layers])
        self.bias = torch.zeros(len(index), 1, 1, width + self.room, dtype=hidden.dtype, device=hidden.device)
        self.bias[..., :width].masked_fill_((columns < 0)[:, None, None], -torch.inf)
        self.positions, self.filled = lengths.unsqueeze(-1), width
        return self._head(hidden)

    def step(self, tokens: Tensor) -> Tensor:
        self.filled += 1
        options = {
            "position_ids": self.positions,
            "attention_mask": self.bias[:1],  # four dimensions: transformers makes no mask of its own
            "past_key_values": self.cache,
            "use_cache": True,
            "packing": self.bias[..., : self.filled],
        }
        with weights_first(self.wide):
            logits = self._head(self._trunk(tokens.unsqueeze(-1), options)[:, 0])
        self.positions = self.positions + 1
        return logits

    def keep(self, index: Tensor) -> None:
        for layer in self.cache.layers:
            layer.keep(index)
        self.bias, self.positions = self.bias[index], self.positions[index]

    def _trunk(self, ids: Tensor, options: dict) -> Tensor:
        return plain(self.model).base_model(input_ids=ids, **options).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return plain(self.model).get_output_embeddings()(hidden).contiguous()


def wide_layers(model) -> list[torch.nn.Linear]:
    """The layers for `weights_first`: none where it gains nothing."""
    if model.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return []
    return [m for m in model.modules() if type(m) is torch.nn.Linear and m.in_features >= WIDE]


@contextmanager
def weights_first(layers):
    """Inside, large linear layers on a CPU multiply weight · rowsᵀ in place of rows · weightᵀ: the same numbers to the
    order of sums, and a fifth faster for the few rows of a decoding step, where reading the weights is most of the
    work. (Small layers lose more by their transposed outputs.)"""
    for layer in layers:
        layer.forward = partial(_weight_first, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _weight_first(layer, x: Tensor) -> Tensor:
    out = (layer.weight @ x.reshape(-1, x.shape[-1]).T).T
    if layer.bias is not None:
        out = out + layer.bias
    return out.unflatten(0, x.shape[:-1]) if x.dim() > 2 else out


class _Column(DynamicLayer):
    """Keys and values (B, H_kv, room, D) allocated once; a step writes a column and sees those before it."""

    @classmethod
    def of(cls, layer, index: Tensor, room: int) -> "_Column":
        """From a layer that read packed prompts: row b holds the tokens index[b] (B, W), then `room` free columns."""
        new, width = cls(), index.shape[1]
        new.filled, new.is_initialized = width, True
        new.dtype, new.device = layer.keys.dtype, layer.keys.device
        for name in ("keys", "values"):
            packed = getattr(layer, name)[0].transpose(0, 1)  # (T, H_kv, D)
            spread = packed.new_empty(len(index), packed.shape[1], width + room, packed.shape[2])
            spread[:, :, :width] = packed[index].transpose(1, 2)
            setattr(new, name, spread)
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys[:, :, self.filled : self.filled + 1] = key_states
        self.values[:, :, self.filled : self.filled + 1] = value_states
        self.filled += 1
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        return self.filled

    def keep(self, index: Tensor) -> None:
        for name in ("keys", "values"):
            held = getattr(self, name)
            less = held.new_empty(len(index), *held.shape[1:])
            less[:, :, : self.filled] = held[index, :, : self.filled]
            setattr(self, name, less)


class PaddedLane:
    """For any model: prompts padded on the left, transformers' own cache and masks."""

    def __init__(self, model, prompts, response_length: int, pad_id: int):
        device, width, self.wide = model.device, max(map(len, prompts)), []
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        self.mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
        self.positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    def start(self) -> Tensor:
        return self._forward(self.ids)

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=-1)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(tokens.unsqueeze(-1))

    def keep(self, index: Tensor) -> None:
        self.cache.batch_select_indices(index)
        self.mask, self.positions = self.mask[index], self.positions[index]

    def _forward(self, ids: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

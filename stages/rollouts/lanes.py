"""A batch of sequences that grow by a token a step: a model with its cache behind three calls.

start() → logits (B, V) behind the prompts; step(tokens) → logits behind those, until the next step; keep(index) drops
the other rows, or says False where its cache cannot. wide: the layers that `weights_first` turns round. steady: rows
should leave seldom and many at a time.
"""

import copy
import warnings
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from data.groups import make_rows
from stages.models.adapters import plain
from stages.models.families import WHOLE_ROWS, cache_name
from stages.models.forward import next_logits
from stages.models.packing import trunk_options

WIDE = 512  # inputs from which on a linear layer counts as large
COLUMNS = 128  # of the cache, by which a recorded step's view of it grows
WORTH = 16  # steps that a recording must serve: making one takes as long as a few steps without


class _Column(DynamicLayer):
    """Keys and values (B, H_kv, room, D) allocated once; a step writes a column and sees those before it."""

    blank = staticmethod(Tensor.new_empty)

    @classmethod
    def of(cls, layer, index: Tensor, room: int, dtype: torch.dtype) -> "_Column":
        """From a layer that read packed prompts: row b holds the tokens index[b] (B, W), then `room` free columns."""
        new, width = cls(), index.shape[1]
        new.filled, new.is_initialized = width, True
        new.dtype, new.device = dtype, layer.keys.device
        for name in ("keys", "values"):
            packed = getattr(layer, name)[0].transpose(0, 1).to(dtype)  # (T, H_kv, D)
            spread = cls.blank(packed, (len(index), packed.shape[1], width + room, packed.shape[2]))
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
            less = self.blank(held, (len(index), *held.shape[1:]))
            less[:, :, : self.filled] = held[index, :, : self.filled]
            setattr(self, name, less)


class _RecordedColumn(_Column):
    """The column that is written is a number on the device, so that a recorded step finds another one each time; a
    step sees all columns to `end`. Those not filled yet are 0: behind a mask a NaN would still be one."""

    blank = staticmethod(Tensor.new_zeros)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, value_states.to(self.values.dtype))
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]


class PackedLane:
    """For models that pack: each prompt once and without padding, then a cache with room for the whole response.

    Its rows are aligned at the prompts' ends, so that all write the same column; a bias hides what is before a prompt.
    """

    layer = _Column

    def __init__(self, model, prompts, response_length: int, pad_id: int):
        self.model, self.room, self.wide = model, response_length, wide_layers(model)
        self.steady = bool(self.wide)
        self.rows = make_rows(prompts, [[] for _ in prompts], pad_id, packed=True).to(model.device)

    def start(self) -> Tensor:
        rows, cache = self.rows, DynamicCache()
        self.name = cache_name(plain(self.model).base_model) or "past_key_values"  # a trunk may pass on what it takes
        options = trunk_options(rows) | {self.name: cache, "use_cache": True}
        hidden = self._trunk(rows.input_ids, options)[0].index_select(0, rows.last)
        lengths = rows.position_ids[0][rows.prompt_end] + 1
        width = int(lengths.max())
        columns = torch.arange(width, device=hidden.device) - (width - lengths).unsqueeze(-1)  # < 0 before a prompt
        index = rows.sequences.gather(-1, columns.clamp(min=0))
        dtype = attention_dtype(hidden)
        self.cache = Cache([self.layer.of(layer, index, self.room, dtype) for layer in cache.layers])
        self.bias = torch.zeros(len(index), 1, 1, width + self.room, dtype=dtype, device=hidden.device)
        self.bias[..., :width].masked_fill_((columns < 0)[:, None, None], -torch.inf)
        self.positions, self.filled = lengths.unsqueeze(-1), width
        return self._head(hidden)

    def step(self, tokens: Tensor) -> Tensor:
        self.filled += 1
        with weights_first(self.wide):
            return self._read(tokens, self.filled)

    def keep(self, index: Tensor) -> bool:
        for layer in self.cache.layers:
            layer.keep(index)
        self.bias, self.positions = self.bias[index], self.positions[index]
        return True

    def _read(self, tokens: Tensor, end: int) -> Tensor:
        """Logits behind one token a row, which sees the cache's columns to `end`; positions move on."""
        options = {
            "position_ids": self.positions,
            "attention_mask": self.bias[:1],  # four dimensions: transformers makes no mask of its own
            self.name: self.cache,
            "use_cache": True,
            "packing": self.bias[..., :end],
        }
        logits = self._head(self._trunk(tokens.unsqueeze(-1), options)[:, 0])
        self.positions += 1
        return logits

    def _trunk(self, ids: Tensor, options: dict) -> Tensor:
        return plain(self.model).base_model(input_ids=ids, **options).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return plain(self.model).get_output_embeddings()(hidden).contiguous()


class RecordedLane(PackedLane):
    """PackedLane for a GPU: a step is a fixed list of kernels, recorded once (a CUDA graph) and replayed, since
    launching them one by one from Python takes longer than they run.

    A recording has fixed shapes: it sees the cache to the end of a block of columns, those not yet filled hidden by
    the bias. The first step in a new block, or with fewer rows, runs as it is; the second is recorded. Under autocast
    a recording reads the cast weights that the prefill left in autocast's cache: they live as long as the context that
    the sampler runs in, and a lane does not outlive it.
    """

    layer = _RecordedColumn

    def __init__(self, model, prompts, response_length: int, pad_id: int):
        super().__init__(model, prompts, response_length, pad_id)
        self.steady, self.shape, self.graph = True, None, None

    def start(self) -> Tensor:
        longest = int(self.rows.position_ids.max()) + 1
        self.left, self.room = self.room, self.room + -(longest + self.room) % COLUMNS  # whole blocks
        logits = super().start()
        self.bias[..., self.filled :] = -torch.inf
        self.column = torch.tensor([self.filled], device=logits.device)
        for layer in self.cache.layers:
            layer.column, layer.filled = self.column, self.bias.shape[-1]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        end = self.filled // COLUMNS * COLUMNS + COLUMNS
        serves = min(end - self.filled, self.left)
        self.filled, self.left = self.filled + 1, self.left - 1
        if self.shape != (len(tokens), end):
            self.shape, self.graph, self.tokens = (len(tokens), end), None, tokens.clone()
            return self._one(end)
        self.tokens.copy_(tokens)
        if self.graph is None and not (tokens.is_cuda and serves >= WORTH and self._record(end)):
            return self._one(end)
        self.graph.replay()
        return self.logits

    def _one(self, end: int) -> Tensor:
        """A step that takes its tokens, its column and its positions from tensors, and moves those on."""
        self.bias.index_fill_(-1, self.column, 0.0)
        for layer in self.cache.layers:
            layer.end = end
        logits = self._read(self.tokens, end)
        self.column += 1
        return logits

    def _record(self, end: int) -> bool:
        """Whether a recording of a step could be made."""
        inner = plain(self.model)
        if not hasattr(inner, "_steps_can_be_recorded"):
            problem = self._what_it_asks(end)
            inner._steps_can_be_recorded = problem is None
            if problem:
                warnings.warn(f"decoding goes step by step, slower: no CUDA graph ({problem})", stacklevel=2)
        if inner._steps_can_be_recorded:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._one(end)
            self.graph = graph
        return inner._steps_can_be_recorded

    def _what_it_asks(self, end: int) -> str | None:
        """What a step asks the device for as it goes (some mixtures of experts do), which no recording can: torch would
        be left in the middle of one. None: nothing. What this trial writes, the step itself writes again."""
        before, asked = (self.column.clone(), self.positions.clone()), torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
            try:
                self._one(end)
            except RuntimeError as problem:
                return str(problem).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode(asked)
                self.column.copy_(before[0])
                self.positions.copy_(before[1])
        return None


def lane_for(model, packed: bool):
    """The kind of lane that serves `model` best. packed: it packs, and its head is linear."""
    inner = plain(model)
    if getattr(inner.config, WHOLE_ROWS, False) or (cache_name(inner) is None and not packed):
        return WholeLane
    if packed:
        return RecordedLane if model.device.type == "cuda" else PackedLane
    return PaddedLane


def attention_dtype(hidden: Tensor) -> torch.dtype:
    """What attention computes in: under autocast it would cast the whole cache anew at each step."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


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


class PaddedLane:
    """For any model that takes transformers' cache: prompts padded on the left, transformers' masks."""

    def __init__(self, model, prompts, response_length: int, pad_id: int):
        device, width, self.wide, self.steady = model.device, max(map(len, prompts)), [], False
        self.model, self.name = model, cache_name(plain(model))
        self.drops = None  # not known whether rows can leave
        self.ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        self.mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
        self.positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    def start(self) -> Tensor:
        try:
            self.cache = DynamicCache(config=self.model.config)
            return self._forward(self.ids).logits[:, -1]
        except (ValueError, KeyError):  # some make a cache of their own, and take no other (MiniMax)
            self.cache = None
            out = self._forward(self.ids)
            self.cache = getattr(out, self.name, None)
            if self.cache is None:
                raise
            return out.logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=-1)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(tokens.unsqueeze(-1)).logits[:, -1]

    def keep(self, index: Tensor) -> bool:
        rows = len(self.mask)
        if self.drops is None:
            layers = getattr(self.cache, "layers", [])
            can = all(selected(layer, index[:1], rows) is not None for layer in layers)
            self.drops = bool(layers) and can and not tensors_of(self.cache)
        if not self.drops:
            return False
        for i, layer in enumerate(self.cache.layers):
            self.cache.layers[i] = selected(layer, index, rows)
        self.mask, self.positions = self.mask[index], self.positions[index]
        return True

    def _forward(self, ids: Tensor):
        return self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.name: self.cache},
        )


def selected(layer, index: Tensor, rows: int):
    """A copy of a layer of transformers' cache that holds the rows index (b,) of its `rows`; None where the layer
    cannot tell them apart: it has no way to choose, or one that leaves some of its tensors whole."""
    new = copy.copy(layer)
    for name, value in vars(new).items():
        if isinstance(value, (dict, list)):
            setattr(new, name, copy.copy(value))
    if not hasattr(new, "reorder_cache"):
        return None
    new.reorder_cache(index)
    before, after = tensors_of(layer), tensors_of(new)
    every = len(before) == len(after) and all(
        x.dim() == 0 or x.numel() == 0 or (len(x) == rows and len(y) == len(index))
        for x, y in zip(before, after, strict=False)
    )
    return new if every else None


def tensors_of(layer) -> list[Tensor]:
    """The tensors that a layer of a cache holds, or the cache itself beside its layers."""
    found = []
    for value in vars(layer).values():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        found += [x for x in inside if isinstance(x, Tensor)]
    return found


class WholeLane:
    """For a model that takes no cache of transformers' (Mamba, RWKV, the first GPT), or reads otherwise with it than
    without (base's trial tells): every row is read anew at each step, padded on the right as in training."""

    def __init__(self, model, prompts, response_length: int, pad_id: int):
        self.model, self.pad_id, self.rows = model, pad_id, [list(prompt) for prompt in prompts]
        self.wide, self.steady = [], False

    def start(self) -> Tensor:
        rows = make_rows(self.rows, [[] for _ in self.rows], self.pad_id)
        return next_logits(self.model, rows.to(self.model.device))

    def step(self, tokens: Tensor) -> Tensor:
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self.start()

    def keep(self, index: Tensor) -> bool:
        self.rows = [self.rows[i] for i in index.tolist()]
        return True

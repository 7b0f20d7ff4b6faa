"""Decode a batch of rows token by token: a model and its cache with three calls (a "lane").

Four lanes serve four kinds of models:

    PackedLane    models that read packed rows: each prompt once, no padding, one preallocated cache
    RecordedLane  the same on a GPU, with a decoding step recorded as a CUDA graph
    PaddedLane    models that take transformers' cache: prompts padded on the left
    WholeLane     models without such a cache: every row is read from its start at each token
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import ModelOutput

from data.groups import make_rows
from stages.models.adapters import unwrapped
from stages.models.families import WHOLE_ROWS, cache_name
from stages.models.forward import next_logits
from stages.models.packing import trunk_options

WIDE_INPUTS = 512  # a linear layer with at least so many inputs counts as wide (`weights_first`)
COLUMN_BLOCK = 128  # columns of the cache by which a recorded step's view of it grows
WORTH_RECORDING = 16  # steps that a recording must serve: making one takes as long as a few steps


class Lane(Protocol):
    """A batch of B rows that grow by one token a step."""

    steady: bool
    """Whether rows should leave seldom, and many at a time."""

    def start(self) -> Tensor:
        """Read the prompts; return the logits (B, V) after them."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row; return the logits (B, V) after it (until the next step)."""

    def keep(self, index: Tensor) -> bool:
        """Drop all rows but those of `index`; return False if the cache cannot drop rows."""


class _Column(DynamicLayer):
    """Keys and values of one layer, allocated once: (B, heads, columns, head size).

    A step writes one column and sees the columns before it. transformers' own layer would
    concatenate, and so copy the whole cache, at each step."""

    allocate = staticmethod(Tensor.new_empty)

    @classmethod
    def of(cls, layer: DynamicLayer, index: Tensor, room: int, dtype: torch.dtype) -> "_Column":
        """Return a layer with the keys and values of packed prompts, one prompt a row.

        Args:
            layer: Keys and values of a packed row of T tokens.
            index: (B, W) positions in the packed row of the tokens of each prompt, aligned at its
                end.
            room: Free columns to allocate for the response.
            dtype: Dtype that attention computes in.
        """
        new, width = cls(), index.shape[1]
        new.filled, new.is_initialized = width, True
        new.dtype, new.device = dtype, layer.keys.device
        for name in ("keys", "values"):
            packed = getattr(layer, name)[0].transpose(0, 1).to(dtype)  # (T, heads, head size)
            columns = cls.allocate(packed, (len(index), packed.shape[1], width + room, packed.shape[2]))
            columns[:, :, :width] = packed[index].transpose(1, 2)
            setattr(new, name, columns)
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the next column; return all columns up to it."""
        self.keys[:, :, self.filled : self.filled + 1] = key_states
        self.values[:, :, self.filled : self.filled + 1] = value_states
        self.filled += 1
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        """Return how many columns are filled; transformers asks for it."""
        return self.filled

    def keep(self, index: Tensor) -> None:
        """Drop all rows but those of `index`."""
        for name in ("keys", "values"):
            before = getattr(self, name)
            # free columns are not copied: nothing is in them yet
            after = self.allocate(before, (len(index), *before.shape[1:]))
            after[:, :, : self.filled] = before[index, :, : self.filled]
            setattr(self, name, after)


class _RecordedColumn(_Column):
    """A layer whose next column is an index on the device, so that each replay writes another one.

    A step sees all columns up to `end`, also those that are not filled yet. These must be 0 and not
    uninitialised memory: the bias hides them, but NaN · 0 is still NaN."""

    allocate = staticmethod(Tensor.new_zeros)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the column that `self.column` names; return all columns up to `self.end`."""
        # a slice with a Python integer would be fixed in the recording
        # index_copy_ does not cast, as an assignment to a slice would
        self.keys.index_copy_(2, self.column, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, value_states.to(self.values.dtype))
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]


class PackedLane:
    """Decode with a model that packs: each prompt is read once, without padding.

    Rows are aligned at the ends of their prompts, so that all of them write the same column of the
    cache; a bias hides the columns before a prompt's start."""

    layer = _Column

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], response_length: int, pad_id: int):
        self.model, self.room = model, response_length
        self.wide = wide_layers(model)
        # with wide layers a step's time depends on the rows in blocks (`ROW_MULTIPLE`)
        self.steady = bool(self.wide)
        self.rows = make_rows(prompts, [[] for _ in prompts], pad_id, packed=True).to(model.device)

    def start(self) -> Tensor:
        """Read the packed prompts; return the logits (B, V) after them."""
        # transformers fills this cache with one packed row; the columns below are copied from it
        rows, cache = self.rows, DynamicCache()
        # a trunk may pass on what it takes by **kwargs, and then names no cache of its own
        self.cache_argument = cache_name(unwrapped(self.model).base_model) or "past_key_values"
        options = trunk_options(rows) | {self.cache_argument: cache, "use_cache": True}
        hidden = self._trunk(rows.input_ids, options)[0].index_select(0, rows.last)
        lengths = rows.position_ids[0][rows.prompt_end] + 1
        width = int(lengths.max())
        # column of each row's tokens, counted from the start of its prompt: negative before it
        columns = torch.arange(width, device=hidden.device) - (width - lengths).unsqueeze(-1)
        # columns before a prompt repeat its first token: the bias hides them, if they are finite
        index = rows.sequences.gather(-1, columns.clamp(min=0))
        dtype = attention_dtype(hidden)
        # each packed layer is freed before the next is copied, so that prompts are not held twice
        self.cache = Cache(
            [self.layer.of(cache.layers.pop(0), index, self.room, dtype) for _ in range(len(cache.layers))]
        )
        self.bias = torch.zeros(len(index), 1, 1, width + self.room, dtype=dtype, device=hidden.device)
        self.bias[..., :width].masked_fill_((columns < 0)[:, None, None], -torch.inf)
        # the next token of a row is at the position after its own prompt, wherever its column is
        self.positions, self.filled = lengths.unsqueeze(-1), width
        return self._head(hidden)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row; return the logits (B, V) after it."""
        self.filled += 1
        # only in steps: the many rows of the prefill gain nothing from it
        with weights_first(self.wide):
            return self._forward(tokens, self.filled)

    def keep(self, index: Tensor) -> bool:
        """Drop all rows but those of `index`."""
        for layer in self.cache.layers:
            layer.keep(index)
        self.bias, self.positions = self.bias[index], self.positions[index]
        return True

    def _forward(self, tokens: Tensor, end: int) -> Tensor:
        """Return the logits after one token a row, which sees the cache's columns up to `end`."""
        options = {
            "position_ids": self.positions,
            # four dimensions keep transformers from making a mask; attention reads `packing`
            # instead
            "attention_mask": self.bias[:1],
            self.cache_argument: self.cache,
            "use_cache": True,
            "packing": self.bias[..., :end],
        }
        logits = self._head(self._trunk(tokens.unsqueeze(-1), options)[:, 0])
        self.positions += 1  # in place, so that a replay advances the same tensor
        return logits

    def _trunk(self, ids: Tensor, options: dict[str, Any]) -> Tensor:
        return unwrapped(self.model).base_model(input_ids=ids, **options).last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return unwrapped(self.model).get_output_embeddings()(hidden).contiguous()


class RecordedLane(PackedLane):
    """Decode on a GPU with a step that is recorded once as a CUDA graph and replayed.

    A step is a fixed list of kernels; launching them one by one from Python takes longer than they
    run. A recording has fixed shapes: it sees the cache up to the end of a block of columns, of
    which the bias hides those that are not filled yet. The first step in a new block, or with fewer
    rows, runs as it is; the second one is recorded.

    Under autocast a recording reads the cast weights that the prefill left in autocast's cache.
    They live as long as the autocast context that the sampler runs in, and a lane does not outlive
    it."""

    layer = _RecordedColumn

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], response_length: int, pad_id: int):
        super().__init__(model, prompts, response_length, pad_id)
        # each number of rows needs a recording of its own
        self.steady, self.shape, self.graph = True, None, None

    def start(self) -> Tensor:
        """Read the packed prompts; return the logits (B, V) after them."""
        longest = int(self.rows.position_ids.max()) + 1
        self.steps_left = self.room
        self.room += -(longest + self.room) % COLUMN_BLOCK  # so that the cache has whole blocks of columns
        logits = super().start()
        # hidden until the step that fills the column
        self.bias[..., self.filled :] = -torch.inf
        # one tensor for all layers, which a replay reads by its address and advances in place
        self.column = torch.tensor([self.filled], device=logits.device)
        for layer in self.cache.layers:
            # recorded steps do not count on the host, so `keep` must copy every column
            layer.column, layer.filled = self.column, self.bias.shape[-1]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row; return the logits (B, V) after it."""
        # counted on the host as well: reading `self.column` would wait for the device
        end = self.filled // COLUMN_BLOCK * COLUMN_BLOCK + COLUMN_BLOCK
        steps_served = min(end - self.filled, self.steps_left)
        self.filled, self.steps_left = self.filled + 1, self.steps_left - 1
        if self.shape != (len(tokens), end):
            # unrecorded: this step also warms up kernels and memory for the new shape
            self.shape, self.graph, self.tokens = (len(tokens), end), None, tokens.clone()
            return self._step_from_tensors(end)
        # a replay reads the addresses that were recorded, so its input is copied there
        self.tokens.copy_(tokens)
        if self.graph is None:
            is_worth_it = tokens.is_cuda and steps_served >= WORTH_RECORDING
            if not (is_worth_it and self._record(end)):
                return self._step_from_tensors(end)
        self.graph.replay()
        return self.logits  # the next replay overwrites them

    def _step_from_tensors(self, end: int) -> Tensor:
        """Take a step that reads tokens, column and positions from tensors, and advances these."""
        self.bias.index_fill_(-1, self.column, 0.0)
        for layer in self.cache.layers:
            layer.end = end
        logits = self._forward(self.tokens, end)
        self.column += 1
        return logits

    def _record(self, end: int) -> bool:
        """Record a step; return whether this model's steps can be recorded."""
        inner = unwrapped(self.model)
        # remembered on the model: a lane lives for one batch, and finding out takes a step
        if not hasattr(inner, "_steps_can_be_recorded"):
            problem = self._synchronisation(end)
            inner._steps_can_be_recorded = problem is None
            if problem:
                warnings.warn(f"decoding is slower: a step cannot be a CUDA graph ({problem})", stacklevel=2)
        if inner._steps_can_be_recorded:
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may use the device meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._step_from_tensors(end)
            self.graph = graph
        return inner._steps_can_be_recorded

    def _synchronisation(self, end: int) -> str | None:
        """Return why a step waits for the device, or None if it does not.

        Some mixtures of experts do. A recording cannot, and would leave torch in the middle of a
        capture, so a step is tried first. The real step then writes again whatever the trial has
        written.
        """
        column, positions = self.column.clone(), self.positions.clone()
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that this mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
            try:
                self._step_from_tensors(end)
            except RuntimeError as problem:
                return str(problem).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                # copied back in place: layers and recordings hold these tensors
                self.column.copy_(column)
                self.positions.copy_(positions)
        return None


def lane_for(model: nn.Module, packed: bool) -> Callable[..., Lane]:
    """Return the class of lane that serves a model best.

    Args:
        model: A causal language model.
        packed: Whether it reads packed rows and its head is linear.
    """
    inner = unwrapped(model)
    if getattr(inner.config, WHOLE_ROWS, False) or (cache_name(inner) is None and not packed):
        return WholeLane
    if packed:
        return RecordedLane if model.device.type == "cuda" else PackedLane
    return PaddedLane


def attention_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype that attention computes in.

    The cache is kept in it: under autocast, attention would otherwise cast the whole cache at each
    step.
    """
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def wide_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the layers for `weights_first`: the wide ones in float32 on a CPU, otherwise none."""
    if model.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return []
    # exactly nn.Linear: a subclass may compute something else than weight · rows
    return [m for m in model.modules() if type(m) is nn.Linear and m.in_features >= WIDE_INPUTS]


@contextmanager
def weights_first(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Let wide linear layers multiply weight · rowsᵀ in place of rows · weightᵀ while inside.

    The results are the same up to the order of sums. On a CPU it is a fifth faster for the few rows
    of a decoding step, where reading the weights is most of the work. Small layers would lose more
    by their transposed outputs.
    """
    for layer in layers:
        layer.forward = partial(_weight_first, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # uncovers the method of the class


def _weight_first(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return layer(x), computed as (weight · xᵀ)ᵀ."""
    out = (layer.weight @ x.reshape(-1, x.shape[-1]).T).T
    if layer.bias is not None:
        out = out + layer.bias
    return out.unflatten(0, x.shape[:-1]) if x.dim() > 2 else out


class PaddedLane:
    """Decode with any model that takes transformers' cache, with prompts padded on the left."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], response_length: int, pad_id: int):
        device, width = model.device, max(map(len, prompts))
        self.steady = False
        self.model, self.cache_argument = model, cache_name(unwrapped(model))
        self.drops_rows: bool | None = None  # not known before the first row is to leave
        self.ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
        self.mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
        # positions count from a prompt's own start, not from its padding
        self.positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    def start(self) -> Tensor:
        """Read the padded prompts; return the logits (B, V) after them."""
        try:
            self.cache = DynamicCache(config=self.model.config)
            return self._forward(self.ids).logits[:, -1]
        except (ValueError, KeyError):
            # some models make a cache of their own and take no other (MiniMax)
            self.cache = None
            out = self._forward(self.ids)
            self.cache = getattr(out, self.cache_argument, None)
            if self.cache is None:
                raise
            return out.logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row; return the logits (B, V) after it."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=-1)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(tokens.unsqueeze(-1)).logits[:, -1]

    def keep(self, index: Tensor) -> bool:
        """Drop all rows but those of `index`; return False if the cache cannot drop rows."""
        rows = len(self.mask)
        if self.drops_rows is None:
            layers = getattr(self.cache, "layers", [])
            # tried on one row; a tensor of the cache beside its layers would keep all rows
            every_layer = all(select_rows(layer, index[:1], rows) is not None for layer in layers)
            self.drops_rows = bool(layers) and every_layer and not tensors_of(self.cache)
        if not self.drops_rows:
            return False
        for i, layer in enumerate(self.cache.layers):
            self.cache.layers[i] = select_rows(layer, index, rows)
        self.mask, self.positions = self.mask[index], self.positions[index]
        return True

    def _forward(self, ids: Tensor) -> ModelOutput:
        return self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_argument: self.cache},
        )


def select_rows(layer: Any, index: Tensor, rows: int) -> Any:
    """Return a copy of a layer of transformers' cache that holds some of its rows.

    Args:
        layer: A layer of any of transformers' caches.
        index: (b,) the rows to hold.
        rows: How many rows `layer` holds.

    Returns:
        The copy; None if the layer has no way to select rows, or one that leaves some of its
        tensors whole.
    """
    # a shallow copy is enough: reorder_cache replaces tensors and does not write into them
    new = copy.copy(layer)
    for name, value in vars(new).items():
        if isinstance(value, (dict, list)):
            # containers too, or the selection would also change the original
            setattr(new, name, copy.copy(value))
    if not hasattr(new, "reorder_cache"):
        return None
    new.reorder_cache(index)
    before, after = tensors_of(layer), tensors_of(new)
    if len(before) != len(after):
        return None
    for x, y in zip(before, after, strict=True):
        # a scalar is a counter, and an empty tensor a part that is not in use
        has_rows = x.dim() > 0 and x.numel() > 0
        if has_rows and (len(x) != rows or len(y) != len(index)):
            return None
    return new


def tensors_of(layer: Any) -> list[Tensor]:
    """Return the tensors of a cache's layer, or of the cache itself beside its layers."""
    tensors = []
    for value in vars(layer).values():
        if isinstance(value, dict):
            values = list(value.values())
        elif isinstance(value, (list, tuple)):
            values = list(value)
        else:
            values = [value]
        tensors += [x for x in values if isinstance(x, Tensor)]
    return tensors


class WholeLane:
    """Decode with a model whose cache cannot be used: each row is read again at each token.

    These are models that take none of transformers' caches (Mamba, RWKV, the first GPT), and models
    that give other numbers with a cache than without (the trial of the stage base finds out). Rows
    are padded on the right, as in training."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], response_length: int, pad_id: int):
        self.model, self.pad_id, self.rows = model, pad_id, [list(prompt) for prompt in prompts]
        self.steady = False

    def start(self) -> Tensor:
        """Read all rows; return the logits (B, V) after them."""
        rows = make_rows(self.rows, [[] for _ in self.rows], self.pad_id)
        return next_logits(self.model, rows.to(self.model.device))

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row; return the logits (B, V) after it."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self.start()

    def keep(self, index: Tensor) -> bool:
        """Drop all rows but those of `index`."""
        self.rows = [self.rows[i] for i in index.tolist()]
        return True

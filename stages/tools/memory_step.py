"""Take one optimizer step on shapes only, and count the bytes that it needs.

torch's FakeTensorMode runs the real models, heads, adapters and optimizers on tensors without
numbers, in seconds and without memory. `LiveBytes` counts the tensors that are alive.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.groups import Rows, make_rows
from stages.models.activations import ActivationOffload, Waiting, offload_activations
from stages.models.adapters import (
    AdapterSettings,
    is_adapted,
    share_frozen,
    trainable_parameters,
    unwrapped,
    with_adapter,
)
from stages.models.families import has_family_class, name_trunk, scalar_class, weightless_causal
from stages.models.head import CHUNK, head_logprobs
from stages.models.layout import Layout
from stages.models.loading import score_head, without_dropout
from stages.models.packing import has_short_window, register, trunk_options
from stages.models.precision import cast_frozen, castable
from stages.models.quantized import Quantized
from stages.models.remote_code import forget_remote_classes, is_remote
from stages.models.sharding import decoder_layers, gathered_cast
from stages.models.soft_prompts import assume_soft_prompt
from stages.objectives.logprobs import token_logprobs
from stages.training.trainee import make_trainee

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number. On shapes, float16 is computed as bfloat16, which is as wide."""
Lengths = list[tuple[int, list[int]]]
"""The length of each prompt, and the lengths of its responses."""


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are alive, and their maximum."""

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__()
        self.now = self.most = self.host = self.host_most = 0
        self.on_host = False
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count the tensors that it returns."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor until it is freed; tensors that share storage count once."""
        if (storage := tensor.untyped_storage()) not in self.known:
            self.known.add(storage)
            grow = self.grow_host if self.on_host else self.grow
            grow(storage.nbytes())
            weakref.finalize(storage, grow, -storage.nbytes())

    def grow(self, size: int) -> None:
        """Add a number of bytes, negative when a tensor is freed."""
        self.now += size
        self.most = max(self.most, self.now)

    def grow_host(self, size: int) -> None:
        """Add a number of bytes to what the CPU's memory holds for a GPU."""
        self.host += size
        self.host_most = max(self.host_most, self.host)

    def to_host(self, x: Tensor) -> Tensor:
        """Return a copy of a tensor that counts as the CPU's memory."""
        self.on_host = True
        try:
            return x.clone()
        finally:
            self.on_host = False


class CountedOffload(ActivationOffload):
    """Offload activations where fake tensors of both memories claim to be on a CPU."""

    def unpack(self, kept: Tensor | Waiting) -> Tensor:
        """Return a copy, as one comes back to the GPU."""
        return kept if isinstance(kept, Tensor) else kept.copy.clone()


@dataclass(frozen=True)
class Step:
    """One micro-batch of a model that trains."""

    model: str
    """"policy", "reward_model" or "value_model"."""
    head: str
    """What the loss reads: "logprobs", "scores" or "values" of responses; or of text rows, "text"
    (log-probabilities in chunks) or "logits" (all logits at once)."""
    lengths: Lengths = ()
    """Of prompts and responses."""
    rows: int = 0
    """Rows of text."""
    width: int = 0
    """Tokens in a row of text; 0 for responses."""
    times: int = 1
    """2 if the batch has several micro-batches, so that a gradient exists already; otherwise 1."""


@dataclass(frozen=True)
class Sizes:
    """The bytes that a step needs. `weights`, `moments` and `step` are those of one process."""

    weights: int
    """All weights together."""
    models: dict[str, int]
    """The whole weights of each model."""
    frozen: dict[str, int]
    """The weights of each model if nothing of it trained."""
    trains: dict[str, int]
    """The weights of each model that train."""
    moments: int
    """Adam's moments."""
    step: int
    """The most that the step holds in addition: activations and gradients."""
    shared: bool
    """Whether models share frozen weights."""
    adapted: bool
    """Whether a model has an adapter, which can be turned off, or only a soft prompt of its own."""
    host: int = 0
    """What one process of a GPU holds in the CPU's memory, besides offloaded weights."""
    saved: int = 0
    """What one process writes of a checkpoint: of weights that train, and of moments."""


def take_step(
    config: Any,
    steps: list[Step],
    adapter: AdapterSettings,
    dtype: str,
    device: str,
    checkpointing: bool = False,
    attention: str = "sdpa",
    parts: int = 1,
    layout: Layout | None = None,
) -> Sizes:
    """Take one optimizer step on fake tensors, and return the bytes that it needs.

    Args:
        config: transformers' configuration of the model.
        steps: A micro-batch of each model that trains, in order.
        adapter: How adapters are trained.
        dtype: "float32", "bfloat16" or "float16", which products are computed in.
        device: "cpu", "cuda" or "mps", which decides how rows are packed.
        checkpointing: Whether activations are recomputed in the backward pass.
        attention: `model.attn_implementation`.
        parts: How many processes hold a shard of each weight (fsdp2), or of the moments (ZeRO-1).
            If weights are sharded, a layer's gradients are freed as soon as they are computed, and
            those outside the layers after the pass; the shards of the gradients, and the weights
            that are gathered for a pass, are added at the end.
        layout: What else is sharded or offloaded; None: as `Layout()`.
    """
    layout = layout or Layout()
    sharded = layout.offload == "all" or (parts > 1 and not layout.splits_step)
    longest = max([step.width for step in steps] + [p + max(rs) for step in steps for p, rs in step.lengths])
    packed = attention == "sdpa" and not has_short_window(config, longest)
    real = [laid_out(step, packed) for step in steps]  # how rows are packed depends on their contents
    read = [None if isinstance(x, Tensor) else int(x.lengths.sum()) for x in real]
    with quiet():
        made = {step.model: make(config, step.model, adapter, checkpointing, attention, packed) for step in steps}
    with quiet(), experts_by_shape(), FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        models: dict[str, nn.Module] = {}
        for name, model in made.items():
            model.to_empty(device="cpu")
            unwrapped(model).tie_weights()
            if dtype != "float32":
                cast_frozen(model, torch.bfloat16)
            if not sharded:
                share_frozen(model, list(models.values()), same=lambda *_: True)
            for p in (p for layer in decoder_layers(unwrapped(model)) for p in layer.parameters() if sharded):
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            if layout.offload_activations and device == "cpu":  # both memories are one
                offload_activations(model)
            elif layout.offload_activations:
                CountedOffload(unwrapped(model).base_model, live.to_host).attach()
            models[name] = model
        weights, sizes = live.now, {name: size_of(model) for name, model in models.items()}
        trains = {name: sum(p.nbytes for p in trainable_parameters(model).values()) for name, model in models.items()}
        frozen = {name: frozen_size(model, dtype) for name, model in models.items()}
        cast_gathers(list(models.values()), sharded and dtype != "float32" and layout.casts_gathers)
        options = {"steps": 100, "learning_rate": 1.0, "max_grad_norm": 1.0}
        trainees = [make_trainee(name, model, **options) for name, model in models.items()]
        if not sharded:
            create_moments(list(models.values()), trainees)
        live.most, before, apart = live.now, live.now, []
        for head, turn in (("any", 0), ("any", 1), ("text", 0), ("text", 1)):
            for step, batch, tokens in zip(steps, real, read, strict=True):
                if turn >= step.times or (step.head == "text") != (head == "text"):
                    continue
                model = models[step.model]
                if (head, turn) == ("text", 0):  # PPO keeps its own gradient aside while it computes the text's
                    apart += [p.grad for p in trainable_parameters(model).values()]
                    model.zero_grad(set_to_none=True)
                casts = {"enabled": dtype != "float32", "cache_enabled": not sharded}
                with torch.autocast("cpu", torch.bfloat16, **casts):
                    loss = forward(model, step, faked(batch, tokens), device)
                loss.sum().backward()
                del loss
                if sharded:  # the gradients outside the layers
                    model.zero_grad(set_to_none=True)
        apart.clear()
        for trainee in trainees:
            trainee.optimizer.step()
            trainee.optimizer.zero_grad(set_to_none=True)
        aside = sum(trains[step.model] for step in steps if step.head == "text" and len(steps) > 1)
        step, moments = live.most - before, before - weights
        host = live.host_most
        if sharded:  # Adam has no moments yet
            moments = 2 * sum(trains.values())
            # Shards of gradients, of PPO and the text: before the last backward pass, and after.
            again = max(one.times for one in steps) > 1
            early, late = ((sum(trains.values()) * some + aside) // parts for some in (again, True))
            if layout.reduces_last:
                early = sum(trains.values()) * again + aside // parts
            if layout.offload == "all" and device != "cpu":
                host, early, late = host + late, 0, 0
            at_once = max(map(gathered_at_once, models.values()))
            whole = max(map(size_of, models.values())) if layout.shard == "gradients" else at_once
            step = max(step + whole + early, late + at_once)
        moments //= parts
        saved = sum(trains.values()) // (1 if layout.splits_step else parts) + moments  # rank 0 saves what is whole
        if layout.splits_step:  # after the step, one whole weight is gathered at a time
            step = max(step, sum(trains.values()) + max(p.nbytes for m in models.values() for p in m.parameters()))
        if layout.offload == "optimizer":
            copies = 2 * sum(trains.values()) // parts  # of the weights that it steps, and of their gradients
            moments, host = (moments + copies, host) if device == "cpu" else (0, host + moments + copies)
        return Sizes(
            weights=weights // (parts if sharded else 1),
            models=sizes,
            frozen=frozen,
            trains=trains,
            moments=moments,
            step=step,
            shared=weights < sum(sizes.values()),
            adapted=adapter.soft_prompt is not None or any(map(is_adapted, models.values())),
            host=host,
            saved=saved,
        )


def cast_gathers(models: list[nn.Module], casts: bool) -> None:
    """Cast the weights that are gathered in 16 bits, of which autocast then makes no copies.

    Args:
        models: The models that train; changed.
        casts: Whether any are.
    """
    for layer in (layer for model in models if casts for layer in gathered_cast(model)):
        for p in layer.parameters():
            p.data = p.data.to(torch.bfloat16)


def create_moments(models: list[nn.Module], trainees: list[Any]) -> None:
    """Let each optimizer step once, on gradients that no pass computed, so that it has its moments.

    Args:
        models: The models.
        trainees: What `make_trainee` returned for them.
    """
    for model in models:
        for p in trainable_parameters(model).values():
            p.grad = torch.empty_like(p)
    for trainee in trainees:
        trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)


def take_passes(
    config: Any, steps: list[Step], dtype: str, device: str, attention: str = "sdpa", sharded: bool = False
) -> tuple[dict[str, int], int]:
    """Pass micro-batches through frozen models, on fake tensors, one pass at a time.

    Args:
        config: transformers' configuration of the model.
        steps: The micro-batches, each with its model.
        dtype: "float32", "bfloat16" or "float16", which products are computed in.
        device: "cpu", "cuda" or "mps", which decides how rows are packed.
        attention: `model.attn_implementation`.
        sharded: Whether weights are gathered for a pass (fsdp2, or offloaded to the CPU).

    Returns:
        The bytes of each model's whole weights, and the most that a pass holds in addition: its
        activations and, of shards, the weights that are gathered.
    """
    longest = max([step.width for step in steps] + [p + max(rs) for step in steps for p, rs in step.lengths])
    packed = attention == "sdpa" and not has_short_window(config, longest)
    real = [laid_out(step, packed) for step in steps]
    read = [None if isinstance(x, Tensor) else int(x.lengths.sum()) for x in real]
    names = dict.fromkeys(step.model for step in steps)
    with quiet():
        made = {name: make(config, name, AdapterSettings(), False, attention, packed) for name in names}
    with quiet(), experts_by_shape(), FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        for model in made.values():
            model.requires_grad_(False).to_empty(device="cpu")
            unwrapped(model).tie_weights()
            if dtype != "float32":
                cast_frozen(model, torch.bfloat16)
        weights = live.most = live.now
        casts = {"enabled": dtype != "float32", "cache_enabled": not sharded}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, **casts):
            for step, batch, tokens in zip(steps, real, read, strict=True):
                forward(made[step.model].eval(), step, faked(batch, tokens), device)
        most = live.most - weights
        if sharded:
            most += max(map(gathered_at_once, made.values()))
        return {name: size_of(model) for name, model in made.items()}, most


@contextlib.contextmanager
def experts_by_shape() -> Iterator[None]:
    """Let mixtures of experts multiply by transformers' own grouped operation inside this context.

    It computes shapes in every dtype; torch's operation does so only in bfloat16.
    """
    from transformers.integrations import moe

    kept = getattr(moe, "_can_use_grouped_mm", None)
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        if kept is not None:
            moe._can_use_grouped_mm = kept


def make(
    config: Any, name: str, adapter: AdapterSettings, checkpointing: bool, attention: str, packed: bool
) -> nn.Module:
    """Return a model without memory, as it trains.

    Args:
        config: transformers' configuration of the model.
        name: "policy", "reward_model" or "value_model".
        adapter: How adapters are trained.
        checkpointing: Whether activations are recomputed in the backward pass.
        attention: `model.attn_implementation`.
        packed: Whether rows are packed.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.initialization import no_init_weights

    scalar = name in ("reward_model", "value_model")
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    config = copy.deepcopy(config)
    config.num_labels = 1
    trust = {"trust_remote_code": is_remote(config)}  # the flag was given when its configuration was loaded
    options = trust | {"dtype": torch.float32, "attn_implementation": "eager" if attention == "eager" else "sdpa"}
    with no_init_weights(), torch.device("meta"):
        if scalar and not is_remote(config) and not has_family_class(config):
            own = scalar_class(weightless_causal(config))
            model = own._from_config(config, **{key: x for key, x in options.items() if key not in trust})
        else:
            model = kind.from_config(config, **options)
        name_trunk(without_dropout(model))
        forget_remote_classes(kind)
        if packed:
            register(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        assume_soft_prompt(model.config, adapter.soft_prompt)
        model = with_adapter(model, adapter, scalar=scalar)
    return model.train()


def head_is_linear(model: nn.Module) -> bool:
    """Return whether a model's logits are only a matrix product, by its settings.

    `stages/models/forward.py` tries it instead, which takes numbers.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    names = ("logits_scaling", "logit_scale", "lm_head_multiplier", "final_logit_softcapping", "logits_soft_cap")
    scaled = [getattr(config, name, None) for name in names]
    return type(head) is nn.Linear and head.bias is None and all(x in (None, 1.0) for x in scaled)


def forward(model: nn.Module, step: Step, batch: Any, device: str) -> Tensor:
    """Compute the loss's input as `stages/models/forward.py` does.

    That module finds the positions to read by the numbers in a mask, which fake tensors do not
    have.

    Args:
        model: The model.
        step: The micro-batch.
        batch: Its rows, from `faked`.
        device: "cpu", "cuda" or "mps".
    """
    inner, words = unwrapped(model), step.head in ("text", "logits", "logprobs")
    if step.width:
        inputs, read = {"input_ids": batch[:, :-1], "use_cache": False}, batch[:, 1:].flatten()
        places = torch.empty(read.shape, dtype=torch.long)
    else:
        rows, read = batch
        options = trunk_options(rows)
        if "packing" in options:  # a GPU gathers rows, but fake tensors claim to be on a CPU
            options["packing"].__dict__["short"] = device != "cpu" or options["packing"].short
        inputs, places = {"input_ids": rows.input_ids, **options}, rows.last if step.head == "scores" else read
    if step.head == "logits" or (words and not head_is_linear(inner)):
        return token_logprobs(model(**inputs).logits.flatten(0, 1).index_select(0, places).float(), read)
    hidden = inner.base_model(**inputs).last_hidden_state.flatten(0, 1).index_select(0, places)
    if words:
        return head_logprobs(hidden, inner.get_output_embeddings().weight, read, chunk=CHUNK[device])[0]
    with torch.autocast("cpu", enabled=False):
        return score_head(inner)(hidden.float())


def laid_out(step: Step, packed: bool) -> Rows | Tensor:
    """Return the rows of a micro-batch, with real numbers."""
    if step.width:
        return torch.zeros(step.rows, step.width, dtype=torch.long)
    prompts = [[i] * n for i, (n, responses) in enumerate(step.lengths) for _ in responses]
    return make_rows(prompts, [[0] * n for _, responses in step.lengths for n in responses], 0, packed=packed)


def faked(batch: Rows | Tensor, tokens: int | None) -> Tensor | tuple[Rows, Tensor]:
    """Return the same shapes without numbers; for Rows also a position for each response token."""

    def empty(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype)

    if isinstance(batch, Tensor):
        return empty(batch)
    parts = {f.name: empty(x) for f in fields(batch) if isinstance(x := getattr(batch, f.name), Tensor)}
    return replace(batch, **parts), torch.empty(tokens, dtype=torch.long)


def gathered_at_once(model: nn.Module) -> int:
    """Return the bytes of whole weights that a sharded model holds at once during a pass.

    They are the weights outside its layers, of one layer, and of the next one.
    """
    layers = list(map(size_of, decoder_layers(unwrapped(model))))
    return size_of(model) - sum(layers) + 2 * max(layers)


def frozen_size(model: nn.Module, dtype: str) -> int:
    """Return the bytes of a model if no weight trained and none were quantized."""
    whole = castable(model) if dtype != "float32" else []
    packed = [layer for layer in model.modules() if isinstance(layer, Quantized)]
    held = sum(p.nbytes for layer in packed for name, p in layer.named_parameters() if name != "bias")
    floats = sum(layer.in_features * layer.out_features * WIDTH[dtype] for layer in packed)
    return size_of(model) - sum(p.nbytes // 2 for p in whole if p.dtype == torch.float32) - held + floats


def size_of(model: nn.Module) -> int:
    """Return the bytes of a model's weights."""
    return sum(p.nbytes for p in model.parameters())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings of peft and torch about tensors without numbers."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

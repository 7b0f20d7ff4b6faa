"""Put trained keys and values before every text, in all layers of a model (prefix tuning).

Li & Liang 2021; without the MLP it is P-tuning v2 (Liu 2022). The prefix lives in the model: a hook
on the trunk computes it at each pass, and attention (stages/models/packing.py) reads it before the
keys and values of the text. So rows of every kind work, padded, packed or decoded with a cache,
which itself never holds the prefix. Texts begin at position n, behind the n prefix tokens, as in
peft: its PrefixTuning computes the same from the same numbers.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

NAME = "prefix"  # of the encoder inside the trunk
ATTENTION = "sdpa_behind_prefix"  # transformers' name for `packed_attention` where rows are not packed
WORKS_WITH = ("sdpa", ATTENTION)


@dataclass(frozen=True)
class PrefixShape:
    """State the shape of a prefix."""

    tokens: int
    """Prefix tokens n."""
    layers: int
    """Layers L."""
    heads: int
    """Heads of keys and values H."""
    head_size: int
    """Numbers a head D."""

    @property
    def width(self) -> int:
        """Numbers a prefix token: keys and values of all layers."""
        return self.layers * 2 * self.heads * self.head_size


class CurrentPrefix:
    """Hold the keys and values that the trunk's hook has computed for the pass at hand."""

    def __init__(self) -> None:
        self.values: Tensor | None = None  # (L, 2, H, n, D)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CurrentPrefix":
        """Return an empty one, which the modules of a copied model share."""
        return memo.setdefault(id(self), CurrentPrefix())

    def __reduce__(self) -> tuple[type["CurrentPrefix"], tuple]:
        """Travel empty to another process: every pass computes its own."""
        return CurrentPrefix, ()


def add_prefix(
    model: nn.Module, tokens: int, *, projection: bool = False, hidden_size: int | None = None, seed: int = 0
) -> None:
    """Add a new prefix to a model.

    Without the MLP it starts as the keys and values of ordinary tokens (Li & Liang, section 7.4),
    with it at random.

    Args:
        model: A transformers model without a prefix; changed.
        tokens: Prefix tokens n.
        projection: Whether an MLP computes it from n vectors while it trains.
        hidden_size: Width of the MLP; None: the width of the keys of a layer, as in peft.
        seed: Of the random weights.

    Raises:
        UserError: The family's attention does not take a prefix.
    """
    from stages.models.families import ordinary_ids

    ids = torch.tensor([ordinary_ids(model.config, tokens + 3)], device=model.get_input_embeddings().weight.device)
    shape, flat = keys_and_values(model, ids[:, :tokens])
    with torch.no_grad():
        expected = None if flat.is_meta else hidden_states(model, ids)[:, tokens:]  # meta: only sizes are asked for
    set_prefix(model, shape, flat)
    if expected is not None and not reads_prefix(model, ids[:, tokens:], expected):
        raise UserError(
            f"model.peft.method: prefix_tuning does not fit this {model.config.model_type} model, which computes "
            f"something else behind given keys and values than behind the tokens they are of; use lora"
        )
    if projection:
        torch.manual_seed(seed)
        encoder = encoder_of(shape, projection=True, hidden_size=hidden_size)
        setattr(model.base_model, NAME, encoder.to(flat.device, torch.float32))


@torch.enable_grad()
def reads_prefix(model: nn.Module, ids: Tensor, expected: Tensor) -> bool:
    """Return whether a model computes what is expected behind its prefix, and all layers read it.

    Args:
        model: A model with a prefix that is not computed by an MLP.
        ids: (1, T), the text.
        expected: (1, T, d), the text's hidden states behind the tokens that the prefix is of.
    """
    found, weight = hidden_states(model, ids), model.base_model.prefix.embedding.weight
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().mean())):
        return False
    shape = prefix_shape(model)
    assert shape is not None
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(found)
    (gradient,) = torch.autograd.grad((found * probe).sum(), weight, allow_unused=True, materialize_grads=True)
    by_layer = gradient.unflatten(1, (shape.layers, 2, -1))[:, :, 1]  # of the values
    return bool((by_layer.abs().amax((0, 2)) > 0).all())


def set_prefix(model: nn.Module, shape: PrefixShape, flat: Tensor) -> None:
    """Give a model a prefix of known values, and an attention that reads it.

    Args:
        model: A transformers model without a prefix; changed.
        shape: Its shape.
        flat: (n, 2·L·H·D), in peft's order.

    Raises:
        UserError: The model's attention kernel is not sdpa, or its trunk cannot have a hook.
    """
    from stages.models.packing import NAME as PACKED
    from stages.models.packing import register

    kernel = getattr(model.config, "_attn_implementation", None)
    if kernel not in (*WORKS_WITH, PACKED):
        raise UserError(
            f"model.attn_implementation: {kernel} cannot read the keys and values of a prefix (prefix_tuning); use sdpa"
        )
    if kernel == "sdpa":
        register(model, ATTENTION)
    encoder = encoder_of(shape, projection=False)
    encoder.embedding.weight = nn.Parameter(flat.detach().clone())
    trunk, current = model.base_model, CurrentPrefix()
    trunk.add_module(NAME, encoder)
    trunk.prefix_shape, trunk.current_prefix = shape, current
    for module in trunk.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.prefix_of_layer = (current, module.layer_idx)
    trunk.register_forward_pre_hook(_compute_prefix, with_kwargs=True)
    if not flat.is_meta:
        with torch.no_grad(), contextlib.suppress(RuntimeError):  # a layer found no prefix
            model(input_ids=torch.ones(1, 1, dtype=torch.long, device=flat.device), use_cache=False)
        if current.values is None:
            raise UserError(
                f"model.peft.method: prefix_tuning does not fit this {model.config.model_type} model, which does not "
                f"call its trunk as a whole; use lora"
            )


def encoder_of(shape: PrefixShape, *, projection: bool, hidden_size: int | None = None) -> nn.Module:
    """Return peft's encoder of a prefix.

    Args:
        shape: The prefix's shape.
        projection: Whether it is an MLP on n vectors; otherwise it is the values themselves.
        hidden_size: As of `add_prefix`.
    """
    from peft.tuners.prefix_tuning import PrefixEncoder

    return PrefixEncoder(peft_config(shape, projection=projection, hidden_size=hidden_size))


def peft_config(shape: PrefixShape, *, projection: bool, hidden_size: int | None = None, **options: Any) -> Any:
    """Return peft's configuration of a prefix.

    Args:
        shape: The prefix's shape.
        projection: As of `encoder_of`.
        hidden_size: As of `add_prefix`.
        options: More of PrefixTuningConfig's.
    """
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        num_virtual_tokens=shape.tokens,
        num_layers=shape.layers,
        num_attention_heads=shape.heads,
        token_dim=shape.heads * shape.head_size,
        num_transformer_submodules=1,
        encoder_hidden_size=hidden_size or shape.heads * shape.head_size,
        prefix_projection=projection,
        **options,
    )


def prefix_shape(model: nn.Module) -> PrefixShape | None:
    """Return the shape of a model's prefix; None without one."""
    return getattr(model.base_model, "prefix_shape", None)


def flat_prefix(model: nn.Module) -> Tensor:
    """Return a model's prefix as it is now, (n, 2·L·H·D), in peft's order."""
    trunk = model.base_model
    return trunk.prefix(torch.arange(trunk.prefix_shape.tokens, device=trunk.prefix.embedding.weight.device))


@torch.no_grad()
def keys_and_values(model: nn.Module, ids: Tensor) -> tuple[PrefixShape, Tensor]:
    """Compute the keys and values of tokens at the beginning of a text.

    Args:
        model: A transformers model.
        ids: (1, n).

    Returns:
        Their shape, and the numbers (n, 2·L·H·D) in the order of peft's prefix.

    Raises:
        UserError: The model has layers without keys and values, or with several shapes of them.
    """
    from transformers import DynamicCache

    from stages.models.families import cache_name

    cache = DynamicCache()
    name = cache_name(model.base_model) or "past_key_values"  # a trunk may pass it on by **kwargs
    try:
        model.base_model(input_ids=ids, use_cache=True, **{name: cache})
        parts = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        stacked = torch.cat(parts).unflatten(0, (-1, 2))  # (L, 2, H, n, D)
    except (ValueError, TypeError, AttributeError, RuntimeError, LookupError) as error:
        raise UserError(
            f"model.peft.method: prefix_tuning needs keys and values of one shape in every layer, which this "
            f"{model.config.model_type} model does not have; use lora"
        ) from error
    layers, _, heads, tokens, head_size = stacked.shape
    flat = stacked.permute(3, 0, 1, 2, 4).flatten(1).float()
    return PrefixShape(tokens, layers, heads, head_size), flat.contiguous()


def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the trunk's last hidden states (1, T, d) of one row."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def before(module: nn.Module, key: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the prefix's keys and values that a layer reads before those of the text.

    Args:
        module: The attention layer.
        key: The text's keys (B, H, T, D).

    Returns:
        Keys and values (B, H, n, D) in the dtype of `key`; None without a prefix.
    """
    current, layer = getattr(module, "prefix_of_layer", (None, 0))
    if current is None:
        return None
    if current.values is None:
        raise RuntimeError("the trunk's hook has computed no prefix for this pass")
    keys, values = current.values[layer].to(key.dtype).unsqueeze(1).expand(-1, len(key), -1, -1, -1)
    return keys, values


def seen_behind(mask: Tensor | None, query: Tensor, key: Tensor, tokens: int) -> Tensor | None:
    """Return an attention mask whose first columns are a prefix that every token sees.

    Args:
        mask: (B, 1, T, S) of the text, boolean or added to scores; None: causal.
        query: (B, H, T, D).
        key: (B, H, S, D) of the text.
        tokens: Prefix tokens n.

    Returns:
        (B, 1, T, n + S); None if a single token sees everything.
    """
    T, S = query.shape[2], key.shape[2]
    if mask is None:
        if T == 1:
            return None
        return torch.ones(T, tokens + S, dtype=torch.bool, device=query.device).tril(tokens + S - T)[None, None]
    seen = torch.ones if mask.dtype == torch.bool else torch.zeros
    front = seen(*mask.shape[:-1], tokens, dtype=mask.dtype, device=mask.device)
    return torch.cat([front, mask], dim=-1)


def _compute_prefix(trunk: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Compute the prefix for a pass and move the text's positions behind it, as a pre-hook."""
    shape = trunk.prefix_shape
    numbers = torch.arange(shape.tokens, device=trunk.prefix.embedding.weight.device)
    flat = trunk.prefix(numbers).view(shape.tokens, shape.layers, 2, shape.heads, shape.head_size)
    trunk.current_prefix.values = flat.permute(1, 2, 3, 0, 4)
    positions = kwargs.get("position_ids")
    if positions is None:
        text = args[0] if args else kwargs.get("input_ids")
        text = kwargs["inputs_embeds"] if text is None else text
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        start = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(start, start + text.shape[1], device=text.device).unsqueeze(0)
    return args, kwargs | {"position_ids": positions + shape.tokens}

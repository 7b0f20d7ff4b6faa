"""Apply parameter-efficient tuning: wrap a model, choose what trains, share the trunk, merge.

LoRA (Hu 2021), DoRA (Liu 2024), AdaLoRA (Zhang 2023) and IA³ (Liu 2022) are adapters of peft. QLoRA
(Dettmers 2023) is LoRA on a quantized model. BitFit (Ben Zaken 2021) trains the model's own biases.
Prompt tuning and P-tuning train rows of its embedding (`soft_prompts.py`).
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.launch.parallel import is_rank_zero
from stages.models.adapter_folder import IN_PLACE, adapter_parameters, method_in
from stages.models.bottleneck import FORMS, add_bottlenecks, bottleneck_shape, shape_of
from stages.models.ensemble import members
from stages.models.loading import load_scalar_model, new_reward_model, scalar_config, score_head, without_dropout
from stages.models.prefix import add_prefix, prefix_shape
from stages.models.principal import restore_start, start_from, write_as_lora
from stages.models.publish import edit_json, save_model
from stages.models.quantized import dequantize, quantize
from stages.models.soft_prompts import SoftPrompt, merge_soft_prompt, train_soft_prompt
from stages.models.targets import Choice, layer_options, modules_in_full, trains_ends, trains_tied

TRAINS_ROWS = ("lora", "dora", "qlora")  # methods that can train single rows of embedding and head
FOLDER = "adapter"  # beside the merged weights of a published model


@dataclass(frozen=True)
class AdapterSettings:
    """Choose which weights train, and how: the values of the section model.peft."""

    method: str | None = None
    """None: every weight trains; "bitfit": the biases; otherwise peft's adapter of that name."""
    r: int = 16
    """Rank of LoRA, DoRA and QLoRA; of AdaLoRA the mean rank that is left at the end."""
    lora_alpha: int = 32
    """Scale of an adapter's output, divided by the rank."""
    lora_dropout: float = 0.0
    """Dropout on an adapter's input; used by sft only."""
    target_modules: str | list[str] = "all-linear"
    """Ends of the names of layers that get an adapter, a regular expression, or "all-linear"."""
    init_r: int | None = None
    """AdaLoRA's rank at the start; None: 1.5 · r, rounded up."""
    bits: int | None = None
    """Bits per frozen weight, 4 or 8, for QLoRA; None for other methods."""
    bottleneck_size: int | None = None
    """Units of a bottleneck adapter; None: the model's width over 16."""
    bottleneck_activation: str | None = None
    """Nonlinearity of a bottleneck adapter; None: that of the method's paper."""
    bottleneck_scale: float | None = None
    """Factor of a bottleneck adapter's output; None: that of the method's paper."""
    num_virtual_tokens: int = 20
    """Prefix tokens of prefix tuning."""
    prefix_projection: bool = False
    """Whether an MLP computes the prefix while it trains."""
    encoder_hidden_size: int | None = None
    """Width of that MLP; None: the width of the keys of a layer."""
    soft_prompt: SoftPrompt | None = None
    """The soft prompt of prompt tuning and P-tuning; None for other methods."""
    exclude_modules: str | list[str] | None = None
    """Layers that get no adapter, in the notation of target_modules."""
    layers_to_transform: list[int] | None = None
    """Indices of the decoder layers that get adapters; None: all."""
    modules_to_save: tuple[str, ...] = ()
    """Names or ends of names of modules that train in full."""
    use_rslora: bool = False
    """Whether the scale is divided by the rank's square root instead of the rank."""
    start: str | None = None
    """What LoRA starts from, "pissa" or "olora" (`principal.py`); None: it starts at 0."""


def with_adapter(
    model: nn.Module,
    settings: AdapterSettings,
    *,
    scalar: bool = False,
    seed: int = 0,
    dropout: bool = False,
    new_tokens: Sequence[int] = (),
    exact: bool = False,
) -> nn.Module:
    """Choose what trains of a model and wrap it in an adapter where the method is one.

    Args:
        model: A transformers model; it is changed.
        settings: The method and its values.
        scalar: Whether it is a reward or value model, whose head always trains in full.
        seed: Seed of the adapter's random weights.
        dropout: Whether lora_dropout is used; only sft does, since PPO's ratios need log-probs
            that repeat.
        new_tokens: Ids whose rows in the embedding and the head train too.
        exact: Whether the model has to begin with the numbers that it has without a new adapter, as
            a policy whose reference that is.

    Returns:
        The model itself (all weights, its biases, its soft prompt, or an adapter that stays in it
        train) or a PeftModel, in eval mode.

    Raises:
        UserError: The method does not fit this model.
    """
    if settings.method is None:
        model.requires_grad_(True)
        return model
    if settings.method in IN_PLACE:
        return with_adapter_in_place(model, settings, scalar=scalar, seed=seed, exact=exact)
    if settings.soft_prompt is not None:
        train_soft_prompt(model, settings.soft_prompt, seed, list(score_head(model).parameters()) if scalar else [])
        return model.eval()
    config = adapter_config(model, settings, scalar=scalar, new_tokens=new_tokens)
    if config is None:
        return model
    from peft import get_peft_model

    torch.manual_seed(seed)  # adapters start with random A matrices
    try:
        model = get_peft_model(model, config)
    except TypeError as error:  # an adapter in a module that trains in full
        raise UserError(f"model.peft.modules_to_save: {' '.join(str(error).split())[:300]}") from error
    except ValueError as error:  # no layer of that name, or of a kind the method does not support
        raise UserError(f"model.peft.target_modules: {' '.join(str(error).split())[:300]}") from error
    refuse_tied(unwrapped(model))
    if getattr(config, "ensure_weight_tying", False):
        refuse_untied(unwrapped(model))
    if settings.start is not None:
        start_from(model, settings.start)
    if getattr(config, "trainable_token_indices", None):
        check_token_rows(unwrapped(model))
    return (model if dropout else without_dropout(model)).eval()


def with_adapter_in_place(
    model: nn.Module, settings: AdapterSettings, *, scalar: bool, seed: int, exact: bool
) -> nn.Module:
    """Let only an adapter that stays in the model train, and the scalar head.

    A model that an earlier stage gave such an adapter goes on with it; otherwise it gets a new one.

    Args:
        model: A transformers model; changed.
        settings: The method, one of IN_PLACE, and its values.
        scalar: As of `with_adapter`.
        seed: As of `with_adapter`.
        exact: As of `with_adapter`.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: The model has an adapter of another method or shape, or cannot have this one.
    """
    method = settings.method
    assert method is not None
    found = method_in(model)
    if found is None and method == "prefix_tuning":
        if exact:
            raise UserError(
                "model.peft.method: prefix_tuning begins away from the model that it is put before, so the policy "
                "would not begin as its reference; train sft with prefix_tuning too, or use another method here"
            )
        options = {"projection": settings.prefix_projection, "hidden_size": settings.encoder_hidden_size}
        add_prefix(model, settings.num_virtual_tokens, seed=seed, **options)
    elif found is None:
        torch.manual_seed(seed)
        add_bottlenecks(model, bottleneck_shape_of(model, settings))
    elif found != method:
        raise UserError(
            f"model.peft.method: {method} on a model that an earlier stage gave {found}; go on with {found}, or train "
            f"all weights (null)"
        )
    else:
        check_same_shape(model, settings)
    model.requires_grad_(False)
    for p in [*adapter_parameters(model).values(), *(score_head(model).parameters() if scalar else ())]:
        p.requires_grad_(True)
    return model.eval()


def bottleneck_shape_of(model: nn.Module, settings: AdapterSettings) -> Any:
    """Return the shape of the bottleneck adapters that the settings ask for."""
    assert settings.method in FORMS
    values = (settings.bottleneck_size, settings.bottleneck_activation, settings.bottleneck_scale)
    return shape_of(model, settings.method, *values)


def check_same_shape(model: nn.Module, settings: AdapterSettings) -> None:
    """Check that the adapter in a model is the one that the settings describe.

    Args:
        model: A model with an adapter that stays in it.
        settings: The method, which is the adapter's, and its values.

    Raises:
        UserError: It has another shape.
    """
    prefix, bottleneck = prefix_shape(model), bottleneck_shape(model)
    if prefix is not None and prefix.tokens != settings.num_virtual_tokens:
        raise UserError(
            f"model.peft.num_virtual_tokens: {settings.num_virtual_tokens}, but the model that this stage starts from "
            f"has a prefix of {prefix.tokens} tokens, which trains on; use {prefix.tokens}"
        )
    if bottleneck is not None and bottleneck != (wanted := bottleneck_shape_of(model, settings)):
        keys = ("size", "activation", "scale")
        key = next(key for key in keys if getattr(bottleneck, key) != getattr(wanted, key))
        has = getattr(bottleneck, key)
        raise UserError(
            f"model.peft.bottleneck_{key}: {getattr(wanted, key)}, but the adapters of the model that this stage "
            f"starts from have {has} and train on; use {has}"
        )


def refuse_tied(inner: nn.Module) -> None:
    """Refuse an adapter on an embedding that is also the head: merging it would change both.

    Args:
        inner: The transformers model inside the adapted one.

    Raises:
        UserError: There is such an adapter.
    """
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    if None not in ends and inner.config.tie_word_embeddings and any(map(has_adapter, ends)):
        raise UserError(
            f"model.peft.target_modules: names the embedding or the head of this {inner.config.model_type} model, and "
            f"both are one weight; leave it out"
        )


def refuse_untied(inner: nn.Module) -> None:
    """Refuse a model whose embedding and head were one weight and train apart now.

    peft knows the names of the two in most families, not in all.

    Args:
        inner: The transformers model inside the adapted one.

    Raises:
        UserError: They are two weights.
    """
    if inner.get_input_embeddings().weight is not inner.get_output_embeddings().weight:
        raise UserError(
            f"model.peft.modules_to_save: embedding and head of this {inner.config.model_type} model are one weight, "
            f"and peft would train two; leave them out, or train all weights (model.peft: null)"
        )


def refuse_untrained(new_tokens: Sequence[int], method: str | None, tokenizer: Any) -> None:
    """Refuse a method that would leave the random rows of new tokens untrained.

    Args:
        new_tokens: Ids whose rows `base` added.
        method: model.peft.method; None if every weight trains.
        tokenizer: Gives the tokens' names.

    Raises:
        UserError: There are new tokens, and the method cannot train single rows.
    """
    if new_tokens and method not in (None, *TRAINS_ROWS):
        tokens = ", ".join(tokenizer.convert_ids_to_tokens(list(new_tokens)[:8]))
        if len(new_tokens) > 8:
            tokens += ", …"
        raise UserError(
            f"model.peft.method: {method} cannot train the new rows of {tokens}, which start random; use "
            f"{', '.join(TRAINS_ROWS)}, or train all weights (model.peft: null)"
        )


def token_rows(inner: nn.Module, new_tokens: Sequence[int], saved: Sequence[str] = ()) -> dict[str, list[int]] | None:
    """Return peft's `trainable_token_indices` for the embedding and the head of a causal model.

    Args:
        inner: The causal model.
        new_tokens: Ids whose rows should train.
        saved: Whole names of the modules that train in full, and so with these rows.

    Returns:
        Name of a layer: the ids; None without new tokens, or where all rows train anyway.
    """
    if not new_tokens:
        return None
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    if ends[1] is None or ends[1].weight is ends[0].weight:  # tied: peft ties the two adapters
        ends = ends[:1]
    names = {id(module): name for name, module in inner.named_modules()}
    return {names[id(end)]: list(new_tokens) for end in ends if names[id(end)] not in saved} or None


def trains_token_rows(model: nn.Module) -> bool:
    """Return whether rows of the embedding or the head train: single ones (`token_rows`) or all."""
    if not is_adapted(model):
        return False
    ends = (unwrapped(model).get_input_embeddings(), unwrapped(model).get_output_embeddings())
    return any(hasattr(end, "token_adapter") or hasattr(end, "modules_to_save") for end in ends)


@torch.no_grad()
def check_token_rows(inner: nn.Module) -> None:
    """Check that embedding and head compute the same with trainable rows as without them.

    peft does not support a head with a bias, nor every way of scaling an embedding. The rows have
    not been trained yet, so the results have to be equal.

    Args:
        inner: The transformers model inside the adapted one.

    Raises:
        UserError: They differ.
    """
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    ids = torch.arange(min(4, inner.config.get_text_config().vocab_size), device=embedding.weight.device)
    hidden = torch.randn(4, head.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(head.weight)
    for end, x in ((embedding, ids), (head, hidden)):
        if hasattr(end, "modules_to_save"):  # trains in full
            continue
        try:
            same = hasattr(end, "token_adapter") and torch.equal(end(x), end.token_adapter.get_base_layer()(x))
        except ValueError:  # the layer also has an adapter
            same = False
        if not same:
            raise UserError(
                f"model.peft.method: the tokenizer has tokens without a row in the model, and peft cannot train "
                f"single rows in the {'embedding' if end is embedding else 'head'} of this {inner.config.model_type} "
                f"model; train all weights (model.peft: null)"
            )


def load_on_trunk(
    folder: Path,
    *,
    trunk: Path | None,
    bits: int | None = None,
    trains: bool = False,
    trust_remote_code: bool = False,
    start: AdapterSettings | None = None,
    **options: Any,
) -> nn.Module:
    """Load a reward model as an adapter on the model that rm started from.

    Reward and value model can then share that trunk. Without an adapter in the folder, or if the
    trunk is not known, load the merged weights.

    Args:
        folder: Of the reward model.
        trunk: Folder of the model that rm started from; None: not known.
        bits: Bits per weight that rm quantized the trunk to; None: it did not.
        trains: Whether adapter and head continue to train.
        trust_remote_code: Whether code that the model brings may run.
        start: How the adapter was trained, if it was LoRA with a start and continues to train.
        options: More options of `load_scalar_model`.
    """
    from peft import PeftModel

    options["trust_remote_code"] = trust_remote_code
    if trunk is None or not (folder / FOLDER).is_dir():
        return load_scalar_model(folder, **options)
    bias = scalar_config(folder, trust_remote_code=trust_remote_code).reward_bias
    model = new_reward_model(trunk, seed=0, **options)  # the head comes with the adapter
    model.config.reward_bias = bias
    if bits is not None:
        quantize(model, bits)
    where = {"is_trainable": trains, "torch_device": "cpu"}
    model = PeftModel.from_pretrained(model, str(folder / FOLDER), **where)
    if start is not None:
        restore_start(model, start.r, start.lora_alpha / (start.r**0.5 if start.use_rslora else start.r))
    return without_dropout(model).eval()


def adapter_config(
    model: nn.Module, settings: AdapterSettings, *, scalar: bool = False, new_tokens: Sequence[int] = ()
) -> Any:
    """Return peft's configuration of an adapter, and prepare the model for it.

    For QLoRA the model's linear layers are quantized here. BitFit needs no configuration: here its
    biases are chosen to train.

    Args:
        model: A transformers model; it may be changed.
        settings: The method and its values; the method is not None.
        scalar: As of `with_adapter`.
        new_tokens: As of `with_adapter`.

    Returns:
        A peft configuration, or None for BitFit.
    """
    from peft import AdaLoraConfig, IA3Config, LoraConfig, TaskType
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_LAYERS

    method = settings.method
    saved = modules_in_full(model, settings.modules_to_save, scalar)
    options: dict[str, Any] = {
        "task_type": TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM,
        "modules_to_save": ["score", *saved] if scalar else saved or None,
    }
    if method == "bitfit":
        train_biases(model, list(score_head(model).parameters()) if scalar else [])
        return None
    if method == "ia3":
        if model.config.model_type not in IA3_LAYERS:
            raise UserError(f"model.peft.method: peft has no ia3 for a {model.config.model_type} model; use lora")
        if not scalar and trains_tied(model, saved):
            raise UserError(
                "model.peft.modules_to_save: embedding and head are one weight in this model, and ia3 cannot train it "
                "whole; use lora"
            )
        return IA3Config(**options)  # keys, values and feed-forward layers, by peft's names
    options["lora_alpha"] = settings.lora_alpha
    options["lora_dropout"] = settings.lora_dropout
    options["ensure_weight_tying"] = not scalar and trains_tied(model, saved)
    choice = Choice(settings.target_modules, settings.exclude_modules, settings.layers_to_transform)
    options |= layer_options(model, choice, scalar)
    if method == "adalora":
        # peft's own penalty and schedule are switched off (0 and 1 step): the optimizer of
        # stages/models/adalora.py does both.
        first_rank = settings.init_r or math.ceil(1.5 * settings.r)
        return AdaLoraConfig(init_r=first_rank, target_r=settings.r, orth_reg_weight=0.0, total_step=1, **options)
    assert method in ("lora", "dora", "qlora")
    if method == "qlora":
        assert settings.bits is not None
        quantize(model, settings.bits, saved)
    rows = token_rows(model, [] if trains_ends(model, saved) else new_tokens, saved)
    if settings.use_rslora:
        options["use_rslora"] = True
    return LoraConfig(r=settings.r, use_dora=method == "dora", trainable_token_indices=rows, **options)


def train_biases(model: nn.Module, head: list[nn.Parameter]) -> None:
    """Let only the biases and the given head parameters train.

    Args:
        model: The model; changed.
        head: Parameters of the scalar head; empty for a policy.

    Raises:
        UserError: The model has no bias, as Llama.
    """
    model.requires_grad_(False)
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    if not biases:
        raise UserError(
            f"model.peft.method: bitfit trains biases, and this {model.config.model_type} model has none; use lora"
        )
    for p in biases + head:
        p.requires_grad_(True)


def is_adapted(model: nn.Module) -> bool:
    """Return whether a model is a PeftModel."""
    return hasattr(model, "merge_and_unload")


def has_adapter(module: nn.Module) -> bool:
    """Return whether a layer has an adapter of peft."""
    return hasattr(module, "get_base_layer") and hasattr(module, "merge")


def merge_adapter(model: nn.Module) -> nn.Module:
    """Return a plain transformers model with the adapter merged into its weights.

    This ends the adapter, so call it after training. A quantized model is first dequantized to the
    weights that it computed with. Weights that other models share stay as they are. A copy without
    weights (`sharding.publishable` on other ranks) has nothing to merge.
    """
    if not next(model.parameters()).numel():
        return unwrapped(model)
    if not is_adapted(model):
        return merge_soft_prompt(model)
    dequantize(model)
    return model.merge_and_unload(safe_merge=True)


def name_of_base(source: Path, adapter: Path) -> str:
    """Return the name of an adapter's base model for adapter_config.json.

    peft resolves a path from the working directory. Artifacts inside it, the default, are named
    relative to it, so that AutoPeftModel finds the base. Others are named relative to the adapter's
    folder, which holds wherever both are moved together. An absolute path would hold on this
    machine only.

    Args:
        source: Folder of the base model.
        adapter: Folder of the adapter.
    """
    here = Path.cwd()
    start = here if source.resolve().is_relative_to(here) else adapter
    return os.path.relpath(source, start).replace(os.sep, "/")


def save_adapter(model: nn.Module, folder: Path, base: tuple[str, str | None] = ("", None)) -> None:
    """Write the adapter and scalar head of an adapted model to folder/adapter, in peft's format.

    Other models have none; nothing is written for them.

    Args:
        model: The model.
        folder: Folder of the published model.
        base: (Hub id or path, commit of a Hub id) of the adapter's base model; "" if it has no
            name.
    """
    if not is_adapted(model) or not is_rank_zero():
        return
    for config in model.peft_config.values():
        config.base_model_name_or_path = ""  # otherwise peft would look there for the vocabulary, even on the Hub
        for name, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, name, sorted(value))  # a set has no stable order
    model.save_pretrained(folder / FOLDER)
    write_as_lora(model, folder / FOLDER)
    name, revision = base
    named = {"base_model_name_or_path": name, "revision": revision}
    edit_json(folder / FOLDER / "adapter_config.json", lambda config: config | named)
    (folder / FOLDER / "README.md").unlink(missing_ok=True)  # the card of the model says more


def save_merged(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    card: str,
    base: tuple[str, str | None] = ("", None),
    **options: Any,
) -> None:
    """Publish the merged weights, which transformers alone can load, and the adapter beside them.

    Merging happens on the CPU, where the model then stays: it takes memory for one more trunk,
    which a GPU may not have.

    Args:
        model: The model, adapted or not.
        tokenizer: Its tokenizer.
        folder: Where to write.
        card: Text of README.md.
        base: As of `save_adapter`.
        options: More options of `save_model`.
    """
    if is_rank_zero():
        save_adapter(model, folder, base)
        save_model(merge_adapter(model.cpu()), tokenizer, folder, card=card, **options)


def share_frozen(model: nn.Module, others: list, same: Callable[[Tensor, Tensor], bool] = torch.equal) -> None:
    """Let frozen weights of a model share memory with equal ones of other models.

    Args:
        model: The model; changed.
        others: Models whose weights it may share.
        same: Compares two tensors of the same device, dtype and shape; bit by bit by default.
    """
    known: dict[str, list[nn.Parameter]] = {}
    for other in others:
        for name, p in _frozen(other):
            known.setdefault(name, []).append(p)
    for name, p in _frozen(model):
        for q in known.get(name, ()):
            if (p.device, p.dtype, p.shape) == (q.device, q.dtype, q.shape) and same(p, q):
                p.data = q.data
                break


def _frozen(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield frozen parameters under their names in the unwrapped model."""
    for member in members(model):
        for name, p in unwrapped(member).named_parameters():
            if not p.requires_grad:
                yield plain_name(name), p


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """Turn an adapted model into its own base while the context lasts.

    This gives the reference policy without memory of its own.
    """
    with model.disable_adapter():
        yield model


def plain_name(name: str) -> str:
    """Return the name that a frozen weight of an adapted model has in the model itself."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PeftModel; adapters in its layers stay active."""
    return model.get_base_model() if is_adapted(model) else model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train by name, in a fixed order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}

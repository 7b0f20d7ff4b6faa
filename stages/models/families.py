"""Know how families of models differ where it matters to the stages.

That is: what is not a causal language model, the name of a cache, routers of mixtures of experts,
and the scalar head that a family may not have. What a model's numbers can tell is tried out
(stages/rollouts/trial.py) and not looked up in a list of names.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError

CAUSAL = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "WithLMHead")  # ends of class names
HEAD_FILE = "scalar_head.py"
SCALAR = "AutoModelForSequenceClassification"
WHOLE_ROWS = "samples_whole_rows"  # in config.json, true: sample without a cache, which does not work
ROUTERS = "output_router_logits"
ROUTING = (ROUTERS, "router_aux_loss_coef")  # set by trl's trainer for a mixture of experts
REMEDY = "take a causal language model (Llama, Qwen, Mistral, Gemma, GPT-2 …)"


def refuse_kind(config: Any, name: str) -> None:
    """Refuse a model that is not a causal language model, before any weight is read.

    Args:
        config: transformers' configuration of the model.
        name: The model, for the error line.

    Raises:
        UserError: It is an encoder-decoder, or transformers has no causal language model of its
            type.
    """
    from transformers import AutoModelForCausalLM

    kind = (getattr(config, "architectures", None) or [f"{config.model_type} model"])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model.name_or_path: {name} holds a {kind}, an encoder-decoder; {REMEDY}")
    brings = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not brings and type(config) not in AutoModelForCausalLM._model_mapping:
        problem = f"and transformers has no causal language model of type {config.model_type}"
        raise UserError(f"model.name_or_path: {name} holds a {kind}, {problem}; {REMEDY}")


def name_trunk(model: nn.Module) -> None:
    """Let `model.base_model` be the trunk even if the class names one that it does not have.

    Llama 4 does so.
    """
    from transformers import PreTrainedModel

    if model.base_model is not model or model.get_output_embeddings() is None:
        return
    inside = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(inside) == 1:
        model.base_model_prefix = inside[0]


def cache_name(model: nn.Module) -> str | None:
    """Return the name of the argument by which a model takes transformers' Cache, or None.

    It is `cache` since transformers 5.24, and `past_key_values` before and in models' own code.
    """
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), None)


@contextmanager
def off_the_gpu(model: nn.Module) -> Iterator[None]:
    """Use sdpa while the context lasts, if the model's attention runs on a GPU only.

    So a model with flash_attention_2 can be tried on the CPU, where it was loaded.
    """
    kernel = getattr(model.config, "_attn_implementation", None)
    if kernel is None or "flash" not in kernel:
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(kernel)


def ordinary_ids(config: Any, count: int) -> list[int]:
    """Return token ids for trying a model.

    They are spread over the first four fifths of the vocabulary, since rows at its end may never
    have been trained, and none of them has a meaning in the configuration (padding, ends).

    Args:
        config: Of the model.
        count: How many.
    """
    text, special = config.get_text_config(), set()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id", "decoder_start_token_id"):
        given = getattr(text, name, None)
        special.update(given if isinstance(given, (list, tuple)) else [given])
    size = getattr(text, "vocab_size", None) or 64
    spread = [int(0.8 * size * (i + 1) / (count + 1)) for i in range(count)]
    return [next((i for i in range(at, size) if i not in special), at) for at in spread]


# ── Mixtures of experts ──────────────────────────────────────────────────────────────────────────


def config_parts(config: Any) -> list:
    """Return a configuration and, if there is one, that of the language model inside it."""
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def silence_routers(model: nn.Module) -> None:
    """Turn off the output of routers' logits.

    They serve the term that balances experts, which fails if a batch is not the padded rows of a
    training step. The original flag is kept for publication (`original_routers`).
    """
    if "given_routers" not in model.__dict__:
        model.__dict__["given_routers"] = [getattr(part, ROUTERS, None) for part in config_parts(model.config)]
    for part in config_parts(model.config):
        if getattr(part, ROUTERS, None):
            setattr(part, ROUTERS, False)


@contextmanager
def original_routers(model: nn.Module) -> Iterator[None]:
    """Restore the original flag for routers' logits while the context lasts, for saving."""
    given = model.__dict__.get("given_routers", [])
    for part, flag in zip(config_parts(model.config), given, strict=False):
        if flag:
            setattr(part, ROUTERS, flag)
    try:
        yield
    finally:
        for part, flag in zip(config_parts(model.config), given, strict=False):
            if flag:
                setattr(part, ROUTERS, False)


@contextmanager
def routing_restored(config: Any) -> Iterator[None]:
    """Restore the settings in ROUTING when the context ends."""
    kept = [
        (part, name, getattr(part, name)) for part in config_parts(config) for name in ROUTING if hasattr(part, name)
    ]
    try:
        yield
    finally:
        for part, name, value in kept:
            setattr(part, name, value)


def has_routers(config: Any) -> bool:
    """Return whether transformers can compute the load-balancing term of a model."""
    text = config.get_text_config()
    return all(hasattr(text, name) for name in (ROUTERS, "num_experts", "num_experts_per_tok"))


# ── Scalar heads ─────────────────────────────────────────────────────────────────────────────────


def has_family_class(config: Any) -> bool:
    """Return whether transformers itself has a sequence classification for a configuration.

    Code that came with a model may have registered another class for it; that does not count.
    """
    from transformers import AutoModelForSequenceClassification

    mapping = AutoModelForSequenceClassification._model_mapping
    if type(config) not in mapping:
        return False
    kinds = mapping[type(config)]
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    return kind.__module__.startswith("transformers.models.")


def scalar_class(causal: nn.Module) -> type:
    """Return our class of reward models on the trunk of a causal model of transformers.

    It is `ScalarHead` on the family's pretrained class.

    Args:
        causal: Such a model; its weights are not read.
    """
    kinds = (parent_of(causal), type(causal.config), type(causal.base_model))
    return make_scalar_class(scalar_name(type(causal)), *kinds, causal.base_model_prefix)


@lru_cache
def make_scalar_class(name: str, parent: type, config_class: type, trunk: type, prefix: str) -> type:
    """Return a class of reward models.

    A model of it is pickled by these arguments, since no module of another process contains the
    class.

    Args:
        name: Of the class.
        parent: The family's pretrained class.
        config_class: Of its configuration.
        trunk: Class of its trunk.
        prefix: Its attribute that holds the trunk.
    """
    from stages.models.scalar_head import ScalarHead

    def described(model: nn.Module, protocol: int) -> tuple:
        return blank_scalar, (name, parent, config_class, trunk, prefix), model.__dict__

    parts = {
        "__module__": __name__,
        "__reduce_ex__": described,
        "config_class": config_class,
        "base_model_prefix": prefix,
        "trunk_class": trunk,
        "trunk_options": trunk_options_of(trunk),
    }
    return type(name, (ScalarHead, parent), parts)


def blank_scalar(*parts: Any) -> nn.Module:
    """Return an empty model of `make_scalar_class(*parts)`, for unpickling."""
    kind = make_scalar_class(*parts)
    return kind.__new__(kind)


def trunk_options_of(trunk: type) -> dict:
    """Return arguments that leave out weights which the causal model lacks (BERT's pooler)."""
    known = inspect.signature(trunk.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in known else {}


def parent_of(causal: nn.Module) -> type:
    """Return the pretrained class that a causal model and its trunk have in common."""
    from transformers import PreTrainedModel

    trunk = causal.base_model
    return next(c for c in type(causal).__mro__ if issubclass(c, PreTrainedModel) and isinstance(trunk, c))


def scalar_name(causal: type) -> str:
    """Return the name of our class of reward models for a causal class."""
    name = causal.__name__
    for end in CAUSAL:
        name = name.removesuffix(end)
    return f"{name}ForSequenceClassification"


def weightless_causal(config: Any) -> nn.Module:
    """Return the causal model of a configuration of transformers on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    name_trunk(model)
    return model


def is_own_head(model_or_class: nn.Module | type) -> bool:
    """Return whether the class of a reward model is one of `scalar_class`."""
    kind = model_or_class if isinstance(model_or_class, type) else type(model_or_class)
    return kind.__module__ == __name__


def names_own_head(config: Any, folder: Path) -> bool:
    """Return whether a folder holds a reward model with our head on a family of transformers.

    Then its class is built here, and no file of the folder is run.

    Args:
        config: The configuration in the folder.
        folder: The folder.
    """
    named = (getattr(config, "auto_map", None) or {}).get(SCALAR, "")
    if not type(config).__module__.startswith("transformers.models."):
        return False
    file = Path(folder) / HEAD_FILE
    if named.rpartition(".")[0] != HEAD_FILE.removesuffix(".py"):
        return False
    return not file.is_file() or file.read_text(encoding="utf-8").startswith(head_source().splitlines()[0])


def head_source() -> str:
    """Return the source of scalar_head.py."""
    return Path(__file__).with_name(HEAD_FILE).read_text(encoding="utf-8")


def head_text(
    name: str, trunk: type, parent: type, config_class: type, prefix: str, module_of: Callable[[type], str]
) -> str:
    """Return the text of the file scalar_head.py of a published folder.

    Args:
        name: Of the class of reward models.
        trunk: Class of the trunk.
        parent: The family's pretrained class.
        config_class: Of the configuration.
        prefix: The attribute that holds the trunk.
        module_of: Returns how the file names the module of a class.
    """
    imports = sorted({f"from {module_of(c)} import {c.__name__}" for c in (trunk, parent, config_class)})
    options = trunk_options_of(trunk)
    return (
        f"{head_source()}\n\n"
        + "".join(f"{line}  # noqa: E402\n" for line in imports)
        + f"\n\nclass {name}(ScalarHead, {parent.__name__}):\n"
        f'    """A scalar head on a {trunk.__name__}."""\n\n'
        f"    config_class = {config_class.__name__}\n"
        f'    base_model_prefix = "{prefix}"\n'
        f"    trunk_class = {trunk.__name__}\n"
        f"    trunk_options = {options}\n"
    )


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the scalar head of a reward model; None if its class has none of the known names."""
    return getattr(model, "score", None) or getattr(model, "classifier", None)


def head_problem(model: nn.Module) -> str | None:
    """Return why the logit of a reward model is not what the stages train and read, or None.

    They read the head on the trunk's hidden state at the last token. A short row is tried, in the
    way that the model card shows: no padding, no mask.
    """
    head = head_of(model)
    if not isinstance(head, nn.Linear):
        return f"{type(model).__name__} has no linear head `score`"
    if model.base_model is model:
        return f"{type(model).__name__} names no trunk (base_model_prefix)"
    ids = torch.tensor([ordinary_ids(model.config, 5)], device=head.weight.device)
    try:
        with torch.no_grad(), off_the_gpu(model):
            logits = model(input_ids=ids).logits
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            expected = head(states.to(head.weight.dtype))[:, -1]
    except Exception as error:  # code of any kind
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    # Weights that are not finite are another fault, which the scores will show: hence equal_nan.
    if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=1e-3, atol=1e-4, equal_nan=True):
        return f"{type(model).__name__} computes more, or at another token, than a head on the last hidden state"
    return None


def family_problem(model: nn.Module) -> str | None:
    """Return why a causal model of transformers cannot be made a reward model, or None if it can.

    The family's class is tried, then ours, on the model's own trunk; no other memory is used.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels = 1
    if has_family_class(config):
        with torch.device("meta"):
            scalar = AutoModelForSequenceClassification.from_config(config)
        same = scalar.base_model_prefix == model.base_model_prefix and isinstance(
            scalar.base_model, type(model.base_model)
        )
        if same and head_problem(graft(scalar, model.base_model)) is None:
            return None
    try:
        with torch.device("meta"):
            scalar = scalar_class(model)._from_config(config)  # accepts a dtype that is still a name
    except Exception as error:  # a trunk's constructor may ask for anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return head_problem(graft(scalar, model.base_model))


def graft(scalar: nn.Module, trunk: nn.Module) -> nn.Module:
    """Put a reward model from the meta device on a trunk with weights.

    Its other weights become random. The trunk is shared.

    Args:
        scalar: The reward model; changed.
        trunk: The trunk; it keeps its mode.

    Returns:
        The reward model, in eval mode.
    """
    setattr(scalar, scalar.base_model_prefix, trunk)
    generator = torch.Generator().manual_seed(0)
    for module in [m for name, m in scalar.named_children() if m is not trunk]:
        module.to_empty(device=trunk.device).to(trunk.dtype)
        for p in module.parameters():
            shape = p.shape
            p.data = (torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5).to(p.device, p.dtype)
    training = trunk.training
    scalar.eval()
    trunk.train(training)
    return scalar

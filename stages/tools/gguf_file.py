"""Write a published policy as a GGUF file, which llama.cpp, Ollama and LM Studio read.

The format and the names of tensors are those of the package gguf. llama.cpp's own conversion is a
script that no package keeps; this writes the few families whose result a test holds to the model's
logits, and names the script for all others.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from data.tokenizer import CHAT_TEMPLATE
from pipeline.errors import UserError

INSTEAD = "run llama.cpp's convert_hf_to_gguf.py on this folder instead"
FAMILIES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}
"""Class of the model in transformers → its family in GGUF."""
TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
BLOCK = 32
"""Numbers that Q8_0 holds with one scale: rows of another length stay in f16."""
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""How Llama 3 splits text; Qwen2 takes digits one by one."""
SPLITS = {LLAMA_SPLIT: "llama-bpe", LLAMA_SPLIT.replace("{1,3}", ""): "qwen2"}
CONTENT = "{{ m['content'] }}"
SPACE = "{% if m['content'] and not m['content'].startswith(' ') %} {% endif %}"
"""The space that the tokenizer of models from scratch adds to a text, and llama.cpp does not."""
SPACE_NOTE = "put a space before each text that you give without the chat template: the model was trained so"


def write(folder: Path, output: Path, name: str, dtype: str) -> list[str]:
    """Write a model to a GGUF file, one tensor after the other.

    Args:
        folder: Folder with config, safetensors and tokenizer.
        output: File to write.
        name: Name of the model, for people.
        dtype: How matrices are held, a key of TYPES; vectors are float32.

    Returns:
        Lines for whoever uses the file.

    Raises:
        UserError: The model is of a kind that is not written here.
    """
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    arch = family_of(config, folder)
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(name)
    writer.add_file_type(TYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, config)
    notes = add_tokenizer(writer, config, tokenizer, folder)
    tensors = tensors_in(folder)
    names = gguf_names(tensors, arch, config, folder)
    with_types = {}
    for given, place in tensors.items():
        with safe_open(place, framework="pt") as file:
            shape = file.get_slice(given).get_shape()
        kind = type_of(shape, dtype)
        size = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(names[given], size, np.dtype(np.uint8), int(np.prod(size)), raw_dtype=kind)
        with_types[given] = kind
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for given, place in tensors.items():
        with safe_open(place, framework="pt") as file:
            values = file.get_tensor(given).to(torch.float32).numpy()
        values = permuted(values, given, config) if arch == gguf.MODEL_ARCH.LLAMA else values
        writer.write_tensor_data(gguf.quants.quantize(values, with_types[given]).view(np.uint8))
    writer.close()
    return notes


def family_of(config: Any, folder: Path) -> gguf.MODEL_ARCH:
    """Return the family of a model in GGUF.

    Raises:
        UserError: It is of another family, or has a part that the family's file has no place for.
    """
    kind = (config.architectures or ["a model without a class"])[0]
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        remedy = "export a policy" if kind.endswith("ForSequenceClassification") else INSTEAD
        raise UserError(f"{folder}: is {kind}, and GGUF is written here for policies of {known}; {remedy}")
    rope, wrong = config.rope_parameters or {}, []
    if rope.get("rope_type", "default") != "default":
        wrong.append(f"rope_type {rope['rope_type']}")
    if config.hidden_act != "silu":
        wrong.append(f"hidden_act {config.hidden_act}")
    if getattr(config, "sliding_window", None) is not None:
        wrong.append("a sliding window")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        wrong.append("biases")
    if getattr(config, "quantization_config", None) is not None:
        wrong.append("quantized weights")
    if wrong:
        raise UserError(f"{folder}: has {' and '.join(wrong)}, which is not written here; {INSTEAD}")
    return FAMILIES[kind]


def add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write what the model's config says of its shape."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


# -- tensors -------------------------------------------------------------------------------------


def tensors_in(folder: Path) -> dict[str, Path]:
    """Return {name: file} of all tensors of a folder."""
    places = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), path))
    return places


def gguf_names(tensors: dict[str, Path], arch: gguf.MODEL_ARCH, config: Any, folder: Path) -> dict[str, str]:
    """Return the name of each tensor in GGUF.

    Raises:
        UserError: The family has no place for one of them.
    """
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    names = {given: table.get_name(given, try_suffixes=(".weight", ".bias")) for given in tensors}
    if unknown := [given for given, name in names.items() if name is None]:
        raise UserError(f"{folder}: GGUF has no place for {unknown[0]}; {INSTEAD}")
    return {given: name for given, name in names.items() if name is not None}


def type_of(shape: list[int], dtype: str) -> gguf.GGMLQuantizationType:
    """Return how a tensor is held: matrices as asked, vectors in float32."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if dtype == "q8_0" and shape[-1] % BLOCK:
        return gguf.GGMLQuantizationType.F16
    return TYPES[dtype][0]


def permuted(values: np.ndarray, name: str, config: Any) -> np.ndarray:
    """Return the rows of a query or key matrix as llama.cpp rotates them.

    transformers rotates the two halves of a head against each other, llama.cpp neighbouring rows.

    Args:
        values: The matrix, (heads · head_dim, hidden), or any other tensor, which stays as it is.
        name: Its name in transformers.
        config: The model's config.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


# -- tokenizer -----------------------------------------------------------------------------------


def add_tokenizer(writer: gguf.GGUFWriter, config: Any, tokenizer: Any, folder: Path) -> list[str]:
    """Write the tokenizer and the chat template; return lines for whoever uses the file.

    Raises:
        UserError: llama.cpp would split texts otherwise than the model was trained on.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no tokenizer.json; {INSTEAD}")
    content = json.loads(path.read_text(encoding="utf-8"))
    split, adds_space = how_it_splits(content, folder)
    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([pieces.get(index, f"[PAD{index}]") for index in range(config.vocab_size)])
    writer.add_token_types([kind_of(index, pieces, added) for index in range(config.vocab_size)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]])
    for token_id, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    first = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)
    notes = []
    template = tokenizer.chat_template
    if adds_space:
        if template != CHAT_TEMPLATE:
            raise UserError(f"{folder}: its tokenizer puts a space before texts, which llama.cpp does not; {INSTEAD}")
        template = template.replace(CONTENT, SPACE + CONTENT)
        notes.append(SPACE_NOTE)
    if isinstance(template, str):
        writer.add_chat_template(template)
    unread = sorted(
        {*(getattr(config, "soft_prompt_ids", None) or ()), *(getattr(config, "control_token_ids", None) or ())}
    )
    if unread:
        notes.append(f"give these tokens a bias of -100, so that they are never answered: {unread}")
    return notes


def how_it_splits(content: dict[str, Any], folder: Path) -> tuple[str, bool]:
    """Return llama.cpp's name for how a tokenizer splits texts, and whether it adds a space before.

    Args:
        content: The tokenizer.json.
        folder: Where it is.

    Raises:
        UserError: It is no byte-level BPE, or splits in a way that has no name here.
    """
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    name = None
    if content["model"]["type"] != "BPE" or kinds[-1:] != ["ByteLevel"] or content["model"].get("byte_fallback"):
        pass
    elif kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        name = SPLITS.get(steps[0]["pattern"].get("Regex"))
    normalizer = (content["normalizer"] or {}).get("type")
    normalizes = normalizer not in ((None, "NFC") if name == "qwen2" else (None,))
    merges_alike = bool(content["model"].get("ignore_merges")) == (name == "llama-bpe")
    if name is None or normalizes or not merges_alike:
        raise UserError(f"{folder}: its tokenizer splits texts in a way that is not written here; {INSTEAD}")
    return name, bool(steps[-1].get("add_prefix_space"))


def kind_of(index: int, pieces: dict[int, str], added: dict[int, Any]) -> gguf.TokenType:
    """Return the kind of a token: of the vocabulary, special, added, or a row without a token."""
    if index not in pieces:
        return gguf.TokenType.UNUSED
    if index not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED

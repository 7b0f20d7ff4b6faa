"""A model and its tokenizer → a folder that transformers loads, the release before the installed one included.

transformers 5 names some things anew in the files that it writes, and transformers 4 then refuses them (the class of a
tokenizer) or takes a default for them in silence (the base of rotary positions). Both names are written here.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.launch.parallel import is_rank_zero
from stages.models.families import as_given
from stages.models.remote_code import is_remote, keep_code, read

# The old names of what `rope_parameters` holds, where they are not rope_theta and partial_rotary_factor.
ROPE_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
# Kinds with other positions in layers of another type, that transformers 4 knows: old names of the base of
# full_attention and of sliding_attention (None: one name for both).
ROPE_NAMES_BY_LAYER = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", None),
}
LONGROPE_KEYS = {"phi3": ("short_factor", "long_factor"), "phi4_multimodal": ("short_factor", "long_factor")}
OF_THIS_MACHINE = ("is_local", "local_files_only", "name_or_path", "cache_dir", "_commit_hash")


def save_model(
    model, tokenizer, folder: Path, *, card: str, temperature: float | None = None, dtype: str | None = None
) -> None:
    """Write a folder that transformers alone can load: safetensors, tokenizer, chat template, generation config, card,
    and the code that the model brings, if any. Of several processes the first one writes it.

    Args:
        model: a transformers model; it stays as it is, but for the ids of special tokens in its config.
        tokenizer: its tokenizer.
        folder: where to; made if it is not there.
        card: the text of README.md.
        temperature: of a policy, what it was trained to be sampled at: `generate` then samples so. None: the sampling
            settings that the model was given with stay, if they are valid.
        dtype: what the weights are rounded to, as "bfloat16"; None: they are written as they are.
    """
    if not is_rank_zero():
        return
    folder.mkdir(parents=True, exist_ok=True)
    keep_code(model, tokenizer, folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.use_cache = True
    weights = None if dtype is None else rounded(model, getattr(torch, dtype))
    with generating(model, generation_config(model, tokenizer, temperature)), as_given(model):
        model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
    model.config.use_cache = False
    tokenizer.save_pretrained(folder)
    if weights is not None:
        edit_json(folder / "config.json", lambda config: with_dtype(config, dtype))
    write_old_positions(model, folder)
    facts = (pre_tokenizer_of(folder), added_by(tokenizer))
    edit_json(folder / "tokenizer_config.json", lambda config: portable_tokenizer(config, *facts))
    (folder / "README.md").write_text(card, encoding="utf-8")


def edit_json(path: Path, change) -> None:
    """Replace the JSON object in a file by change(it); nothing where the file is missing."""
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(change(before), indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


# -- weights ---------------------------------------------------------------------------------------------


def rounded(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the model's state with its floating-point parameters in `dtype`.

    Buffers stay, and so do parameters that the model's class keeps in float32. Tensors that share memory still do, so
    that tied weights are written once.
    """
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    copies: dict[tuple, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        if name in parameters and tensor.is_floating_point() and not kept & {*name.split(".")}:
            memory = (tensor.data_ptr(), tensor.shape)
            if memory not in copies:
                copies[memory] = tensor.to(dtype)
            tensor = copies[memory]
        state[name] = tensor
    return state


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json, sub-configs included, that says which dtype the weights are in."""
    changed = {key: with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}


@dataclass(frozen=True)
class Given:
    """What is known of the files of a given model. dtype: of its weights, None for float32 or where nothing says it;
    rows: of its embedding, None where they are not known."""

    dtype: str | None
    rows: int | None


def given_model(name: str, *, revision: str | None, trust_remote_code: bool) -> Given:
    """Return what the files of `model.name_or_path` say of its weights, before anything was converted."""
    from transformers import AutoConfig

    if name.startswith("package:"):  # a gguf file: its weights were dequantized
        return Given(None, None)
    folder = Path(name).expanduser()
    place = str(folder) if folder.is_dir() else name
    options = {} if revision is None else {"revision": revision}
    config = read(AutoConfig, place, trust_remote_code=trust_remote_code, **options)
    text = config.get_text_config()
    named = str(config.dtype or text.dtype or (dtype_of_files(folder) if folder.is_dir() else None))
    dtype = named.removeprefix("torch.")
    return Given(dtype if dtype in ("bfloat16", "float16") else None, getattr(text, "vocab_size", None))


def dtype_of_files(folder: Path) -> str | None:
    """The dtype of most numbers in a folder's safetensors files, where that is a half-sized one."""
    from safetensors import safe_open

    numbers: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(key)
                numbers[part.get_dtype()] += math.prod(part.get_shape())
    most = numbers.most_common(1)
    return {"BF16": "bfloat16", "F16": "float16"}.get(most[0][0]) if most else None


def dtype_of_folder(folder: Path) -> str | None:
    """Return the dtype that a published folder's weights are in, as its config.json says; None for float32, or where
    it says nothing."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = (config, config.get("text_config") or {})
    named = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)
    return named if named in ("bfloat16", "float16") else None


# -- generation ------------------------------------------------------------------------------------------


@contextmanager
def generating(model, config) -> Iterator[None]:
    """Inside, the model has this generation config (None: what it has)."""
    held = getattr(model, "generation_config", None)
    if config is not None:
        model.generation_config = config
    try:
        yield
    finally:
        if config is not None:
            model.generation_config = held


def generation_config(model, tokenizer, temperature: float | None):
    """Return the generation config to publish with a model; None for one that generates nothing.

    Args:
        model: with the generation config that it was given with, which may be invalid.
        tokenizer: whose EOS ends an answer and whose pad token fills rows.
        temperature: of a policy: it is sampled at this temperature from all tokens, without processors. None: the
            settings that the model was given with, as far as they are valid.

    Returns:
        One that is valid. Tokens that ended a text for the given model still do, behind the tokenizer's EOS.
    """
    from transformers import GenerationConfig

    given = getattr(model, "generation_config", None)
    if given is None or not model.can_generate():
        return None
    bos = next((id for id in (given.bos_token_id, model.config.bos_token_id, tokenizer.bos_token_id) if id is not None),
               None)  # fmt: skip
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": bos}
    ids["eos_token_id"] = end_tokens(tokenizer.eos_token_id, given.eos_token_id)
    if temperature is None:
        plain = {key: value for key, value in given.to_diff_dict().items() if not key.startswith("_")}
        kept = GenerationConfig(**{**plain, **ids})
        return kept if is_valid(kept) else GenerationConfig(**ids)
    return GenerationConfig(**ids, do_sample=True, temperature=float(temperature), top_k=0, top_p=1.0)


def end_tokens(own: int, given: int | list[int] | None) -> int | list[int]:
    """The id of the tokenizer's EOS, and behind it the other ids that ended a text for the given model; one id alone
    is no list."""
    others = given if isinstance(given, list) else [given]
    ids = list(dict.fromkeys([own, *(id for id in others if isinstance(id, int))]))
    return ids if len(ids) > 1 else own


def is_valid(config) -> bool:
    """Whether transformers saves a generation config (it refuses sampling settings beside greedy decoding)."""
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


# -- names of both releases ------------------------------------------------------------------------------


def pre_tokenizer_of(folder: Path) -> dict[str, Any]:
    """The pre-tokenizer that a published tokenizer.json names; {} without one."""
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("pre_tokenizer") if path.is_file() else None
    return found or {}


def added_by(tokenizer) -> dict[str, bool]:
    """Whether a tokenizer puts BOS in front of a text, and EOS behind it: its class's own flags, where it has them."""
    flags = {"add_bos_token": tokenizer.bos_token_id, "add_eos_token": tokenizer.eos_token_id}
    ids = tokenizer("a")["input_ids"]
    ends = {"add_bos_token": ids[:1], "add_eos_token": ids[-1:]}
    return {flag: ends[flag] == [id] for flag, id in flags.items() if id is not None and hasattr(tokenizer, flag)}


def portable_tokenizer(config: dict[str, Any], pre_tokenizer: dict[str, Any], added: dict[str, bool]) -> dict[str, Any]:
    """Return a tokenizer_config.json that transformers 4 reads too, without what is true of this machine alone.

    Args:
        config: tokenizer_config.json as transformers 5 writes it.
        pre_tokenizer: that of tokenizer.json.
        added: as of `added_by`. Some classes of transformers 4 put BOS in front unless they are told not to, whatever
            tokenizer.json says; the generic one goes by that.
    """
    config = {key: value for key, value in config.items() if key not in OF_THIS_MACHINE}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 expects a mapping here
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if isinstance(pre_tokenizer.get("add_prefix_space"), bool):  # else transformers 4 sets it to false
        config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    return config if config.get("tokenizer_class") == "PreTrainedTokenizerFast" else config | added


def write_old_positions(model, folder: Path) -> None:
    """Write the rotary positions of config.json under transformers 4's names too.

    They stay unwritten where the installed transformers would then read something else, where transformers 4 could not
    say them, and where a model brings its own configuration class, which has names of its own.
    """
    from transformers import AutoConfig

    if is_remote(model.config):
        return
    path = folder / "config.json"
    before = path.read_text(encoding="utf-8")
    edit_json(path, with_old_positions)
    if path.read_text(encoding="utf-8") == before:
        return
    try:
        same = positions_of(AutoConfig.from_pretrained(folder)) == positions_of(model.config)
    except Exception:  # a configuration class may refuse the old names in any way
        same = False
    if not same:
        path.write_text(before, encoding="utf-8")


def positions_of(config) -> list[tuple[str, Any]]:
    """(where, rope_parameters) of a configuration and the configurations inside it."""
    found: list[tuple[str, Any]] = []

    def look(part: dict, where: str) -> None:
        if isinstance(rope := part.get("rope_parameters"), dict):
            found.append((where, {key: value for key, value in rope.items() if key != "type"}))  # rope_type's old name
        for key, value in sorted(part.items()):
            if isinstance(value, dict) and key != "rope_parameters":
                look(value, f"{where}.{key}")

    look(config.to_dict(), "")
    return found


def with_old_positions(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with transformers 4's names beside every `rope_parameters`."""
    config = {
        key: with_old_positions(value) if isinstance(value, dict) and key != "rope_parameters" else value
        for key, value in config.items()
    }
    rope = config.get("rope_parameters")
    return config | old_positions(rope, config) if isinstance(rope, dict) else config


def old_positions(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers 4 would have in the place of `rope_parameters`.

    Args:
        rope: rope_parameters, of all layers or by type of layer.
        config: the configuration that holds them; its model_type decides on names.

    Returns:
        Keys beside `rope_parameters`; none where transformers 4 has no names for them.
    """
    kind = config.get("model_type", "")
    if "rope_theta" in rope:
        names = ROPE_NAMES.get(kind, {})
        old = {names.get(key, key): rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        scaling = old_scaling(rope, kind)
        if scaling is not None and "original_max_position_embeddings" in rope and kind in LONGROPE_KEYS:
            old["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        return old | {"rope_scaling": scaling}
    full, sliding = (rope.get(f"{layers}_attention") for layers in ("full", "sliding"))
    if kind not in ROPE_NAMES_BY_LAYER or full is None or sliding is None:
        return {}
    name, sliding_name = ROPE_NAMES_BY_LAYER[kind]
    scaling = old_scaling(full, kind)
    scaled_alike = kind.startswith("modernbert")  # which has no scaling
    can_say = old_scaling(sliding, kind) is None and not (scaled_alike and scaling is not None)
    if not can_say or (sliding_name is None and sliding["rope_theta"] != full["rope_theta"]):
        return {}
    old = {name: full["rope_theta"]} | ({} if sliding_name is None else {sliding_name: sliding["rope_theta"]})
    return old if scaled_alike else old | {"rope_scaling": scaling}


def old_scaling(rope: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """transformers 4's `rope_scaling` of the positions of a layer; None for plain ones."""
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if {*scaling} <= {"rope_type", "type"} and scaling.get("rope_type", "default") == "default":
        return None
    if kind in LONGROPE_KEYS and scaling.get("rope_type") == "longrope":  # these two take exactly three keys
        return {"type": "longrope", **{key: scaling[key] for key in LONGROPE_KEYS[kind]}}
    return scaling

"""Write a model and its tokenizer to a folder that transformers 5 and 4 load.

transformers 5 has new names for some entries of its files. transformers 4 refuses some of them (the
class of a tokenizer) and silently takes a default for others (the base of rotary positions). Both
names are written here.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.launch.parallel import is_rank_zero
from stages.models.adapter_folder import BASE, method_in, without_adapter, write_adapter
from stages.models.families import original_routers
from stages.models.remote_code import from_pretrained, is_remote, keep_code
from stages.models.soft_prompts import unanswered_ids

# Old names of the entries of `rope_parameters` that are not rope_theta and partial_rotary_factor.
ROPE_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
# Model types of transformers 4 whose positions depend on the type of a layer: old names of the base
# of full_attention and of sliding_attention (None: one name for both).
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
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    card: str,
    temperature: float | None = None,
    dtype: str | None = None,
    name_of_weights: str = BASE,
) -> None:
    """Write a folder that transformers can load by itself.

    It has safetensors, tokenizer, chat template, generation config, card, and the code that the
    model brings, if any. With an adapter that stays in the model, the weights are in base/
    (`adapter_folder`). Only rank 0 writes.

    Args:
        model: A transformers model; unchanged, except for the ids of special tokens in its config.
        tokenizer: Its tokenizer.
        folder: Where to write; created if it does not exist.
        card: Text of README.md.
        temperature: Of a policy, the sampling temperature that it was trained at; `generate` then
            uses it. None: the model's original sampling settings are kept, if they are valid.
        dtype: What weights are rounded to, "bfloat16" or "float16"; None: they are not rounded.
            Weights of an adapter that stays in the model never are.
        name_of_weights: What the adapter_config.json of such an adapter calls base/.
    """
    if not is_rank_zero():
        return
    has_adapter = method_in(model) is not None
    inside = folder / BASE if has_adapter else folder
    inside.mkdir(parents=True, exist_ok=True)
    keep_code(model, tokenizer, inside)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.use_cache = True
    weights = None if dtype is None else rounded(model, getattr(torch, dtype))
    if has_adapter:
        weights = without_adapter(model, model.state_dict() if weights is None else weights)
    with given_generation_config(model, generation_config(model, tokenizer, temperature)), original_routers(model):
        model.save_pretrained(inside, **({} if weights is None else {"state_dict": weights}))
    model.config.use_cache = False
    tokenizer.save_pretrained(folder)
    if dtype is not None:
        edit_json(inside / "config.json", lambda config: with_dtype(config, dtype))
    write_old_positions(model, inside)
    if has_adapter:
        write_adapter(model, folder, name_of_weights)
    facts = (pre_tokenizer_of(folder), added_by(tokenizer))
    edit_json(folder / "tokenizer_config.json", lambda config: portable_tokenizer(config, *facts))
    (folder / "README.md").write_text(card, encoding="utf-8")


def edit_json(path: Path, change: Callable[[dict], dict]) -> None:
    """Replace the JSON object in a file, if the file exists.

    Args:
        path: The file.
        change: Returns the new object, given the old one.
    """
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(change(before), indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────


def rounded(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the model's state with its floating-point parameters in another dtype.

    Buffers keep theirs, as do parameters that the model's class keeps in float32, and the head of a
    reward or value model: it is small, and all of a score's digits depend on it. Tensors that share
    memory still do, so that tied weights are written once.

    Args:
        model: Unchanged.
        dtype: The dtype.

    Raises:
        UserError: A weight is too large for float16.
    """
    kept = {"score", *(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    copies: dict[tuple, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        if name in parameters and tensor.is_floating_point() and not kept & {*name.split(".")}:
            memory = (tensor.data_ptr(), tensor.shape)
            if memory not in copies:
                copies[memory] = tensor.to(dtype)
                if not copies[memory].isfinite().all() and tensor.isfinite().all():
                    raise UserError(
                        f"model.publish_dtype: float16 ends at 65504, and {name} reaches {tensor.abs().max():.3g}; set "
                        f"bfloat16, or float32"
                    )
            tensor = copies[memory]
        state[name] = tensor
    return state


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config.json, including the configs in it, that names another dtype."""
    changed = {key: with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}


@dataclass(frozen=True)
class Given:
    """Describe the weights of the original model, as far as its files state it."""

    dtype: str | None
    """Their dtype; None for float32, or if nothing says it."""
    rows: int | None
    """Rows of the embedding; None if they are not known."""


def given_model(name: str, *, revision: str | None, trust_remote_code: bool) -> Given:
    """Return what the files of `model.name_or_path` say about its weights.

    Args:
        name: A folder, a Hub id, or `package:NAME`.
        revision: Commit of a Hub id.
        trust_remote_code: Whether code that the model brings may run.
    """
    from transformers import AutoConfig

    if name.startswith("package:"):  # a gguf file, whose weights are dequantized
        return Given(None, None)
    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    options = {} if revision is None else {"revision": revision}
    config = from_pretrained(AutoConfig, source, trust_remote_code=trust_remote_code, **options)
    text = config.get_text_config()
    named = str(config.dtype or text.dtype or (dtype_of_files(folder) if folder.is_dir() else None))
    dtype = named.removeprefix("torch.")
    return Given(dtype if dtype in ("bfloat16", "float16") else None, getattr(text, "vocab_size", None))


def dtype_of_files(folder: Path) -> str | None:
    """Return the dtype of most numbers in a folder's safetensors files, if it is a 16-bit one."""
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
    """Return the dtype that a published folder's config.json names; None for float32 or none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = (config, config.get("text_config") or {})
    named = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)
    return named if named in ("bfloat16", "float16") else None


# ── Generation ───────────────────────────────────────────────────────────────────────────────────


@contextmanager
def given_generation_config(model: nn.Module, config: Any) -> Iterator[None]:
    """Give the model another generation config while the context lasts (None: its own)."""
    held = getattr(model, "generation_config", None)
    if config is not None:
        model.generation_config = config
    try:
        yield
    finally:
        if config is not None:
            model.generation_config = held


def generation_config(model: nn.Module, tokenizer: Any, temperature: float | None) -> Any:
    """Return the generation config to publish with a model; None if it does not generate.

    Args:
        model: It has its original generation config, which may be invalid.
        tokenizer: Its EOS ends an answer, and its pad token pads rows.
        temperature: Of a policy: sample at this temperature from all tokens, without processors.
            None: keep the original settings as far as they are valid.

    Returns:
        A valid config. Tokens that ended a text in the original config still do, after the
        tokenizer's EOS.
    """
    from transformers import GenerationConfig

    given = getattr(model, "generation_config", None)
    if given is None or not model.can_generate():
        return None
    bos = next((id for id in (given.bos_token_id, model.config.bos_token_id, tokenizer.bos_token_id) if id is not None),
               None)  # fmt: skip
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": bos}
    ids["eos_token_id"] = end_tokens(tokenizer.eos_token_id, given.eos_token_id)
    if unanswered := unanswered_ids(model):
        ids["suppress_tokens"] = unanswered
    if temperature is None:
        settings = {key: value for key, value in given.to_diff_dict().items() if not key.startswith("_")}
        kept = GenerationConfig(**{**settings, **ids})
        return kept if is_valid(kept) else GenerationConfig(**ids)
    return GenerationConfig(**ids, do_sample=True, temperature=float(temperature), top_k=0, top_p=1.0)


def end_tokens(own: int, given: int | list[int] | None) -> int | list[int]:
    """Return the id of EOS followed by the other ids that ended a text in the original model.

    Args:
        own: The tokenizer's EOS.
        given: The original ids.

    Returns:
        A list, or a single id.
    """
    others = given if isinstance(given, list) else [given]
    ids = list(dict.fromkeys([own, *(id for id in others if isinstance(id, int))]))
    return ids if len(ids) > 1 else own


def is_valid(config: Any) -> bool:
    """Return whether transformers would save a generation config.

    It refuses sampling settings together with greedy decoding.
    """
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


# ── Names of both releases ───────────────────────────────────────────────────────────────────────


def pre_tokenizer_of(folder: Path) -> dict[str, Any]:
    """Return the pre-tokenizer in a published tokenizer.json; {} if there is none."""
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("pre_tokenizer") if path.is_file() else None
    return found or {}


def added_by(tokenizer: Any) -> dict[str, bool]:
    """Return whether a tokenizer adds BOS before a text, and EOS after it.

    The keys are its class's own flags; flags that the class does not have are left out.
    """
    flags = {"add_bos_token": tokenizer.bos_token_id, "add_eos_token": tokenizer.eos_token_id}
    ids = tokenizer("a")["input_ids"]
    ends = {"add_bos_token": ids[:1], "add_eos_token": ids[-1:]}
    return {flag: ends[flag] == [id] for flag, id in flags.items() if id is not None and hasattr(tokenizer, flag)}


def portable_tokenizer(config: dict[str, Any], pre_tokenizer: dict[str, Any], added: dict[str, bool]) -> dict[str, Any]:
    """Return a tokenizer_config.json for transformers 4 too, without values of this machine only.

    Args:
        config: tokenizer_config.json as transformers 5 writes it.
        pre_tokenizer: Of tokenizer.json.
        added: As of `added_by`. Some classes of transformers 4 add BOS unless told not to, whatever
            tokenizer.json says; the generic class follows tokenizer.json.
    """
    config = {key: value for key, value in config.items() if key not in OF_THIS_MACHINE}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 expects a mapping here
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if isinstance(pre_tokenizer.get("add_prefix_space"), bool):  # transformers 4 would set it to false
        config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    return config if config.get("tokenizer_class") == "PreTrainedTokenizerFast" else config | added


def write_old_positions(model: nn.Module, folder: Path) -> None:
    """Write the rotary positions of config.json under transformers 4's names too.

    They are left out if the installed transformers would then read something else, if transformers
    4 cannot express them, and if a model brings its own configuration class, which has its own
    names.
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


def positions_of(config: Any) -> list[tuple[str, Any]]:
    """Return (where, rope_parameters) of a configuration and the configurations in it."""
    found: list[tuple[str, Any]] = []

    def look(part: dict, where: str) -> None:
        """Collect the rope_parameters of a part and of the parts in it."""
        if isinstance(rope := part.get("rope_parameters"), dict):
            found.append((where, {key: value for key, value in rope.items() if key != "type"}))  # type: the old name of rope_type
        for key, value in sorted(part.items()):
            if isinstance(value, dict) and key != "rope_parameters":
                look(value, f"{where}.{key}")

    look(config.to_dict(), "")
    return found


def with_old_positions(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with transformers 4's names beside every `rope_parameters`."""
    config = {
        key: with_old_positions(value) if isinstance(value, dict) and key != "rope_parameters" else value
        for key, value in config.items()
    }
    rope = config.get("rope_parameters")
    return config | old_positions(rope, config) if isinstance(rope, dict) else config


def old_positions(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return what transformers 4 has in place of `rope_parameters`.

    Args:
        rope: rope_parameters, of all layers or by type of layer.
        config: The configuration that contains them; its model_type decides on the names.

    Returns:
        Keys to add beside `rope_parameters`; {} if transformers 4 has no names for them.
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
    unscaled = kind.startswith("modernbert")  # it has no rope_scaling
    can_say = old_scaling(sliding, kind) is None and not (unscaled and scaling is not None)
    if not can_say or (sliding_name is None and sliding["rope_theta"] != full["rope_theta"]):
        return {}
    old = {name: full["rope_theta"]} | ({} if sliding_name is None else {sliding_name: sliding["rope_theta"]})
    return old if unscaled else old | {"rope_scaling": scaling}


def old_scaling(rope: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """Return transformers 4's `rope_scaling` of a layer's positions; None if they are not scaled.

    Args:
        rope: rope_parameters of one type of layer.
        kind: The model_type.
    """
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if {*scaling} <= {"rope_type", "type"} and scaling.get("rope_type", "default") == "default":
        return None
    if kind in LONGROPE_KEYS and scaling.get("rope_type") == "longrope":  # these types take exactly three keys
        return {"type": "longrope", **{key: scaling[key] for key in LONGROPE_KEYS[kind]}}
    return scaling

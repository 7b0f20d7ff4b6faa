"""A tree of plain values in, one validated experiment out, or every mistake in it at once, each with a
remedy."""

import difflib
import json
import re
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_core import PydanticUndefined

from pipeline.config.sections import (
    KINDS,
    STRICT,
    CheckpointsConfig,
    DataConfig,
    DataSource,
    LaunchConfig,
    ModelConfig,
    TrackingConfig,
    is_hub_id,
    local_folder,
    source_path,
)
from pipeline.config.yaml_tree import Tree, dotted, read_tree, show
from pipeline.errors import UserError

REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

# Keys of other days and other programs, and where their meaning went.
RENAMED = {
    "warmup_ratio": "use warmup_steps",
    "evaluation_strategy": "use eval_steps",
    "eval_strategy": "use eval_steps",
    "overwrite_output_dir": "use `rlhf run STAGE --force`",
    "output_dir": "use `--artifacts DIR` and name",
    "torch_dtype": "use model.dtype",
    "fp16_backend": "use model.dtype",
    "half_precision_backend": "use model.dtype",
    "lr": "use learning_rate",
    "logging_steps": "leave it out, every step is logged",
    "tokenizer": "leave it out, the tokenizer is the one that lies with the model",
    "past_index": "leave it out, models here keep no past between batches",
    "use_mps_device": "use launch.device: it knows cpu and cuda",
    "tpu_num_cores": "leave it out, TPUs are not supported; see launch.device",
    "eval_batch_size": "leave it out, held-out rows go in batches of per_device_train_batch_size",
    "per_device_eval_batch_size": "leave it out, held-out rows go in batches of per_device_train_batch_size",
    "no_cuda": "use launch.device: cpu",
    "use_cpu": "use launch.device: cpu",
    "save_safetensors": "leave it out, models are always saved so",
    "group_by_length": "leave it out, demonstrations are always grouped by length",
    "logging_dir": "use the section tracking",
    "report_to": "use tracking.wandb",
    "fp16": "use model.dtype",
    "bf16": "use model.dtype",
    "save_steps": "use checkpoints.every",
    "save_total_limit": "use checkpoints.keep",
    "max_seq_length": "use max_length",
    "num_mini_batches": "use mini_batch_size",
    "vf_coef": "leave it out, policy and value model have separate optimizers",
    "init_kl_coef": "use kl_coef",
    "mixed_precision": "use model.dtype",
    "fsdp": "use launch.strategy: fsdp2",
    "fsdp_config": "use launch.strategy: fsdp2, which has no other settings",
    "deepspeed": "use launch.strategy: fsdp2, which shares out what ZeRO-3 does",
    "zero_stage": "use launch.strategy: fsdp2, which shares out what ZeRO-3 does",
    "offload": "leave it out, weights stay on the devices; see launch.strategy: fsdp2",
}


# Ways of tuning that no stage can take, and why.
IN_FRONT = (
    "learns vectors that stand before a prompt, which cannot be folded into weights, and a stage publishes weights "
    "that transformers alone can load"
)
REFUSED_METHODS = {"prompt_tuning": IN_FRONT, "prefix_tuning": IN_FRONT, "p_tuning": IN_FRONT}

COMMON = {
    "model": ModelConfig,
    "data": DataConfig,
    "tracking": TrackingConfig,
    "checkpoints": CheckpointsConfig,
    "launch": LaunchConfig,
}


def experiment_type(stages: dict[str, type[BaseModel]]) -> type[BaseModel]:
    """The type of a whole experiment: the common sections and one for each stage {name: Config}."""
    for name, section in stages.items():
        settings = section.model_config
        assert settings.get("extra") == "forbid" and settings.get("strict"), f"{name}: model_config = STRICT"
    fields: dict[str, Any] = {
        "name": (str, Field(description="names the experiment's folder; letters, digits, `.`, `_`, `-`")),
        "seed": (int, Field(0, ge=0, lt=2**32, description="every random choice follows from it")),
    }
    for name, section in (COMMON | stages).items():
        fields[name] = (section, Field(default_factory=section))
    return create_model("Experiment", __config__=STRICT, **fields)


def load_experiment(
    path: str | Path,
    overrides: Iterable[str],
    Experiment: type[BaseModel],
    checks: Iterable[Callable[[Any], list[str]]] = (),
) -> Any:
    """The validated experiment. Every mistake is a line of one UserError. `checks`: functions of the
    experiment that give lines "section.key: what; what would be right" (mistakes between fields)."""
    tree = read_tree(path, overrides)
    return validate_tree(tree, Experiment, checks)


def validate_tree(tree: Tree, Experiment: type[BaseModel], checks: Iterable[Callable[[Any], list[str]]] = ()) -> Any:
    """The second half of `load_experiment`, for a tree that was read before."""
    lines = list(tree.problems)
    problems = _name_problems(tree.values) + _path_problems(tree.values)
    lines += [f"{tree.origin(where)}: {dotted(where)}: {what}" for where, what in problems]
    experiment = None
    sections = [name for name, info in Experiment.model_fields.items() if _model_in(info.annotation)]
    try:
        # a section whose lines are all commented out is null in YAML: it means the defaults
        values = {key: {} if value is None and key in sections else value for key, value in tree.values.items()}
        # through JSON, where strict types still take a list for a tuple and an int for a float
        experiment = Experiment.model_validate_json(json.dumps(values))
    except ValidationError as error:
        lines += _explain(error, tree, Experiment)
    if experiment is not None:
        for check in (_cross_checks, *checks):
            for line in check(experiment):
                where = tuple(line.partition(":")[0].split("."))
                lines.append(f"{tree.origin(where)}: {line}")
    if lines:
        raise UserError(lines)
    return experiment


def _explain(error: ValidationError, tree: Tree, Experiment: type[BaseModel]) -> list[str]:
    """pydantic's errors as our lines. The branches of a union (`float | list`) speak of one key: they become
    one line."""
    found: dict[tuple, list[Any]] = {}
    for item in error.errors(include_url=False, include_context=False):
        path = _resolve(item["loc"], tree.values, item["type"] == "missing")
        found.setdefault(path, []).append(item)
    lines = []
    for path, items in found.items():
        if any(other != path and other[: len(path)] == path for other in found):
            if all(item["type"].endswith("_type") for item in items):
                continue  # "should be a string" beside what is wrong inside the mapping that was written
        where, key = tree.origin(path), dotted(path)
        kind = items[0]["type"]
        if kind == "missing":
            lines.append(f"{where}: {key}: is missing; {_meaning(Experiment, path)}")
        elif kind == "extra_forbidden":
            lines.append(f"{where}: {key}: unknown key; {_advice(Experiment, path)}")
        else:
            wishes = dict.fromkeys(_wish(item["msg"]) for item in items)
            lines.append(f"{where}: {key}: {show(items[0]['input'])}; {', or '.join(wishes)}")
    return lines


def _resolve(loc: tuple, values: Any, missing: bool) -> tuple:
    """The user's path in an error's location, without the names of union branches that pydantic puts
    between."""
    path: tuple = ()
    for index, part in enumerate(loc):
        inside = isinstance(values, dict) and part in values
        if inside or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            path, values = (*path, part), values[part]
        elif missing and index == len(loc) - 1:
            path = (*path, part)
    return path


def _wish(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if message.startswith("Input should be "):
        wish = message.removeprefix("Input should be ").removeprefix("a valid ").removeprefix("an ").removeprefix("a ")
        words = {"integer": "an integer", "array": "a list", "object": "a mapping", "boolean": "true or false"}
        nouns = {"string": "a string", "number": "a number", "finite number": "a finite number"}
        return f"should be {(words | nouns).get(wish, wish)}"
    return message[:1].lower() + message[1:]


def _advice(Experiment: type[BaseModel], path: tuple) -> str:
    """What an unknown key may have meant: a new name, the same key in another section, the nearest key
    here."""
    key = str(path[-1])
    section = model_at(Experiment, path[:-1])
    known = list(section.model_fields) if section is not None else []
    if key in RENAMED and key not in known:
        return RENAMED[key]
    homes = [
        dotted((name, key))
        for name, info in Experiment.model_fields.items()
        if (inner := _model_in(info.annotation)) is not None and key in inner.model_fields and (name,) != path[:-1]
    ]
    if len(path) > 1 and key in Experiment.model_fields:
        homes.insert(0, f"{key} (at the top, in no section)")
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return f"did you mean {dotted((*path[:-1], near[0]))}?"
    if homes:
        return f"did you mean {' or '.join(homes)}?"
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.55):
        return f"did you mean {dotted((*path[:-1], near[0]))}?"
    return f"known here: {', '.join(known)}" if known else "nothing is known here"


def _meaning(Experiment: type[BaseModel], path: tuple) -> str:
    while isinstance(path[-1], int):  # an item of a list: what the list should be
        path = path[:-1]
    section = model_at(Experiment, path[:-1])
    info = section.model_fields.get(path[-1]) if section is not None else None
    return f"should be {_type_name(info.annotation)}: {info.description}" if info is not None else "write it"


def model_at(Experiment: type[BaseModel], path: tuple) -> type[BaseModel] | None:
    """The config model that holds the keys below `path`, or None."""
    model: type[BaseModel] | None = Experiment
    for part in path:
        info = model.model_fields.get(part) if model is not None and isinstance(part, str) else None
        model = _model_in(info.annotation) if info is not None else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in get_args(annotation) if (model := _model_in(arg)) is not None), None)


def read_name(tree: Tree) -> str:
    """The experiment's name alone, of a config that may be wrong elsewhere."""
    name, lines = tree.values.get("name"), []
    if not isinstance(name, str):
        found = "is missing" if name is None else show(name)
        lines = [f"{tree.origin(('name',))}: name: {found}; should be a string: it names the experiment's folder"]
    lines += [f"{tree.origin(where)}: name: {what}" for where, what in _name_problems(tree.values)]
    if tree.problems or lines:
        raise UserError(tree.problems + lines)
    return name


def _name_problems(tree: dict[str, Any]) -> list[tuple[tuple, str]]:
    """A name that cannot be a folder's, found on the tree itself like a path."""
    name = tree.get("name")
    if not isinstance(name, str) or NAME.fullmatch(name):
        return []
    right = "letters, digits, `.`, `_`, `-`, and begin with a letter, a digit or `_`"
    return [(("name",), f"{name!r} cannot name a folder; should be {right}")]


def taken_from(text: str) -> str:
    """Say from where a relative path was taken: from the working folder, not from the YAML's."""
    return "" if Path(text).expanduser().is_absolute() else f" (from {Path.cwd()})"


def _path_problems(tree: dict[str, Any]) -> list[tuple[tuple, str]]:
    """Local paths that do not exist, found on the tree itself so that they stand beside the errors of
    validation."""
    problems = []
    data, model = tree.get("data"), tree.get("model")
    for kind in KINDS:
        value = data.get(kind) if isinstance(data, dict) else None
        text = source_path(value)
        where = ("data", kind, "path") if isinstance(value, dict) else ("data", kind)
        if not isinstance(text, str):
            continue
        if text == "world":
            if kind == "rankings":
                problems.append((where, "the world has no rankings file; null lets the simulated labelers rank"))
        elif not text or "\0" in text:
            problems.append((where, "is empty; should be world, a path or a Hub id"))
        elif not is_hub_id(text) and not Path(text).expanduser().exists():
            right = f"world, an existing path{taken_from(text)} or a Hub id org/name"
            problems.append((where, f"no such file: {text}; should be {right}"))
    text = model.get("name_or_path") if isinstance(model, dict) else None
    if isinstance(text, str) and (folder := local_folder(text)) is not None:
        if not text or "\0" in text or not folder.is_dir():
            what = f"no such folder: {text}; should be a folder, a Hub id org/name, package:NAME or null"
            problems.append((("model", "name_or_path"), what))
    text = model.get("chat_template") if isinstance(model, dict) else None
    if isinstance(text, str) and ("\0" in text or not Path(text).expanduser().is_file()):
        what = f"no such file: {text}; should be a file with a Jinja chat template, or null"
        problems.append((("model", "chat_template"), what))
    return problems


def _revision_problems(experiment: Any) -> list[str]:
    """Revisions of what is not on the Hub, or that could name no branch, tag or commit."""
    named = {"model": (experiment.model.name_or_path or "", experiment.model.revision)}
    for kind in KINDS:
        if isinstance(source := getattr(experiment.data, kind), DataSource):
            named[f"data.{kind}"] = (source.path, source.revision)
    problems = []
    for key, (name, revision) in named.items():
        if revision is None:
            continue
        if not is_hub_id(name):
            problems.append(f"{key}.revision: {name or 'null'} is no Hub id, and has no revisions; leave it out")
        elif not REVISION.fullmatch(revision) or ".." in revision:
            problems.append(f"{key}.revision: {revision!r} names no branch, tag or commit; give one, or leave it out")
    return problems


def _cross_checks(experiment: Any) -> list[str]:
    model = experiment.model
    problems = _revision_problems(experiment)
    if model.hidden_size % model.num_attention_heads:
        problems.append(
            f"model.num_attention_heads: {model.num_attention_heads} does not divide "
            f"model.hidden_size {model.hidden_size}; should be a divisor"
        )
    elif model.hidden_size // model.num_attention_heads % 2:
        problems.append(
            f"model.num_attention_heads: a head of {model.hidden_size} / {model.num_attention_heads} = "
            f"{model.hidden_size // model.num_attention_heads} is odd; rotary positions need an even number"
        )
    method, bits = (None, None) if model.peft is None else (model.peft.method, model.peft.bits)
    if why := REFUSED_METHODS.get(method):
        problems.append(f"model.peft.method: {method} {why}; use lora, dora, adalora, ia3, bitfit or qlora")
    if bits is not None and method != "qlora":
        problems.append(f"model.peft.bits: {bits} has no meaning with method {method}; use qlora, or leave it out")
    init_r = None if method is None else model.peft.init_r
    if init_r is not None and method != "adalora":
        only = f"has no meaning with method {method}; use adalora, or leave it out"
        problems.append(f"model.peft.init_r: {init_r} {only}")
    elif init_r is not None and init_r < model.peft.r:
        problems.append(f"model.peft.init_r: {init_r} is under r {model.peft.r}, to which adalora prunes; raise it")
    if method == "adalora" and experiment.launch.strategy == "fsdp2":
        problems.append(
            "launch.strategy: fsdp2 shares out each weight by rows, and adalora compares whole ones; use ddp, or "
            "model.peft.method: lora"
        )
    if method == "qlora" and experiment.launch.strategy == "fsdp2":
        problems.append(
            "launch.strategy: fsdp2 shares out float weights by rows, and qlora's are packed bytes that share scales; "
            "use ddp, or model.peft.method: lora"
        )
    if model.attn_implementation == "flash_attention_2" and model.dtype == "float32":
        problems.append(
            "model.attn_implementation: flash_attention_2 does not compute in float32; "
            "set model.dtype: bfloat16, or use sdpa"
        )
    return problems


# -- help ------------------------------------------------------------------------------------------------


def describe(section: type[BaseModel], name: str) -> list[tuple[str, str, str, str, str]]:
    """(key, type, default, unit, description) of every field of a section, sections inside it included."""
    rows = []
    for key, info in section.model_fields.items():
        default = info.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else _default(default)
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        inner = _model_in(info.annotation)
        if inner is None or not isinstance(default, BaseModel):
            rows.append(
                (
                    f"{name}.{key}",
                    _type_name(info.annotation),
                    shown,
                    str(extra.get("unit", "")),
                    info.description or "",
                )
            )
        if inner is not None:
            rows += describe(inner, f"{name}.{key}")
    return rows


def _default(value: Any) -> str:
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _type_name(annotation: Any) -> str:
    """A type in a user's words: "number or null", "best | last"."""
    words = {float: "number", int: "integer", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in words:
        return words[annotation]
    if origin is Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args)
    if origin in (list, tuple):
        inner = dict.fromkeys(_type_name(arg) for arg in args if arg is not Ellipsis)
        return f"list of {' or '.join(inner)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return getattr(annotation, "__name__", str(annotation))

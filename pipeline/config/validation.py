"""Turn a parsed config into one validated experiment, or report every mistake in it at once."""

import difflib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.config.checks import check_common, name_problems, path_problems
from pipeline.config.help import fields_of, section_in, sections_in, type_name
from pipeline.config.sections import Common, ConfigFile
from pipeline.config.yaml_tree import Tree, dotted, read_tree, show
from pipeline.errors import UserError

E = TypeVar("E", bound=Common)
Check = Callable[[Any], list[str]]

# Keys of earlier versions and of other programs, anywhere or at one place, and what to use instead.
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
    "tokenizer": "leave it out, the tokenizer is the one in the model's folder",
    "past_index": "leave it out, models keep no state between batches here",
    "use_mps_device": "use launch.device: mps, or auto",
    "tpu_num_cores": "leave it out, TPUs are not supported; see launch.device",
    "eval_batch_size": "leave it out, held-out rows use per_device_train_batch_size",
    "per_device_eval_batch_size": "leave it out, held-out rows use per_device_train_batch_size",
    "no_cuda": "use launch.device: cpu",
    "use_cpu": "use launch.device: cpu",
    "save_safetensors": "leave it out, models are always saved as safetensors",
    "group_by_length": "leave it out, demonstrations are always grouped by length",
    "logging_dir": "use the section tracking",
    "report_to": "use tracking.with",
    "fp16": "use model.dtype",
    "bf16": "use model.dtype",
    "save_steps": "use checkpoints.every",
    "save_total_limit": "use checkpoints.keep",
    "max_seq_length": "use max_length",
    "num_mini_batches": "use mini_batch_size",
    "vf_coef": "leave it out, policy and value model have separate optimizers",
    "init_kl_coef": "use kl_coef",
    "vllm_importance_sampling_correction": "use ppo.rollout.correction",
    "vllm_importance_sampling_mode": "use ppo.rollout.correction and correction_outliers",
    "vllm_importance_sampling_cap": "use ppo.rollout.correction_clip_max",
    "vllm_importance_sampling_clip_max": "use ppo.rollout.correction_clip_max",
    "vllm_importance_sampling_clip_min": "use ppo.rollout.correction_clip_min",
    "mixed_precision": "use model.dtype",
    "tp_size": "use launch.tensor_parallel",
    "cp_size": "use launch.context_parallel",
    "parallelism_config": "use launch.tensor_parallel, launch.context_parallel and launch.strategy: fsdp2",
    "fsdp": "use launch.strategy: fsdp2",
    "fsdp_config": "use launch.strategy: fsdp2 with launch.shard and launch.offload",
    "deepspeed": "use launch.strategy: fsdp2 with launch.shard",
    "zero_stage": "use launch.strategy: fsdp2 with launch.shard: optimizer (1), gradients (2) or weights (3)",
    "reshard": "use launch.shard: gradients (false) or weights (true)",
    "reshard_after_forward": "use launch.shard: gradients (false) or weights (true)",
    "offload": "use launch.offload",
    "offload_optimizer": "use launch.offload: optimizer",
    "offload_param": "use launch.offload: all",
    "cpu_offload": "use launch.offload: all",
    "activation_offloading": "use launch.offload_activations",
    **dict.fromkeys(
        ("ppo.top_k", "ppo.top_p", "ppo.rollout.top_k", "ppo.rollout.top_p"),
        "leave it out: PPO's ratios and KL are of whole distributions, and samples of a truncated one would bias them; "
        "evaluate, rankings and chat have it",
    ),
}


def load_experiment(
    path: str | Path, overrides: Iterable[str], experiment_class: type[E], checks: Iterable[Check] = ()
) -> E:
    """Load and validate an experiment.

    Args:
        path: The YAML file.
        overrides: Settings on top of it, `section.key=value` each.
        experiment_class: Class of the whole experiment: the common sections and one per stage.
        checks: Functions of the experiment that return lines "section.key: what is wrong; what to
            do", for mistakes between settings.

    Raises:
        UserError: With one line for every mistake.
    """
    return validate_tree(read_tree(path, overrides), experiment_class, checks)


def validate_tree(tree: Tree, experiment_class: type[E], checks: Iterable[Check] = ()) -> E:
    """Validate a parsed config; see `load_experiment`."""
    lines = list(tree.problems)
    problems = name_problems(tree.values) + path_problems(tree.values)
    lines += [f"{tree.origin(where)}: {dotted(where)}: {what}" for where, what in problems]
    experiment = None
    try:
        experiment = experiment_class.model_validate_json(json.dumps(fill_empty_sections(tree, experiment_class)))
    except ValidationError as error:
        lines += explain(error, tree, experiment_class)
    if experiment is not None:
        for check in (check_common, *checks):
            for line in check(experiment):
                where = path_of(line.partition(":")[0])
                lines.append(f"{tree.origin(where)}: {line}")
    if lines or experiment is None:
        raise UserError(lines)
    experiment._file = ConfigFile(Path(tree.source), tree.overrides)
    return experiment


def path_of(key: str) -> tuple:
    """Return the path of a dotted key, with the places in lists: "a.b[0].c" gives (a, b, 0, c)."""
    parts = re.findall(r"[^.[\]]+|\[\d+\]", key)
    return tuple(int(part[1:-1]) if part.startswith("[") else part for part in parts)


def fill_empty_sections(tree: Tree, experiment_class: type[BaseModel]) -> dict[str, Any]:
    """Return the values of a tree with {} for each section that is null.

    A section whose lines are all commented out is null in YAML, and means the defaults. The result
    goes through JSON, where strict types still accept a list for a tuple and an int for a float.
    """
    sections = [
        name
        for name, info in experiment_class.model_fields.items()
        if info.alias is None and section_in(info.annotation)  # `from` is null by default
    ]
    return {key: {} if value is None and key in sections else value for key, value in tree.values.items()}


def read_name(tree: Tree) -> str:
    """Return the experiment's name from a config that may have mistakes elsewhere."""
    name, lines = tree.values.get("name"), []
    if not isinstance(name, str):
        found = "is missing" if name is None else show(name)
        lines = [f"{tree.origin(('name',))}: name: {found}; should be a string: it names the experiment's folder"]
    lines += [f"{tree.origin(where)}: name: {what}" for where, what in name_problems(tree.values)]
    if tree.problems or lines or not isinstance(name, str):
        raise UserError(tree.problems + lines)
    return name


KEY_NAME = "key_env"
"""The setting that names the environment variable with a server's key."""


def explain(error: ValidationError, tree: Tree, experiment_class: type[BaseModel]) -> list[str]:
    """Return pydantic's errors as our lines.

    pydantic reports each branch of a union (`float | list`) as an error of its own; they become one
    line per key.
    """
    errors: dict[tuple, list[Any]] = {}
    for item in error.errors(include_url=False, include_context=False):
        path = resolve(item["loc"], tree.values, item["type"] == "missing")
        errors.setdefault(path, []).append(item)
    lines = []
    for path, items in errors.items():
        is_section = any(other != path and other[: len(path)] == path for other in errors)
        if is_section and all(item["type"].endswith(("_type", "literal_error")) for item in items):
            continue  # "should be a string" is noise next to the errors inside the mapping that was written
        where, key = tree.origin(path), dotted(path)
        kind = items[0]["type"]
        if kind == "missing":
            lines.append(f"{where}: {key}: is missing; {meaning(experiment_class, path, items[0]['loc'])}")
        elif kind == "extra_forbidden":
            lines.append(f"{where}: {key}: unknown key; {advice(experiment_class, path, items[0]['loc'])}")
        elif path[-1] == KEY_NAME:
            # whoever wrote the key itself here must not find it in a log
            remedy = "should be the name of the environment variable that holds the key; what is there is not shown"
            lines.append(f"{where.partition('=')[0]}: {key}: {remedy}")
        else:
            wishes = dict.fromkeys(expectation(item["msg"]) for item in items)
            lines.append(f"{where}: {key}: {show(items[0]['input'])}; {', or '.join(wishes)}")
    return lines


def resolve(location: tuple, values: Any, missing: bool) -> tuple:
    """Return the keys, as the user wrote them, of the location of an error.

    Args:
        location: pydantic's location, which also names the branches of unions.
        values: The parsed config.
        missing: Whether the last key of the location is missing in the config.
    """
    path: tuple = ()
    for index, part in enumerate(location):
        in_mapping = isinstance(values, dict) and part in values
        in_list = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if in_mapping or in_list:
            path, values = (*path, part), values[part]
        elif missing and index == len(location) - 1:
            path = (*path, part)
    return path


def expectation(message: str) -> str:
    """Return one of pydantic's messages in the form "should be …"."""
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not message.startswith("Input should be "):
        return message[:1].lower() + message[1:]
    noun = message.removeprefix("Input should be ").removeprefix("a valid ").removeprefix("an ").removeprefix("a ")
    words = {
        "integer": "an integer",
        "array": "a list",
        "object": "a mapping",
        "boolean": "true or false",
        "string": "a string",
        "number": "a number",
        "finite number": "a finite number",
    }
    return f"should be {words.get(noun, noun)}"


def advice(experiment_class: type[BaseModel], path: tuple, location: tuple) -> str:
    """Return what an unknown key may have meant.

    In this order: its new name, a very similar key here, the same key in another section, a
    similar key here, or all keys that are known here.

    Args:
        experiment_class: Class of all settings.
        path: The key, with those that it is in.
        location: pydantic's location of it.
    """
    key = str(path[-1])
    section = section_at(experiment_class, path[:-1], location)
    known = list(fields_of(section)) if section is not None else []
    for name in (dotted(path), key):
        if name in RENAMED and key not in known:
            return RENAMED[name]
    homes = []
    if len(path) > 1 and key in experiment_class.model_fields:
        homes.append(f"{key} (at the top level, outside any section)")
    for name, info in experiment_class.model_fields.items():
        inner = section_in(info.annotation)
        if inner is None or info.alias is not None:  # `experiment` is too common a word to mean from.experiment
            continue
        if key in fields_of(inner) and (name,) != path[:-1]:
            homes.append(dotted((name, key)))
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return f"did you mean {dotted((*path[:-1], near[0]))}?"
    if homes:
        return f"did you mean {' or '.join(homes)}?"
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.55):
        return f"did you mean {dotted((*path[:-1], near[0]))}?"
    return f"known here: {', '.join(known)}" if known else "no keys are known here"


def meaning(experiment_class: type[BaseModel], path: tuple, location: tuple) -> str:
    """Return the type and meaning of a missing setting.

    Args:
        experiment_class: Class of all settings.
        path: The key, with those that it is in.
        location: pydantic's location of it.
    """
    while isinstance(path[-1], int):  # an item of a list: describe the list
        path = path[:-1]
    section = section_at(experiment_class, path[:-1], location)
    info = fields_of(section).get(path[-1]) if section is not None else None
    return f"should be {type_name(info.annotation)}: {info.description}" if info is not None else "add it"


def section_at(experiment_class: type[BaseModel], path: tuple, location: tuple) -> type[BaseModel] | None:
    """Return the class of the section at a path of keys, or None if no section is there.

    Args:
        experiment_class: Class of all settings.
        path: The keys.
        location: pydantic's location, which names the class where a section is one of several.
    """
    section: type[BaseModel] | None = experiment_class
    for part in path:
        if isinstance(part, int):
            continue  # an item of a list has the section of the list
        info = fields_of(section).get(part) if section is not None else None
        possible = sections_in(info.annotation) if info is not None else []
        named = [one for one in possible if one.__name__ in location]
        section = next(iter(named or possible), None)
    return section

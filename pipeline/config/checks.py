"""Check the settings that every experiment has: names, paths, revisions and combinations.

Checks of the parsed tree return (path of keys, what is wrong); checks of the validated experiment
return whole lines "section.key: what is wrong; what to do".
"""

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.section import Section
from pipeline.config.sections import (
    AXES,
    KINDS,
    RANKED,
    Common,
    DataSource,
    LaunchSettings,
    ModelSettings,
    PeftSettings,
    is_hub_id,
    local_folder,
    source_paths,
)
from pipeline.launch.processes import rank_and_size_from_environment
from pipeline.trackers.names import PACKAGES

REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
PASSWORD_IN_ADDRESS = re.compile(r"://[^/@\s]+@|[?&](write_)?(token|key)=")

# Methods whose adapters stay in the model.
BOTTLENECKS, PREFIX = ("houlsby", "pfeiffer", "parallel_adapter"), ("prefix_tuning",)
IN_PLACE = (*BOTTLENECKS, *PREFIX)
PREFIX_TOKENS = 20  # of a prefix, unless model.peft.num_virtual_tokens says otherwise

SOFT = ("prompt_tuning", "p_tuning")
# Adapter settings → the methods that have them; others refuse all but the default.
LOW_RANK = ("lora", "dora", "qlora", "adalora")
OF_METHODS: dict[str, tuple[str, ...]] = {
    "r": LOW_RANK,
    "lora_alpha": LOW_RANK,
    "lora_dropout": LOW_RANK,
    "target_modules": LOW_RANK,
    "init_r": ("adalora",),
    "bits": ("qlora",),
    "exclude_modules": LOW_RANK,
    "layers_to_transform": LOW_RANK,
    "modules_to_save": (*LOW_RANK, "ia3"),
    "use_rslora": ("lora", "dora", "qlora"),
    "init_lora_weights": ("lora", "qlora"),
    "bottleneck_size": BOTTLENECKS,
    "bottleneck_activation": BOTTLENECKS,
    "bottleneck_scale": BOTTLENECKS,
    "prefix_projection": PREFIX,
    "num_virtual_tokens": (*SOFT, *PREFIX),
    "prompt_tuning_init": SOFT,
    "prompt_tuning_init_text": SOFT,
    "encoder_reparameterization_type": ("p_tuning",),
    "encoder_hidden_size": ("p_tuning", *PREFIX),
}

OF_RANKINGS = ("by", "tie_within", "min_score_ratio", "tiers")
"""Settings of a source that say how rankings are made of its rows."""

Problem = tuple[tuple, str]


# -- the parsed tree -----------------------------------------------------------------------------


def name_problems(tree: dict[str, Any]) -> list[Problem]:
    """Return what is wrong with a name that cannot be the name of a folder."""
    name = tree.get("name")
    if not isinstance(name, str) or NAME.fullmatch(name):
        return []
    rule = "use letters, digits, `.`, `_`, `-`, and start with a letter, a digit or `_`"
    return [(("name",), f"{name!r} cannot name a folder; {rule}")]


def path_problems(tree: dict[str, Any]) -> list[Problem]:
    """Return a problem for every local path that does not exist.

    The parsed tree is checked, not the validated experiment: that way these problems are reported
    together with the errors of validation.
    """
    data, model = tree.get("data"), tree.get("model")
    problems = data_path_problems(data) if isinstance(data, dict) else []
    problems += model_path_problems(model, ("model",)) if isinstance(model, dict) else []
    second = second_model(tree)
    return problems + (model_path_problems(second, ("rm", "base")) if isinstance(second, dict) else [])


def data_path_problems(data: dict[str, Any]) -> list[Problem]:
    """Return the problems of the paths in the section `data`."""
    problems: list[Problem] = []
    for kind in KINDS:
        value = data.get(kind)
        parts = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        if isinstance(value, list) and not value:
            problems.append((("data", kind), "is an empty list; should name at least one source, or be null"))
        for index, part in parts:
            where: tuple[Any, ...] = ("data", kind) if index is None else ("data", kind, index)
            if isinstance(part, dict):
                where += ("path",)
            if isinstance(part, dict):
                problems += aside_problems(where[:-1], part) + idle_problems(where[:-1], kind, part, index is None)
            (text,) = source_paths(part) if not isinstance(part, list) else (None,)
            if not isinstance(text, str):
                continue
            if text == "world" and index is not None:
                problems.append((where, "the world's data cannot be mixed with others; give files or Hub ids"))
            elif text == "world":
                if kind == "rankings":
                    what = "the world has no file of rankings; use null: simulated labelers rank then"
                    problems.append((where, what))
            elif text == RANKED:
                if kind != "rankings":
                    problems.append((where, "what people ranked are rankings; use it as data.rankings"))
            elif not text or "\0" in text:
                problems.append((where, "is empty; should be world, a path or a Hub id"))
            elif not is_hub_id(text) and not exists(text):
                remedy = f"should be world, an existing path{relative_to(text)} or a Hub id org/name"
                problems.append((where, f"no such file: {text}; {remedy}"))
    return problems


def idle_problems(where: tuple[Any, ...], kind: str, part: dict[str, Any], alone: bool) -> list[Problem]:
    """Return the problems of settings that do nothing where they stand.

    Args:
        where: The path of the source's keys.
        kind: The kind of data.
        part: The source.
        alone: Whether it is the only one, and no part of a mixture.
    """
    problems: list[Problem] = []
    if alone and part.get("weight") is not None:
        problems.append(((*where, "weight"), "is a share of a mixture, and there is one source; leave it out"))
    for key in () if kind == "rankings" else OF_RANKINGS:
        default = DataSource.model_fields[key].get_default(call_default_factory=True)
        if key in part and part[key] != default:
            problems.append(((*where, key), f"says how rankings are read, and these are {kind}; leave it out"))
    return problems


def aside_problems(where: tuple[Any, ...], part: dict[str, Any]) -> list[Problem]:
    """Return the problems of the files that a source names beside its own.

    Args:
        where: The path of the source's keys.
        part: The source.
    """
    problems: list[Problem] = []
    for key, remedy in (("wordings", "a YAML file of wordings"), ("shots_from", "a file, a folder or a glob")):
        text = part.get(key)
        if isinstance(text, str) and (not text or "\0" in text or not exists(text)):
            problems.append(((*where, key), f"no such file: {text}; should be {remedy}{relative_to(text)}"))
    return problems


def exists(text: str) -> bool:
    """Return whether a path names a file or folder, or a glob matches one."""
    path = Path(text).expanduser()
    return path.exists() or (glob.has_magic(text) and any(glob.iglob(str(path), recursive=True)))


def second_model(tree: dict[str, Any]) -> Any:
    """Return `rm.base` of a parsed config as a mapping; whatever else it is if it is none."""
    section = tree.get("rm")
    named = section.get("base") if isinstance(section, dict) else None
    return {"name_or_path": named} if isinstance(named, str) else named


def model_path_problems(model: dict[str, Any], place: tuple) -> list[Problem]:
    """Return the problems of the paths in a section that names a model.

    Args:
        model: The section, parsed.
        place: Its keys, for error lines.
    """
    problems: list[Problem] = []
    text = model.get("name_or_path")
    folder = local_folder(text) if isinstance(text, str) else None
    if folder is not None and (not text or "\0" in text or not folder.is_dir()):
        what = f"no such folder: {text}; should be a folder, a Hub id org/name, package:NAME or null"
        problems.append(((*place, "name_or_path"), what))
    elif folder is not None and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        what = f"{text} holds an adapter; name the model that it was trained on here, and {text} in model.adapter"
        problems.append(((*place, "name_or_path"), what))
    text = model.get("chat_template")
    if isinstance(text, str) and ("\0" in text or not Path(text).expanduser().is_file()):
        what = f"no such file: {text}; should be a file with a Jinja chat template, or null"
        problems.append(((*place, "chat_template"), what))
    text = model.get("adapter")
    if isinstance(text, str) and (wrong := adapter_folder_problem(text)):
        problems.append(((*place, "adapter"), wrong))
    return problems


def adapter_folder_problem(text: str) -> str:
    """Return what is wrong with the folder of an adapter; "" if nothing is."""
    folder = Path(text).expanduser()
    if not text or "\0" in text or not folder.is_dir():
        return f"no such folder: {text}; should be one that peft saved an adapter in (download it from the Hub first)"
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if not missing:
        return ""
    if (folder / "adapter_model.bin").is_file():
        return f"{text} holds pickled weights, which are not read; save them with peft again as safetensors"
    return f"{text} has no {' and no '.join(missing)}; should be a folder that peft saved an adapter in"


def relative_to(text: str) -> str:
    """Return " (from FOLDER)" for a relative path; FOLDER is the working folder."""
    return "" if Path(text).expanduser().is_absolute() else f" (from {Path.cwd()})"


# -- the validated experiment --------------------------------------------------------------------


def check_common(experiment: Common) -> list[str]:
    """Return a line for every mistake in the common sections that no single setting shows."""
    model = experiment.model
    return [
        *revision_problems(experiment),
        *shots_problems(experiment),
        *head_problems(model),
        *adapter_problems(model),
        *layout_problems(experiment.launch, experiment.model.dtype),
        *axis_problems(experiment),
        *compile_problems(experiment),
        *attention_problems(model),
        *(apple_problems(experiment) if experiment.launch.device == "mps" else []),
        *tracking_problems(experiment),
    ]


def shots_problems(experiment: Common) -> list[str]:
    """Return a line for each source whose shots could be held out."""
    problems = []
    for kind in KINDS:
        value = getattr(experiment.data, kind)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, DataSource) and part.shots is not None and experiment.data.validation_fraction > 0.5:
                problems.append(
                    f"data.{kind}.shots: are drawn from the half of the rows that is never held out, and "
                    f"data.validation_fraction is {experiment.data.validation_fraction:g}; set it to 0.5 or less"
                )
    return problems


def revision_problems(experiment: Common) -> list[str]:
    """Return a line for each revision of something that is not on the Hub, or that is not valid."""
    named: dict[str, tuple[str, str | None]] = {
        "model": (experiment.model.name_or_path or "", experiment.model.revision)
    }
    second = getattr(getattr(experiment, "rm", None), "base", None)
    if second is not None:
        named["rm.base"] = (second.name_or_path or "", second.revision)
    for kind in KINDS:
        value = getattr(experiment.data, kind)
        parts = {f"data.{kind}[{i}]": part for i, part in enumerate(value)} if isinstance(value, list) else {}
        for key, source in (parts or {f"data.{kind}": value}).items():
            if isinstance(source, DataSource):
                named[key] = (source.path, source.revision)
    problems = []
    for key, (name, revision) in named.items():
        if revision is None:
            continue
        if not is_hub_id(name):
            problems.append(f"{key}.revision: {name or 'null'} is not a Hub id and has no revisions; leave it out")
        elif not REVISION.fullmatch(revision) or ".." in revision:
            problems.append(
                f"{key}.revision: {revision!r} is not the name of a branch, tag or commit; correct it or leave it out"
            )
    return problems


def head_problems(model: ModelSettings) -> list[str]:
    """Return a line if the attention heads do not fit the width of the model."""
    width, heads = model.hidden_size, model.num_attention_heads
    if width % heads:
        return [f"model.num_attention_heads: {heads} does not divide model.hidden_size {width}; should be a divisor"]
    if width // heads % 2:
        return [
            f"model.num_attention_heads: the size of a head, {width} / {heads} = {width // heads}, is odd; rotary "
            f"positions need an even size"
        ]
    return []


def adapter_problems(model: ModelSettings) -> list[str]:
    """Return a line for each adapter setting that its method does not have, or that cannot work."""
    lines = [] if model.peft is None else peft_problems(model.peft, "model.peft")
    if model.adapter is not None and model.name_or_path is None:
        lines.append(
            "model.adapter: a model from scratch has no adapter; name the model that it was trained on in "
            "model.name_or_path"
        )
    if model.peft is not None and model.peft.method == "prefix_tuning" and model.attn_implementation != "sdpa":
        lines.append(
            f"model.attn_implementation: {model.attn_implementation} cannot read the keys and values of a prefix "
            f"(prefix_tuning); use sdpa"
        )
    return lines


def peft_problems(peft: PeftSettings, place: str) -> list[str]:
    """Return a line for each setting that the method does not have, or that cannot work.

    Args:
        peft: The settings.
        place: The key that they stand under: "model.peft", or that of a stage.
    """
    method, problems = peft.method, []
    for key, methods in OF_METHODS.items():
        value = getattr(peft, key)
        if value != PeftSettings.model_fields[key].default and method not in methods:
            problems.append(
                f"{place}.{key}: {value} has no effect with method {method}; use {' or '.join(methods)}, or leave it "
                f"out"
            )
    if method == "adalora" and peft.init_r is not None and peft.init_r < peft.r:
        problems.append(
            f"{place}.init_r: {peft.init_r} is lower than r {peft.r}, the rank that adalora prunes to; raise it"
        )
    if method == "prefix_tuning" and peft.encoder_hidden_size is not None and not peft.prefix_projection:
        problems.append(
            f"{place}.encoder_hidden_size: {peft.encoder_hidden_size} has no effect without the MLP; set "
            f"prefix_projection: true, or leave it out"
        )
    return problems + layer_problems(peft, place) + soft_prompt_problems(peft, place)


def layer_problems(peft: PeftSettings, place: str) -> list[str]:
    """Return a line for each choice of layers that is empty or no valid regular expression.

    Args:
        peft: The settings.
        place: As of `peft_problems`.
    """
    problems = []
    for key in ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"):
        value = getattr(peft, key)
        if value is not None and (not value or (key != "layers_to_transform" and "" in list(value))):
            problems.append(f"{place}.{key}: names nothing; name at least one, or leave it out")
        elif isinstance(value, str) and (what := expression_problem(value)):
            problems.append(
                f"{place}.{key}: {value!r} is no regular expression ({what}); a name alone is a list: [NAME]"
            )
    is_pattern = isinstance(peft.target_modules, str) and peft.target_modules != "all-linear"
    if is_pattern and peft.layers_to_transform is not None:
        problems.append(
            f"{place}.layers_to_transform: has no effect beside an expression in target_modules; let the expression "
            f"name the layers, or list names there"
        )
    return problems


def soft_prompt_problems(peft: PeftSettings, place: str) -> list[str]:
    """Return a line where a soft prompt's start and its text do not fit; arguments as above."""
    problems = []
    text, init = peft.prompt_tuning_init_text, peft.prompt_tuning_init
    if init == "text" and text is None:
        problems.append(f"{place}.prompt_tuning_init: text needs one; give it as prompt_tuning_init_text")
    elif init not in (None, "text") and text is not None:
        problems.append(f"{place}.prompt_tuning_init_text: has no effect with prompt_tuning_init {init}; use text")
    return problems


def expression_problem(text: str) -> str:
    """Return what is wrong with a regular expression; "" if nothing is."""
    try:
        re.compile(text)
    except re.error as error:
        return str(error)
    return ""


def layout_problems(launch: LaunchSettings, dtype: str) -> list[str]:
    """Return a line for each pair of settings of shards and offloading that cannot both be meant.

    Args:
        launch: The section launch.
        dtype: What products are computed in; "auto" is checked when that is known.
    """
    problems = []
    if dtype == "float16" and (launch.offload == "optimizer" or launch.shard == "optimizer"):
        place = "launch.offload" if launch.offload == "optimizer" else "launch.shard"
        problems.append(
            f"{place}: optimizer steps other tensors than those whose gradients float16 scales; set {place}: "
            f"{'all' if place == 'launch.offload' else 'gradients'}, or model.dtype: float32"
        )
    if launch.shard is not None and launch.strategy == "ddp":
        problems.append("launch.shard: has no effect with launch.strategy ddp; set launch.strategy: fsdp2")
    if launch.reduce is not None and (launch.strategy == "ddp" or launch.shard == "optimizer"):
        problems.append(
            "launch.reduce: has no effect where gradients are whole, which are always summed at the last micro-batch; "
            "leave it out, or set launch.strategy: fsdp2 and launch.shard: weights"
        )
    if launch.reduce == "last" and launch.offload == "all":
        problems.append(
            "launch.reduce: last keeps whole gradients on the device, and launch.offload: all is there to keep none; "
            "leave one of them out"
        )
    if launch.offload == "all" and count_of_processes(launch) > 1 and launch.strategy == "ddp":
        problems.append(
            "launch.offload: all shards the weights, and launch.strategy ddp keeps them whole; set launch.strategy: "
            "fsdp2, or launch.offload: optimizer"
        )
    if launch.offload == "all" and launch.shard == "optimizer":
        problems.append(
            "launch.offload: all shards the weights, and launch.shard optimizer keeps them whole; set launch.shard: "
            "weights, or launch.offload: optimizer"
        )
    return problems


def compile_problems(experiment: Common) -> list[str]:
    """Return a line if layers are to be compiled that processes compute together."""
    launch = experiment.launch
    if not experiment.model.compile or launch.together == 1:
        return []
    key = "tensor_parallel" if (launch.tensor_parallel or 1) > 1 else "context_parallel"
    return [
        f"model.compile: true makes one graph of a layer, and with launch.{key} processes communicate inside it; set "
        f"model.compile: false, or launch.{key}: 1"
    ]


def count_of_processes(launch: LaunchSettings) -> int:
    """Return how many processes there will be, or are: torchrun starts its own."""
    return max(launch.processes * launch.nodes, rank_and_size_from_environment()[1])


def axis_problems(experiment: Common) -> list[str]:
    """Return a line for each axis of parallelism that the processes or the adapter do not allow."""
    launch, lines = experiment.launch, []
    together = launch.together
    count = count_of_processes(launch)
    if count % together:
        axes = [f"{key} {getattr(launch, key)}" for key in AXES if (getattr(launch, key) or 1) > 1]
        lines.append(
            f"launch.processes: {count} process(es) do not divide into groups of {together} ({' × '.join(axes)}); set "
            f"a multiple of {together}"
        )
    usual = {"shard": (None, "weights"), "reduce": (None, "each"), "offload": (None, "none")}
    if together > 1 and (odd := [key for key, values in usual.items() if getattr(launch, key) not in values]):
        key = odd[-1]
        lines.append(
            f"launch.{key}: {getattr(launch, key)} was not made for models that processes compute together "
            f"(launch.tensor_parallel, context_parallel); leave it out, or set both to 1"
        )
    if experiment.model.peft is not None:
        lines += cut_adapter_problems(experiment, experiment.model.peft, "model.peft")
    return lines


def cut_adapter_problems(experiment: Common, peft: PeftSettings, place: str) -> list[str]:
    """Return a line if an adapter would be trained on a model that is cut, or a prefix on cut rows.

    Args:
        experiment: The experiment.
        peft: The adapter.
        place: Where the adapter's settings are.
    """
    if (experiment.launch.context_parallel or 1) > 1 and peft.method in PREFIX:
        return [
            f"launch.context_parallel: a prefix's keys come before those of the row, which processes compute in parts; "
            f"set it to 1, or {place}.method: lora"
        ]
    if (experiment.launch.tensor_parallel or 1) == 1:
        return []
    return [
        f"launch.tensor_parallel: transformers' plans name the weights of a model without an adapter, and {place} sets "
        f"one; use launch.strategy: fsdp2 for a model that is too large for one device, or train every weight"
    ]


def attention_problems(model: ModelSettings) -> list[str]:
    """Return a line if the attention kernel does not support the precision."""
    if model.attn_implementation == "flash_attention_2" and model.dtype == "float32":
        return [
            "model.attn_implementation: flash_attention_2 does not support float32; set model.dtype: bfloat16, or use "
            "sdpa"
        ]
    return []


def apple_problems(experiment: Common) -> list[str]:
    """Return a line for each setting, of whatever section, that Apple's GPU (mps) cannot do."""
    lines, launch = [], experiment.launch
    if launch.processes * launch.nodes > 1:
        lines.append(
            f"launch.processes: {launch.processes * launch.nodes} in all, and Apple's GPU (mps) takes one, since "
            f"torch.distributed does not know it; set launch.processes: 1, or launch.device: cpu"
        )
    if experiment.model.attn_implementation == "flash_attention_2":
        lines.append("model.attn_implementation: flash_attention_2 needs a CUDA GPU, and this is Apple's; use sdpa")
    for key in ("offload", "offload_activations"):
        if getattr(launch, key) not in (None, False, "none"):
            lines.append(f"launch.{key}: Apple's GPU (mps) has the CPU's memory, so nothing is saved; leave it out")
    for place, section in sections_in(experiment, ""):
        if getattr(section, "method", None) == "qlora":
            lines.append(f"{place}.method: qlora's kernels do not run on Apple's GPU (mps); use lora")
        if getattr(section, "engine", None) == "vllm":
            lines.append(f"{place}.engine: vllm does not run beside Apple's GPU (mps); use transformers")
    return lines


def sections_in(section: Section, place: str) -> Iterator[tuple[str, Section]]:
    """Yield all sections inside a section, each with its dotted key.

    Args:
        section: The outer section.
        place: Its own key; "" for the whole experiment.
    """
    for name in type(section).model_fields:
        inner = getattr(section, name)
        if isinstance(inner, Section):
            key = f"{place}.{name}".removeprefix(".")
            yield key, inner
            yield from sections_in(inner, key)


def tracking_problems(experiment: Common) -> list[str]:
    """Return a line for each tracker setting that contradicts another, or that holds a secret."""
    tracking, problems = experiment.tracking, []
    if tracking.wandb == "off" and "wandb" in tracking.with_:
        problems.append("tracking.wandb: off, and tracking.with names wandb; leave one of them out")
    for name, options in tracking.options.items():
        place = f"tracking.options.{name}"
        if name not in tracking.trackers:
            problems.append(f"{place}: {name} is not in tracking.with; add it there, or leave these out")
            continue
        for key, value in options.items():
            if key in PACKAGES[name].ours:
                problems.append(f"{place}.{key}: is set from the experiment, or resuming would fail; leave it out")
            elif SECRET.search(key) or holds_password(value):
                problems.append(
                    f"{place}.{key}: a config is copied into manifests and must hold no secret; set it in the "
                    f"environment as {name} documents"
                )
    return problems


def holds_password(value: Any) -> bool:
    """Return whether a value, or one inside it, is an address with a password in it."""
    if isinstance(value, dict):
        return any(SECRET.search(str(key)) or holds_password(item) for key, item in value.items())
    if isinstance(value, list):
        return any(holds_password(item) for item in value)
    return isinstance(value, str) and PASSWORD_IN_ADDRESS.search(value) is not None

"""Answer a colleague's first questions about a run.

Everything comes from the manifests, so a page describes the run that made it and not the files of
today.
"""

from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from pipeline.config.checks import IN_PLACE
from stages.page.manifests import Manifest, commit_of, common_versions, metrics_of, ordered, seconds_of, section, shown
from stages.page.numbers import duration

SHAPE = {"hidden_size": "width {}", "num_hidden_layers": "{} layers", "num_attention_heads": "{} heads",
         "vocab_size": "at most {} token ids", "max_position_embeddings": "context of {} tokens"}  # fmt: skip
"""Setting of a model from scratch → how the page words it."""


def facts(manifests: dict[str, Manifest]) -> list[tuple[str, list[str]]]:
    """Answer what a colleague asks first.

    Args:
        manifests: Stage → its manifest.

    Returns:
        (question, lines of the answer) of each. A question that no manifest answers is left out.
    """
    seconds = {stage: seconds_of(manifest) for stage, manifest in ordered(manifests)}
    each = " · ".join(f"{stage} {duration(taken)}" for stage, taken in seconds.items())
    libraries = " · ".join(f"{name} {version}" for name, version in common_versions(manifests).items())
    answers = [
        ("Round", round_lines(manifests)),
        ("Base model", base_model(manifests)),
        ("What is trained", [adapter(manifests)]),
        ("Seed", sorted({str(manifest["seed"]) for manifest in manifests.values()})),
        ("Hardware", hardware(manifests)),
        ("Time", [f"{duration(sum(seconds.values()))} in total", each]),
        ("Command", commands(manifests)),
        ("Code", code(manifests)),
        ("Libraries", [libraries]),
    ]
    return [(question, lines) for question, lines in answers if any(lines)]


def base_model(manifests: dict[str, Manifest]) -> list[str]:
    """Return the model that the run started from.

    Returns:
        Lines: a folder, a package or a name on the Hub with its commit, or a new model's shape.
    """
    model, size = section(manifests.get("base", {}), "model"), metrics_of(manifests, "base").get("parameters")
    count = f"{size / 1e6:,.1f}M parameters" if size else ""
    name = model.get("name_or_path")
    if name is None:
        parts = [text.format(model[key]) for key, text in SHAPE.items() if key in model]
        shape = ", ".join(part.removesuffix("s") if part.startswith("1 ") else part for part in parts)
        return [f"trained from scratch: {count}" if count else "trained from scratch", shape]
    commit = model.get("revision") or manifests.get("base", {}).get("inputs", {}).get("hub:model.name_or_path")
    requested = model.get("asked_revision")
    line = f"commit {commit}" if commit else ""
    if commit and requested and requested != commit:
        line += f" (requested: {requested})"
    return [str(name), line, count]


def round_lines(manifests: dict[str, Manifest]) -> list[str]:
    """Return which round this is and what it follows; nothing in round 1."""
    # a stage that was taken from an earlier round records that one
    recorded = [section(manifest, "round") for _, manifest in ordered(manifests)]
    newest = max(recorded, key=number_of, default={})
    if not newest:
        return []
    names = [PurePath(folder).name for folder in newest["earlier"]]
    digests = [f"{stage} {digest[:12]}" for stage, digest in newest["digests"].items()]
    return [f"{newest['number']}, after {', '.join(names)}", f"made of {', '.join(digests)} of {names[-1]}"]


def number_of(recorded: dict[str, Any]) -> int:
    """Return the number of a round; 1 where a manifest records none."""
    return recorded.get("number", 1)


def adapter(manifests: dict[str, Manifest]) -> str:
    """Say which weights are trained: all of them, or those of an adapter."""
    adapters = [peft for _, manifest in ordered(manifests) if (peft := section(manifest, "model").get("peft"))]
    others = {stage: peft for stage, manifest in ordered(manifests) if (peft := section(manifest, stage).get("peft"))}
    text = "all weights, no adapter"
    if adapters:
        peft = adapters[0]
        parts = [f"{key} {shown(value)}" for key, value in peft.items() if key != "method" and value not in (None, 0.0)]
        method = peft.get("method", "lora")
        in_place = method in IN_PLACE
        where = "beside the base model in each published folder" if in_place else "merged into each published model"
        text = f"adapter {method}: {', '.join(parts)}; {where}"
        if peft.get("method") in ("prompt_tuning", "p_tuning"):
            length = peft.get("num_virtual_tokens") or 20
            text = f"{peft['method']}: the embeddings of {length} tokens that the chat template begins with"
    for stage, peft in others.items():
        keys = peft.items() if isinstance(peft, dict) else ()
        parts = [f"{key} {shown(value)}" for key, value in keys if value is not None]
        text += f"; {stage}: {', '.join(parts) or 'all weights'}"
    return text


def hardware(manifests: dict[str, Manifest]) -> list[str]:
    """Describe the machines, one line each."""
    return by_stage((stage, machine(manifest)) for stage, manifest in ordered(manifests))


def machine(manifest: Manifest) -> str:
    """Describe what a stage ran on, as far as its manifest records it."""
    recorded, device = manifest.get("hardware") or {}, manifest.get("device")
    gpus, memory = recorded.get("devices") or 0, recorded.get("device_memory_gb")
    parts = []
    if device and device != "cpu":
        count, size = f"{gpus} × " if gpus > 1 else "", f" ({memory:g} GB)" if memory else ""
        parts.append(f"{count}{device}{size}")
    if recorded.get("cpu"):
        parts.append(recorded["cpu"])
    if recorded.get("cores"):
        parts.append(f"{recorded['cores']:g} cores")
    if recorded.get("memory_gb"):
        parts.append(f"{recorded['memory_gb']:g} GB of memory")
    world_size, threads = manifest.get("world_size"), manifest.get("threads")
    if world_size and threads:
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        each = "1 thread" if threads == 1 else f"{threads} threads"
        strategy = f", {manifest['strategy']}" if manifest.get("strategy") else ""
        parts.append(f"{processes} of {each}{strategy}")
    return " · ".join(parts)


def commands(manifests: dict[str, Manifest]) -> list[str]:
    """Return the commands that ran the stages, one line each; none where they were not recorded."""
    return by_stage((stage, manifest.get("command") or "") for stage, manifest in ordered(manifests))


def code(manifests: dict[str, Manifest]) -> list[str]:
    """Return the git commits that ran, one line each."""
    return by_stage((stage, commit_of(manifest)) for stage, manifest in ordered(manifests))


def by_stage(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Group stages by a text.

    Args:
        pairs: (stage, text) of each stage.

    Returns:
        Each text once; where there are several, with the stages that it belongs to.
    """
    stages: dict[str, list[str]] = {}
    for stage, text in pairs:
        stages.setdefault(text, []).append(stage)
    if len(stages) == 1:
        return [text for text in stages if text]
    return [f"{text or 'not recorded'} ({', '.join(names)})" for text, names in stages.items()]

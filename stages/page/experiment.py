"""What was run: manifests in, a colleague's first questions answered; the lineage of the artifacts. Pure.

Everything here is of the manifests alone, so a page tells of the run that made it and not of today's files.
"""

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import PurePath
from typing import Any, get_args

from stages.page.svg import graph
from stages.page.table import Cell, Table, dense
from stages.page.words import NONE, duration, fixed, moment
from stages.settings.report import STAGES

KINDS = ("documents", "demonstrations", "prompts", "evaluation_prompts", "rankings")
SHAPE = {"hidden_size": "width {}", "num_hidden_layers": "{} layers", "num_attention_heads": "{} heads",
         "vocab_size": "at most {} token ids", "max_position_embeddings": "context of {} tokens"}  # fmt: skip
COMMON = ("model", "tracking", "checkpoints", "launch")  # sections that every manifest records
MANY_SETTINGS = 12


# -- a colleague's first questions -------------------------------------------------------------------------


def facts(manifests: dict[str, dict]) -> list[tuple[str, list[str]]]:
    """Answer what a colleague asks first.

    Args:
        manifests: Stage → its manifest.

    Returns:
        (question, lines of the answer) of each; what no manifest tells is left out or said to be unknown.
    """
    seconds = {stage: seconds_of(m) for stage, m in ordered(manifests)}
    each = " · ".join(f"{stage} {duration(taken)}" for stage, taken in seconds.items())
    found = [
        ("Base model", base_model(manifests)),
        ("What trains", [adapter(manifests)]),
        ("Seed", sorted({str(m["seed"]) for m in manifests.values()})),
        ("Hardware", hardware(manifests)),
        ("Time", [f"{duration(sum(seconds.values()))} in all", each]),
        ("Command", commands(manifests)),
        ("Code", code(manifests)),
        ("Libraries", [" · ".join(f"{k} {v}" for k, v in common_versions(manifests).items())]),
    ]
    return [(question, lines) for question, lines in found if any(lines)]


def ordered(manifests: dict[str, dict]) -> list[tuple[str, dict]]:
    """Return the manifests in the order of the stages."""
    return [(stage, manifests[stage]) for stage in STAGES if stage in manifests]


def seconds_of(manifest: dict) -> float:
    """Return how long a stage took from its first start to its end, in seconds."""
    start, end = (datetime.fromisoformat(manifest[key]) for key in ("started_at", "finished_at"))
    return (end - start).total_seconds()


def base_model(manifests: dict[str, dict]) -> list[str]:
    """Name the model that everything began from: a folder, package or name on the Hub with its commit, or a shape."""
    manifest = manifests.get("base", {})
    model, size = section(manifest, "model"), manifest.get("metrics", {}).get("parameters")
    count = f"{size / 1e6:,.1f}M parameters" if size else ""
    name = model.get("name_or_path")
    if name is None:
        shape = ", ".join(what.format(model[key]) for key, what in SHAPE.items() if key in model)
        return [f"trained from scratch{f': {count}' if count else ''}", shape]
    commit = model.get("revision") or manifest.get("inputs", {}).get("hub:model.name_or_path")
    asked = model.get("asked_revision")
    of_branch = f" (asked for: {asked})" if asked and asked != commit else ""
    return [str(name), f"commit {commit}{of_branch}" if commit else "", count]


def adapter(manifests: dict[str, dict]) -> str:
    """Say which weights train: all of them, or an adapter's."""
    peft = next((p for _, m in ordered(manifests) if (p := section(m, "model").get("peft"))), None)
    if peft is None:
        return "all weights, no adapter"
    method = peft.get("method", "lora")
    rest = [f"{key} {shown(value)}" for key, value in peft.items() if key != "method" and value not in (None, 0.0)]
    return f"adapter {method}: {', '.join(rest)}; merged where a model is published"


def hardware(manifests: dict[str, dict]) -> list[str]:
    """Describe the machines, a line each with the stages that ran there where there were several."""
    return by_stage((stage, machine(m)) for stage, m in ordered(manifests))


def machine(manifest: dict) -> str:
    """Describe what a stage ran on, as far as its manifest tells."""
    found, device = manifest.get("hardware") or {}, manifest.get("device")
    gpus, memory = found.get("devices") or 0, found.get("device_memory_gb")
    parts = []
    if device and device != "cpu":
        count, size = f"{gpus} × " if gpus > 1 else "", f" ({memory:g} GB)" if memory else ""
        parts.append(f"{count}{device}{size}")
    if found.get("cpu"):
        parts.append(found["cpu"])
    parts += [f"{count:g} {what}" for key, what in (("cores", "cores"), ("memory_gb", "GB of memory"))
              if (count := found.get(key))]  # fmt: skip
    size, threads = manifest.get("world_size"), manifest.get("threads")
    if size and threads:
        strategy = f", {manifest['strategy']}" if manifest.get("strategy") else ""
        parts.append(
            f"{'1 process' if size == 1 else f'{size} processes'} of {threads} thread{'s' * (threads != 1)}{strategy}"
        )
    return " · ".join(parts)


def commands(manifests: dict[str, dict]) -> list[str]:
    """List the commands that made the stages, a line each; [] where older versions recorded none."""
    return by_stage((stage, m.get("command") or "") for stage, m in ordered(manifests))


def code(manifests: dict[str, dict]) -> list[str]:
    """Name the git commits that ran."""
    return by_stage((stage, commit_of(m)) for stage, m in ordered(manifests))


def commit_of(manifest: dict, digits: int = 40) -> str:
    git = manifest.get("git")
    return f"git {git['commit'][:digits]}{' + changes' * bool(git['dirty'])}" if git else ""


def by_stage(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return each text once, with the stages that it is of where there are several texts."""
    stages: dict[str, list[str]] = {}
    for stage, text in pairs:
        stages.setdefault(text, []).append(stage)
    if len(stages) == 1:
        return [text for text in stages if text]
    return [f"{text or 'not recorded'} ({', '.join(some)})" for text, some in stages.items()]


def section(manifest: dict, name: str) -> dict[str, Any]:
    found = (manifest.get("config") or {}).get(name)
    return found if isinstance(found, dict) else {}


def shown(value: Any) -> str:
    """A setting's value as YAML would have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# -- data --------------------------------------------------------------------------------------------------


def data_table(manifests: dict[str, dict], results: dict) -> Table | None:
    """List the data by kind: its file, its rows, who read it. None where no manifest names any.

    Rows are those of the file; of data on the Hub, which is not counted when it is named, those that a stage used.
    """
    readers: dict[str, list[str]] = {}
    found: dict[str, dict] = {}
    for stage, manifest in ordered(manifests):
        for kind, source in section(manifest, "data").items():
            if isinstance(source, dict):
                readers.setdefault(kind, []).append(stage)
                ours = sha256_of(manifests, "world", f"{kind}.jsonl") if source["path"] == "world" else None
                found.setdefault(kind, {**source, "digest": manifest["inputs"].get(f"data:{kind}") or ours})
    made, used = manifests.get("world", {}).get("metrics", {}), used_rows(manifests, results)
    rows = []
    for kind in (kind for kind in KINDS if kind in found):
        source = found[kind]
        count = made.get(kind) if source["path"] == "world" else source.get("rows")
        read = rows_read(count, source)
        of = f"{read:,}" if read is not None else f"{used[kind]:,} used" if used.get(kind) is not None else NONE
        part = f"of {count:,} in the file" if read != count else ""
        name = f"{kind}.jsonl" if source["path"] == "world" else file_name(source)
        file = Cell(name, "of the embedded world" if source["path"] == "world" else part_of(source))
        rows.append((Cell(kind.replace("_", " ")), file, Cell(of, part), Cell(", ".join(readers[kind])),
                     Cell((source["digest"] or NONE)[:12], code=True)))  # fmt: skip
    if "rankings" in manifests and "rankings" not in found:
        labelers = Cell("train.jsonl, validation.jsonl", "SFT's samples, ranked by simulated labelers")
        count = manifests["rankings"].get("metrics", {}).get("rankings")
        readers_of = [s for s, m in ordered(manifests) if "rankings" in m["inputs"]]
        rows.append((Cell("rankings"), labelers, Cell(NONE if count is None else f"{count:,}"),
                     Cell(", ".join(readers_of)),
                     Cell((sha256_of(manifests, "rankings", "train.jsonl") or NONE)[:12], code=True)))  # fmt: skip
    head = ("data", "file", "rows", "read by", "sha256")
    return dense(Table("Data by kind", head, tuple(rows), frozenset({0, 1, 3, 4}))) if rows else None


def sha256_of(manifests: dict[str, dict], stage: str, file: str) -> str | None:
    """Return the digest of a file that a stage published, if it did."""
    return manifests.get(stage, {}).get("outputs", {}).get(file, {}).get("sha256")


def rows_read(count: int | None, source: dict) -> int | None:
    """Return how many rows of a file were read, of `count` that it has: those after `skip`, at most `limit`."""
    if count is None:
        return None
    rest = max(0, count - (source.get("skip") or 0))
    return rest if source.get("limit") is None else min(rest, source["limit"])


def used_rows(manifests: dict[str, dict], results: dict) -> dict[str, int | None]:
    """Return how many rows of a kind the stages used, where they say so."""
    metrics = {stage: m.get("metrics", {}) for stage, m in manifests.items()}
    return {
        "demonstrations": metrics.get("sft", {}).get("rows"),
        "rankings": metrics.get("rankings", {}).get("rankings"),
        "evaluation_prompts": results.get("prompts"),
    }


def file_name(source: dict) -> str:
    """Return the name of a file or folder without where it lies; of a data set on the Hub, its whole name."""
    path = source["path"]
    on_hub = "asked_revision" in source or source.get("revision")
    return path if on_hub else PurePath(path).name or path


def part_of(source: dict) -> str:
    """Say which part of a source was read, and of which commit."""
    says = [f"split {source['split']}"] if source.get("split") not in (None, "train") else []
    says += [f"subset {source['subset']}"] if source.get("subset") else []
    says += [f"commit {source['revision'][:7]}"] if source.get("revision") else []
    says += [f"after the first {source['skip']:,}"] if source.get("skip") else []
    says += [f"at most {source['limit']:,} rows"] if source.get("limit") else []
    return ", ".join(says)


# -- settings ----------------------------------------------------------------------------------------------


def defaults_of(experiment: type) -> dict[str, Any]:
    """Return the defaults of an experiment's type, as manifests record settings, by dotted key; inside a section that
    is null by default (model.peft), those that hold once it is given."""
    found: dict[str, Any] = {}
    for name, info in experiment.model_fields.items():
        made = info.get_default(call_default_factory=True)
        if hasattr(made, "model_dump"):
            found |= flat(made.model_dump(mode="json"), name)
            for key, field in type(made).model_fields.items():
                inner = next((kind for kind in get_args(field.annotation) if hasattr(kind, "model_fields")), None)
                for part, inside in inner.model_fields.items() if inner is not None else ():
                    if not inside.is_required():
                        found[f"{name}.{key}.{part}"] = inside.get_default(call_default_factory=True)
    return found


def settings_table(manifests: dict[str, dict], defaults: dict[str, Any]) -> Table | None:
    """List every setting that differs from its default; None where all are as they come.

    Args:
        manifests: Stage → its manifest, which records its own section and those that all share.
        defaults: As `defaults_of`.
    """
    found: dict[tuple[str, str], list[str]] = {}
    known: dict[str, str] = {}
    stages = ordered(manifests)
    for stage, manifest in stages:
        for name in (stage, *COMMON):
            recorded = section(manifest, name)
            for key, value in differing(recorded, name, defaults).items():
                known[key] = shown(defaults.get(key))
                found.setdefault((key, shown(value)), []).append(stage)
        fraction = section(manifest, "data").get("validation_fraction")
        usual = defaults.get("data.validation_fraction")
        if fraction is not None and fraction != usual:
            known["data.validation_fraction"] = shown(usual)
            found.setdefault(("data.validation_fraction", shown(fraction)), []).append(stage)
    overridden = {
        key: values for _, m in stages for key, values in ((m.get("config") or {}).get("overridden") or {}).items()
    }
    several = {key for key, _ in found if sum(key == other for other, _ in found) > 1}
    rows = []
    for key, value in sorted(found, key=lambda item: order_of(item[0])):
        where = f"in {', '.join(found[key, value])}" if key in several else ""
        changed = f"changed on the way: {' → '.join(map(shown, overridden[key]))}" if key in overridden else ""
        small = "; ".join(filter(None, (where, changed)))
        rows.append((Cell(key, code=True), Cell(value, small, code=True), Cell(known[key], code=True)))
    if not rows:
        return None
    label = "Settings that differ from their default"
    folded = f"{label}: {len(rows)}" if len(rows) > MANY_SETTINGS else ""
    return Table(label, ("setting", "value", "default"), tuple(rows), frozenset({0, 1, 2}), folded)


def differing(recorded: dict, prefix: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return what of a recorded section differs from its defaults, by dotted key; a section inside that is null by
    default is {} where it was given with nothing but defaults."""
    found: dict[str, Any] = {}
    for name, value in recorded.items():
        key = f"{prefix}.{name}"
        inner = flat(value, key)
        differs = {k: item for k, item in inner.items() if k not in defaults or item != defaults[k]}
        if not differs and isinstance(value, dict) and key in defaults and defaults[key] is None:
            differs = {key: {}}
        found |= differs
    return found


def flat(value: Any, prefix: str) -> dict[str, Any]:
    """Return nested settings by dotted key; a section that is null is one key."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {key: item for name, inner in value.items() for key, item in flat(inner, f"{prefix}.{name}").items()}


def order_of(key: str) -> tuple[int, str]:
    """Return where a setting stands in the table: the model and data first, then stage by stage."""
    sections = ("model", "data", *STAGES, "checkpoints", "launch", "tracking")
    name = key.split(".")[0]
    return (sections.index(name) if name in sections else len(sections), key)


# -- lineage -----------------------------------------------------------------------------------------------


def lineage_table(manifests: dict[str, dict]) -> Table:
    """A row a stage: what it was made of, when, in how long, by which code."""
    common, rows = common_versions(manifests), []
    for stage, m in ordered(manifests):
        differs = [f"{k} {v}" for k, v in m["versions"].items() if common.get(k) != v]
        differs += [f"{key} overridden" for key in sorted((m.get("config") or {}).get("overridden", {}))]
        inputs = ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(m["inputs"].items()))
        rows.append(
            (
                Cell(stage),
                Cell(m["digest"][:12], code=True),
                Cell(inputs or NONE, code=True),
                Cell(moment(m["finished_at"])),
                Cell(duration(seconds_of(m)), f"{m['resumes']} × resumed" if m["resumes"] else ""),
                Cell(f"{fixed(sum(f['bytes'] for f in m['outputs'].values()) / 1e6, 1)} MB"),
                Cell(str(m["seed"])),
                Cell(commit_of(m, 7).removeprefix("git ") or NONE),
                Cell(", ".join(differs) or NONE),
            )
        )
    head = ("stage", "digest", "made of", "finished", "took", "size", "seed", "code", "differs in")
    if all(row[-1].text == NONE for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return Table("Lineage of the artifacts", head, tuple(rows), frozenset({0, 1, 2, 7, 8}))


def common_versions(manifests: dict[str, dict]) -> dict[str, str]:
    """Versions that all stages ran on."""
    first, *others = [m["versions"] for m in manifests.values()]
    return {k: v for k, v in first.items() if all(o.get(k) == v for o in others)}


def drawing(manifests: dict[str, dict]) -> str:
    """The lineage as a picture; an input that another input already stands on is left to the table."""
    stages = [s for s in STAGES if s in manifests]
    direct = {s: {i for i in manifests[s]["inputs"] if i in stages} for s in stages}
    above: dict[str, set[str]] = {}
    for s in stages:
        above[s] = direct[s].union(*(above[i] for i in direct[s]))
    edges = {s: {i for i in direct[s] if not any(i in above[j] for j in direct[s])} for s in stages}
    last = {s for s in stages if not any(s in e for e in edges.values())}
    nodes = {s: (manifests[s]["digest"][:12], s) for s in stages} | {"report": ("this page", "soft")}
    return graph(nodes, edges | {"report": last})

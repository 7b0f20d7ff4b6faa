"""The README.md of a published model: what it is, what it was made of, and how it is used with transformers alone.

The head of the file is the metadata that the Hub reads (huggingface_hub's ModelCardData). A stage takes over what the
card of the model that it began with says of base model, licence and data sets.
"""

import json
import os
from pathlib import Path
from typing import Any

from pipeline.config.sections import is_hub_id
from pipeline.stage import StageRun
from pipeline.store.files import is_inside
from stages.settings.changed import changed, defaults_of

ANSWER = """\

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "model"  # where this folder is
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], add_generation_prompt=True,
                                       return_dict=True, return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=64)[0, prompt["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

`generate` samples as in training: `generation_config.json` says at which temperature.
"""
SCORE = """\

A score is the logit at the response's EOS, less `reward_bias` of `config.json` (by which demonstrations score 0 on
average): transformers alone does not subtract it.

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "model"  # where this folder is
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], add_generation_prompt=True,
                                       return_dict=False)
response = tokenizer("Hi there.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
score = model(torch.tensor([prompt + response])).logits[0, 0] - model.config.reward_bias
print(score.item())
```
"""
OWN_HEAD = """\

The family has no sequence classification in transformers that serves: the class with the scalar head stands in
scalar_head.py, and transformers loads it with `trust_remote_code=True`.
"""
ADAPTER = """\

## Adapter

`adapter/` holds what was trained apart, for peft: `{auto}.from_pretrained("adapter"{more})`. Its base is
`{base}`{where}.
"""
RELATIVE = """: a path from the folder `adapter/`, right wherever the experiment's folder is moved as a whole.
peft takes it from the working folder, so change into `adapter/` and load `"."`, or give the base yourself:
`PeftModel.from_pretrained({kind}.from_pretrained(BASE{more}), "adapter")`"""
INHERITED = ("base_model", "license", "license_name", "license_link", "datasets")


def use_of(text: str, own_head: bool) -> str:
    """Return the lines by which a model is used.

    Args:
        text: ANSWER, SCORE, or "" for a value model.
        own_head: whether the class of its scalar head is a file of the folder, which those who load it must allow.
    """
    if not own_head:
        return text
    load = "AutoModelForSequenceClassification.from_pretrained(folder"
    return OWN_HEAD + text.replace("tokenizer, model = AutoTokenizer.from_pretrained(folder), " + load + ")",
                                    "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
                                    "model = " + load + ", trust_remote_code=True)")  # fmt: skip


def card(
    ctx: StageRun,
    what: str,
    use: str = "",
    *,
    figures: dict[str, Any] | None = None,
    source: Path | None = None,
    adapter: tuple[str, str | None] | None = None,
    own_head: bool = False,
    is_scalar: bool | None = None,
) -> str:
    """Return the text of a model card, with no path of this machine in it.

    Args:
        ctx: the stage's context.
        what: what the folder holds, as a noun phrase.
        use: the lines of Python that the model is used by, ANSWER or SCORE.
        figures: what was measured; those that are numbers are listed.
        source: the folder of the model that the stage began with, whose card's licence, base model and data sets hold
            here too; None: it began from scratch, or with the model of `model.name_or_path`.
        adapter: (base, revision) of the adapter beside the weights, as `adapters.base_of` names it; None: there is
            none.
        own_head: whether the class of its scalar head is a file of the folder (`families.is_own_head`).
        is_scalar: whether the model has a scalar head; None: whether its use is SCORE.
    """
    manifests = upstream(ctx)
    is_scalar = use == SCORE if is_scalar is None else is_scalar
    metadata = metadata_of(ctx, source, manifests, "classification" if is_scalar else "generation")
    parts = [
        f"---\n{metadata}---\n# {ctx.experiment.name} / {ctx.stage}\n",
        f"This folder holds {what}, made by the stage `{ctx.stage}` of the experiment `{ctx.experiment.name}`. "
        f"`manifest.json` beside it records settings, inputs and digests.\n",
        use_of(use, own_head).lstrip("\n"),
        adapter_lines(adapter, is_scalar).lstrip("\n"),
        origin_lines(ctx, metadata, manifests),
        table("Data", ("kind", "from", "rows", "read by"), data_rows(ctx, manifests)),
        table("Settings that are not the defaults", ("setting", "value"), settings_of(ctx)),
        table("Figures", ("figure", "value"), numbers(figures or {})),
    ]
    return "\n".join(part for part in parts if part)


def adapter_lines(adapter: tuple[str, str | None] | None, is_scalar: bool) -> str:
    """Say how the adapter is loaded; "" without one."""
    if adapter is None:
        return ""
    base, revision = adapter
    task = "SequenceClassification" if is_scalar else "CausalLM"
    more = ", num_labels=1" if task != "CausalLM" else ""
    if not base:
        return "\n## Adapter\n\n`adapter/` holds what was trained apart, on a model that lies outside the experiment.\n"
    kind = f"AutoModelFor{task}"
    if base.startswith("."):
        where = RELATIVE.format(kind=kind, more=more)
    else:
        where = f" at the commit `{revision}`" if revision else ": a path from the folder where `rlhf` ran"
    return ADAPTER.format(auto=f"AutoPeftModelFor{task}", base=base, more=more, where=where)


# -- where it comes from ---------------------------------------------------------------------------------


def upstream(ctx: StageRun) -> dict[str, dict[str, Any]]:
    """Return the manifests of all stages that this one stands on, as far as they lie beside its inputs: {stage:
    manifest}, the nearest first."""
    from pipeline.errors import UserError
    from pipeline.store import files

    found, waiting = {}, [(name, manifest, ctx.inputs[name]) for name, manifest in ctx.manifests.items()]
    while waiting:
        name, manifest, folder = waiting.pop(0)
        if name in found:
            continue
        found[name] = manifest
        for need, digest in manifest.get("inputs", {}).items():
            path = folder.parent / need / "manifest.json"
            if ":" in need or not is_inside(need) or not path.is_file():
                continue
            try:
                further = files.read_sealed(path)
            except UserError:
                continue
            if further.get("digest") == digest:
                waiting.append((need, further, path.parent))
    return found


def metadata_of(ctx: StageRun, source: Path | None, manifests: dict[str, dict], task: str) -> str:
    """Return the YAML at the head of the card. base_model, license and datasets stand there only if they are known."""
    from huggingface_hub import ModelCardData

    name = ctx.experiment.model.name_or_path
    known = inherited(source / "README.md") if source is not None else given_card(name, ctx.model_revision)
    if source is None:
        known.pop("datasets", None)  # what the given model was trained on
        known["base_model"] = name if is_hub_id(name or "") else None
    read = {row[1].split()[0].strip("`,") for row in data_rows(ctx, manifests)}
    known["datasets"] = sorted({*filter(is_hub_id, read), *(known.get("datasets") or ())})
    data = ModelCardData(
        library_name="transformers",
        tags=["rlhf", ctx.stage],
        pipeline_tag=f"text-{task}",
        **{key: value for key, value in known.items() if value},
    )
    return data.to_yaml() + "\n"


def given_card(name: str | None, revision: str | None) -> dict[str, Any]:
    """What the card of `model.name_or_path` says, a folder's or a Hub repository's; {} where there is none."""
    if name is None:
        return {}
    if not is_hub_id(name):
        return inherited(Path(name).expanduser() / "README.md")
    from huggingface_hub import hf_hub_download

    try:
        return inherited(Path(hf_hub_download(name, "README.md", revision=revision)))
    except Exception:  # no card, no network: nothing is known then
        return {}


def inherited(path: Path) -> dict[str, Any]:
    """What holds of a model that is made of the one with this card, by the card's metadata; {} without any."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no file, or one that a person has written as it pleased
        return {}
    return {key: data[key] for key in INHERITED if data.get(key)}


def origin_lines(ctx: StageRun, metadata: str, manifests: dict[str, dict]) -> str:
    """Say which model the chain began with, and under which licence it is."""
    name, base = ctx.experiment.model.name_or_path, manifests.get("base", {})
    if name is None:
        return "The model was trained from scratch by the stage `base`.\n"
    commit = ctx.model_revision or base.get("config", {}).get("model", {}).get("revision")
    what = f"`{name}`" if is_hub_id(name) or name.startswith("package:") else f"the folder `{Path(name).name}`"
    at = f" at the commit `{commit}`" if is_hub_id(name) and commit else ""
    licence = next((line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("license: ")), None)
    under = f"Its card names the licence {licence}." if licence else "Its licence is not known here: see its own card."
    return f"The chain began with {what}{at}. {under}\n"


# -- tables ----------------------------------------------------------------------------------------------


def table(title: str, heads: tuple[str, ...], rows: list[tuple]) -> str:
    """Return a section with a Markdown table; "" without rows."""
    if not rows:
        return ""
    cells = [heads, ["---"] * len(heads), *rows]
    plain = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    lines = [f"| {' | '.join(row)} |" for row in plain]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"


def data_rows(ctx: StageRun, manifests: dict[str, dict]) -> list[tuple]:
    """List the data of this stage and of those that it stands on: (kind, where from, rows, stages that read it)."""
    read: dict[tuple, list[str]] = {}
    records = {ctx.stage: ctx.data} | {name: m.get("config", {}).get("data", {}) for name, m in manifests.items()}
    written = manifests.get("world", {}).get("metrics", {})
    for stage, data in records.items():
        for kind, fact in data.items():
            if isinstance(fact, dict):
                row = (kind, place_of(fact), fact.get("rows") or written.get(kind) or "–")
                read.setdefault(row, []).append(stage)
    return sorted((*row, ", ".join(sorted(stages))) for row, stages in read.items())


def place_of(fact: dict[str, Any]) -> str:
    """Where data are from, as a manifest records it: a file's name without its folder."""
    path = str(fact.get("path"))
    if path == "world":
        return "the embedded world"
    text = f"`{path}`" if is_hub_id(path) else f"`{Path(path).name}`"
    if is_hub_id(path):
        parts = [fact.get("subset"), fact.get("split"), (fact.get("revision") or "")[:7]]
        text += f" {' '.join(part for part in parts if part)}".rstrip()
    text += f", after the first {fact['skip']}" if fact.get("skip") else ""
    return text + (f", {fact['limit']} of them" if fact.get("limit") else "")


def settings_of(ctx: StageRun) -> list[tuple[str, str]]:
    """List the settings of the stage and of its model that are not the defaults."""
    sections = {ctx.stage: ctx.config, "model": ctx.experiment.model}
    rows = {"seed": ctx.seed} if ctx.seed != 0 else {}
    for name, section in sections.items():
        rows |= changed(section.model_dump(mode="json"), defaults_of(type(section), name), name)
    return [(key, f"`{shown(value)}`") for key, value in rows.items()]


def shown(value: Any) -> str:
    """A setting as YAML has it, without the folders of a path."""
    if not isinstance(value, str):
        return json.dumps(value)
    is_path = not is_hub_id(value) and (os.sep in value or value.startswith("~"))
    return Path(value).name if is_path else value


def numbers(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """List the figures that are single numbers."""
    plain = {key: value for key, value in figures.items() if type(value) in (int, float)}
    return [(key, f"{value:.6g}") for key, value in plain.items()]

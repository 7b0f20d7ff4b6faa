"""Write the model card (README.md) of a published model: what it is, its origin, how to use it.

The head of the file is the metadata that the Hub reads (huggingface_hub's ModelCardData). A stage
takes base model, licence and data sets over from the card of the model that it began with.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.sections import is_hub_id
from pipeline.store.integrity import is_inside
from stages.settings.changed import changed, defaults_of
from stages.shared.provenance import Provenance
from stages.shared.runtime import soft_prompt_settings
from stages.shared.source_words import parts_of, reading_words, recorded_rows, short_name

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

`generate` samples as in training, at the temperature of `generation_config.json`.
"""
SCORE = """\

A score is the logit at the response's EOS minus `reward_bias` of `config.json`, which makes demonstrations score 0 on
average. transformers does not subtract it by itself.

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

transformers has no suitable sequence classification for this family: the class with the scalar head is in
scalar_head.py, and transformers loads it with `trust_remote_code=True`.
"""
ADAPTER = """\

## Adapter

`adapter/` holds the trained weights by themselves, for peft: `{auto}.from_pretrained("adapter"{more})`. Its base model
is `{base}`{where}.
"""
RELATIVE = """: a path from the folder `adapter/`, valid as long as the experiment's folder is moved as a whole.
peft resolves it from the working folder, so change into `adapter/` and load `"."`, or give the base yourself:
`PeftModel.from_pretrained({kind}.from_pretrained(BASE{more}), "adapter")`"""
PREFIX_USE = """\

## Adapter

The base model is in `base/`; what was trained are keys and values before every text (prefix tuning), which cannot be
merged into it. Inside this folder, peft loads both with
`PeftModel.from_pretrained({auto}.from_pretrained("base"{more}), ".")` and computes what was trained;
`generate` of peft 0.21 fails under transformers 5 for every prefix. `stages.models.loading.{loader}(folder)` of
rlhf-pipeline loads a model that also generates. transformers alone stops here: it has no prefixes.
"""
BOTTLENECK_USE = """\

## Adapter

The base model is in `base/`; what was trained are bottleneck adapters ({method}), which cannot be merged into it, and
which peft does not have. `stages.models.loading.{loader}(folder)` of rlhf-pipeline loads both; transformers and peft
alone stop here.
"""
SOFT_PROMPT = """\
## Soft prompt

The chat template begins with {count} tokens, `<|soft_prompt_0|>` and so on, whose embeddings were \
trained{others}. They are read and never answered: `generate` leaves them out
(`suppress_tokens` of `generation_config.json`). Other programs have to be told their ids, `soft_prompt_ids` of
`config.json`, for example in vLLM as a `logit_bias` of -100 each.
"""
CONTROL = """\
## Control tokens

The generation prompt of the chat template ends with `{best}`, which asks for a good answer; {others} before an answer
ask for a worse one. They are read and never answered: `generate` leaves them out (`suppress_tokens` of
`generation_config.json`). Other programs have to be told their ids, `control_token_ids` of `config.json`.
"""
INHERITED = ("base_model", "license", "license_name", "license_link", "datasets")


@dataclass(frozen=True)
class ModelCard:
    """Hold what the card of one model says besides its provenance."""

    what: str
    """What the folder holds, as a noun phrase."""
    use: str = ""
    """Python that uses the model: ANSWER, SCORE, or "" for a value model."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What was measured; single numbers are listed."""
    source: Path | None = None
    """Folder of the model that the stage began with.

    Licence, base model and data sets of its card hold here too. None: the stage began from scratch,
    or with model.name_or_path."""
    adapter: tuple[str, str | None] | None = None
    """Base model of the adapter beside the weights (`adapter_base`); None: there is no adapter."""
    own_head: bool = False
    """Whether the class of its scalar head is a file of the folder (`families.is_own_head`)."""
    is_scalar: bool | None = None
    """Whether the model has a scalar head; None: whether its use is SCORE."""
    in_place: str | None = None
    """Method of the adapter that stays in the model; None: there is none."""
    soft_prompt: int = 0
    """Tokens of the soft prompt that the model has."""
    control_tokens: tuple[str, ...] = ()
    """The control tokens that the model has, from worst to best."""


def use_of(text: str, own_head: bool) -> str:
    """Return the lines that show how a model is used.

    Args:
        text: ANSWER, SCORE, or "" for a value model.
        own_head: Whether the class of its scalar head is a file of the folder.
    """
    if not own_head:
        return text
    load = "AutoModelForSequenceClassification.from_pretrained(folder"
    return OWN_HEAD + text.replace("tokenizer, model = AutoTokenizer.from_pretrained(folder), " + load + ")",
                                    "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
                                    "model = " + load + ", trust_remote_code=True)")  # fmt: skip


def card_text(provenance: Provenance, card: ModelCard) -> str:
    """Return the text of a model card. It holds no path of this machine.

    Args:
        provenance: What the model was made of.
        card: What the card says besides.
    """
    manifests = upstream(provenance)
    is_scalar = card.use == SCORE if card.is_scalar is None else card.is_scalar
    metadata = metadata_of(provenance, card.source, manifests, "classification" if is_scalar else "generation")
    experiment, stage = provenance.experiment, provenance.stage
    parts = [
        f"---\n{metadata}---\n# {experiment} / {stage}\n",
        f"This folder holds {card.what}, made by the stage `{stage}` of the experiment `{experiment}`. "
        f"`manifest.json` beside it records settings, inputs and digests.\n",
        (use_of(card.use, card.own_head) if card.in_place is None else in_place_lines(card.in_place, is_scalar)).lstrip(
            "\n"
        ),
        adapter_lines(card.adapter, is_scalar).lstrip("\n"),
        soft_prompt_lines(provenance, card.soft_prompt),
        control_token_lines(provenance.model.control_tokens or card.control_tokens),
        origin_lines(provenance, metadata, manifests),
        table("Data", ("kind", "from", "rows", "read by"), data_rows(provenance, manifests)),
        table("Settings that are not the defaults", ("setting", "value"), settings_of(provenance)),
        table("Figures", ("figure", "value"), numbers(card.figures)),
    ]
    return "\n".join(part for part in parts if part)


def adapter_lines(adapter: tuple[str, str | None] | None, is_scalar: bool) -> str:
    """Return the lines on how the adapter is loaded; "" without one.

    Args:
        adapter: Its base model, as `ModelCard.adapter`.
        is_scalar: Whether the model has a scalar head.
    """
    if adapter is None:
        return ""
    base, revision = adapter
    task = "SequenceClassification" if is_scalar else "CausalLM"
    more = ", num_labels=1" if is_scalar else ""
    if not base:
        return (
            "\n## Adapter\n\n`adapter/` holds the trained weights by themselves, on a base model outside the "
            "experiment.\n"
        )
    kind = f"AutoModelFor{task}"
    if base.startswith("."):
        where = RELATIVE.format(kind=kind, more=more)
    else:
        where = f" at the commit `{revision}`" if revision else ": a path from the folder where `rlhf` ran"
    return ADAPTER.format(auto=f"AutoPeftModelFor{task}", base=base, more=more, where=where)


def in_place_lines(method: str, is_scalar: bool) -> str:
    """Return the lines on how a model is loaded whose adapter stays in it.

    Args:
        method: The adapter's method.
        is_scalar: Whether the model has a scalar head.
    """
    loader = "load_scalar_model" if is_scalar else "load_policy"
    auto = "AutoModelForSequenceClassification" if is_scalar else "AutoModelForCausalLM"
    text = PREFIX_USE if method == "prefix_tuning" else BOTTLENECK_USE
    return text.format(method=method, loader=loader, auto=auto, more=", num_labels=1" if is_scalar else "")


def soft_prompt_lines(provenance: Provenance, has: int) -> str:
    """Return the lines about the tokens of a soft prompt; "" without one.

    Args:
        provenance: What the model was made of.
        has: Tokens of the soft prompt that the model has, whichever stage trained it.
    """
    trained = None if provenance.model.peft is None else soft_prompt_settings(provenance.model.peft)
    if trained is not None:
        others = "; all other\nweights of the language model are the base model's"
        return SOFT_PROMPT.format(count=trained.count, others=others)
    return SOFT_PROMPT.format(count=has, others=" by an earlier stage") if has else ""


def control_token_lines(names: Sequence[str]) -> str:
    """Return the lines about control tokens, given from worst to best; "" without any."""
    if not names:
        return ""
    return CONTROL.format(best=names[-1], others=", ".join(f"`{name}`" for name in names[:-1]))


# -- origin --------------------------------------------------------------------------------------


def upstream(provenance: Provenance) -> dict[str, dict[str, Any]]:
    """Collect the manifests of all stages that led to this one, the nearest first.

    Only stages are found whose artifacts lie beside the inputs, and have not been made again since.

    Returns:
        The manifests, by stage.
    """
    from pipeline.errors import UserError
    from pipeline.store import integrity

    collected: dict[str, dict[str, Any]] = {}
    waiting = [(name, manifest, provenance.inputs[name]) for name, manifest in provenance.manifests.items()]
    while waiting:
        name, manifest, folder = waiting.pop(0)
        if name in collected:
            continue
        collected[name] = manifest
        for need, digest in manifest.get("inputs", {}).items():
            path = folder.parent / need / "manifest.json"
            if ":" in need or not is_inside(need) or not path.is_file():
                continue
            try:
                further = integrity.read_sealed(path)
            except UserError:
                continue
            if further.get("digest") == digest:
                waiting.append((need, further, path.parent))
    return collected


def metadata_of(provenance: Provenance, source: Path | None, manifests: dict[str, dict], task: str) -> str:
    """Return the YAML at the head of the card.

    Args:
        provenance: What the model was made of.
        source: As `ModelCard.source`.
        manifests: Manifests of the stages that led here.
        task: "generation" or "classification".

    Returns:
        YAML; base_model, license and datasets are in it only if they are known.
    """
    from huggingface_hub import ModelCardData

    name = provenance.model.name_or_path
    known = inherited(source / "README.md") if source is not None else given_card(name, provenance.model_revision)
    if source is None:
        known.pop("datasets", None)  # the base model was trained on them, not this one
        known["base_model"] = name if is_hub_id(name or "") else None
    facts = [fact for data in recorded_data(provenance, manifests).values() for fact in data.values()]
    read = {str(part.get("path")) for fact in facts if isinstance(fact, dict) for part in parts_of(fact)}
    known["datasets"] = sorted({*filter(is_hub_id, read), *(known.get("datasets") or ())})
    data = ModelCardData(
        library_name="transformers",
        tags=["rlhf", provenance.stage],
        pipeline_tag=f"text-{task}",
        **{key: value for key, value in known.items() if value},
    )
    return data.to_yaml() + "\n"


def given_card(name: str | None, revision: str | None) -> dict[str, Any]:
    """Return the metadata of the card of `model.name_or_path`; {} where there is none.

    Args:
        name: A folder or a Hub id; None: the chain began from scratch.
        revision: Commit of a Hub id.
    """
    if name is None:
        return {}
    if not is_hub_id(name):
        return inherited(Path(name).expanduser() / "README.md")
    from huggingface_hub import hf_hub_download

    try:
        return inherited(Path(hf_hub_download(name, "README.md", revision=revision)))
    except Exception:  # no card or no network: then nothing is known
        return {}


def inherited(path: Path) -> dict[str, Any]:
    """Return the metadata of a card that also hold for models made from its model."""
    from huggingface_hub import ModelCard as HubCard

    try:
        data = HubCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no file, or one with other metadata than the Hub's
        return {}
    return {key: data[key] for key in INHERITED if data.get(key)}


def origin_lines(provenance: Provenance, metadata: str, manifests: dict[str, dict]) -> str:
    """Return a line on the model that the chain began with, and its licence.

    Args:
        provenance: What the model was made of.
        metadata: YAML of this card.
        manifests: Manifests of the stages that led here.
    """
    name, base = provenance.model.name_or_path, manifests.get("base", {})
    if name is None:
        return "The model was trained from scratch by the stage `base`.\n"
    commit = provenance.model_revision or base.get("config", {}).get("model", {}).get("revision")
    what = f"`{name}`" if is_hub_id(name) or name.startswith("package:") else f"the folder `{Path(name).name}`"
    at = f" at the commit `{commit}`" if is_hub_id(name) and commit else ""
    licence = next((line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("license: ")), None)
    under = f"Its card names the licence {licence}." if licence else "Its licence is not known here: see its own card."
    return f"The chain began with {what}{at}. {under}\n"


# -- tables --------------------------------------------------------------------------------------


def table(title: str, heads: tuple[str, ...], rows: list[tuple]) -> str:
    """Return a section with a Markdown table; "" without rows.

    Args:
        title: Heading of the section.
        heads: Headings of the columns.
        rows: Cells of each row.
    """
    if not rows:
        return ""
    cells = [heads, ["---"] * len(heads), *rows]
    escaped = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"


def recorded_data(provenance: Provenance, manifests: dict[str, dict]) -> dict[str, dict[str, Any]]:
    """Return what is recorded of the data of this stage and of those that led to it, by stage."""
    others = {name: manifest.get("config", {}).get("data", {}) for name, manifest in manifests.items()}
    return {provenance.stage: provenance.data} | others


def data_rows(provenance: Provenance, manifests: dict[str, dict]) -> list[tuple]:
    """List the data of this stage and of the stages that led to it.

    Args:
        provenance: What the model was made of.
        manifests: Manifests of the stages that led here.

    Returns:
        (kind, source, rows, stages that read it) of each.
    """
    readers: dict[tuple, list[str]] = {}
    written = manifests.get("world", {}).get("metrics", {})
    for stage, data in recorded_data(provenance, manifests).items():
        for kind, fact in data.items():
            if isinstance(fact, dict):
                row = (kind, source_of(fact), recorded_rows(fact) or written.get(kind) or "–")
                readers.setdefault(row, []).append(stage)
    return sorted((*row, ", ".join(sorted(stages))) for row, stages in readers.items())


def source_of(fact: dict[str, Any]) -> str:
    """Return where data come from: a Hub id, or a file's name without its folder.

    Args:
        fact: What a manifest records of the data.
    """
    if fact.get("parts"):
        return " + ".join(source_of(part) for part in parts_of(fact))
    path = str(fact.get("path"))
    if path == "world":
        return "the embedded world"
    text = f"`{path}`" if is_hub_id(path) else f"`{short_name(path)}`"
    if is_hub_id(path):
        parts = [fact.get("subset"), fact.get("split"), (fact.get("revision") or "")[:7]]
        text += f" {' '.join(part for part in parts if part)}".rstrip()
    text += f", after the first {fact['skip']}" if fact.get("skip") else ""
    text += f", {fact['limit']} of them" if fact.get("limit") else ""
    words = reading_words(fact)
    return text + (f" ({'; '.join(words)})" if words else "")


def settings_of(provenance: Provenance) -> list[tuple[str, str]]:
    """List the settings of the stage and of its model that are not the defaults."""
    settings: dict[str, Any] = {}
    if provenance.seed != 0:
        settings["seed"] = provenance.seed
    for name, section in ((provenance.stage, provenance.section), ("model", provenance.model)):
        settings |= changed(section.model_dump(mode="json"), defaults_of(type(section), name), name)
    return [(key, f"`{shown(value)}`") for key, value in settings.items()]


def shown(value: Any) -> str:
    """Return a setting's value as YAML writes it; of a path only the last part."""
    if not isinstance(value, str):
        return json.dumps(without_folders(value))
    is_path = not is_hub_id(value) and (os.sep in value or value.startswith("~"))
    return Path(value).name if is_path else value


def without_folders(value: Any) -> Any:
    """Return a JSON value in which absolute paths, also inside of lists, are their last parts."""
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    is_absolute = isinstance(value, str) and value.startswith(("/", "~"))
    return Path(value).name if is_absolute else value


def numbers(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the figures that are single numbers."""
    return [(key, f"{value:.6g}") for key, value in figures.items() if type(value) in (int, float)]

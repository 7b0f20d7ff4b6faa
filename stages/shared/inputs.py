"""Small things that several stage files say in the same words."""

import dataclasses
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from data import sources
from data.records import DataError, prompt_key
from data.streams import derive_seed, grouped_by_length, held_out
from pipeline.config.sections import is_hub_id, local_folder
from pipeline.errors import UserError
from pipeline.fingerprints import source_of
from pipeline.launch import parallel
from pipeline.stage import StageRun


def read(ctx: StageRun, kind: str) -> list:
    """The records of a kind (documents, demonstrations, …) from where the config's `data:` section says."""
    return sources.load(kind, **dataclasses.asdict(ctx.source(kind)))


def read_placed(ctx: StageRun, kind: str) -> tuple[list, list[str]]:
    """As `read`, and the place of each record, for error lines."""
    return sources.load_placed(kind, **dataclasses.asdict(ctx.source(kind)))


def unreadable(experiment, kinds: list[str]) -> list[str]:
    """What is wrong with the first rows of the files that the config names for these kinds, a line each: told before
    anything runs, for the stage that reads them may come after hours."""
    found = []
    for kind in kinds:
        value = getattr(experiment.data, kind)
        source = None if value is None else source_of(value)
        if source is not None and source.path is not None:  # the Hub is not asked for rows, and the world's are ours
            facts = source.path.stat()
            found += faults_in_head(kind, source.path, source.skip, source.limit, (facts.st_mtime_ns, facts.st_size))
    return found


@lru_cache(maxsize=8)  # several stages read the same files
def faults_in_head(kind: str, path: Path, skip: int, limit: int | None, state: tuple) -> tuple[str, ...]:
    """Error lines of a file's first 200 rows after `skip`. state: of the file, so that another is read again."""
    try:
        sources.load_first(kind, path, limit, skip, most=200)
    except DataError as fault:
        return tuple(fault.lines)
    return ()


def device_of(experiment) -> str:
    """ "cpu" or "cuda", as launch.device asks ("auto": a GPU if there is one)."""
    import torch

    asked = experiment.launch.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def dtype_of(experiment) -> str:
    """ "float32" or "bfloat16", as model.dtype asks ("auto": bfloat16 where the hardware computes in it)."""
    import torch

    asked = experiment.model.dtype
    if asked != "auto":
        return asked
    if experiment.launch.device != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    cpu = torch.cpu.get_capabilities()
    return "bfloat16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16") else "float32"


def split_documents(ctx: StageRun) -> tuple[list, list]:
    """The documents (to train on, held out): the same ones for every stage of an experiment."""
    documents = read(ctx, "documents")
    parts = held_out([d.text for d in documents], ctx.experiment.data.validation_fraction)
    return tuple([documents[i] for i in part] for part in parts)


def fit_prompts(ctx: StageRun, tokenizer, prompts, places: list[str]):
    """Prompts that leave room for response_length: (which of them, their ids, LengthReport)."""
    from data.encode import encode_prompts, fit_lengths

    c, ids = ctx.config, encode_prompts(tokenizer, prompts, places)
    kept, ids, _, report = fit_lengths(
        ids,
        [[] for _ in ids],
        max_length=c.max_length - c.response_length,
        on_too_long="drop" if c.on_too_long == "truncate" else c.on_too_long,
        what="prompt",
        names=places,
        section=ctx.stage,
    )
    return kept, ids, report


def context_of(config: dict) -> int | None:
    """The longest row that a model reads, as its config.json names it (of one with a language model inside: there);
    None where it does not."""
    names = ("max_position_embeddings", "n_positions", "seq_length")
    known = (part.get(name) for part in (config.get("text_config") or {}, config) for name in names)
    return next(filter(None, known), None)


def beyond_context(experiment, stage: str, *lengths: str) -> list[str]:
    """Return a line for each length of a stage that is more than the given model reads, where that is a folder of this
    machine: told before anything runs. lengths: settings of the stage beside max_length."""
    folder = local_folder(experiment.model.name_or_path)
    if folder is None or not (folder / "config.json").is_file():
        return []
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:  # base says so
        return []
    context = context_of(config) if isinstance(config, dict) else None
    return too_long_for(context, getattr(experiment, stage), stage, *lengths)


def too_long_for(context: int | None, section, stage: str, *lengths: str) -> list[str]:
    """Return a line for each length of a stage's section that is more than the model's context in tokens; None: it is
    not known."""
    asked = {key: getattr(section, key) for key in ("max_length", *lengths)}
    return [
        f"{stage}.{key}: {length} tokens, and the model's context is {context}; set {stage}.{key} to {context} or less"
        for key, length in asked.items()
        if context is not None and length > context
    ]


def check_context(ctx: StageRun, folder: Path, *lengths: str) -> None:
    """UserError if the stage's max_length, or another of its lengths that is named, is more than the model in `folder`
    can read; a line if it is more than leaves shorter rows as they are."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if lines := too_long_for(context_of(config), ctx.config, ctx.stage, *lengths):
        raise UserError(lines)
    bound, longest = bound_of_short_rows(config), ctx.config.max_length  # others' rows are all as long
    if bound is not None and longest > bound:
        ctx.tracker.say(
            f"{ctx.stage}: a row of more than {bound} tokens changes the numbers of shorter rows beside it (longrope "
            f"positions), and {ctx.stage}.max_length is {longest}; set {ctx.stage}.max_length: {bound}"
        )


def bound_of_short_rows(config: dict) -> int | None:
    """Return the longest row, in tokens, of a batch in which each row's numbers are its own; None where that is any.

    longrope takes other frequencies for a whole batch once one of its rows is longer than
    original_max_position_embeddings. ("dynamic" does so beyond the context, which no row may be.)

    Args:
        config: A model's config.json; of one with a language model inside, that part's settings count.
    """
    found = []
    for part in (config, config.get("text_config") or {}):
        ropes = [rope for name in ("rope_parameters", "rope_scaling") if isinstance(rope := part.get(name), dict)]
        ropes += [rope for kinds in ropes for rope in kinds.values() if isinstance(rope, dict)]  # of kinds of layers
        for rope in ropes:
            if rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
                length = rope.get("original_max_position_embeddings", part.get("original_max_position_embeddings"))
                found += [length] * isinstance(length, int)
    return min(found, default=None)


def is_sharding(ctx: StageRun) -> bool:
    """Whether each of several processes holds a part of what trains (launch.strategy: fsdp2)."""
    return parallel.rank_and_size()[1] > 1 and ctx.experiment.launch.strategy == "fsdp2"


def place(ctx: StageRun, make: Callable, accelerator):
    """make(), a model that trains, on its device; or this process's part of it."""
    from stages.models.roles import settled

    model = settled(make, accelerator, ctx.config.max_length, is_sharding(ctx))
    if ctx.experiment.model.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def note_default_rate(ctx: StageRun, *keys: str) -> None:
    """Say so where adapters train and a learning rate is the default, which suits the training of every weight. keys:
    of the stage's learning rates; by default learning_rate."""
    if ctx.experiment.model.peft is None:
        return
    for key in keys or ("learning_rate",):
        if key not in ctx.config.model_fields_set:
            rate = getattr(ctx.config, key)
            ctx.tracker.say(
                f"{ctx.stage}: {key} is the default {rate:g}, which suits the training of every weight; for adapters "
                f"about ten times as much is usual: {ctx.stage}.{key}={10 * rate:g}"
            )


def adapter_settings(model_section) -> dict | None:
    """The `model.peft` section as keyword arguments; None where every weight trains."""
    peft = model_section.peft
    return (
        None
        if peft is None
        else {
            "method": peft.method,
            "r": peft.r,
            "lora_alpha": peft.lora_alpha,
            "lora_dropout": peft.lora_dropout,
            "target_modules": peft.target_modules,
            "init_r": peft.init_r,
            "bits": (peft.bits or 4) if peft.method == "qlora" else None,
        }
    )


def publish_dtype(ctx: StageRun, source: Path) -> str | None:
    """The dtype that a stage writes weights in, as model.publish_dtype asks, if it is not float32. source: the folder
    of the model that the stage began with."""
    from stages.models.publish import dtype_of_folder

    asked = ctx.experiment.model.publish_dtype
    return dtype_of_folder(source) if asked == "as_given" else asked


def adapter_base(ctx: StageRun, folder: Path, source: Path) -> tuple[str, str | None] | None:
    """Name the base of the adapter in what is published as `folder`, the model in `source`; None where no adapter is
    trained. Base's model goes by its name on the Hub where it is that one, row for row."""
    from stages.models.adapters import base_of

    peft = ctx.experiment.model.peft
    if peft is None or peft.method == "bitfit":
        return None
    base, name = ctx.manifests.get("base"), ctx.experiment.model.name_or_path
    if base is not None and source.parent == ctx.inputs["base"] and base["metrics"].get("same_rows_as_given"):
        if name is not None and is_hub_id(name):
            return name, base["config"]["model"].get("revision")
    home = next(iter(ctx.inputs.values())).parent / ctx.stage  # where the folder will be
    return base_of(source, home / folder.relative_to(ctx.publish))


def count(model) -> str:
    """Parameters of a model, for people: 1.1M."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"


def show_samples(model, tokenizer, prompts, *, seed: int, response_length: int, score=None) -> list[dict]:
    """Rows {prompt, response, score?} for samples.jsonl: one generation a prompt, the same seeds every time;
    none where response_length is 0.

    score: response_texts' ids → numbers, called with (prompt_ids, response_ids).
    """
    if response_length == 0:
        return []
    from data.encode import decode_response, encode_prompt
    from stages.models.sharding import whole
    from stages.rollouts.transformers import sample

    context = context_of(model.config.to_dict()) or 10**9
    room = [(p, ids) for p in prompts if len(ids := encode_prompt(tokenizer, p)) + response_length <= context]
    if not room:
        return []
    prompts, ids = zip(*room, strict=True)
    with whole(model) as reader:
        responses = sample(
            reader,
            ids,
            [derive_seed(seed, "samples", i) for i in range(len(ids))],
            response_length=response_length,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
        )
    rows = [
        {"prompt": p if isinstance(p, str) else list(p), "response": decode_response(tokenizer, r)}
        for p, r in zip(prompts, responses, strict=True)
    ]
    if score is not None:
        for row, value in zip(rows, score(ids, responses), strict=True):
            row["score"] = value
    return rows


def say_off_template(ctx: StageRun, tokenizer, rows: list[tuple], names: list[str], what: str) -> None:
    """Say how many of the stage's rows are not what the chat template writes; nothing where all are.

    Args:
        ctx: The stage's run.
        tokenizer: The tokenizer with its chat template.
        rows: (prompt, answer) of each.
        names: The place of each.
        what: What they are, in the plural.
    """
    from data.agreement import compare, remedy

    if parallel.is_first():
        found = compare(tokenizer, rows, names)
        if found.differ:
            ctx.tracker.say(f"{ctx.stage}: {found.text(what)}; {remedy(tokenizer)}")


def load_groups(ctx: StageRun, tokenizer, split: str, *, max_length: int, on_too_long: str):
    """rankings/SPLIT.jsonl → (PromptGroups with at least one usable pair, LengthReport).

    A response that was cut off has no EOS: its score is read at its last token, as PPO and evaluate read
    that of a sample that met the length limit, and its log-probability is that of its own tokens.
    """
    from data.encode import encode_prompts, encode_response, equal_pairs, fit_lengths
    from data.groups import PromptGroup

    file = ctx.inputs["rankings"] / f"{split}.jsonl"
    rows, places = sources.load_placed("rankings", path=file)
    names = [f"{place} ({r.id})" for place, r in zip(places, rows, strict=True)]
    kept, prompts, responses, report = fit_lengths(
        encode_prompts(tokenizer, (r.prompt for r in rows), names),
        [[encode_response(tokenizer, *answer) for answer in r.answers] for r in rows],
        max_length=max_length,
        on_too_long=on_too_long,
        what="ranking",
        names=names,
        section=ctx.stage,
    )
    same: dict[tuple, list] = {}  # responses that several labelers ranked: one group, computed once
    for i, p, rs in zip(kept, prompts, responses, strict=True):
        report.equal += [names[i]] * equal_pairs(rows[i], rs)
        same.setdefault((prompt_key(rows[i].prompt), rows[i].answers), []).append((p, rs, rows[i]))
    groups = []
    for found in same.values():
        (p, rs, first), rankings = found[0], [row for _, _, row in found]
        names, margins = tuple(r.labeler for r in rankings), tuple(r.margin or 0.0 for r in rankings)
        groups.append(PromptGroup(p, rs, first.ranks, first.id, tuple(r.ranks for r in rankings[1:]), names, margins))
    groups = [g for g in groups if g.pairs()]
    if not groups:
        what = "no usable pair (all ties, unjudged, dropped or equal within max_length)"
        look = f"`rlhf data check {file} -c CONFIG` says more"
        raise DataError([f"{file}: {what}; {look}"])
    return groups, report


def group_order(ctx: StageRun, groups, steps: int, batch_size: int, member: int = 0) -> list[int]:
    """Which groups each of `steps` batches holds, in order: shuffled, like lengths together within four batches.
    member: which of several models; each has an order of its own."""
    lengths = [g.tokens() for g in groups]
    seed = derive_seed(ctx.seed, ctx.stage, *[member] * bool(member))
    return grouped_by_length(lengths, batch_size, steps * batch_size, seed, window=4)


def cut_by_tokens(ctx: StageRun, groups, packed: bool):
    """(batch → its micro-batches, and the same for all of `groups`, which are many): within per_device_train_tokens or
    per_device_train_batch_size prompts. Packed micro-batches are balanced, padded ones of like length."""
    from stages.training.loop import balanced, sorted_chunks

    c = ctx.config
    limits = (c.per_device_train_batch_size, c.per_device_train_tokens)
    if packed:
        tokens = [g.tokens() for g in groups]
        return lambda rows: balanced(rows, tokens, *limits), lambda rows: sorted_chunks(rows, tokens, sum, *limits)
    widths = [len(g.prompt) + max(map(len, g.responses)) for g in groups]
    most = max(len(g.responses) for g in groups)
    padded = lambda rows: sorted_chunks(rows, widths, lambda part: len(part) * most * max(part), *limits)  # noqa: E731
    return padded, padded


def in_parts(ctx: StageRun, groups, packed: bool) -> tuple[list[list[int]], list[int]]:
    """All of `groups` in micro-batches for a forward alone, and the tokens of each."""
    parts = cut_by_tokens(ctx, groups, packed)[1](list(range(len(groups))))
    return parts, [sum(groups[i].tokens() for i in rows) for rows in parts]


def packing(ctx: StageRun, *models) -> bool:
    """Whether rows go through `models` packed, with each prompt computed once; a line says so where they cannot."""
    from stages.models.packing import can_pack

    packs = all([can_pack(model, ctx.config.max_length) for model in models])
    if not packs:
        problem = "this model, or its attention kernel, cannot read packed rows"
        ctx.tracker.say(f"{ctx.stage}: {problem}; each response gets a padded row of its own")
    return packs


def read_world(ctx: StageRun) -> dict | None:
    """world.json of the embedded world; None where the experiment does not use it."""
    if "world" not in ctx.inputs:
        return None
    return json.loads((ctx.inputs["world"] / "world.json").read_text(encoding="utf-8"))

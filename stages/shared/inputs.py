"""Small things that several stage files say in the same words."""

import dataclasses
import json

from data import sources
from data.records import prompt_key
from data.streams import derive_seed, grouped_by_length, held_out
from pipeline.errors import UserError
from pipeline.stage import StageRun


def read(ctx: StageRun, kind: str) -> list:
    """The records of a kind (documents, demonstrations, …) from where the config's `data:` section says."""
    return sources.load(kind, **dataclasses.asdict(ctx.source(kind)))


def read_placed(ctx: StageRun, kind: str) -> tuple[list, list[str]]:
    """As `read`, and the place of each record, for error lines."""
    return sources.load_placed(kind, **dataclasses.asdict(ctx.source(kind)))


def split_documents(ctx: StageRun) -> tuple[list, list]:
    """The documents (to train on, held out): the same ones for every stage of an experiment."""
    documents = read(ctx, "documents")
    parts = held_out([d.text for d in documents], ctx.experiment.data.validation_fraction)
    return tuple([documents[i] for i in part] for part in parts)


def fit_prompts(ctx: StageRun, tokenizer, prompts, places: list[str]):
    """Prompts that leave room for response_length: (which of them, their ids, LengthReport)."""
    from data.encode import encode_prompts
    from data.length_limit import fit_lengths

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


def load_groups(ctx: StageRun, tokenizer, split: str, *, max_length: int, on_too_long: str):
    """rankings/SPLIT.jsonl → (PromptGroups with at least one usable pair, LengthReport).

    A response that was cut off has no EOS: its score is read at its last token, as PPO and evaluate read
    that of a sample that met the length limit, and its log-probability is that of its own tokens.
    """
    from data.encode import encode_prompts, encode_response
    from data.groups import PromptGroup
    from data.length_limit import equal_pairs, fit_lengths

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
        raise UserError([f"{file}: {what}; {look}"])
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


def read_world(ctx: StageRun) -> dict | None:
    """world.json of the embedded world; None where the experiment does not use it."""
    if "world" not in ctx.inputs:
        return None
    return json.loads((ctx.inputs["world"] / "world.json").read_text(encoding="utf-8"))

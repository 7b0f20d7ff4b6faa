"""Measure reward models on RewardBench and RewardBench 2, which nobody here was trained on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.encode import encode_prompts, encode_responses
from data.error_lines import shorten
from data.length_limit import fit_lengths
from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun
from pipeline.tracking import json_value
from stages.evaluation.writing import write_jsonl
from stages.external.bench_rows import Item, read_items
from stages.external.bench_scores import Scored, figures, value_of
from stages.models.ensemble import load_reward_model
from stages.models.forward import score_all
from stages.models.loading import load_tokenizer
from stages.models.packing import can_pack
from stages.models.precision import frozen
from stages.settings.checks import context_of
from stages.settings.experiment import Experiment
from stages.settings.reward_bench import OF_RM, RewardBenchSettings, parts_of
from stages.shared.runtime import Runtime, make_accelerator, runtime_of
from stages.training.session import Session, session_of

PART = 64
"""Items that are scored between two looks at whether the run is to stop."""


@dataclass(frozen=True)
class Encoded:
    """Items as token ids for one model."""

    items: list[Item]
    """Those that fit."""
    prompts: list[list[int]]
    """The prompt of each."""
    responses: list[list[list[int]]]
    """The responses of each."""
    dropped: int
    """Items that were left out because they are too long."""


def run(ctx: StageRun[RewardBenchSettings, Experiment]) -> dict[str, Any]:
    """Score all responses by each model, and publish results.json and bench_scores.jsonl.

    Returns:
        The figures for the manifest.
    """
    settings, session, runtime = ctx.config, session_of(ctx, trains=False), runtime_of(ctx)

    # 1. Read the benchmark.
    read = [read_items(part) for part in parts_of(settings.data)]
    if lines := [line for _, errors in read for line in errors]:
        raise UserError(shorten(lines))
    items = [item for some, _ in read for item in some]
    session.say(f"{len(items):,} items of {len({item.subset for item in items})} subsets")

    # 2. Score every response by each model, with a checkpoint after each.
    folders = model_folders(settings, ctx.inputs.get("rm"))
    checkpoint = session.checkpoints.newest()
    scores: dict[str, Any] = {} if checkpoint is None else checkpoint.state["scores"]
    with session.tracker.progress(len(folders), "reward_bench", len(scores)) as progress:
        for name, folder in folders.items():
            if name in scores:
                continue
            how = ctx.experiment.evaluate.reward_ensemble
            scores[name] = score_items(folder, how, items, settings, runtime, session, (len(scores), len(folders)))
            progress.update(len(scores))
            if len(scores) < len(folders):
                session.checkpoints.save(len(scores), {}, {"scores": scores}, len(folders))
                session.leave_if_requested(len(scores), len(folders))
    ctx.confirm_folders()

    # 3. Compute the figures, and publish.
    results, rows = {}, []
    for name in folders:
        scored = [
            Scored(item, tuple(values))
            for item, values in zip(items, scores[name]["values"], strict=True)
            if values is not None
        ]
        results[name] = figures(scored) | {"dropped": scores[name]["dropped"]}
        rows += [score_row(name, one) for one in scored]
    content = {"models": results, "items": len(items)}
    text = json.dumps(json_value(content), indent=1) + "\n"
    (ctx.publish / "results.json").write_text(text, encoding="utf-8")
    write_jsonl(ctx.publish / "bench_scores.jsonl", rows)
    first = results[next(iter(folders))]
    overall = {key: first[key]["overall"]["value"] for key in ("best_of", "pairs") if first[key]}
    return {"models": len(folders), "items": len(items), "overall": next(iter(overall.values())), **overall}


def model_folders(settings: RewardBenchSettings, rm: Path | None) -> dict[str, Path]:
    """Return the folder of each model to measure, by name.

    Args:
        settings: The section reward_bench.
        rm: The artifact of the stage rm; None if it is not needed.

    Raises:
        UserError: The stage rm trained no such model.
    """
    if settings.models is None:
        assert rm is not None
        return {name: rm / folder for name, folder in OF_RM.items() if (rm / folder).is_dir()}
    folders = {}
    for name in settings.models:
        if name not in OF_RM:
            folders[name] = Path(name).expanduser()
            continue
        assert rm is not None
        folders[name] = rm / OF_RM[name]
        if not folders[name].is_dir():
            raise UserError(f"reward_bench.models: the stage rm trained no {name}; leave it out")
    return folders


def score_items(
    folder: Path,
    how: Any,
    items: Sequence[Item],
    settings: RewardBenchSettings,
    runtime: Runtime,
    session: Session,
    done: tuple[int, int],
) -> dict[str, Any]:
    """Score the responses of all items by one reward model, each rank its share.

    Args:
        folder: The model's folder; with an ensemble beside it, all of its models score.
        how: How an ensemble's scores are combined.
        items: The items.
        settings: The section reward_bench.
        runtime: How the stage computes.
        session: The run.
        done: Models measured before this one, and models in all.

    Returns:
        {"values": the scores of each item's responses, or None for an item that is too long,
        "dropped": how many of those}.
    """
    accelerator = make_accelerator(runtime.device, runtime.dtype)
    model = load_reward_model(folder, how, **runtime.load_options())
    tokenizer = load_tokenizer(folder, trust_remote_code=runtime.trust_remote_code)
    context = context_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    limit = settings.max_length or context
    if limit is None:
        raise UserError(f"reward_bench.max_length: {folder} does not say how long its context is; set max_length")
    if context is not None and limit > context:
        raise UserError(f"reward_bench.max_length: {limit} is over the context of {folder}, {context}; lower it")
    prompts = encode_prompts(tokenizer, (item.prompt for item in items), [item.place for item in items])
    responses = [encode_responses(tokenizer, [(text, True) for text in item.responses]) for item in items]
    kept, prompts, responses, report = fit_lengths(
        prompts,
        responses,
        max_length=limit,
        on_too_long=settings.on_too_long,
        what="item",
        names=[item.place for item in items],
        section="reward_bench",
    )
    if report.dropped or report.truncated:
        session.say(report.line(f"{folder}"))
    packed = can_pack(model, limit)
    model = frozen(model, runtime.dtype).to(accelerator.device)

    def score_parts(mine: list[list[int]]) -> list[list[list[float]]]:
        scored = []
        for part in mine:
            session.leave_if_requested(*done)
            scored.append(score_part([prompts[i] for i in part], [responses[i] for i in part]))
        return scored

    @torch.no_grad()
    def score_part(some_prompts: list[list[int]], some_responses: list[list[list[int]]]) -> list[list[float]]:
        flat = score_all(
            model,
            [prompt for prompt, group in zip(some_prompts, some_responses, strict=True) for _ in group],
            [response for group in some_responses for response in group],
            pad_id=tokenizer.pad_token_id,
            batch_size=settings.batch_size,
            accelerator=accelerator,
            packed=packed,
        ).tolist()
        values = iter(flat)
        return [[next(values) for _ in group] for group in some_responses]

    parts = [list(range(start, min(start + PART, len(kept)))) for start in range(0, len(kept), PART)]
    by_part = parallel.compute_and_all_gather(parts, [len(part) for part in parts], score_parts)
    values: list[list[float] | None] = [None] * len(items)
    for i, scores in zip(kept, (scores for part in by_part for scores in part), strict=True):
        values[i] = scores
    return {"values": values, "dropped": report.dropped}


def score_row(model: str, scored: Scored) -> dict[str, Any]:
    """Return the row of bench_scores.jsonl of an item."""
    item = scored.item
    return {
        "model": model,
        "id": item.id,
        "subset": item.subset,
        "chosen": len(item.chosen),
        "scores": list(scored.scores),
        "value": value_of(scored),
    }

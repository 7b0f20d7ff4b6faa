"""What a stage shows of its models: parameter counts, sample generations, rows that differ from the chat template."""

from data.streams import derive_seed
from pipeline.launch import parallel
from pipeline.stage import StageRun
from stages.settings.checks import context_of


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
    from data.agreement import Answered, compare, remedy

    if parallel.is_rank_zero():
        found = compare(tokenizer, [Answered(*row) for row in rows], names)
        if found.differ:
            ctx.tracker.say(f"{ctx.stage}: {found.text(what)}; {remedy(tokenizer)}")

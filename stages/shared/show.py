"""Show a model to people: its size, its responses, rows that differ from its chat template."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from data.agreement import Answered, compare, remedy
from data.streams import derive_seed
from pipeline.launch import parallel
from stages.settings.checks import context_of
from stages.training.session import Session


def parameter_count(model: nn.Module) -> str:
    """Return the number of a model's parameters for people, in millions: 1.1M."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"


def show_samples(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence,
    *,
    seed: int,
    response_length: int,
    score: Callable[[Sequence, Sequence], Sequence[float]] | None = None,
) -> list[dict]:
    """Sample one response to each prompt, with the same seeds at every call.

    Args:
        model: The policy.
        tokenizer: Its tokenizer, with the chat template.
        prompts: Prompts, each a string or a list of messages; those without room for a response are
            left out.
        seed: The experiment's seed.
        response_length: The most tokens of a response; 0: no samples.
        score: Prompts and responses, as token ids → their scores.

    Returns:
        Rows {prompt, response, score?} for samples.jsonl.
    """
    if response_length == 0:
        return []
    from data.encode import decode_response, encode_prompt
    from stages.models.sharding import gathered
    from stages.rollouts.transformers import sample

    context = context_of(model.config.to_dict()) or 10**9
    encoded = [(p, encode_prompt(tokenizer, p)) for p in prompts]
    fitting = [(p, ids) for p, ids in encoded if len(ids) + response_length <= context]
    if not fitting:
        return []
    prompts, ids = zip(*fitting, strict=True)
    with gathered(model) as reader:
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


def say_off_template(session: Session, tokenizer: Any, rows: Sequence[Answered], names: list[str], what: str) -> None:
    """Print how many rows are not as the chat template writes them; nothing where all are.

    Args:
        session: The run.
        tokenizer: The tokenizer with its chat template.
        rows: Prompt and answer of each row.
        names: The location of each row, for the line.
        what: What the rows are, in the plural.
    """
    if parallel.is_rank_zero():
        comparison = compare(tokenizer, rows, names)
        if comparison.differ:
            session.say(f"{comparison.text(what)}; {remedy(tokenizer)}")

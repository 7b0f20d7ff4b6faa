"""Show a model to people: its size, its responses, rows that differ from its chat template."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from data.agreement import Answered, compare, remedy
from data.streams import derive_seed
from stages.settings.checks import context_of


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
    from stages.rollouts.transformers import Decoding, sample

    context = context_of(model.config.to_dict()) or 10**9
    encoded = [(p, encode_prompt(tokenizer, p)) for p in prompts]
    fitting = [(p, ids) for p, ids in encoded if len(ids) + response_length <= context]
    if not fitting:
        return []
    prompts, ids = zip(*fitting, strict=True)
    seeds = [derive_seed(seed, "samples", i) for i in range(len(ids))]
    decoding = Decoding(response_length, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    with gathered(model) as reader:
        responses = sample(reader, ids, seeds, decoding)
    rows = [
        {"prompt": p if isinstance(p, str) else list(p), "response": decode_response(tokenizer, r)}
        for p, r in zip(prompts, responses, strict=True)
    ]
    if score is not None:
        for row, value in zip(rows, score(ids, responses), strict=True):
            row["score"] = value
    return rows


def off_template_line(tokenizer: Any, rows: Sequence[Answered], names: list[str], total: int, what: str) -> str | None:
    """Say how many rows are not as the chat template writes them; None where all are.

    Args:
        tokenizer: The tokenizer with its chat template.
        rows: Prompt and answer of each row that is compared.
        names: The location of each, for the line.
        total: The number of all rows.
        what: What the rows are, in the plural.
    """
    comparison = replace(compare(tokenizer, rows, names), total=total)
    return f"{comparison.text(what)}; {remedy(tokenizer)}" if comparison.differ else None

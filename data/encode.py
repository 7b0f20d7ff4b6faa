"""Encode prompts, responses and demonstrations as token ids, and decode responses.

A row is `prompt_ids + response_ids`. The prompt is the chat template with its generation prompt.
The response is tokenized on its own and ends with EOS, exactly as the policy will have to produce
it. A response that was cut off has no EOS, so that no model is trained to end there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from data.conversations import encode_conversations
from data.error_lines import shorten
from data.length_limit import LengthReport, fit_lengths
from data.records import Demonstration, as_messages
from data.templates import TemplateOverrun
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF_CHARACTER = "\ufffd"
"""What decoding makes of bytes that are not a whole character."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Iterable[dict]) -> list[int]:
    """Encode one prompt, ready for the assistant's turn.

    Special tokens that occur in a message stay plain text: nobody can end a turn or speak for the
    assistant.

    Args:
        tokenizer: The tokenizer with its chat template.
        prompt: A string, or messages with system and earlier turns.

    Raises:
        UserError: The chat template refuses the prompt.
    """
    messages = as_messages(prompt)
    (ids,) = encode_prompts(tokenizer, [messages], [f"prompt {messages[-1]['content'][:40]!r}"])
    return ids


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str | Iterable[dict]], names: Sequence[str]
) -> list[list[int]]:
    """Encode prompts, each ready for the assistant's turn.

    Args:
        tokenizer: The tokenizer with its chat template.
        prompts: Strings or lists of messages.
        names: The location of each prompt, for error lines.

    Raises:
        UserError: With a line for every prompt that the chat template refuses (some take no system
            message, or only alternating turns), or for the one on which it takes too long.
    """
    conversations = [as_messages(prompt) for prompt in prompts]
    ids: list[list[int]] = []
    problems: list[str] = []
    try:
        encoded = encode_conversations(tokenizer, conversations, add_generation_prompt=True)
        for result, name in zip(encoded, names, strict=True):
            if isinstance(result, TemplateError):
                problem = f"the model's chat template refuses this prompt ({result})"
                problems.append(f"{name}: {problem}; change its messages")
            else:
                ids.append(result)
    except TemplateOverrun as error:  # every other prompt would take as long
        problem = f"the model's chat template fails on this prompt ({error})"
        remedy = "give another template as model.chat_template: FILE, or take another model"
        raise UserError([f"{names[error.index]}: {problem}; {remedy}"]) from error
    if problems:
        raise UserError(shorten(problems))
    return ids


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, finished: bool = True) -> list[int]:
    """Encode a response; special tokens that occur in its text stay plain text.

    Args:
        tokenizer: The tokenizer.
        text: The response.
        finished: Whether it ended by itself, and so gets EOS.
    """
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    if finished:
        ids.append(tokenizer.eos_token_id)
    return ids


def encode_responses(tokenizer: PreTrainedTokenizerBase, answers: Sequence[tuple[str, bool]]) -> list[list[int]]:
    """Encode responses as `encode_response` does, many at once, which is faster.

    Args:
        tokenizer: The tokenizer.
        answers: (text, whether it ended by itself) of each.
    """
    if not answers:
        return []
    texts = [text for text, _ in answers]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    end = tokenizer.eos_token_id
    return [[*ids, end] if finished else list(ids) for ids, (_, finished) in zip(encoded, answers, strict=True)]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decode a response, without special tokens and without blanks at its ends.

    Where the response was cut off inside a character of several bytes, that character is left out:
    it would be encoded as other tokens than were sampled.
    """
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    if not (len(ids) and ids[-1] == tokenizer.eos_token_id):
        text = text.rstrip(HALF_CHARACTER)
    return text.strip()


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Demonstration], *, names: Sequence[str], **limits: Any
) -> tuple[list[int], list[dict[str, list[int]]], LengthReport]:
    """Encode demonstrations as rows whose loss covers only the completion and its EOS.

    Args:
        tokenizer: The tokenizer with its chat template.
        rows: The demonstrations.
        names: The location of each, for error lines.
        limits: max_length, on_too_long and section, as of `fit_lengths`.

    Returns:
        The indices of the rows that are kept; their {input_ids, labels} with the label -100 at
        prompt
        tokens; and what the length limit did.
    """
    prompts = encode_prompts(tokenizer, (row.prompt for row in rows), names)
    responses = [[encode_response(tokenizer, row.completion)] for row in rows]
    kept, prompts, fitted, report = fit_lengths(prompts, responses, what="demonstration", names=names, **limits)
    encoded = []
    for prompt, (response,) in zip(prompts, fitted, strict=True):
        encoded.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    return kept, encoded, report

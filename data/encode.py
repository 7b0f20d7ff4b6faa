"""Encode prompts, responses and demonstrations as token ids, and decode responses.

A row is `prompt_ids + response_ids`. The prompt is the chat template with its generation prompt.
The response is tokenized on its own and ends with EOS, exactly as the policy will have to produce
it. A response that was cut off has no EOS, so that no model is trained to end there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from data.conversations import encode_beginnings, encode_conversations
from data.error_lines import shorten
from data.length_limit import LengthReport, fit_lengths
from data.records import Demonstration, as_messages
from data.templates import TemplateOverrun
from data.turns import Turn, Turns, turns_of
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE = 512
"""Demonstrations that are encoded together."""
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
                problems.append(_refused(name, result))
            else:
                ids.append(result)
    except TemplateOverrun as error:  # every other prompt would take as long
        raise _overrun(names[error.index], error) from error
    if problems:
        raise UserError(shorten(problems))
    return ids


def _refused(name: str, refusal: TemplateError) -> str:
    """Return the error line of a prompt that the chat template refuses."""
    return f"{name}: the model's chat template refuses this prompt ({refusal}); change its messages"


def _overrun(name: str, error: TemplateOverrun) -> UserError:
    """Return the error of a prompt on which the chat template takes too long."""
    problem = f"the model's chat template fails on this prompt ({error})"
    remedy = "give another template as model.chat_template: FILE, or take another model"
    return UserError([f"{name}: {problem}; {remedy}"])


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


# ── demonstrations ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TaughtRow:
    """Hold the token ids of a conversation, or of its beginning, and which of them are taught."""

    ids: list[int]
    """The ids; the last one is taught."""
    spans: list[tuple[int, int]]
    """(begin, end) of each answer that is taught, EOS included, in order."""
    turn: Turn
    """The last turn that it teaches, with which it ends."""


@dataclass
class EncodedDemonstrations:
    """Hold demonstrations as rows of token ids, within a length limit."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    """{input_ids, labels} of each row; a label is -100 where nothing is taught."""
    origins: list[int] = field(default_factory=list)
    """The index of each row's demonstration."""
    turns: list[Turn] = field(default_factory=list)
    """The last turn that each row teaches."""
    answer_tokens: list[int] = field(default_factory=list)
    """The tokens of each answer that is taught, EOS included."""
    apart: list[str] = field(default_factory=list)
    """The location of each earlier answer that has a row of its own."""
    report: LengthReport = field(default_factory=LengthReport)
    """What the length limit did."""

    def apart_text(self, name: str) -> str:
        """Say how many earlier answers have rows of their own, and why.

        Args:
            name: The name of the tokenizer, or of its chat template.
        """
        answers = (
            "1 earlier answer has a row" if len(self.apart) == 1 else f"{len(self.apart):,} earlier answers have rows"
        )
        return (
            f"the chat template of {name} writes earlier answers otherwise than they are sampled: {answers} of "
            f"{'its' if len(self.apart) == 1 else 'their'} own (the first: {self.apart[0]})"
        )


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    names: Sequence[str],
    turns: Turns = "all",
    **limits: Any,
) -> EncodedDemonstrations:
    """Encode demonstrations as rows whose loss covers only the answers that are taught.

    A row that is cut to `max_length` loses its end: an answer that is cut has no EOS, and answers
    after it are lost. The prompt, which is never cut, is what comes before the first answer that is
    taught.

    Args:
        tokenizer: The tokenizer with its chat template.
        demonstrations: The demonstrations.
        names: The location of each, for error lines.
        turns: Which answers are taught.
        limits: max_length, on_too_long and section, as of `fit_lengths`.

    Raises:
        UserError: As of `encode_prompts` and `fit_lengths`.
    """
    encoded = EncodedDemonstrations()
    rows: list[TaughtRow] = []
    origins: list[int] = []
    places: list[str] = []
    for i, own in enumerate(teach(tokenizer, demonstrations, names, turns)):
        for row in own:
            is_last = row is own[-1]
            place = names[i] if is_last else f"{names[i]}, assistant turn {row.turn.number}"
            if not is_last:
                encoded.apart.append(place)
            rows.append(row)
            origins.append(i)
            places.append(place)
    prompts = [row.ids[: row.spans[0][0]] for row in rows]
    answers = [[row.ids[row.spans[0][0] :]] for row in rows]
    kept, prompts, answers, encoded.report = fit_lengths(prompts, answers, what="demonstration", names=places, **limits)
    for i, prompt, (answer,) in zip(kept, prompts, answers, strict=True):
        row, length = rows[i], len(prompt) + len(answer)
        spans = [(begin, min(end, length)) for begin, end in row.spans if begin < length]
        length = spans[-1][1]  # nothing is taught after it
        ids = (prompt + answer)[:length]
        labels = [-100] * length
        for begin, end in spans:
            labels[begin:end] = ids[begin:end]
        encoded.rows.append({"input_ids": ids, "labels": labels})
        encoded.origins.append(origins[i])
        encoded.turns.append(row.turn)
        encoded.answer_tokens += [end - begin for begin, end in spans]
    return encoded


def teach(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], names: Sequence[str], turns: Turns
) -> Iterator[list[TaughtRow]]:
    """Encode each demonstration as the fewest rows in which every answer is as it is sampled.

    An answer is taught after exactly the ids that the policy sees before it: the chat template's,
    of the messages up to there. Where those and the answer begin the row of a later turn, one row
    teaches both. Some templates write earlier turns otherwise (without their thoughts, for
    example), or no EOS after them: such a turn has a row of its own.

    Args:
        tokenizer: The tokenizer with its chat template.
        demonstrations: The demonstrations.
        names: The location of each, for error lines.
        turns: Which answers are taught.

    Yields:
        The rows of each demonstration, of which the last ends with its completion; [] where the
        template refuses it, which raises in the end.

    Raises:
        UserError: With a line for every prompt that the chat template refuses, or for the one on
            which it takes too long.
    """
    problems: list[str] = []
    for first in range(0, len(demonstrations), AT_ONCE):
        taught = [turns_of(demonstration, turns) for demonstration in demonstrations[first : first + AT_ONCE]]
        conversations = [as_messages(own[-1].prompt) for own in taught]
        ends = [[len(as_messages(turn.prompt)) for turn in own] for own in taught]
        try:
            for i, prompts in enumerate(encode_beginnings(tokenizer, conversations, ends), first):
                refused = [(k, ids) for k, ids in enumerate(prompts) if isinstance(ids, TemplateError)]
                encoded = [ids for ids in prompts if not isinstance(ids, TemplateError)]
                if refused:
                    k, refusal = refused[-1]  # usually the whole prompt
                    number = taught[i - first][k].number
                    place = names[i] if k == len(prompts) - 1 else f"{names[i]}, assistant turn {number}"
                    problems.append(_refused(place, refusal))
                    yield []
                else:
                    yield _merge(tokenizer, taught[i - first], encoded)
        except TemplateOverrun as error:
            raise _overrun(names[first + error.index], error) from error
    if problems:
        raise UserError(shorten(problems))


def _merge(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], prompts: Sequence[list[int]]) -> list[TaughtRow]:
    """Return the fewest rows that teach the turns of a conversation, in order of their last turns.

    Args:
        tokenizer: The tokenizer.
        turns: The turns that are taught.
        prompts: The ids of the prompt of each.
    """
    rows: list[TaughtRow] = []
    for turn, prompt in zip(reversed(turns), reversed(prompts), strict=True):
        ids = prompt + encode_response(tokenizer, turn.answer)
        span = (len(prompt), len(ids))
        holder = next((row for row in rows if row.ids[: len(ids)] == ids), None)
        if holder is None:
            rows.append(TaughtRow(ids, [span], turn))
        else:
            holder.spans.insert(0, span)
    return rows[::-1]

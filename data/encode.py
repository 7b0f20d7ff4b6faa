"""Encode prompts, responses and demonstrations as token ids, and decode responses.

A row is `prompt_ids + response_ids`. The prompt is the chat template with its generation prompt.
The response is tokenized on its own and ends with EOS, exactly as the policy will have to produce
it. A response that was cut off has no EOS, so that no model is trained to end there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from data.conversations import encode_beginnings, encode_conversations
from data.error_lines import shorten
from data.length_limit import LengthLimiter, LengthReport
from data.records import Demonstration, as_messages
from data.templates import TemplateOverrun
from data.token_ids import token_ids
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
    problems: list[str] = []
    ids = encode_some_prompts(tokenizer, prompts, names, problems)
    if problems:
        raise UserError(shorten(problems))
    return ids


def encode_some_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[str | Iterable[dict]],
    names: Sequence[str],
    problems: list[str],
) -> list[list[int]]:
    """Encode prompts as `encode_prompts` does, and collect what the chat template refuses.

    Args:
        tokenizer: The tokenizer with its chat template.
        prompts: Strings or lists of messages.
        names: The location of each prompt, for error lines.
        problems: Gets a line for every prompt that the chat template refuses.

    Returns:
        The ids of each prompt; [] of one that is refused.

    Raises:
        UserError: The chat template takes too long on a prompt.
    """
    conversations = [as_messages(prompt) for prompt in prompts]
    ids: list[list[int]] = []
    try:
        encoded = encode_conversations(tokenizer, conversations, add_generation_prompt=True)
        for result, name in zip(encoded, names, strict=True):
            if isinstance(result, TemplateError):
                problems.append(_refused(name, result))
                ids.append([])
            else:
                ids.append(result)
    except TemplateOverrun as error:  # every other prompt would take as long
        raise _overrun(names[error.index], error) from error
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
    encoded = token_ids(tokenizer, [text for text, _ in answers], is_plain=True)
    end = tokenizer.eos_token_id
    return [[*ids, end] if finished else ids for ids, (_, finished) in zip(encoded, answers, strict=True)]


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


@dataclass(frozen=True)
class EncodedRow:
    """Hold a row of token ids within the length limit."""

    ids: list[int]
    """The ids."""
    spans: list[tuple[int, int]]
    """(begin, end) of each answer that is taught."""
    turn: Turn
    """The last turn that it teaches, cut or not."""
    place: str
    """The location of its demonstration."""

    @property
    def labels(self) -> list[int]:
        """Return the ids with -100 where nothing is taught."""
        labels = [-100] * len(self.ids)
        for begin, end in self.spans:
            labels[begin:end] = self.ids[begin:end]
        return labels


@dataclass
class DemonstrationEncoder:
    """Encode demonstrations, some at a time, as rows whose loss covers only what is taught."""

    tokenizer: PreTrainedTokenizerBase
    """The tokenizer with its chat template."""
    limiter: LengthLimiter
    """The length limit; its report counts rows."""
    turns: Turns = "all"
    """Which answers are taught."""
    apart: int = 0
    """Earlier answers so far that have rows of their own."""
    first_apart: str = ""
    """The location of the first of them."""
    problems: list[str] = field(default_factory=list)
    """An error line for each prompt so far that the chat template refuses."""

    def rows(self, demonstrations: Sequence[Demonstration], names: Sequence[str]) -> Iterator[EncodedRow]:
        """Encode some demonstrations.

        A row that is cut to the limit loses its end: an answer that is cut has no EOS, and answers
        after it are lost. The prompt, which is never cut, is what comes before the first answer
        that is taught.

        Args:
            demonstrations: The demonstrations.
            names: The location of each.

        Raises:
            UserError: The chat template takes too long; of all else `finished` tells.
        """
        rows: list[TaughtRow] = []
        origins: list[str] = []
        places: list[str] = []
        taught = teach_some(self.tokenizer, demonstrations, names, self.turns, self.problems)
        for name, own in zip(names, taught, strict=True):
            for row in own:
                is_last = row is own[-1]
                place = name if is_last else f"{name}, assistant turn {row.turn.number}"
                if not is_last:
                    self.apart += 1
                    self.first_apart = self.first_apart or place
                rows.append(row)
                origins.append(name)
                places.append(place)
        prompts = [row.ids[: row.spans[0][0]] for row in rows]
        answers = [[row.ids[row.spans[0][0] :]] for row in rows]
        for i, prompt, (answer,) in zip(*self.limiter.fit(prompts, answers, places), strict=True):
            length = len(prompt) + len(answer)
            spans = [(begin, min(end, length)) for begin, end in rows[i].spans if begin < length]
            ids = (prompt + answer)[: spans[-1][1]]  # nothing is taught after it
            yield EncodedRow(ids, spans, rows[i].turn, origins[i])

    def finished(self) -> LengthReport:
        """Return what the length limit did to all rows.

        Raises:
            UserError: As of `encode_prompts` and `fit_lengths`.
        """
        if self.problems:
            raise UserError(shorten(self.problems))
        return self.limiter.finished()


def apart_text(tokenizer: str, count: int, first: str) -> str:
    """Say how many earlier answers have rows of their own, and why.

    Args:
        tokenizer: The name of the tokenizer, or of its chat template.
        count: The number of these answers.
        first: The location of the first.
    """
    answers = "1 earlier answer has a row" if count == 1 else f"{count:,} earlier answers have rows"
    return (
        f"the chat template of {tokenizer} writes earlier answers otherwise than they are sampled: {answers} of "
        f"{'its' if count == 1 else 'their'} own (the first: {first})"
    )


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
        part = slice(first, first + AT_ONCE)
        yield from teach_some(tokenizer, demonstrations[part], names[part], turns, problems)
    if problems:
        raise UserError(shorten(problems))


def teach_some(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    names: Sequence[str],
    turns: Turns,
    problems: list[str],
) -> Iterator[list[TaughtRow]]:
    """Encode some demonstrations as `teach` does.

    Args:
        tokenizer: The tokenizer with its chat template.
        demonstrations: At most AT_ONCE demonstrations.
        names: The location of each, for error lines.
        turns: Which answers are taught.
        problems: Gets a line for every prompt that the chat template refuses.

    Yields:
        The rows of each demonstration; [] where the template refuses it.
    """
    taught = [turns_of(demonstration, turns) for demonstration in demonstrations]
    conversations = [as_messages(own[-1].prompt) for own in taught]
    ends = [[len(as_messages(turn.prompt)) for turn in own] for own in taught]
    answers = iter(encode_responses(tokenizer, [(turn.answer, True) for own in taught for turn in own]))
    try:
        for i, prompts in enumerate(encode_beginnings(tokenizer, conversations, ends)):
            responses = list(islice(answers, len(taught[i])))
            refused = [(k, ids) for k, ids in enumerate(prompts) if isinstance(ids, TemplateError)]
            encoded = [ids for ids in prompts if not isinstance(ids, TemplateError)]
            if refused:
                k, refusal = refused[-1]  # usually the whole prompt
                number = taught[i][k].number
                place = names[i] if k == len(prompts) - 1 else f"{names[i]}, assistant turn {number}"
                problems.append(_refused(place, refusal))
                yield []
            else:
                yield _merge(taught[i], encoded, responses)
    except TemplateOverrun as error:
        raise _overrun(names[error.index], error) from error


def _merge(turns: Sequence[Turn], prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[TaughtRow]:
    """Return the fewest rows that teach the turns of a conversation, in order of their last turns.

    Args:
        turns: The turns that are taught.
        prompts: The ids of the prompt of each.
        responses: The ids of the answer of each, with EOS.
    """
    rows: list[TaughtRow] = []
    for turn, prompt, response in zip(reversed(turns), reversed(prompts), reversed(responses), strict=True):
        ids = prompt + response
        span = (len(prompt), len(ids))
        holder = next((row for row in rows if row.ids[: len(ids)] == ids), None)
        if holder is None:
            rows.append(TaughtRow(ids, [span], turn))
        else:
            holder.spans.insert(0, span)
    return rows[::-1]

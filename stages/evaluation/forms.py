"""Write a prompt in the form a policy can read, and parse the policy's answer.

Policies trained by this project know the chat template. A base model that was trained from scratch
does not: its corpus never contained the template's tokens, so its response to them says nothing
about what it knows. It is prompted in a form it does know: plain text, as in its corpus, or a few
examples before the question (Brown et al. 2020).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data.documents import document_end
from data.encode import decode_response, encode_prompt, encode_response
from data.records import Demonstration, as_messages

Form = Literal["chat", "plain", "few_shot"]
QUESTION, ANSWER, STOP = "Question: ", "\nAnswer:", "\n\nQuestion:"
DESCRIPTIONS = {
    "chat": "through its own chat template",
    "plain": "in plain text, as in its corpus: the prompt only, and the answer follows",
    "few_shot": "in plain text after a few demonstrations, as question and answer",
}


@dataclass(frozen=True)
class Query:
    """A prompt in the form a policy reads."""

    form: Form
    """How the prompt is written."""
    ids: list[int]
    """Token ids that the answer continues."""
    end_id: int
    """The id that ends an answer."""
    stop: str | None = None
    """Text that ends an answer as well; it is not part of the answer."""


@dataclass(frozen=True)
class Answer:
    """A policy's answer to a query."""

    text: str
    """The answer without special tokens or stop text."""
    finished: bool
    """Whether the answer ended by itself, before the length limit."""
    sampled: list[int]
    """The ids as sampled, up to the end of the answer and with its end id or stop text."""
    response: list[int]
    """The answer's ids as a chat response, with EOS if it is finished; the judges read these."""


def form_of_base(setting: str, name_or_path: str | None) -> Form:
    """Return the form in which the base model is prompted.

    Args:
        setting: `evaluate.base_prompt`: a form, or "auto".
        name_or_path: `model.name_or_path`; None for a model that the stage base trains from
            scratch.

    Returns:
        The form. "auto" is the chat template for a pretrained model, and plain text for one from
        scratch.
    """
    if setting != "auto":
        return setting
    return "plain" if name_or_path is None else "chat"


def make_query(
    tokenizer: Any,
    form: Form,
    prompt: str | Sequence[dict],
    examples: Sequence[Demonstration] = (),
    room: int | None = None,
) -> Query:
    """Write a prompt in a form.

    Args:
        tokenizer: The policy's tokenizer.
        form: One of DESCRIPTIONS.
        prompt: A string, or messages; plain forms join the contents of the messages by newlines.
        examples: Demonstrations to show before the question (few_shot only).
        room: How many ids fit. The first examples are left out until the query fits.

    Returns:
        The query.
    """
    if form == "chat":
        return Query(form, encode_prompt(tokenizer, prompt), tokenizer.eos_token_id)
    if form == "plain":
        return Query(form, _encode_plain(tokenizer, _text_of(prompt)), document_end(tokenizer))
    question = QUESTION + _text_of(prompt) + ANSWER
    for first in range(len(examples) + 1):
        shown = [f"{QUESTION}{_text_of(d.prompt)}{ANSWER} {d.completion}\n\n" for d in examples[first:]]
        ids = _encode_plain(tokenizer, "".join(shown) + question)
        if room is None or len(ids) <= room:
            break
    return Query(form, ids, document_end(tokenizer), STOP)


def parse_answer(tokenizer: Any, query: Query, sampled: list[int]) -> Answer:
    """Extract the answer from sampled ids.

    Args:
        tokenizer: The policy's tokenizer.
        query: The query that was answered.
        sampled: The sampled ids, with the end id if it was sampled.

    Returns:
        The answer. Its `response` is the sampled ids for a chat. For another form it is encoded
        again, because the same text has other ids after the chat template.
    """
    finished = sampled[-1] == query.end_id
    if query.form == "chat":
        return Answer(decode_response(tokenizer, sampled), finished, sampled, sampled)
    if query.stop is not None:
        sampled, stopped = _cut_at(tokenizer, sampled, query.stop)
        finished = finished or stopped
    text = decode_response(tokenizer, sampled)
    if query.stop is not None:
        text = text.partition(query.stop)[0].strip()
    response = encode_response(tokenizer, text)
    if not finished and len(response) > 1:
        response = response[:-1]  # an answer that was cut off has no EOS
    return Answer(text, finished, sampled, response)


def _text_of(prompt: str | Sequence[dict]) -> str:
    """Return a prompt as one text, the contents of its messages on lines of their own."""
    return "\n".join(message["content"] for message in as_messages(prompt))


def _encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Encode the beginning of a document: with BOS if the tokenizer adds one, and without EOS."""
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _cut_at(tokenizer: Any, sampled: list[int], stop: str) -> tuple[list[int], bool]:
    """Cut sampled ids after the first occurrence of a stop text.

    Returns:
        The shortest prefix whose text contains `stop`, and True; all ids and False if none does.
    """
    if stop not in tokenizer.decode(sampled):
        return sampled, False
    # A longer prefix contains `stop` whenever a shorter one does, so the shortest is found by
    # bisection.
    low, high = 1, len(sampled)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if stop in tokenizer.decode(sampled[:middle]) else (middle + 1, high)
    return sampled[:low], True

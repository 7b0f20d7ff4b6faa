"""How a policy is asked for an answer: a prompt in, token ids out; sampled ids in, the answer's text out.

Policies trained here know the chat template. A base model that was trained from scratch does not: its corpus never
held the template's tokens, so its answer to them says nothing of what it knows. It is asked in a form that it does
know: in plain text, as its corpus asks, or with a few examples before the question (Brown et al. 2020).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data.documents import document_end
from data.encode import decode_response, encode_prompt, encode_response
from data.records import Demonstration, as_messages

Form = Literal["chat", "plain", "few_shot"]
QUESTION, ANSWER, STOP = "Question: ", "\nAnswer:", "\n\nQuestion:"
DESCRIPTIONS = {
    "chat": "through its own chat template",
    "plain": "in plain text, as its corpus asks: the prompt alone, the answer follows",
    "few_shot": "in plain text after a few demonstrations, as question and answer",
}


@dataclass(frozen=True)
class Asked:
    """A prompt in a form, ready to be sampled from, and what ends the answer."""

    form: Form
    ids: list[int]
    """Token ids that the answer follows."""
    end_id: int
    """The id that ends an answer."""
    stop: str | None = None
    """Text that also ends an answer; what follows it is not part of it."""


@dataclass(frozen=True)
class Answer:
    """What a policy answered."""

    text: str
    finished: bool
    """Whether the answer ended by itself, before the length limit."""
    sampled: list[int]
    """The ids as they were sampled, to the end of the answer: the end id or the stop text included."""
    response: list[int]
    """The answer's ids as a response of a chat row, EOS included if it is finished: what the judges read."""


def form_of_base(setting: str, name_or_path: str | None) -> Form:
    """Return how base is asked.

    Args:
        setting: `evaluate.base_prompt`: a form, or "auto".
        name_or_path: `model.name_or_path`; None for a model that `base` trains from scratch.

    Returns:
        The form: "auto" gives the chat template of a pretrained model, and plain text for one from scratch.
    """
    if setting != "auto":
        return setting
    return "plain" if name_or_path is None else "chat"


def ask(tokenizer, form: Form, prompt, examples: Sequence[Demonstration] = (), room: int | None = None) -> Asked:
    """Put a prompt into a form.

    Args:
        tokenizer: The policy's tokenizer.
        form: One of DESCRIPTIONS.
        prompt: A string, or messages; plain forms join the messages' contents by newlines.
        examples: Demonstrations shown before the question (few_shot only).
        room: The most ids that fit. Examples are left out from the front until the rest fits.

    Returns:
        The ids to continue and what ends the answer.
    """
    if form == "chat":
        return Asked(form, encode_prompt(tokenizer, prompt), tokenizer.eos_token_id)
    if form == "plain":
        return Asked(form, _plain_ids(tokenizer, _text_of(prompt)), document_end(tokenizer))
    question = QUESTION + _text_of(prompt) + ANSWER
    for first in range(len(examples) + 1):
        shown = [f"{QUESTION}{_text_of(d.prompt)}{ANSWER} {d.completion}\n\n" for d in examples[first:]]
        ids = _plain_ids(tokenizer, "".join(shown) + question)
        if room is None or len(ids) <= room:
            break
    return Asked(form, ids, document_end(tokenizer), STOP)


def answer_of(tokenizer, asked: Asked, sampled: list[int]) -> Answer:
    """Read the answer out of sampled ids.

    Args:
        tokenizer: The policy's tokenizer.
        asked: What was asked.
        sampled: The ids that were sampled, the end id included where it came.

    Returns:
        The answer. A chat answer's ids are those that were sampled; that of another form is encoded again, since
        the same text has other ids behind the chat template.
    """
    finished = sampled[-1] == asked.end_id
    if asked.form == "chat":
        return Answer(decode_response(tokenizer, sampled), finished, sampled, sampled)
    if asked.stop is not None:
        sampled, stopped = _until(tokenizer, sampled, asked.stop)
        finished = finished or stopped
    text = decode_response(tokenizer, sampled)
    if asked.stop is not None:
        text = text.partition(asked.stop)[0].strip()
    response = encode_response(tokenizer, text)
    if not finished and len(response) > 1:
        response = response[:-1]  # a cut answer has no EOS
    return Answer(text, finished, sampled, response)


def _text_of(prompt) -> str:
    return "\n".join(message["content"] for message in as_messages(prompt))


def _plain_ids(tokenizer, text: str) -> list[int]:
    """Encode text as a document begins: with BOS where the tokenizer adds one, and without an end."""
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _until(tokenizer, sampled: list[int], stop: str) -> tuple[list[int], bool]:
    """Return the shortest beginning of `sampled` whose text holds `stop` and True; all of it and False without one."""
    if stop not in tokenizer.decode(sampled):
        return sampled, False
    low, high = 1, len(sampled)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if stop in tokenizer.decode(sampled[:middle]) else (middle + 1, high)
    return sampled[:low], True

"""List the assistant turns of demonstrations that are taught, and count them.

A demonstration is a conversation. Its completion is always taught; the earlier answers that
`learnt` names are taught too, each as what the policy would see: the messages before it, then it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from data.records import Demonstration, Record, as_messages, own_text, prompt_key

Turns = Literal["all", "last"]
"""Which answers are taught: "all" that a demonstration says are learnt, or only its completion."""


class Turn(NamedTuple):
    """Hold one assistant turn that is taught."""

    prompt: str | tuple[dict, ...]
    """The prompt that it answers, as of `Demonstration`."""
    answer: str
    """The text of the turn."""
    number: int
    """Its number among the assistant's turns of the conversation, from 1."""
    row_text: str | None = None
    """What the row of its demonstration says, if that is worded."""

    @property
    def own_text(self) -> str | tuple[dict, ...]:
        """Return what tells its prompt from others, as `records.own_text` does."""
        return self.prompt if self.row_text is None else self.row_text


def turns_of(demonstration: Demonstration, turns: Turns = "all") -> list[Turn]:
    """Return the turns of a demonstration that are taught, in order; the completion is the last.

    Args:
        demonstration: The demonstration.
        turns: Which answers are taught.
    """
    prompt = demonstration.prompt
    taught = []
    if turns == "all" and not isinstance(prompt, str):
        for index in demonstration.learnt:
            number = _answers_in(prompt[: index + 1])
            taught.append(Turn(prompt[:index], prompt[index]["content"], number, demonstration.row_text))
    return [*taught, Turn(prompt, demonstration.completion, _answers_in(prompt) + 1, demonstration.row_text)]


def learnt_prompts(demonstrations: Iterable[Demonstration], turns: Turns = "all") -> list[str | tuple[dict, ...]]:
    """Return the prompt of every turn that is taught: what training knows of prompts.

    Of worded rows it is what the row says.

    Args:
        demonstrations: The demonstrations.
        turns: Which answers are taught.
    """
    return [turn.own_text for demonstration in demonstrations for turn in turns_of(demonstration, turns)]


def conversation_key(prompt: str | Iterable[dict]) -> str:
    """Return a key that is equal for conversations that open alike, up to the first user message.

    Rows are held out by it: the same conversation may be in a file at several depths, and its early
    turns would otherwise be trained on in one row and held out in another. Of a prompt of one turn
    it is the prompt's own key.
    """
    messages = as_messages(prompt)
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages) - 1)
    return prompt_key(messages[: first + 1])


def split_key(record: Record) -> str:
    """Return the key by which a record is held out: its conversation's, or its row's if worded.

    All wordings of a row, with whatever rows before them, are on the same side.
    """
    return conversation_key(own_text(record))


# ── counts ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TurnCount:
    """Count the assistant turns of demonstrations."""

    conversations: int
    """Demonstrations."""
    assistant: int
    """Assistant turns in them."""
    learnt: int
    """Assistant turns that are taught."""

    def __add__(self, other: "TurnCount") -> "TurnCount":
        """Return the count of two sets of demonstrations together."""
        return TurnCount(
            self.conversations + other.conversations, self.assistant + other.assistant, self.learnt + other.learnt
        )

    def text(self) -> str:
        """Say how many turns there are and how many are learnt."""
        number = f"{self.assistant:,} assistant turn" + ("" if self.assistant == 1 else "s")
        if self.learnt == self.assistant:
            return f"{number}, all learnt"
        return f"{number}, {self.learnt:,} learnt"


def count_turns(demonstrations: Iterable[Demonstration], turns: Turns = "all") -> TurnCount:
    """Count the assistant turns of demonstrations, and those that are taught.

    Args:
        demonstrations: The demonstrations.
        turns: Which answers are taught.
    """
    conversations = assistant = learnt = 0
    for demonstration in demonstrations:
        conversations += 1
        assistant += _answers_in(demonstration.prompt) + 1
        learnt += len(turns_of(demonstration, turns))
    return TurnCount(conversations, assistant, learnt)


def _answers_in(prompt: str | tuple[dict, ...]) -> int:
    """Return the number of assistant messages in a prompt."""
    return sum(message["role"] == "assistant" for message in as_messages(prompt))

"""Choose which assistant turns of a conversation a demonstration teaches.

All of them, except those that the data exclude: OpenAI's `weight: 0` in a message, and what other
tools write for it (MARKS).
"""

from collections.abc import Collection

from data.forms.form import LeftOut, Row
from data.parsing import describe

MARKS = ("weight", "loss_weight", "loss", "train", "training", "trainable", "loss_mask", "output_with_loss")
"""Keys of a message that say whether it is learnt: 1 or true, 0 or false; null says nothing."""
UNANSWERED = "the user's message at the end of a conversation, which nobody answers"
AFTER = "the turns after a conversation's last answer that is learnt"
EXCLUDED = "an earlier answer that the data exclude (weight 0): context, not learnt"
NOTHING = "a conversation all of whose answers the data exclude (weight 0)"
GREETING = "a greeting of the assistant before the user's first message: context, not learnt"


def is_excluded(message: Row, position: int, ignore: Collection[str] = ()) -> bool:
    """Return whether a message says that it is not learnt.

    Args:
        message: The message as it is in the file.
        position: Its position among the messages, from 1; for the error line.
        ignore: Keys that the source leaves unread on purpose.
    """
    role = message.get("role", message.get("from"))
    excluded = False
    for key in MARKS:
        value = message.get(key)
        if value is None or key in ignore:
            continue
        if value not in (0, 1):  # True and False are 1 and 0
            raise ValueError(
                f"'{key}' of message {position} is {describe(value)}; expected 0 (not learnt) or 1 (learnt)"
            )
        if value and role in ("user", "human", "system"):
            problem = f"'{key}' of message {position} asks to learn a message of the {role}; only answers are learnt"
            raise ValueError(f"{problem}: take it out, or say ignore: [{key}]")
        excluded = excluded or not value
    return excluded


def taught(messages: list[Row], excluded: Collection[int]) -> list[Row | LeftOut]:
    """Return the demonstration of a conversation, and what of the conversation is not learnt.

    The last answer that is learnt is the completion. Nothing after it can be learnt from.

    Args:
        messages: The checked messages {role, content}.
        excluded: The indices of messages that are not learnt.

    Raises:
        ValueError: There is no answer, or one that is learnt does not follow the user's message.
        LeftOut: No answer is learnt.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no message of the assistant; a conversation needs at least one (prompts: --kind prompts)")
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    greetings = [index for index in answers if not users or index < users[0]]
    learnt = [index for index in answers if index not in excluded and index not in greetings]
    if not learnt:
        if len(greetings) == len(answers):
            raise ValueError("no message of the assistant answers one of the user; a conversation needs at least one")
        raise LeftOut(NOTHING)
    for index in learnt:
        if messages[index - 1]["role"] == "assistant":
            problem = f"messages {index} and {index + 1} are both the assistant's"
            raise ValueError(f"{problem}; join them into one, or take one out")
    last = learnt.pop()
    row = {"prompt": messages[:last], "completion": messages[last]["content"], "learnt": learnt}
    parts: list[LeftOut] = [LeftOut(GREETING) for index in greetings if index < last]
    parts += [LeftOut(EXCLUDED) for index in answers if index in excluded and index < last and index not in greetings]
    rest = [message["role"] for message in messages[last + 1 :]]
    if rest:
        parts.append(LeftOut(AFTER if "assistant" in rest else UNANSWERED))
    return [row, *parts]

"""Convert conversations: {messages} as of OpenAI, {conversations} as of ShareGPT.

A conversation is a list of {role, content} or {from, value}. As a demonstration, its last assistant
turn is the completion and everything before it the prompt, in which the earlier assistant turns are
taught too; as a prompt, it ends with the last user turn.
"""

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.learnt import is_excluded, taught
from data.parsing import describe, parse_message, parse_text

Messages = list[dict]
"""Messages {role, content}, not yet checked as a prompt."""
SPEAKERS = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of the roles."""


def read_messages(value: object, system: object = None, blank_end: bool = False) -> Messages:
    """Read a list of messages; empty system messages are left out.

    Args:
        value: A list of {role, content} or {from, value}.
        system: The content of a system message that goes first, or None.
        blank_end: Whether the last message may be blank.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"the messages are {describe(value)}; expected a list of {{role, content}}")
    messages = []
    if system not in (None, ""):
        messages.append({"role": "system", "content": parse_text({"system": system}, "system")})
    for position, turn in enumerate(value, 1):
        if isinstance(turn, dict):
            if is_empty_system(turn):
                continue
            role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
            turn = {"role": SPEAKERS.get(role, role) if isinstance(role, str) else role, "content": content}
        messages.append(parse_message(turn, position, allow_blank=blank_end and position == len(value)))
    return messages


def is_empty_system(turn: dict) -> bool:
    """Return whether a message is a system message that says nothing."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    return role == "system" and content in (None, "")


def read_prompt(row: dict) -> str | Messages:
    """Read `prompt`, a string or messages, with the system message that may come with it."""
    if isinstance(row["prompt"], list):
        return read_messages(row["prompt"], row.get("system"))
    if row.get("system") in (None, ""):
        return row["prompt"]
    return read_messages([{"role": "user", "content": row["prompt"]}], row["system"])


def read_conversation(row: dict) -> Messages:
    """Read `messages` or `conversations`, with the system message that may come with it."""
    key = "messages" if "messages" in row else "conversations"
    return read_messages(row[key], row.get("system"))


def up_to_last(role: str, messages: Messages) -> Messages:
    """Return the messages up to the last one of a role; ValueError where there is none."""
    ends = [position for position, message in enumerate(messages, 1) if message["role"] == role]
    if not ends:
        raise ValueError(f"no message of the {role}; a conversation needs at least one")
    return messages[: ends[-1]]


def demonstration_of(row: dict, options: Options) -> list[Row | LeftOut]:
    """Take the last assistant turn as the completion; earlier ones are taught too."""
    messages = read_conversation(row)
    turns = row["messages" if "messages" in row else "conversations"]
    kept = [(position, turn) for position, turn in enumerate(turns, 1) if not is_empty_system(turn)]
    added = len(messages) - len(kept)  # the row's own system message
    excluded = {
        index for index, (position, turn) in enumerate(kept, added) if is_excluded(turn, position, options.ignore)
    }
    return taught(messages, excluded)


def prompt_of(row: dict, options: Options) -> dict:
    """Take the conversation up to the last user turn."""
    return {"prompt": up_to_last("user", read_conversation(row))}


MESSAGES_DEMONSTRATION = Form(("messages",), ("system",), demonstration_of)
SHAREGPT_DEMONSTRATION = Form(("conversations",), ("system",), demonstration_of)
MESSAGES_PROMPT = Form(("messages",), ("system",), prompt_of)
SHAREGPT_PROMPT = Form(("conversations",), ("system",), prompt_of)

"""Convert conversations: {messages} as of OpenAI, {conversations} as of ShareGPT, and relatives.

A conversation is a list of {role, content} or {from, value}, of pairs {input, output}, or of texts
that alternate between the user and the assistant; the text of such a list in a cell of a table is
one too. As a demonstration, its last assistant turn is the completion and everything before it the
prompt, in which the earlier assistant turns are taught too; as a prompt, it ends with the last user
turn.
"""

import ast
import json
import re

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.learnt import MARKS, is_excluded, taught
from data.parsing import describe, parse_message, parse_text

Messages = list[dict]
"""Messages {role, content}, not yet checked as a prompt."""
SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "customer": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "gpt-4": "assistant",
    "gpt4": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "claude": "assistant",
    "ai": "assistant",
    "moss": "assistant",
}
"""Names of the roles, in lower case → ours."""
TOOL_SPEAKERS = ("tool", "function", "function_call", "function_response", "observation", "ipython", "tool_call",
                 "tool_response", "tool_calls", "tool_results", "code_interpreter")  # fmt: skip
"""Names of roles that call a tool, or answer for it."""
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text", "parts")
PAIRS = (
    ("input", "output"),
    ("human", "assistant"),
    ("user", "assistant"),
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "response"),
)
"""Keys of a turn that holds the user's text and the assistant's."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are text."""
SYSTEM_KEYS = ("system", "system_prompt", "system_message", "systemInstruction")
"""Keys of the system message that comes beside a conversation or a prompt."""
LIST_OF_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")
"""The beginning of the text of a list of messages."""


# ── one conversation ─────────────────────────────────────────────────────────────────────────────


def read_messages(value: object, system: object = None, blank_end: bool = False) -> Messages:
    """Read a list of messages; empty system messages are left out.

    Args:
        value: A list of {role, content} or {from, value}, as of `turns_of`.
        system: The content of a system message that goes first, or None.
        blank_end: Whether the last message may be blank.
    """
    return read_turns(turns_of(value), system, blank_end)


def read_turns(turns: list[Row], system: object = None, blank_end: bool = False) -> Messages:
    """Check turns that `turns_of` has read, and return them as messages.

    Args:
        turns: Objects with our names of the roles under `role`, and the content under `content`.
        system: The content of a system message that goes first, or None.
        blank_end: Whether the last message may be blank.
    """
    messages = []
    if system not in (None, ""):
        if turns and turns[0].get("role") == "system" and not is_empty_system(turns[0]):
            if turns[0].get("content") != system:
                raise ValueError("the row has a system message of its own beside that of the conversation; keep one")
        else:
            messages.append({"role": "system", "content": parse_text({"system": system}, "system")})
    for position, turn in enumerate(turns, 1):
        if not is_empty_system(turn):
            messages.append(parse_message(turn, position, allow_blank=blank_end and position == len(turns)))
    return messages


def turns_of(value: object) -> list[Row]:
    """Return the turns of a conversation with our names of their roles, unchecked.

    Args:
        value: A list of {role, content} or {from, value}; of pairs {input, output}; the text of
            such a list; or an object of lists {role: […], content: […]}, as `datasets` makes.
    """
    value = from_columns(from_text(value))
    if not isinstance(value, list) or not value:
        raise ValueError(f"the messages are {describe(value)}; expected a list of {{role, content}}")
    turns = []
    for position, turn in enumerate(value, 1):
        pair = pair_keys(turn)
        if pair is not None:
            if turn.get("system") not in (None, ""):
                turns.append({"role": "system", "content": turn["system"]})
            marks = {key: turn[key] for key in MARKS if key in turn}  # they are the answer's
            answer = {"role": "assistant", "content": turn[pair[1]], **marks}
            turns += [{"role": "user", "content": turn[pair[0]]}, answer]
        else:
            turns.append(turn_of(turn, position) if isinstance(turn, dict) else turn)
    return turns


def turn_of(turn: Row, position: int) -> Row:
    """Return a turn with our name of its role, and its content as a text.

    Args:
        turn: The turn as it is in the file.
        position: Its position among the turns, from 1; for the error line.
    """
    role = next((turn[key] for key in ROLE_KEYS if turn.get(key) is not None), None)
    content = next((turn[key] for key in CONTENT_KEYS if turn.get(key) is not None), None)
    if isinstance(role, str):
        name = role.strip().lower()
        if name in TOOL_SPEAKERS:
            raise ValueError(
                f"message {position} is of the role '{role}': turns of tools are not read; take out conversations "
                "that use tools"
            )
        role = SPEAKERS.get(name, role)
    rest = {key: value for key, value in turn.items() if key not in (*ROLE_KEYS, *CONTENT_KEYS)}
    result = {**rest, "content": joined_parts(content, position)}
    return result if role is None else {"role": role, **result}


def joined_parts(content: object, position: int) -> object:
    """Return content parts of the type text as one text, and any other content as it is.

    Args:
        content: A text, or a list of {type: text, text}, {type: text, value} or {text}.
        position: The position of the message, from 1; for the error line.
    """
    if isinstance(content, dict) and "type" in content:
        content = [content]
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part_type(part)
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if isinstance(text, dict):  # the API of assistants: {type: text, text: {value}}
            text = text.get("value")
        if kind not in TEXT_PARTS or not isinstance(text, str):
            what = f"of the type {describe(kind)}" if isinstance(part, dict) else describe(part)
            raise ValueError(
                f"the content of message {position} has a part {what}; only parts of the type text are read"
            )
        texts.append(text)
    return "".join(texts)


def part_type(part: object) -> object:
    """Return the type of a content part; Gemini's and Bedrock's parts are {text} without one."""
    if not isinstance(part, dict):
        return None
    said = {key for key, value in part.items() if value is not None}
    return "text" if said == {"text"} else part.get("type")


def pair_keys(turn: object) -> tuple[str, str] | None:
    """Return the keys of the user's and the assistant's text in a turn; None for one message."""
    if not isinstance(turn, dict) or any(key in turn for key in ROLE_KEYS):
        return None
    return next((pair for pair in PAIRS if pair[0] in turn and pair[1] in turn), None)


def from_text(value: object) -> object:
    """Return the list whose text, as JSON or as Python writes it, is in a cell of a table."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"the messages are the text {describe(value)}, which is no JSON; write a list") from None


def from_columns(value: object) -> object:
    """Return a list of messages where there is an object of lists {role: […], content: […]}."""
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


def is_empty_system(turn: object) -> bool:
    """Return whether a turn is a system message that says nothing."""
    return isinstance(turn, dict) and turn.get("role") == "system" and turn.get("content") in (None, "")


def alternating(texts: list[str]) -> list[Row]:
    """Return the turns of a list of texts, the user's first (LIMA, UltraChat)."""
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────


def system_of(row: Row) -> object:
    """Return the system message beside a prompt or a conversation; None if there is none."""
    if row.keys().isdisjoint(SYSTEM_KEYS):  # nearly all rows
        return None
    value = next((row[key] for key in SYSTEM_KEYS if row.get(key) not in (None, "", [], {})), None)
    if isinstance(value, dict) and "parts" in value:
        value = value["parts"]
    return joined_parts(value, 0) if isinstance(value, list) else value


def read_prompt(row: dict, key: str = "prompt") -> str | Messages:
    """Read a prompt, a string or messages, with the system message that may come with it.

    Args:
        row: The row.
        key: The key of the prompt.
    """
    value, system = row[key], system_of(row)
    if isinstance(value, str) and LIST_OF_MESSAGES.match(value):
        value = from_text(value)
    if isinstance(value, list | dict):
        return read_messages([value] if is_message(value) else value, system)
    if system is None:
        return value if key == "prompt" else parse_text(row, key)
    return read_messages([{"role": "user", "content": value}], system)


def is_message(value: object) -> bool:
    """Return whether a value is one message {role, content}."""
    return isinstance(value, dict) and any(isinstance(value.get(key), str) for key in ROLE_KEYS)


def up_to_last(role: str, messages: Messages) -> Messages:
    """Return the messages up to the last one of a role; ValueError where there is none."""
    ends = [position for position, message in enumerate(messages, 1) if message["role"] == role]
    if not ends:
        raise ValueError(f"no message of the {role}; a conversation needs at least one")
    return messages[: ends[-1]]


# ── the forms ────────────────────────────────────────────────────────────────────────────────────

CONVERSATION_KEYS = ("messages", "conversations", "conversation", "dialogue", "dialog", "contents", "items", "data")
"""Keys of a whole conversation."""


def conversation_turns(row: Row) -> list[Row]:
    """Return the turns of the conversation that a row holds."""
    present = [row[key] for key in CONVERSATION_KEYS if key in row]
    value = from_text(next((value for value in present if value is not None), None))
    if value == []:
        raise LeftOut("a conversation without messages")
    if is_list_of_texts(value):
        assert isinstance(value, list)
        return alternating(value)
    return turns_of(value)


def is_list_of_texts(value: object) -> bool:
    """Return whether a value is a list of nothing but texts."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)


def read_conversation(row: dict) -> Messages:
    """Read the conversation of a row, with the system message that may come with it."""
    return read_turns(conversation_turns(row), system_of(row))


def answers_beside(row: Row) -> list[str]:
    """Return the key of an answer that stands beside a conversation without it; [] if none does."""
    keys = [key for key in ("response", "completion") if isinstance(row.get(key), str) and row[key].strip()]
    if not keys:
        return []
    try:
        last = conversation_turns(row)[-1]
    except ValueError:  # an error later
        return []
    return keys[:1] if isinstance(last, dict) and last.get("role") == "user" else []


def demonstration_of(row: dict, options: Options) -> list[Row | LeftOut]:
    """Take the last assistant turn as the completion; earlier ones are taught too."""
    turns = conversation_turns(row)
    turns += [{"role": "assistant", "content": row[key]} for key in answers_beside(row)]
    messages = read_turns(turns, system_of(row))
    refuse_other_instruction(row, messages, options)
    kept = [(position, turn) for position, turn in enumerate(turns, 1) if not is_empty_system(turn)]
    added = len(messages) - len(kept)  # the row's own system message
    excluded = {
        index for index, (position, turn) in enumerate(kept, added) if is_excluded(turn, position, options.ignore)
    }
    return taught(messages, excluded)


def prompt_of(row: dict, options: Options) -> dict:
    """Take the conversation up to the last user turn."""
    messages = read_conversation(row)
    refuse_other_instruction(row, messages, options)
    return {"prompt": up_to_last("user", messages)}


def refuse_other_instruction(row: Row, messages: Messages, options: Options) -> None:
    """Raise ValueError for an instruction beside a conversation, unless a turn of it says the same.

    Args:
        row: The row.
        messages: Its conversation.
        options: What the source says.
    """
    instruction = row.get("instruction")
    if "instruction" in options.ignore or not isinstance(instruction, str) or not instruction.strip():
        return
    if not any(instruction.strip() in message["content"] for message in messages):
        raise ValueError(
            "the 'instruction' beside the conversation is not in it, and is not read; put it into the conversation, or "
            "say ignore: [instruction]"
        )


def holds_conversation(row: Row) -> bool:
    """Return whether the value under a key that may mean other things is a conversation."""
    value = next(row[key] for key in CONVERSATION_KEYS if key in row)
    if isinstance(value, str):
        return LIST_OF_MESSAGES.match(value) is not None
    if is_list_of_texts(value):
        return "data" in row or "items" not in row
    return isinstance(value, list) and all(is_message(turn) or pair_keys(turn) is not None for turn in value)


def conversation_form(key: str, name: str) -> Form:
    """Return the form of rows with a conversation under a key that may mean other things too.

    Args:
        key: The key.
        name: The data sets that have it.
    """
    return Form(
        needs=(key,),
        also=SYSTEM_KEYS,
        convert=demonstration_of,
        name=name,
        fits=holds_conversation,
        prompt=prompt_of,
        in_messages=frozenset(MARKS),
    )


MESSAGES_DEMONSTRATION = Form(
    ("messages",), SYSTEM_KEYS, demonstration_of, in_messages=frozenset(MARKS), reads=answers_beside
)
SHAREGPT_DEMONSTRATION = Form(
    ("conversations",), SYSTEM_KEYS, demonstration_of, in_messages=frozenset(MARKS), reads=answers_beside
)
CONVERSATION_DEMONSTRATION = conversation_form("conversation", "WildChat, LMSYS-Chat, Capybara or ms-swift")
CONTENTS_DEMONSTRATION = conversation_form("contents", "Gemini")
ITEMS_DEMONSTRATION = conversation_form("items", "ShareGPT with items")
DATA_DEMONSTRATION = conversation_form("data", "UltraChat")
DIALOGUE_DEMONSTRATION = conversation_form("dialogue", "dialogues")
DIALOG_DEMONSTRATION = conversation_form("dialog", "dialogs")
MESSAGES_PROMPT = Form(("messages",), SYSTEM_KEYS, prompt_of)
SHAREGPT_PROMPT = Form(("conversations",), SYSTEM_KEYS, prompt_of)

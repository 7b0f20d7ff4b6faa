r"""Find text that holds a chat template already, and turn it back into messages.

The chat template of the model writes the turns. A prompt that has been through another template
before ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n") would be one user message full of
markers. So transcripts of a human and an assistant, as hh-rlhf writes them, are split into turns,
and text in any other template is an error, until the source says `templated: strip` (take the
template off) or `templated: keep` (it is plain text).

Markers count only where they frame a text: at its beginning or its end. A text about templates, or
one that has markers in its middle, is a text like others.
"""

import re
from dataclasses import dataclass

from data.tool_text import tool_marker

# ── the templates ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Template:
    """Describe how one family of chat templates writes a conversation."""

    name: str
    """Its name in error lines, with the marker that shows it."""
    turn: str
    """Regular expression of what begins a turn; the group that matches is the role."""
    begins: str
    """Regular expression of what a text in this template begins with."""
    ends: str
    """Regular expression of the marker that a prompt ends with, for the answer to follow."""
    end: str = ""
    """Regular expression of what ends a turn; "" if nothing does."""
    closed: bool = False
    """Whether every turn but the last needs an `end`."""
    preamble: str = ""
    """Regular expression of fixed words before the first turn, which are no system message."""
    both: bool = False
    """Whether the markers are words of plain text, so that a text that begins with one is in this
    template only if it has one of the assistant too."""


START = r"(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>|\[gMASK\]\s*(?:<sop>)?|<sop>)"
"""What may stand before the first turn in any template."""
END = (
    r"(?:</s>|<\|im_end\|>|<\|eot_id\|>|<\|eom_id\|>|<\|endoftext\|>|<\|end_of_text\|>|<eos>|<end_of_turn>|<\|end\|>"
    r"|<\|end_of_turn\|>|<｜end▁of▁sentence｜>|<\|eot\|>|<\|return\|>|<\|END_OF_TURN_TOKEN\|>|<eo[mh]>|<turn\|>)"
)
"""What ends a turn or a text in any template."""

BAIZE = Template(
    name="Baize, [|Human|]",
    turn=r"(?P<user>\[\|Human\|\])|(?P<assistant>\[\|(?:AI|Assistant)\|\])",
    begins=r"\[\|Human\|\]",
    ends=r"\[\|(?:AI|Assistant)\|\]",
    preamble=r"The conversation between human and AI assistant\.",
)
TEMPLATES = (
    Template(
        name="ChatML, <|im_start|>",
        turn=r"<\|im_start\|>\s*(?P<system>system|developer)?(?P<user>user|human)?(?P<assistant>assistant)?[ \t]*\n",
        begins=r"<\|im_start\|>",
        ends=r"<\|im_start\|>\s*assistant",
        end=r"<\|im_end\|>",
        closed=True,
    ),
    Template(
        name="Llama 3, <|start_header_id|>",
        turn=r"<\|start_header_id\|>(?P<system>system)?(?P<user>user)?(?P<assistant>assistant)?<\|end_header_id\|>",
        begins=r"<\|start_header_id\|>",
        ends=r"<\|start_header_id\|>assistant<\|end_header_id\|>",
        end=r"<\|eot_id\|>",
        closed=True,
    ),
    Template(
        name="Llama 4, <|header_start|>",
        turn=r"<\|header_start\|>(?P<system>system)?(?P<user>user)?(?P<assistant>assistant)?<\|header_end\|>",
        begins=r"<\|header_start\|>",
        ends=r"<\|header_start\|>assistant<\|header_end\|>",
        end=r"<\|eot\|>",
        closed=True,
    ),
    Template(
        name="Gemma, <start_of_turn>",
        turn=r"<start_of_turn>(?P<system>system|developer)?(?P<user>user)?(?P<assistant>model)?[ \t]*\n",
        begins=r"<start_of_turn>",
        ends=r"<start_of_turn>model",
        end=r"<end_of_turn>",
        closed=True,
    ),
    Template(
        name="Harmony, <|start|>",
        turn=r"<\|start\|>(?P<system>system|developer)?(?P<user>user)?(?P<assistant>assistant)?(?:<\|message\|>|\s*$)",
        begins=r"<\|start\|>",
        ends=r"<\|start\|>assistant",
        end=r"<\|end\|>",
        closed=True,
    ),
    Template(
        name="Zephyr or Phi, <|user|>",
        turn=r"(?P<system><\|system\|>)|(?P<user><\|(?:user|prompter)\|>)|(?P<assistant><\|assistant\|>)",
        begins=r"<\|(?:system|user|prompter|assistant)\|>",
        ends=r"<\|assistant\|>",
        end=r"</s>|<\|end\|>|<\|endoftext\|>",
    ),
    Template(
        name="DeepSeek, <｜User｜>",
        turn=r"(?P<user><｜User｜>)|(?P<assistant><｜Assistant｜>)",
        begins=r"<｜(?:User|Assistant)｜>",
        ends=r"<｜Assistant｜>(?:\s*</?think>)?",
        end=r"<｜end▁of▁sentence｜>",
    ),
    Template(
        name="Cohere, <|START_OF_TURN_TOKEN|>",
        turn=r"<\|START_OF_TURN_TOKEN\|>"
        r"(?:(?P<system><\|SYSTEM_TOKEN\|>)|(?P<user><\|USER_TOKEN\|>)|(?P<assistant><\|CHATBOT_TOKEN\|>))",
        begins=r"(?:<BOS_TOKEN>)?<\|START_OF_TURN_TOKEN\|>",
        ends=r"<\|CHATBOT_TOKEN\|>",
        end=r"<\|END_OF_TURN_TOKEN\|>",
        closed=True,
    ),
    Template(
        name="OpenChat, GPT4 Correct User:",
        turn=r"(?P<user>GPT4(?: Correct)? User:)|(?P<assistant>GPT4(?: Correct)? Assistant:)",
        begins=r"GPT4(?: Correct)? User:",
        ends=r"GPT4(?: Correct)? Assistant:",
        end=r"<\|end_of_turn\|>",
        closed=True,
    ),
    Template(
        name="MOSS, <|Human|>",
        turn=r"(?P<user><\|Human\|>:?)|(?P<assistant><\|(?:MOSS|Assistant|AI)\|>:?)",
        begins=r"<\|Human\|>",
        ends=r"<\|(?:MOSS|Assistant|AI)\|>:?",
        end=r"<eo[mh]>",
    ),
    BAIZE,
    Template(
        name="[INST] of Llama 2 or Mistral",
        turn=r"(?P<system>\[SYSTEM_PROMPT\])|(?P<user>\[INST\])|(?P<assistant>\[/INST\])",
        begins=r"\[INST\]|\[SYSTEM_PROMPT\]|<<SYS>>",
        ends=r"\[/INST\]",
        end=r"\[/SYSTEM_PROMPT\]|</s>\s*<s>|</s>",
    ),
    Template(
        name="Alpaca, ### Instruction:",
        turn=r"(?:^|(?<=\n))(?:(?P<user>### Instruction:)|(?P<assistant>### Response:))",
        begins=r"### Instruction:|Below is an instruction that describes a task",
        ends=r"### Response:",
        preamble=r"Below is an instruction that describes a task[^\n]*",
    ),
    Template(
        name="### Human: and ### Assistant:",
        turn=r"(?P<user>### ?(?:Human|User|USER):)|(?P<assistant>### ?(?:Assistant|ASSISTANT):)",
        begins=r"### ?(?:Human|User|USER):",
        ends=r"### ?(?:Assistant|ASSISTANT):",
    ),
    Template(
        name="<human>: and <bot>:",
        turn=r"(?P<user><human>:)|(?P<assistant><(?:bot|assistant)>:)",
        begins=r"<human>:",
        ends=r"<(?:bot|assistant)>:",
        both=True,
    ),
    Template(
        name="Vicuna, USER: and ASSISTANT:",
        turn=r"(?:^|(?<=\s)|(?<=</s>))(?:(?P<user>USER:)|(?P<assistant>ASSISTANT:))",
        begins=r"USER:",
        ends=r"(?:^|(?<=\s))ASSISTANT:",
        end=r"</s>",
        both=True,
    ),
    Template(
        name="User: and Assistant:",
        turn=r"(?:^|(?<=\n))(?:(?P<user>User:)|(?P<assistant>Assistant:))",
        begins=r"User:",
        ends=r"(?:^|(?<=\n))Assistant:",
        both=True,
    ),
    Template(
        name="Human: and AI:, or User: and Bot:",
        turn=r"(?:^|(?<=\n))(?:(?P<user>(?:Human|User):)|(?P<assistant>(?:AI|Bot|Chatbot):))",
        begins=r"(?:Human|User):",
        ends=r"(?:^|(?<=\n))(?:AI|Bot|Chatbot):",
        both=True,
    ),
)
"""All templates that are known, but that of hh-rlhf."""

# ── what is looked for ───────────────────────────────────────────────────────────────────────────

EDGE = 240
"""Characters at the beginning and at the end of a text in which its frame is looked for."""
FIRST_LETTERS = ("<", "[", "#", "U", "B", "G", "H")
"""What `begins` of a template can begin with: other texts need not be searched."""
LAST_LETTERS = (">", "]", ":", "assistant", "model")
"""What `ends` of a template can end with."""
EDGE_LETTERS = (frozenset(FIRST_LETTERS), frozenset(end[-1] for end in LAST_LETTERS))
"""The first and the last letters that a text in a template can have; also one with a token at its
edge, a transcript, and the turn of a tool."""
TURNS = tuple(re.compile(template.turn) for template in TEMPLATES)
"""`turn` of each template, compiled."""
FRAMES = tuple(
    (template, turn, re.compile(rf"\s*(?:{START})?\s*(?:{template.begins})"), re.compile(rf"(?:{template.ends})\s*$"))
    for template, turn in zip(TEMPLATES, TURNS, strict=True)
)
"""Each template with `turn`, `begins` and `ends`, compiled."""
START_AT_BEGINNING = re.compile(rf"\s*(?P<marker>{START})")
END_AT_END = re.compile(rf"(?:\s*(?P<marker>{END}))+\s*$")
ASSISTANT_TOKEN = re.compile(
    r"\s*(?P<marker><\|im_start\|>\s*assistant|<\|start_header_id\|>assistant|<\|header_start\|>assistant"
    r"|<start_of_turn>model|<\|assistant\|>|<｜Assistant｜>|<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>"
    r"|<\|CHATBOT_TOKEN\|>|<\|(?:MOSS|AI)\|>|\[\|(?:AI|Assistant)\|\]|\[/INST\]|<\|start\|>assistant)"
)
"""Tokens that begin the assistant's turn; none of them is a word of plain text."""
SYSTEM_IN_TURN = re.compile(r"\s*<<SYS>>(?P<system>.*?)<</SYS>>(?P<rest>.*)", re.DOTALL)
"""Llama 2's system message, which is inside the first turn of the user."""
INPUT = re.compile(r"(?:^|\n)### Input:")
"""The second part of the user's turn in Alpaca's template."""

SPEAKERS = {"Human": "user", "Assistant": "assistant"}
HUMAN = re.compile(r"\s*Human:")
HUMAN_LINE = re.compile(r"\n\s*Human:")
ASSISTANT_LINE = re.compile(r"\n[ \t]*Assistant:")
NEXT_TURN = re.compile(r"\n\nHuman:")
AFTER_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*(Human|Assistant):")
AFTER_LINE = re.compile(r"\n\s*(Human|Assistant):")
PREFACED = Template(
    name="Human: and Assistant: behind other words",
    turn=r"\n\s*(?:(?P<user>Human:)|(?P<assistant>Assistant:))",
    begins=r"Human:",
    ends=r"\n\s*Assistant:",
)
"""A transcript behind other words, which may be a system message or the first of some examples."""
WAYS = "say templated: strip (its turns are read, and its markers taken off) or templated: keep (it is plain text)"


class TemplatedText(ValueError):
    """Say that a text holds a chat template, and that the source says nothing about it."""


# ── a row ────────────────────────────────────────────────────────────────────────────────────────


def without_templates(row: dict, templated: str | None) -> dict:
    """Return a row of our own form whose prompt and answers hold no chat template.

    Args:
        row: A row {prompt}, {prompt, completion, …} or {prompt, responses, …}, unchecked.
        templated: What the source says: "strip", "keep" or None.

    Raises:
        TemplatedText: A text is in a template, and the source does not say what to do with it.
        ValueError: The template cannot be taken off exactly.
    """
    if templated == "keep":
        return row
    prompt = prompt_without(row.get("prompt"), templated)
    in_turns = prompt is not row.get("prompt")
    result = {**row, "prompt": prompt} if in_turns else row
    if isinstance(row.get("completion"), str):
        completion = answer_without(row["completion"], templated, in_turns)
        if in_turns and NEXT_TURN.search(completion):
            raise ValueError("the completion goes on with a turn of the human; cut it off there")
        result = {**result, "completion": completion}
    if isinstance(row.get("responses"), list):
        answers = [
            answer_without(one, templated, in_turns) if isinstance(one, str) else one for one in row["responses"]
        ]
        if answers != row["responses"]:
            result = {**result, "responses": answers}
    return result


def prompt_without(prompt: object, templated: str | None) -> object:
    """Return a prompt without templates; the same object where there are none.

    Args:
        prompt: A string or messages, unchecked.
        templated: "strip" or None.
    """
    if isinstance(prompt, str):
        messages = turns_in(prompt, "prompt", templated)
        return prompt if messages is None else unwrapped(messages)
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return prompt
    is_single = [message.get("role") for message in prompt] in (["user"], ["system", "user"])
    result: list[dict] = []
    for position, message in enumerate(prompt, 1):
        what = f"message {position} of the prompt"
        content = message.get("content")
        if not isinstance(content, str):
            return prompt
        if message.get("role") == "assistant":
            result.append({**message, "content": answer_without(content, templated, False, what)})
            continue
        messages = turns_in(content, what, templated)
        if messages is None:
            result.append(message)
        elif [turn["role"] for turn in messages] == ["user"]:
            result.append({**message, "content": messages[0]["content"]})
        elif message.get("role") == "user" and is_single:
            result += messages
        else:
            raise ValueError(f"{what} holds turns of its own; give the whole conversation as messages")
    return prompt if result == prompt else result


def unwrapped(messages: list[dict]) -> str | list[dict]:
    """Return the only user message as a string, and other messages as they are."""
    return messages[0]["content"] if [message["role"] for message in messages] == ["user"] else messages


# ── a prompt, or a whole conversation ────────────────────────────────────────────────────────────


def turns_in(text: str, what: str, templated: str | None) -> list[dict] | None:
    """Return the messages of a text in a template; None for a text that is in none.

    Args:
        text: A prompt, or a whole conversation.
        what: Its name in error lines.
        templated: "strip" or None; transcripts as of hh-rlhf are split in either case.
    """
    if not has_edge_letter(text):
        return None
    refuse_tools(text, what)
    if is_transcript(text):
        return turns_of_transcript(text)
    template = template_of(text)
    marker = marker_at_edge(text) if template is None else template.name
    if marker is None:
        return None
    if templated is None:
        raise TemplatedText(f"the {what} holds a chat template already ({marker}); {WAYS}")
    if template is None:
        return [{"role": "user", "content": without_edges(text)}]
    return turns_of_template(text, what, template)


def has_edge_letter(text: str) -> bool:
    """Return whether a text may hold anything that is looked for: most texts need no search."""
    first, last = EDGE_LETTERS
    return text.lstrip()[:1] in first or text.rstrip()[-1:] in last


def template_of(text: str) -> Template | None:
    """Return the template that frames a text, by its beginning or its end; None if none does."""
    head, tail = text[:EDGE], text[-EDGE:].rstrip()
    begins = text.lstrip()[:1] in FIRST_LETTERS
    ends = tail.endswith(LAST_LETTERS)
    if not begins and not ends:
        return None
    for template, turn, begin, end in FRAMES:
        if (begins and begin.match(head)) or (ends and end.search(tail)):
            roles = {mark.lastgroup for mark in turn.finditer(text)}
            if not template.both or {"user", "assistant"} <= roles:
                return template
    if tail.endswith("Assistant:") and HUMAN_LINE.search(text) and ASSISTANT_LINE.search(tail):
        return PREFACED
    return None


def turns_of_template(text: str, what: str, template: Template) -> list[dict]:
    """Take a template off a text, and return its messages; the last may be the assistant's.

    Args:
        text: The text.
        what: Its name in error lines.
        template: The template that frames it.

    Raises:
        ValueError: The text is not exactly what the template writes.
    """
    failed = ValueError(
        f"the {what} holds a chat template ({template.name}) that cannot be taken off exactly; write the "
        "conversation as messages, or say templated: keep"
    )
    text = START_AT_BEGINNING.sub("", text, count=1)
    marks = list(re.finditer(template.turn, text))
    if not marks:
        raise failed
    messages: list[dict] = []
    preface = text[: marks[0].start()].strip()
    if preface and not (template.preamble and re.fullmatch(template.preamble, preface, re.DOTALL)):
        if template.closed:
            raise failed
        messages.append({"role": "system", "content": preface})
    for number, mark in enumerate(marks, 1):
        is_last = number == len(marks)
        content = text[mark.end() : len(text) if is_last else marks[number].start()]
        end = re.search(rf"(?:{template.end})\s*$", content) if template.end else None
        if end is not None:
            content = content[: end.start()]
        elif template.closed and not (is_last and mark.lastgroup == "assistant"):
            raise failed
        if mark.lastgroup is None:  # a role that is none of ours
            raise failed
        messages += turns_of_content(mark.lastgroup, content)
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()  # where the answer begins
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    expected = ["assistant" if i % 2 else "user" for i in range(len(turns))]
    if not turns or [turn["role"] for turn in turns] != expected:
        raise failed
    if any(not message["content"] or re.search(END, message["content"]) for message in messages):
        raise failed
    return messages


def turns_of_content(role: str, content: str) -> list[dict]:
    """Return the messages of one turn: Llama 2 writes the system message into the user's.

    Args:
        role: The role of the turn.
        content: What stands between its marker and the next.
    """
    messages = []
    system = SYSTEM_IN_TURN.fullmatch(content) if role == "user" else None
    if system is not None:
        if system["system"].strip():
            messages.append({"role": "system", "content": system["system"].strip()})
        content = system["rest"]
    if role == "user":
        content = "\n".join(part.strip() for part in INPUT.split(content) if part.strip())
    return [*messages, {"role": role, "content": content.strip()}]


def refuse_tools(text: str, what: str) -> None:
    """Raise TemplatedText where a text is the turn of a tool, or calls one.

    Args:
        text: A prompt, a message or an answer.
        what: Its name in the error line.
    """
    marker = tool_marker(text)
    if marker is not None:
        raise TemplatedText(
            f"the {what} calls a tool, or is a tool's result, written as text ({marker}); take out conversations that "
            "use tools, or say templated: keep (it is plain text)"
        )


# ── an answer ────────────────────────────────────────────────────────────────────────────────────


def answer_without(text: str, templated: str | None, in_turns: bool, what: str = "answer") -> str:
    """Return an answer without the markers at its beginning and its end.

    Args:
        text: The answer.
        templated: "strip" or None.
        in_turns: Whether the prompt was in a template, so that blanks around the answer, and the
            assistant's marker before it, are the template's too.
        what: Its name in error lines.
    """
    if not in_turns and not has_edge_letter(text):
        return text
    refuse_tools(text, what)
    token = begins_as_assistant(text)
    marker = marker_at_edge(text) or token
    if marker is not None and templated is None:
        raise TemplatedText(f"the {what} holds a chat template already ({marker}); {WAYS}")
    if marker is None and not in_turns:
        return text
    stripped = without_edges(text) if marker is not None else text.strip()
    if in_turns or token is not None:
        marks = (turn.match(stripped) for turn in TURNS)
        mark = next((mark for mark in marks if mark is not None and mark.lastgroup == "assistant"), None)
        stripped = stripped[mark.end() :] if mark is not None else stripped
    if in_turns:
        stripped = stripped.removeprefix("Assistant:")
    return stripped.strip()


def begins_as_assistant(text: str) -> str | None:
    """Return the token at the beginning of an answer that begins the assistant's turn, if any."""
    if text.lstrip()[:1] not in ("<", "["):
        return None
    mark = ASSISTANT_TOKEN.match(text[:EDGE])
    return mark["marker"] if mark is not None else None


def marker_at_edge(text: str) -> str | None:
    """Return the token that begins or ends a text as a whole; None if there is none.

    `<s>` and `</s>` around a few words of a text are HTML.
    """
    if text.lstrip()[:1] in ("<", "["):
        start = START_AT_BEGINNING.match(text)
        if start is not None and not (start["marker"] == "<s>" and is_html(text)):
            return start["marker"].strip()
    if text.rstrip()[-1:] == ">":
        end = END_AT_END.search(text[-EDGE:])
        if end is not None and not (end["marker"] == "</s>" and is_html(text)):
            return end["marker"]
    return None


def is_html(text: str) -> bool:
    """Return whether `<s>` and `</s>` come in pairs that are only a part of a text."""
    if text.count("<s>") != text.count("</s>"):
        return False
    whole = text.lstrip().startswith("<s>") and text.rstrip().endswith("</s>")
    return not (whole and text.count("<s>") == 1)


def without_edges(text: str) -> str:
    """Return a text without the tokens at its beginning and its end, and blanks beside them."""
    return END_AT_END.sub("", START_AT_BEGINNING.sub("", text, count=1)).strip()


# ── transcripts as of hh-rlhf ────────────────────────────────────────────────────────────────────


def is_transcript(text: str) -> bool:
    r"""Return whether a text is a transcript: "\n\nHuman: …\n\nAssistant: …" from its beginning.

    Without the blank line before it, "Human:" may be what a text is about. Then a line has to begin
    with "Assistant:" too.
    """
    if "Human:" not in text or HUMAN.match(text) is None:
        return False
    return text.startswith("\n\nHuman:") or ASSISTANT_LINE.search(text) is not None


def turns_of_transcript(text: str) -> list[dict]:
    """Split a transcript into messages; an empty turn of the assistant at its end is left out."""
    has_blank_lines = text.startswith("\n\nHuman:") or "\n\nAssistant:" in text
    marker = AFTER_BLANK_LINE if has_blank_lines else AFTER_LINE
    parts = marker.split("\n\n" + text.strip())[1:]
    turns = zip(parts[::2], parts[1::2], strict=True)
    messages: list[dict] = [{"role": SPEAKERS[name], "content": content.strip()} for name, content in turns]
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()
    return messages

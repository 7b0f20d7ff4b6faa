"""Find keys that change what a row means and that nobody reads.

A file of binary labels ({prompt, completion, label}) read as demonstrations would teach the answers
that people rejected. So such a key is an error, unless the form reads it or the source lists it
under `ignore`.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from data.forms.form import Form, Row
from data.forms.learnt import MARKS
from data.forms.marked import BAD
from data.forms.messages import LIST_OF_MESSAGES, SPEAKERS, from_text
from data.parsing import METADATA, describe

OF_ANSWERS = frozenset(
    [
        "label",
        "labels",
        "kto_tag",
        "weight",
        "loss",
        "loss_weight",
        "train",
        "masked",
        "mask",
        "rejected",
        "rejected_response",
        "rejected_responses",
        "chosen",
        "answers",
        "completions",
        "generations",
        "responses",
        "instances",
        "ranks",
        "rank",
        "ranking",
        "scores",
        "score_chosen",
        "score_rejected",
        "preference",
        "winner",
        "ratings",
        "helpfulness",
        "correctness",
        "coherence",
    ]
)
"""Keys that say how an answer is to be taken, or hold further answers."""
OF_PROMPTS = frozenset(
    [
        "tools",
        "tool_calls",
        "tool_call_id",
        "functions",
        "function_call",
        "images",
        "image",
        "audios",
        "audio",
        "videos",
        "video",
        "context",
        "passage",
        "passages",
        "choices",
        "options",
        "history",
        "input",
        "definition",
        "system",
        "system_prompt",
        "system_message",
        "systemInstruction",
        "thinking_trajectories",
        "Complex_CoT",
        "reasoning_content",
        "reasoning",
        "thinking",
        "prefix",
        "instances",
    ]
)
"""Keys that are a part of the conversation, and without which the model would see another one."""
IN_MESSAGES = frozenset(
    [
        "tool_calls",
        "tool_call_id",
        "function_call",
        "images",
        "image",
        "audios",
        "audio",
        "videos",
        "video",
        "reasoning_content",
        "reasoning",
        "thinking",
        "prefix",
        "refusal",
        "train_detail",
        "masked",
        "label",
    ]
)
"""Keys of messages that are a part of the conversation too, or say that some is not learnt."""
VERDICTS = frozenset(
    [
        "is_correct",
        "correct",
        "is_accepted",
        "accepted",
        "is_good",
        "is_desirable",
        "desirable",
        "is_chosen",
        "is_preferred",
        "preferred",
        "is_safe",
        "is_harmless",
        "harmless",
        "passed",
        "feedback",
        "thumbs",
        "vote",
        "liked",
    ]
)
"""Keys under which logs and checkers say whether the only answer of a row is good."""
OF_LOSS = frozenset(MARKS)
"""Keys of messages that say whether they are learnt."""
ASSISTANTS = tuple(name for name, role in SPEAKERS.items() if role == "assistant")
"""Names of the assistant's role, in lower case."""
NESTED = (list, dict)
"""Types of values that hold values."""
USERS = tuple(name for name, role in SPEAKERS.items() if role == "user")
"""Names of the user's role, in lower case."""
MATTERS = {
    "documents": frozenset[str](),
    "demonstrations": OF_ANSWERS | OF_PROMPTS | {"rating"},
    "rankings": OF_ANSWERS | OF_PROMPTS,
    "prompts": OF_PROMPTS,
    "evaluation_prompts": OF_PROMPTS,
}
"""Kind of data → keys that matter to it."""
TAKEN_FOR = {
    "annotator": "labeler",
    "worker": "labeler",
    "rater": "labeler",
    "ranker": "labeler",
    "judge": "labeler",
    "rank": "ranks",
    "ranking": "ranks",
    "order": "ranks",
    "score": "scores",
    "ratings": "scores",
    "response": "completion",
    "system_prompt": "system",
}
"""Other names of our own keys."""


def says_something(key: str, value: object) -> bool:
    """Return whether the value of such a key says anything that does not hold anyway.

    Nulls, empty texts, lists and objects do not; neither does a weight of 1 or a loss that is on.
    """
    if key in MARKS and value in (1, True):
        return False
    if key == "mask" and str(value).lower() in USERS:
        return False  # NeMo: the user's messages are not learnt
    if key in ("prefix", "masked") and value in (0, False):
        return False
    return value not in (None, "", [], {}, "[]", "{}", "null")


@dataclass(frozen=True)
class ToCheck:
    """Say which values of a row may change what it means: nearly all rows of a file share this."""

    verdicts: tuple[str, ...]
    """Keys that may say that the answer to teach is a bad one, or how good it is."""
    matter: tuple[str, ...]
    """Keys that change what the row means if they say anything."""
    in_messages: frozenset[str]
    """Keys that may not be inside a message."""


def what_to_check(kind: str, form: Form, row: Row, ignore: Iterable[str]) -> ToCheck | None:
    """Return which values of a row may change what it means, and are not read.

    Args:
        kind: The kind of data.
        form: The form of the row.
        row: The row, of which only the keys matter (and what `form.reads` looks at).
        ignore: Keys that the source leaves unread on purpose.

    Returns:
        What to check; None for a kind to which no key matters.
    """
    matters = MATTERS[kind]
    if not matters:
        return None
    known = {*form.keys_of(row), *form.harmless, *ignore}
    unknown = [key for key in row if key not in known]
    is_taught = kind == "demonstrations"
    in_messages = IN_MESSAGES | OF_LOSS if is_taught else IN_MESSAGES
    return ToCheck(
        verdicts=tuple(key for key in unknown if is_taught and (key in VERDICTS or key.endswith(".responses"))),
        matter=tuple(key for key in unknown if key in matters),
        in_messages=in_messages - form.in_messages - form.harmless - frozenset(ignore),
    )


def refuse_meaningful_keys(form: Form, row: Row, check: ToCheck | None) -> None:
    """Raise ValueError for a key that changes what the row means and that the form does not read.

    Args:
        form: The form of the row.
        row: The row.
        check: What `what_to_check` gives for its keys.
    """
    if check is None:
        return
    for key in check.verdicts:
        refuse_verdict(key, row[key])
    for key in check.matter:
        if says_something(key, row[key]):
            as_what = f"a row {form}" if not form.name else f"a row of {form}"
            raise ValueError(
                f"the key '{key}' changes what {as_what} means, and is not read; take it out, or say "
                f"ignore: [{key}] in the source"
            )
    refuse_in_messages(row, check.in_messages)


def refuse_verdict(key: str, value: object) -> None:
    """Raise ValueError if a key says that the answer to teach is a bad one, or how good it is.

    Args:
        key: One of VERDICTS, or what people answered to a question of Argilla.
        value: Its value.
    """
    if key in VERDICTS and isinstance(value, str | bool | int | float) and str(value).strip().lower() in BAD:
        raise ValueError(
            f"the key '{key}' says that the answer is bad ({describe(value)}), and is not read; say columns: "
            f"{{label: {key}}} to take only the good answers, or ignore: [{key}] in the source"
        )
    if key.endswith(".responses") and says_something(key, value):
        raise ValueError(
            f"the key '{key}' is what people answered to a question of Argilla about this row, and is not read; "
            f"take it out, or say ignore: [{key}] in the source"
        )


def may_hold_messages(value: object) -> bool:
    """Return whether a value may be, or hold, messages: most values are texts and numbers."""
    return isinstance(value, NESTED) or (isinstance(value, str) and value.lstrip()[:1] == "[")


def refuse_in_messages(value: object, keys: frozenset[str]) -> None:
    """Raise ValueError for a key inside a message that changes what the message means.

    Args:
        value: A row, or a value in it; messages are found at any depth.
        keys: The keys that are not read.
    """
    if isinstance(value, list):
        for item in value:
            if may_hold_messages(item):
                refuse_in_messages(item, keys)
    elif isinstance(value, str) and LIST_OF_MESSAGES.match(value):
        refuse_in_messages(from_text(value), keys)
    elif isinstance(value, dict):
        role = value.get("role", value.get("from"))
        speaker = role.lower() if isinstance(role, str) else None
        for key, item in value.items():
            if speaker is not None and key in keys and says_something(key, item):
                if key in OF_LOSS and speaker not in ASSISTANTS:
                    continue  # what is not the assistant's is not learnt anyway
                raise ValueError(
                    f"the key '{key}' of a message of the {role} changes what the conversation means, and is not "
                    f"read; take such conversations out, or say ignore: [{key}] in the source"
                )
            if may_hold_messages(item) and key not in ("meta", "metadata"):
                refuse_in_messages(item, keys)


def refuse_unknown_keys(form: Form, row: Row, ignore: Iterable[str]) -> None:
    """Raise ValueError for a key of our own form that is probably a misspelling.

    In a strict form every unknown key is one. In others only a key that resembles one that the form
    reads and the row lacks: a misspelt `labeler` would be lost silently.

    Args:
        form: The form of the row.
        row: The row.
        ignore: Keys that the source leaves unread on purpose.
    """
    known = (*form.needs, *form.also)
    for key in row:
        if key in known or key in METADATA or key in ignore:
            continue
        lacking = [name for name in known if name not in row]
        synonym = TAKEN_FOR.get(key)
        similar = [synonym] if synonym in lacking else difflib.get_close_matches(key, lacking, 1, 0.75)
        if similar:
            raise ValueError(
                f"unknown key '{key}'; did you mean '{similar[0]}'? Rename it (columns: {{{similar[0]}: {key}}}), or "
                f"say ignore: [{key}]"
            )
        if form.strict:
            raise ValueError(f"unknown key '{key}'; remove it, put it under 'meta' (not read), or say ignore: [{key}]")

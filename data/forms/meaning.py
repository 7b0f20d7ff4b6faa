"""Find keys that change what a row means and that nobody reads.

A file of binary labels ({prompt, completion, label}) read as demonstrations would teach the answers
that people rejected. So such a key is an error, unless the form reads it or the source lists it
under `ignore`.
"""

import difflib
from collections.abc import Iterable

from data.forms.form import Form, Row
from data.parsing import METADATA

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
        "reasoning_content",
        "reasoning",
        "thinking",
        "prefix",
        "instances",
    ]
)
"""Keys that are a part of the conversation, and without which the model would see another one."""
MATTERS = {
    "documents": frozenset[str](),
    "demonstrations": OF_ANSWERS | OF_PROMPTS,
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
    if key in ("weight", "loss", "loss_weight", "train") and value in (1, True):
        return False
    return value is not None and value != "" and value != [] and value != {}


def refuse_meaningful_keys(kind: str, form: Form, row: Row, ignore: Iterable[str]) -> None:
    """Raise ValueError for a key that changes what the row means and that the form does not read.

    Args:
        kind: The kind of data.
        form: The form of the row.
        row: The row.
        ignore: Keys that the source leaves unread on purpose.
    """
    known = {*form.needs, *form.also, *form.harmless, *ignore}
    for key in row:
        if key in MATTERS[kind] and key not in known and says_something(key, row[key]):
            as_what = f"a row {form}" if not form.name else f"a row of {form}"
            raise ValueError(
                f"the key '{key}' changes what {as_what} means, and is not read; take it out, or say "
                f"ignore: [{key}] in the source"
            )


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

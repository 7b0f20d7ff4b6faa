"""List the forms of data that are understood for each kind, and recognise the form of a row.

To add a form: write a module beside this one (see `data/forms/form.py`), and put its `Form` into
FORMS.
"""

import difflib

from data.forms.arena import ARENA
from data.forms.argilla import ARGILLA
from data.forms.chat_tools import CHAT_TOOLS, RENAMED_PAIRS
from data.forms.form import Form
from data.forms.helpsteer import HELPSTEER
from data.forms.instructions import (
    INSTRUCTION_ANSWER,
    INSTRUCTION_COMPLETION,
    INSTRUCTION_DEMONSTRATION,
    INSTRUCTION_PROMPT,
    INSTRUCTION_RESPONSE,
    SELF_INSTRUCT,
)
from data.forms.label_studio import LABEL_STUDIO
from data.forms.marked import MARKED_DEMONSTRATIONS, MARKED_RANKINGS
from data.forms.messages import (
    CONTENTS_DEMONSTRATION,
    CONVERSATION_DEMONSTRATION,
    DATA_DEMONSTRATION,
    DIALOG_DEMONSTRATION,
    DIALOGUE_DEMONSTRATION,
    ITEMS_DEMONSTRATION,
    MESSAGES_DEMONSTRATION,
    MESSAGES_PROMPT,
    SHAREGPT_DEMONSTRATION,
    SHAREGPT_PROMPT,
)
from data.forms.oasst import OASST_DEMONSTRATIONS, OASST_PROMPTS, OASST_RANKINGS
from data.forms.plain import (
    LABELLED_RESPONSES,
    PROMPT_COMPLETION,
    PROMPT_ONLY,
    RANKED_RESPONSES,
    RULED_PROMPT,
    SCORED_RESPONSES,
    TEXT,
)
from data.forms.preferences import BARE_PAIR_PROMPT, PAIRS
from data.forms.questions import NATURAL_INSTRUCTIONS, QUESTION_FORMS
from data.forms.refused import REFUSED, why_refused
from data.forms.several_answers import FEW_KEYS, SEVERAL_ANSWERS
from data.forms.templated_text import BAIZE, TRANSCRIPT
from data.forms.two_answers import TWO_ANSWERS
from data.parsing import describe

FORMS: dict[str, tuple[Form, ...]] = {
    "documents": (TEXT,),
    "demonstrations": (
        *OASST_DEMONSTRATIONS,
        *MARKED_DEMONSTRATIONS,
        MESSAGES_DEMONSTRATION,
        SHAREGPT_DEMONSTRATION,
        CONVERSATION_DEMONSTRATION,
        INSTRUCTION_DEMONSTRATION,
        INSTRUCTION_RESPONSE,
        INSTRUCTION_COMPLETION,
        INSTRUCTION_ANSWER,
        SELF_INSTRUCT,
        PROMPT_COMPLETION,
        NATURAL_INSTRUCTIONS,
        *QUESTION_FORMS,
        DIALOGUE_DEMONSTRATION,
        DIALOG_DEMONSTRATION,
        CONTENTS_DEMONSTRATION,
        ITEMS_DEMONSTRATION,
        DATA_DEMONSTRATION,
        BAIZE,
        TRANSCRIPT,
    ),
    "rankings": (
        *REFUSED,
        *ARENA,
        *ARGILLA,
        *CHAT_TOOLS,
        *HELPSTEER,
        *LABEL_STUDIO,
        *OASST_RANKINGS,
        *SEVERAL_ANSWERS,
        *TWO_ANSWERS,
        *RENAMED_PAIRS,
        *FEW_KEYS,
        RANKED_RESPONSES,
        SCORED_RESPONSES,
        LABELLED_RESPONSES,
        *PAIRS,
        *MARKED_RANKINGS,
    ),
    "prompts": (
        *OASST_PROMPTS,
        RULED_PROMPT,
        MESSAGES_PROMPT,
        SHAREGPT_PROMPT,
        PROMPT_ONLY,
        INSTRUCTION_PROMPT,
        BARE_PAIR_PROMPT,
    ),
}
"""Kind of data → its forms; of several forms that fit a row, the first is taken. Read as prompts, a
row of any ranking's or demonstration's form that needs more keys than `prompts` lists gives its
prompt."""
FORMS["evaluation_prompts"] = FORMS["prompts"]

STRING_KEY = {"documents": "text", "prompts": "prompt", "evaluation_prompts": "prompt"}
"""Kinds whose rows may be bare strings: the key that such a string is the value of."""
MANY = 40
"""Named forms of a kind that error lines list at most."""
ANSWERED = ("rankings", "demonstrations")
"""Kinds whose rows hold a prompt with answers."""
PROMPT_KINDS = ("prompts", "evaluation_prompts")
MOST_KEPT = 1000
"""Sets of keys for which the forms that fit are kept."""
_CANDIDATES: dict[tuple[str, frozenset[str]], tuple[tuple[Form, ...], tuple[Form, ...]]] = {}
"""Kind and keys of a row → all forms of the kind at that time, and those whose keys the row has."""


def recognise(kind: str, value: object) -> tuple[Form, dict]:
    """Return the form of a row, and the row as an object.

    Args:
        kind: The kind of data.
        value: The row as it is in the file.

    Raises:
        ValueError: The row has no form of this kind.
    """
    if isinstance(value, str) and kind in STRING_KEY:
        value = {STRING_KEY[kind]: value}
    if not isinstance(value, dict):
        raise ValueError(f"the row is {describe(value)}; expected {expected(kind)}")
    form = form_of(kind, value)
    if form is None:
        raise ValueError(why_unknown(kind, value))
    return form, value


def form_of(kind: str, row: dict) -> Form | None:
    """Return the form of a row; None if it has none of this kind.

    Args:
        kind: The kind of data.
        row: The row.
    """
    own = next((form for form in candidates(kind, row) if form.fits is None or form.fits(row)), None)
    if kind == "demonstrations" and own is not None and is_judged(own, row):
        return None
    if kind not in PROMPT_KINDS or (own is not None and own.name):
        return own
    # A row with answers is read as what it is, and gives its prompt: more specific than {prompt}.
    for other in ANSWERED:
        answered = form_of(other, row)
        if answered is not None:
            return answered if answered.name else own
    return own


def candidates(kind: str, row: dict) -> tuple[Form, ...]:
    """Return the forms of a kind whose keys a row has all, in their order.

    Nearly all rows of a file have the same keys, so the answers are kept.

    Args:
        kind: The kind of data.
        row: The row.
    """
    keys = (kind, frozenset(row))
    forms, found = _CANDIDATES.get(keys, ((), ()))
    if forms is not FORMS[kind]:
        found = tuple(form for form in FORMS[kind] if row.keys() >= form.needed)
        if len(_CANDIDATES) >= MOST_KEPT:
            _CANDIDATES.clear()
        _CANDIDATES[keys] = FORMS[kind], found
    return found


def is_judged(form: Form, row: dict) -> bool:
    """Return whether a row says more than a demonstration: how good its answer is.

    HelpSteer's {prompt, response, helpfulness, …} has the keys of {prompt, response}. As
    demonstrations it would teach the bad answers too.

    Args:
        form: The form of the row as a demonstration.
        row: The row.
    """
    more = [other for other in candidates("rankings", row) if other.name and set(form.needs) < set(other.needs)]
    return any(other.fits is None or other.fits(row) for other in more)


def is_of(form: Form, row: dict) -> bool:
    """Return whether a row is of a form."""
    return row.keys() >= form.needed and (form.fits is None or form.fits(row))


def why_unknown(kind: str, row: dict) -> str:
    """Return the error text for a row that has no form of this kind.

    Args:
        kind: The kind of data.
        row: The row.
    """
    # A form that has all its keys here was no candidate for another reason, which the others say.
    # Names of data sets are no help to somebody who misspelt a key of a ranking.
    lacking = [form for form in FORMS[kind] if any(key not in row for key in form.needs)]
    lacking = [form for form in lacking if not form.name or kind != "rankings"] or list(FORMS[kind])
    nearest = max(lacking, key=lambda form: (share_of_needs(form, row), not form.name))
    missing = next((key for key in nearest.needs if key not in row), None)
    if missing is None:
        return f"the keys {', '.join(row)} are no row of {kind}; expected {expected(kind)}"
    # Where most keys of one form are there, the row was meant to be of that form.
    meant = str(nearest) if share_of_needs(nearest, row) > 0.5 and not nearest.name else expected(kind)
    similar = difflib.get_close_matches(missing, row, 1)
    if similar:
        return f"the key '{missing}' is missing (is it '{similar[0]}'?); expected {meant}"
    for other in ("rankings", "demonstrations", "documents"):
        form = form_of(other, row) if other != kind else None
        if form in REFUSED:
            return why_refused(form, row)
        if form is not None:
            return f"the row is one of {other}: {form}; name the file as data.{other}, or give another one here"
    return f"the key '{missing}' is missing; expected {meant}; or name your keys (columns: {{{missing}: …}})"


def share_of_needs(form: Form, row: dict) -> float:
    """Return the share of the keys that a form needs which a row has."""
    return sum(key in row for key in form.needs) / len(form.needs)


def expected(kind: str) -> str:
    """Return the forms that rows of a kind may have: our own by their keys, the others by name."""
    own = " or ".join(str(form) for form in FORMS[kind] if not form.name)
    named = sorted({form.name for form in FORMS[kind] if form.name and "(not read)" not in form.name})
    if len(named) > MANY:
        return f"{own} or a row of one of {len(named)} data sets and tools (data/README.md lists them)"
    return f"{own} or a row of {', '.join(named)}" if named else own

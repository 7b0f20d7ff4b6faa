"""List the forms of data that are understood for each kind, and recognise the form of a row.

To add a form: write a module beside this one (see `data/forms/form.py`), and put its `Form` into
FORMS.
"""

import difflib

from data.forms.form import Form
from data.forms.instructions import INSTRUCTION_DEMONSTRATION, INSTRUCTION_PROMPT
from data.forms.messages import MESSAGES_DEMONSTRATION, MESSAGES_PROMPT, SHAREGPT_DEMONSTRATION, SHAREGPT_PROMPT
from data.forms.plain import PROMPT_COMPLETION, PROMPT_ONLY, RANKED_RESPONSES, TEXT
from data.forms.preferences import BARE_PAIR, BARE_PAIR_PROMPT, CONVERSATION_PAIR, INSTRUCTION_PAIR, PROMPT_PAIR
from data.parsing import describe

FORMS: dict[str, tuple[Form, ...]] = {
    "documents": (TEXT,),
    "demonstrations": (MESSAGES_DEMONSTRATION, SHAREGPT_DEMONSTRATION, INSTRUCTION_DEMONSTRATION, PROMPT_COMPLETION),
    "rankings": (RANKED_RESPONSES, PROMPT_PAIR, CONVERSATION_PAIR, INSTRUCTION_PAIR, BARE_PAIR),
    "prompts": (PROMPT_ONLY, MESSAGES_PROMPT, SHAREGPT_PROMPT, INSTRUCTION_PROMPT, BARE_PAIR_PROMPT),
}
"""Kind of data → its forms; of several forms that fit a row, the first is taken."""
FORMS["evaluation_prompts"] = FORMS["prompts"]

STRING_KEY = {"documents": "text", "prompts": "prompt", "evaluation_prompts": "prompt"}
"""Kinds whose rows may be bare strings: the key that such a string is the value of."""


def recognise(kind: str, value: object) -> tuple[Form, dict]:
    """Return the form of a row, and the row as an object.

    Args:
        kind: The kind of data.
        value: The row as it is in the file.

    Raises:
        ValueError: The row has no form of this kind.
    """
    forms = FORMS[kind]
    known = " or ".join(map(str, forms))
    if isinstance(value, str) and kind in STRING_KEY:
        value = {STRING_KEY[kind]: value}
    if not isinstance(value, dict):
        raise ValueError(f"the row is {describe(value)}; expected {known}")
    for form in forms:
        if all(key in value for key in form.needs):
            return form, value
    row = value
    nearest = max(forms, key=lambda form: sum(key in row for key in form.needs) / len(form.needs))
    missing = next(key for key in nearest.needs if key not in row)
    similar = difflib.get_close_matches(missing, row, 1)
    hint = f" (is it '{similar[0]}'?)" if similar else ""
    raise ValueError(f"the key '{missing}' is missing{hint}; expected {known}")

"""Change the text of a chat template: set its variables, and stop its clock.

What is changed in the text itself holds for everyone who reads the published template later.
"""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime

CLOCK = "strftime_now"
"""The only function of date or time that transformers gives to templates."""
DIRECTIVE = re.compile(r"(?<!{)%[-_0^#]*[EO]?[A-Za-z]")
"""A directive of strftime, as %d or %-B."""
USUAL = tuple("%" + letter for letter in "aAbBcdHIjmMpSUwWxXyYZ")
"""The directives of C89."""
PERCENT = "\ue000"
"""Stands for %% while directives are replaced."""
MOMENTS = (datetime(1987, 8, 13, 3, 42, 31), datetime(2044, 1, 2, 17, 5, 9))
"""Two moments that differ in every part."""
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token",
         "cls_token", "sep_token", "mask_token", "raise_exception", CLOCK)  # fmt: skip
"""Names that the tokenizer itself gives to a template."""
RESERVED = ("true", "false", "none", "True", "False", "None", "and", "or", "not", "if", "in", "is", "else", "elif",
            "for", "set", "loop", "self", "super", "varargs", "kwargs", "caller")  # fmt: skip
"""Words of Jinja that cannot be variables."""
STOPPED = re.compile(rf"{{%- macro {CLOCK}\(format\) %}}.*?{{%- endmacro %}}\n", re.DOTALL)
"""A stopped clock as `at_moment` writes it."""
DEFINED = re.compile(r"(?<![\w.'\"])([A-Za-z_]\w*)\s+is\s+(?:not\s+)?defined")
"""A test of a template whether a variable is defined; group 1 is its name."""


def with_variables(template: str, variables: Mapping[str, object]) -> str:
    """Set variables at the beginning of a template.

    Args:
        template: The text of a chat template.
        variables: Name → a JSON value; `variable_problem` says what a name may be.
    """
    return "".join(f"{{%- set {name} = {literal(value)} %}}\n" for name, value in variables.items()) + template


def literal(value: object) -> str:
    """Write a JSON value in Jinja, whatever quotes, signs of Jinja or characters its texts hold."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{literal(str(key))}: {literal(item)}' for key, item in value.items())}}}"
    # Jinja reads JSON's escapes, but takes \uXXXX for half of a pair: so nothing is escaped.
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def variable_problem(name: str) -> str | None:
    """Return what is wrong with the name of a template's variable; None if it is valid."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name in RESERVED:
        return "cannot be the name of a variable in a template; use letters, digits and _"
    if name in GIVEN:
        return "is what the tokenizer itself gives the template; leave it out"
    return None


def own_variables(template: str) -> list[str]:
    """Return the variables that a template tests with `… is defined`, and that can be set.

    Those that the tokenizer itself gives to the template are left out.
    """
    return list(dict.fromkeys(name for name in DEFINED.findall(template) if name not in (*GIVEN, *RESERVED)))


def unread_variables(template: str, names: Iterable[str]) -> list[str]:
    """Return the names that occur nowhere in a template: setting them would change nothing."""
    return [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", template)]


def asks_for_the_day(template: str) -> bool:
    """Return whether a template names the function that gives today's date and time."""
    return CLOCK in template


def at_moment(template: str, moment: datetime) -> str:
    """Stop a template's clock: a macro that knows only one moment replaces its function.

    Each directive of a format (%d, %B, …) is replaced by its value at that moment. Only the
    directives that occur in the template are known, so that two hours of a day give the same text
    unless the hour is written; if none occurs, those of C89.

    Args:
        template: The text of a chat template.
        moment: The date and time to stop at.
    """
    steps = [f'replace("%%", {literal(PERCENT)})']
    for directive in dict.fromkeys(DIRECTIVE.findall(template) or USUAL):
        text = _written(moment, directive)
        if text != directive:
            steps.append(f"replace({literal(directive)}, {literal(text)})")
    steps.append(f'replace({literal(PERCENT)}, "%")')
    return f"{{%- macro {CLOCK}(format) %}}{{{{ format | {' | '.join(steps)} }}}}{{%- endmacro %}}\n{template}"


def stopped_clock(template: str) -> str:
    """Return the macro by which `at_moment` has stopped a template's clock, or ""."""
    match = STOPPED.match(template)
    return match[0] if match else ""


def with_clock_of(template: str, other: str) -> str:
    """Stop a template's clock at the moment of another's, if it has one that still runs."""
    if asks_for_the_day(template) and not stopped_clock(template):
        return stopped_clock(other) + template
    return template


def _written(moment: datetime, directive: str) -> str:
    """Return what a directive writes at a moment; itself if this system does not know it."""
    try:
        return moment.strftime(directive)
    except ValueError:
        return directive

"""A chat template's text, changed so that everyone who reads it later renders the same: its variables set, its clock
stopped."""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime

CLOCK = "strftime_now"  # transformers' only function of the day or the hour
DIRECTIVE = re.compile(r"(?<!{)%[-_0^#]*[EO]?[A-Za-z]")
USUAL = tuple("%" + letter for letter in "aAbBcdHIjmMpSUwWxXyYZ")  # C89's
PERCENT = "\ue000"  # stands for %% while directives are replaced
MOMENTS = (datetime(1987, 8, 13, 3, 42, 31), datetime(2044, 1, 2, 17, 5, 9))  # differ in every part
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token",
         "cls_token", "sep_token", "mask_token", "raise_exception", CLOCK)  # fmt: skip
RESERVED = ("true", "false", "none", "True", "False", "None", "and", "or", "not", "if", "in", "is", "else", "elif",
            "for", "set", "loop", "self", "super", "varargs", "kwargs", "caller")  # fmt: skip
STOPPED = re.compile(rf"{{%- macro {CLOCK}\(format\) %}}.*?{{%- endmacro %}}\n", re.DOTALL)  # as `at_moment` writes
ASKED_FOR = re.compile(r"(?<![\w.'\"])([A-Za-z_]\w*)\s+is\s+(?:not\s+)?defined")


def with_variables(template: str, variables: Mapping[str, object]) -> str:
    """Return the template with `variables` set at its beginning.

    Args:
        template: The text of a chat template.
        variables: Name → a value as JSON has them; `variable_problem` says what a name may be.
    """
    return "".join(f"{{%- set {name} = {literal(value)} %}}\n" for name, value in variables.items()) + template


def literal(value: object) -> str:
    """Return a JSON value as Jinja writes it: also a text that holds quotes, Jinja's own signs or characters of any
    plane."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{literal(str(key))}: {literal(item)}' for key, item in value.items())}}}"
    # Jinja reads the escapes of JSON, but \uXXXX as half of a pair: so characters stand as they are
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def variable_problem(name: str) -> str | None:
    """Return what is wrong with the name of a template's variable; None where nothing is."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name in RESERVED:
        return "is no name of a variable in a template; should be letters, digits and _"
    if name in GIVEN:
        return "is what the tokenizer itself gives the template; leave it out"
    return None


def own_variables(template: str) -> list[str]:
    """Return the names that a template asks for by `… is defined` and that the tokenizer does not give it: what
    `with_variables` may set."""
    return list(dict.fromkeys(name for name in ASKED_FOR.findall(template) if name not in (*GIVEN, *RESERVED)))


def unread_variables(template: str, names: Iterable[str]) -> list[str]:
    """Return those of `names` that occur nowhere in a template: setting them would change nothing."""
    return [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", template)]


def asks_for_the_day(template: str) -> bool:
    """Return whether the template names the function that gives today's date and time."""
    return CLOCK in template


def at_moment(template: str, moment: datetime) -> str:
    """Return the template with the clock stopped: its function of date and time is a macro that knows `moment` alone.

    Each directive of a format (%d, %B, …) is replaced by what it is at that moment: those that stand in the template,
    so that two hours of a day give the same text unless the hour is written; or else C89's.
    """
    directives = dict.fromkeys(DIRECTIVE.findall(template) or USUAL)
    steps = [f'replace("%%", {literal(PERCENT)})']
    steps += [f"replace({literal(d)}, {literal(text)})" for d in directives if (text := _written(moment, d)) != d]
    steps.append(f'replace({literal(PERCENT)}, "%")')
    return f"{{%- macro {CLOCK}(format) %}}{{{{ format | {' | '.join(steps)} }}}}{{%- endmacro %}}\n{template}"


def stopped_clock(template: str) -> str:
    """Return the beginning of a template by which `at_moment` has stopped its clock; "" where it has not."""
    found = STOPPED.match(template)
    return found[0] if found else ""


def with_clock_of(template: str, other: str) -> str:
    """Return the template with its clock stopped as that of another template is, if the other's alone is stopped."""
    runs = asks_for_the_day(template) and not stopped_clock(template)
    return stopped_clock(other) + template if runs else template


def _written(moment: datetime, directive: str) -> str:
    try:
        return moment.strftime(directive)
    except ValueError:  # no directive on this system
        return directive

"""Convert Alpaca's rows: {instruction, output}, with input, system message and history."""

from data.forms.form import Form, Options
from data.forms.messages import Messages, read_messages, read_prompt
from data.parsing import describe, parse_text

INSTRUCTION_KEYS = ("input", "system", "history")
"""Optional keys beside `instruction`."""


def read_instruction(row: dict) -> str | Messages:
    """Read the instruction, with `input` on the next line, after the turns of `history`.

    `history` is a list of [question, answer] pairs.
    """
    request = parse_text(row, "instruction")
    if row.get("input") not in (None, ""):
        request += "\n" + parse_text(row, "input")
    past = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"a turn of 'history' is {describe(pair)}; expected [question, answer]")
        past += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    if past:
        return read_messages([*past, {"role": "user", "content": request}], row.get("system"))
    return read_prompt({"prompt": request, "system": row.get("system")})


def demonstration_of(row: dict, options: Options) -> dict:
    """Read the instruction and its output; the answers of its history are taught too."""
    prompt = read_instruction(row)
    turns = prompt if isinstance(prompt, list) else []
    learnt = [index for index, message in enumerate(turns) if message["role"] == "assistant"]
    return {"prompt": prompt, "completion": parse_text(row, "output"), "learnt": learnt}


def prompt_of(row: dict, options: Options) -> dict:
    """Read only the instruction."""
    return {"prompt": read_instruction(row)}


INSTRUCTION_DEMONSTRATION = Form(("instruction", "output"), INSTRUCTION_KEYS, demonstration_of)
INSTRUCTION_PROMPT = Form(("instruction",), INSTRUCTION_KEYS, prompt_of)

"""Convert Alpaca's rows {instruction, output} and their relatives: Dolly, self-instruct and others.

The instruction stands first, then `input` and `context`, each on a new line, after the turns of
`history`.
"""

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.messages import SYSTEM_KEYS, Messages, pair_keys, read_messages, read_prompt, system_of
from data.parsing import describe, parse_text

INSTRUCTION_KEYS = ("input", "context", "history", *SYSTEM_KEYS)
"""Optional keys beside `instruction`."""
OUTPUTS = ("output", "response", "completion", "answer")
"""Keys of the answer to an instruction; the first is Alpaca's."""


def read_instruction(row: dict) -> str | Messages:
    """Read the instruction, with `input` and `context` on the next lines, after `history`."""
    request = parse_text(row, "instruction")
    for key in ("input", "context"):
        if row.get(key) not in (None, "", "<noinput>"):  # as self-instruct says that there is none
            request += "\n" + parse_text(row, key)
    past = read_history(row.get("history"))
    if past:
        return read_messages([*past, {"role": "user", "content": request}], system_of(row))
    return read_prompt({"prompt": request, "system": system_of(row)})


def read_history(history: object) -> list[Row]:
    """Return the turns of `history`: [question, answer] pairs, pairs as objects, or messages.

    Args:
        history: The value in the row; empty or null for none.
    """
    if history in (None, "", [], "[]"):
        return []
    if not isinstance(history, list):
        raise ValueError(f"'history' is {describe(history)}; expected a list of [question, answer]")
    turns: list[Row] = []
    for pair in history:
        if isinstance(pair, dict):
            turns += [pair]
            continue
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"a turn of 'history' is {describe(pair)}; expected [question, answer]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def answered(prompt: str | Messages, completion: str) -> Row:
    """Return the demonstration of a completion; the answers of its history are taught too."""
    turns = prompt if isinstance(prompt, list) else []
    learnt = [index for index, message in enumerate(turns) if message["role"] == "assistant"]
    return {"prompt": prompt, "completion": completion, "learnt": learnt}


def demonstration_of(row: dict, options: Options) -> dict:
    """Read the instruction and its output."""
    key = next(key for key in OUTPUTS if key in row)
    return answered(read_instruction(row), parse_text(row, key))


def prompt_of(row: dict, options: Options) -> dict:
    """Read only the instruction."""
    return {"prompt": read_instruction(row)}


def demonstrations_of_instances(row: dict, options: Options) -> list[Row | LeftOut]:
    """Read every instance of a task of self-instruct: {input, output} under one instruction."""
    return [
        {
            "prompt": read_instruction({**row, "input": instance.get("input")}),
            "completion": parse_text(instance, "output"),
        }
        for instance in instances_of(row)
    ]


def prompt_of_instances(row: dict, options: Options) -> dict:
    """Read the instruction with the input of its first instance."""
    return {"prompt": read_instruction({**row, "input": instances_of(row)[0].get("input")})}


def instances_of(row: dict) -> list[Row]:
    """Return the instances of a task, {input, output} each."""
    instances = row["instances"]
    if not isinstance(instances, list) or not instances or any(pair_keys(one) is None for one in instances):
        raise ValueError(f"'instances' is {describe(instances)}; expected a list of {{input, output}}")
    return instances


def instruction_form(output: str, name: str) -> Form:
    """Return the form of rows with an instruction and its answer under another key than Alpaca's.

    Args:
        output: The key of the answer.
        name: The data sets that have it.
    """
    return Form(("instruction", output), INSTRUCTION_KEYS, demonstration_of, name=name, prompt=prompt_of)


INSTRUCTION_DEMONSTRATION = Form(("instruction", "output"), INSTRUCTION_KEYS, demonstration_of)
INSTRUCTION_RESPONSE = instruction_form("response", "Dolly or Magpie")
INSTRUCTION_COMPLETION = instruction_form("completion", "instructions with completions")
INSTRUCTION_ANSWER = instruction_form("answer", "instructions with answers")
SELF_INSTRUCT = Form(
    ("instruction", "instances"),
    SYSTEM_KEYS,
    demonstrations_of_instances,
    name="self-instruct",
    prompt=prompt_of_instances,
)
INSTRUCTION_PROMPT = Form(("instruction",), INSTRUCTION_KEYS, prompt_of)

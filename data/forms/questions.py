"""Convert demonstrations that are two texts: a question and its answer, under their many names."""

from functools import partial

from data.forms.form import Form, Options, Row
from data.forms.instructions import answered, read_history
from data.forms.messages import SYSTEM_KEYS, Messages, is_message, read_messages, read_prompt, system_of
from data.forms.plain import read_reply
from data.parsing import parse_text

NAMES = {
    ("question", "answer"): "GSM8K or question and answer",
    ("question", "response"): "OpenOrca",
    ("query", "response"): "ms-swift or MetaMathQA",
    ("query", "answer"): "query and answer",
    ("input", "output"): "input and output",
    ("input", "target"): "Firefly",
    ("inputs", "targets"): "Aya, FLAN or xP3",
    ("inputs_pretokenized", "targets_pretokenized"): "P3",
    ("prompt", "response"): "prompt and response",
    ("prompt", "output"): "prompt and output",
    ("prompt", "answer"): "prompt and answer",
    ("problem", "solution"): "problem and solution",
    ("problem", "generated_solution"): "OpenMathInstruct",
    ("question", "solution"): "question and solution",
    ("question", "generated_solution"): "OpenMathInstruct",
    ("input_text", "output_text"): "Vertex AI",
    ("message_1", "message_2"): "CAMEL",
    ("Question", "Response"): "Question and Response",
    ("Question", "Answer"): "Question and Answer",
}
"""Keys of the prompt and of the answer → the data sets that have them."""
ALSO = ("history", *SYSTEM_KEYS)
"""Optional keys beside a question."""


def read_question(row: Row, key: str) -> str | Messages:
    """Read a question, after the turns of `history`.

    Args:
        row: The row.
        key: The key of the question.
    """
    past = read_history(row.get("history"))
    if past:
        return read_messages([*past, {"role": "user", "content": parse_text(row, key)}], system_of(row))
    return read_prompt(row, key)


def demonstration_of(question: str, answer: str, row: Row, options: Options) -> Row:
    """Read a question and its answer, under their keys."""
    prompt = read_question(row, question)
    if not isinstance(row[answer], str):
        return answered(prompt, read_reply(row, answer, prompt))
    return answered(prompt, parse_text(row, answer))


def prompt_of(question: str, row: Row, options: Options) -> Row:
    """Read only the question, under its key."""
    return {"prompt": read_question(row, question)}


def holds_texts(question: str, answer: str, row: Row) -> bool:
    """Return whether both values are texts, messages or null: others are another data set's."""
    return is_text(row[question]) and is_text(row[answer])


def is_text(value: object) -> bool:
    """Return whether a value is a text, messages {role, content}, or null."""
    if isinstance(value, list):
        return len(value) > 0 and all(is_message(message) for message in value)
    return value is None or isinstance(value, str) or is_message(value)


def question_form(question: str, answer: str, name: str) -> Form:
    """Return the form of rows with a question and an answer.

    Args:
        question: The key of the question.
        answer: The key of the answer.
        name: The data sets that have these keys.
    """
    return Form(
        needs=(question, answer),
        also=ALSO,
        convert=partial(demonstration_of, question, answer),
        name=name,
        fits=partial(holds_texts, question, answer),
        prompt=partial(prompt_of, question),
    )


def task_of(row: Row, options: Options) -> Row:
    """Read an example of a task of Natural Instructions: the definition, then the input."""
    return {**prompt_of_task(row, options), "completion": parse_text(with_single_texts(row), "targets")}


def prompt_of_task(row: Row, options: Options) -> Row:
    """Read the definition of a task and the input."""
    row = with_single_texts(row)
    return {"prompt": parse_text(row, "definition") + "\n" + parse_text(row, "inputs")}


def with_single_texts(row: Row) -> Row:
    """Return a row with a text in place of each list of one text, as the tasks' files have them."""
    return {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in row.items()}


NATURAL_INSTRUCTIONS = Form(
    ("definition", "inputs", "targets"), (), task_of, name="Natural Instructions", prompt=prompt_of_task
)
QUESTION_FORMS = tuple(question_form(*keys, name) for keys, name in NAMES.items())

"""Convert the battles of Chatbot Arena and the judgments of MT-bench.

A battle is two answers to a prompt, or two conversations, and the winner: a model, or a tie. Where
two conversations part before their last answers, these have different prompts, so that nothing can
be said about them alone.
"""

import json

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.judged import NO_PREFERENCE, judged_conversations, judged_pair, number, shared_start
from data.forms.messages import Messages, read_messages
from data.parsing import describe

WINNERS: dict[str, int | None] = {
    "model_a": 0,
    "model_b": 1,
    "a": 0,
    "b": 1,
    "tie": None,
    "tie (bothbad)": None,
    "both_bad": None,
    "bothbad": None,
}
"""How the data sets name the winner → its index, or None for a tie."""


def winner_of(value: object) -> int | None:
    """Return the index of the winner, or None for a tie; raise LeftOut without a verdict."""
    if value in (None, ""):
        raise LeftOut(NO_PREFERENCE)
    if not isinstance(value, str) or value.strip().lower() not in WINNERS:
        raise ValueError(f"'winner' is {describe(value)}; expected model_a, model_b or tie")
    return WINNERS[value.strip().lower()]


# ── a column for each answer ─────────────────────────────────────────────────────────────────────


def texts_of(value: object, key: str) -> list[object]:
    """Return the turns in a cell: a list, the JSON text of a list, or a single text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            turns = json.loads(value)
        except ValueError:
            return [value]
        if isinstance(turns, list) and all(turn is None or isinstance(turn, str) for turn in turns):
            return turns
        return [value]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(f"'{key}' is {describe(value)}; expected a text or a list of turns")
    return value


def conversation_of(row: Row, key: str) -> Messages:
    """Return the conversation that the turns of `prompt` and of a response make.

    Args:
        row: The row.
        key: The key of the response.
    """
    asked, answered = texts_of(row["prompt"], "prompt"), texts_of(row[key], key)
    if None in asked or None in answered:
        raise LeftOut("a battle in which a turn is missing")
    if len(asked) != len(answered):
        raise ValueError(f"'prompt' has {len(asked)} turns and '{key}' {len(answered)}; expected as many answers")
    turns = []
    for request, answer in zip(asked, answered, strict=True):
        turns += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return read_messages(turns, blank_end=True)


def columns_winner(row: Row) -> int | None:
    """Return the index of the winner of `winner_model_a`, `winner_model_b` and `winner_tie`."""
    keys = ("winner_model_a", "winner_model_b", "winner_tie")
    won = [number(truth(row.get(key)), key) == 1 for key in keys]
    if sum(won) == 0:
        raise LeftOut(NO_PREFERENCE)
    if sum(won) > 1:
        raise ValueError("more than one of winner_model_a, winner_model_b and winner_tie is 1; expected one")
    return None if won[2] else won.index(True)


def truth(value: object) -> object:
    """Return 1 or 0 for true and false that are written as texts; other values as they are."""
    names = {"true": 1, "false": 0}
    return names.get(value.strip().lower(), value) if isinstance(value, str) else value


def battle_of_columns(row: Row, options: Options) -> Row:
    """Convert {prompt, response_a, response_b, winner_model_a, winner_model_b, winner_tie}."""
    first, second = conversation_of(row, "response_a"), conversation_of(row, "response_b")
    return judged_conversations(first, second, columns_winner(row), id=row.get("id"))


def prompt_of_columns(row: Row, options: Options) -> Row:
    """Take what both conversations begin with alike."""
    return {"prompt": shared_start([conversation_of(row, "response_a"), conversation_of(row, "response_b")])}


def battle_of_texts(row: Row, options: Options) -> Row:
    """Convert {prompt, response_a, response_b, winner}, single texts."""
    keys = ("prompt", "response_a", "response_b")
    if all(isinstance(row[key], list) or texts_of(row[key], key) != [row[key]] for key in keys):
        first, second = conversation_of(row, "response_a"), conversation_of(row, "response_b")
        return judged_conversations(first, second, winner_of(row["winner"]))
    return judged_pair(row["prompt"], [row["response_a"], row["response_b"]], winner_of(row["winner"]))


def battle_of_numbered_texts(row: Row, options: Options) -> Row:
    """Convert {prompt, response_1, response_2, winner}, single texts."""
    return judged_pair(row["prompt"], [row["response_1"], row["response_2"]], winner_of(row["winner"]))


# ── whole conversations ──────────────────────────────────────────────────────────────────────────


def judged_part(row: Row, key: str) -> Messages:
    """Return a conversation up to the answer that was judged.

    Args:
        row: The row; `turn` counts the answers up to the judged one, without it it is the last.
        key: The key of the conversation.
    """
    messages = read_messages(row[key], blank_end=True)
    turn = number(row.get("turn"), "turn")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if turn is None or not 1 <= turn <= len(answers):
        return messages
    return messages[: answers[int(turn) - 1] + 1]


def labeler_of(judge: object) -> object:
    """Return the judge's name; a judge may be a list of a model and a prompt."""
    return "/".join(str(part) for part in judge) if isinstance(judge, list) else judge


def battle_of_conversations(row: Row, options: Options) -> Row:
    """Convert {conversation_a, conversation_b, winner, turn?, judge?}."""
    first, second = judged_part(row, "conversation_a"), judged_part(row, "conversation_b")
    return judged_conversations(first, second, winner_of(row["winner"]), labeler=labeler_of(row.get("judge")))


def prompt_of_conversations(row: Row, options: Options) -> Row:
    """Take what both conversations begin with alike."""
    return {"prompt": shared_start([judged_part(row, "conversation_a"), judged_part(row, "conversation_b")])}


ARENA_COLUMNS = Form(
    ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
    ("winner_tie", "id"),
    battle_of_columns,
    name="Arena 55k",
    prompt=prompt_of_columns,
)
ARENA_TEXTS = Form(("prompt", "response_a", "response_b", "winner"), (), battle_of_texts, name="Arena texts")
ARENA_NUMBERED = Form(("prompt", "response_1", "response_2", "winner"), (), battle_of_numbered_texts, name="PPE")
ARENA_CONVERSATIONS = Form(
    ("conversation_a", "conversation_b", "winner"),
    ("turn", "judge"),
    battle_of_conversations,
    name="Arena and MT-bench",
    prompt=prompt_of_conversations,
)
ARENA = (ARENA_COLUMNS, ARENA_TEXTS, ARENA_NUMBERED, ARENA_CONVERSATIONS)

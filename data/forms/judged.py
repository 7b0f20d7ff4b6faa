"""Make rows of our ranking form of answers that somebody judged, and read judgments."""

import math
from collections.abc import Sequence

from data.forms.form import LeftOut, Row
from data.forms.messages import Messages
from data.parsing import describe, digest_of_name

NO_PREFERENCE = "nobody said which answer is better"
PARTED = "two conversations that part before their last answer"
NOT_ANSWERED = "a conversation that does not end with an answer"


def judged_pair(prompt: object, answers: Sequence[object], better: int | None, **about: object) -> Row:
    """Return a row of our ranking form for two answers.

    Args:
        prompt: The prompt, a text or messages.
        answers: The two answers.
        better: The index of the better answer, 0 or 1; None for a tie.
        about: What else the row says: labeler, scores, kind, ….
    """
    ranks = [1, 1] if better is None else [1, 2] if better == 0 else [2, 1]
    return {"prompt": prompt, "responses": list(answers), "ranks": ranks, **about}


def judged_conversations(first: Messages, second: Messages, better: int | None, **about: object) -> Row:
    """Return a row of our ranking form for the last answers of two conversations.

    Args:
        first: A whole conversation.
        second: The other one.
        better: As of `judged_pair`.
        about: As of `judged_pair`.

    Raises:
        LeftOut: They have different prompts, or one does not end with an answer.
    """
    prompt = shared_prompt([first, second])
    return judged_pair(prompt, [first[-1]["content"], second[-1]["content"]], better, **about)


def shared_prompt(conversations: Sequence[Messages]) -> Messages:
    """Return what conversations share, all but their last answers.

    Args:
        conversations: Whole conversations, as messages {role, content}.

    Raises:
        LeftOut: They part earlier, so that their answers have different prompts; or one does not
            end with an answer.
    """
    if any(not messages or messages[-1]["role"] != "assistant" for messages in conversations):
        raise LeftOut(NOT_ANSWERED)
    prompt = conversations[0][:-1]
    if any(messages[:-1] != prompt for messages in conversations):
        raise LeftOut(PARTED)
    return prompt


def shared_start(conversations: Sequence[Messages]) -> Messages:
    """Return the messages that conversations begin with alike, up to the last one of the user."""
    shared: Messages = []
    for turns in zip(*conversations, strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        shared.append(turns[0])
    while shared and shared[-1]["role"] != "user":
        shared.pop()
    return shared


def number(value: object, name: str) -> float | None:
    """Return a number that may be written as a text; None where there is none.

    Args:
        value: The value in the row; null, blank, "N/A" and NaN are no number.
        name: What it is, for the error line.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "n/a", "na", "nan", "none", "null")):
        return None
    if not isinstance(value, int | float | str):
        raise ValueError(f"'{name}' is {describe(value)}; expected a number")
    try:
        result = float(value)
    except ValueError:
        raise ValueError(f"'{name}' is {describe(value)}; expected a number") from None
    if math.isnan(result):
        return None
    if math.isinf(result):
        raise ValueError(f"'{name}' is {describe(value)}; expected a finite number")
    return result


def choice(value: object, name: str, choices: Sequence[float]) -> int | None:
    """Return the position of a number among those that are possible; None where there is none.

    Args:
        value: The value in the row.
        name: Its key, for the error line.
        choices: The possible numbers.
    """
    given = number(value, name)
    if given is None:
        return None
    if given not in choices:
        possible = ", ".join(f"{one:g}" for one in choices)
        raise ValueError(f"'{name}' is {describe(value)}; expected one of {possible}")
    return list(choices).index(given)


def better_by_sign(strength: object, name: str) -> int | None:
    """Return which of two answers is better by a strength: negative for the first, 0 for a tie.

    Args:
        strength: The value in the row.
        name: Its key.

    Raises:
        LeftOut: There is none.
    """
    given = number(strength, name)
    if given is None or given == -100:  # HelpSteer3: neither answer could be judged
        raise LeftOut(NO_PREFERENCE)
    if abs(given) > 3:
        raise ValueError(f"'{name}' is {given:g}; expected -3 (the first is much better) to 3")
    return None if given == 0 else 0 if given < 0 else 1


def kind_of(value: object) -> str | None:
    """Return what a data set calls the sort of a prompt, if that is a text."""
    return value if isinstance(value, str) and value.strip() else None


def pseudonym(person: object) -> str | None:
    """Return a name for a labeler that does not say who it is.

    Args:
        person: A number, an id, an e-mail address, or an object with `id` or `email`.

    Returns:
        The number as a text; of anything else 8 hexadecimal digits of its SHA-256.
    """
    if isinstance(person, dict):
        person = next((person[key] for key in ("id", "email", "username") if person.get(key) not in (None, "")), None)
    if person is None or person == "":
        return None
    if isinstance(person, float) and person.is_integer():
        person = int(person)
    name = str(person).strip()
    if name.isdigit():
        return name
    return digest_of_name(name)


def rated_pair_scores(row: Row, keys: tuple[str, str]) -> list[float] | None:
    """Return two scores under two keys; None where one is missing.

    Args:
        row: The row.
        keys: The keys of the two scores.
    """
    scores = [number(row.get(key), key) for key in keys]
    known = [score for score in scores if score is not None]
    return known if len(known) == 2 else None

"""Convert rankings of Argilla: records as nested objects, or flat with a column for each question.

A record has fields (the prompt and the responses), and for each ranking question what each user
answered. Users are labelers. Answers that are discarded or drafts do not count, and neither do
suggestions.
"""

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.judged import number
from data.forms.messages import read_messages
from data.forms.scores import ranks_of_scores
from data.parsing import describe

PROMPTS = ("prompt", "instruction", "question", "query", "input", "context", "text")
"""Names of the field with the prompt, the most usual first."""
NO_RANKING = "a record without an answer to a ranking question"
DISCARDED = "an answer of a labeler that was discarded or is a draft"
Answer = tuple[object, object, object]
"""(value, user, status) of a question."""


def ranks_from(value: object, names: list[str]) -> list[int | None]:
    """Return the rank of each response from what a user answered.

    Args:
        value: Names in order, the best first; or {value, rank} for each, with ties.
        names: The names of the responses.
    """
    if isinstance(value, dict) and isinstance(value.get("rank"), list) and isinstance(value.get("value"), list):
        value = [{"value": name, "rank": rank} for name, rank in zip(value["value"], value["rank"], strict=True)]
    if not isinstance(value, list):
        raise ValueError(f"a ranking is {describe(value)}; expected a list of the names of the responses")
    scores: dict[str, float] = {}
    for position, entry in enumerate(value, 1):
        name, rank = (entry.get("value"), entry.get("rank")) if isinstance(entry, dict) else (entry, position)
        if name not in names:
            raise ValueError(f"a ranking names {describe(name)}; expected one of {', '.join(names)}")
        place = number(rank, "rank")
        if place is not None:
            scores[str(name)] = -place
    return ranks_of_scores([scores.get(name) for name in names])


def is_ranking(value: object) -> bool:
    """Return whether an answer is a ranking: a list of names, or of {value, rank}."""
    if isinstance(value, dict):
        return isinstance(value.get("rank"), list)
    if not isinstance(value, list) or len(value) < 2:
        return False
    return all(isinstance(entry, str) or (isinstance(entry, dict) and "rank" in entry) for entry in value)


def ranked_names(value: object) -> list[str]:
    """Return the names that a ranking ranks."""
    entries = value.get("value") or [] if isinstance(value, dict) else value
    assert isinstance(entries, list)
    return [str(entry.get("value")) if isinstance(entry, dict) else str(entry) for entry in entries]


def prompt_field(fields: Row, names: list[str]) -> object:
    """Return the prompt of a record: its field `prompt`, or the only field besides responses.

    Args:
        fields: All fields.
        names: The names of the responses.
    """
    others = {key: value for key, value in fields.items() if key not in names and isinstance(value, str | list)}
    key = next((name for name in PROMPTS if others.get(name)), None)
    if key is None and len(others) == 1:
        key = next(iter(others))
    if key is None:
        found = ", ".join(fields)
        raise ValueError(f"no field holds the prompt (the fields are {found}); name it 'prompt'")
    return read_messages(others[key]) if isinstance(others[key], list) else others[key]


def rankings_of(identifier: object, fields: Row, questions: dict[str, list[Answer]]) -> list[Row | LeftOut]:
    """Return a ranking for each user who answered a ranking question.

    Args:
        identifier: The id of the record.
        fields: Its fields.
        questions: Name of a question → its answers.
    """
    results: list[Row | LeftOut] = []
    for answers in questions.values():
        rankings = [answer for answer in answers if is_ranking(answer[0])]
        if not rankings:
            continue
        ranked = {name for value, *_ in rankings for name in ranked_names(value)}
        names = [name for name in fields if name in ranked]
        if len(names) < len(ranked):
            missing = ", ".join(sorted(ranked - set(names)))
            raise ValueError(f"a ranking names {missing}, and there is no such field; rank the responses' fields")
        prompt = prompt_field(fields, names)
        for value, user, status in rankings:
            if status in ("discarded", "draft", "pending"):
                results.append(LeftOut(DISCARDED))
                continue
            ranks = ranks_from(value, names)
            row = {"prompt": prompt, "responses": [fields[name] for name in names], "ranks": ranks, "labeler": user}
            results.append({**row, "id": None if identifier is None else f"{identifier}-{user}"})
    if not results:
        raise LeftOut(NO_RANKING)
    return results


def nested(row: Row, options: Options) -> list[Row | LeftOut]:
    """Convert {id, fields, responses: {question: [{value, user_id, status?}]}}.

    Older versions have responses: [{user_id, status, values: {question: {value}}}].
    """
    fields, responses = row["fields"], row["responses"]
    if not isinstance(fields, dict) or not isinstance(responses, dict | list | None):
        raise ValueError(f"'fields' is {describe(fields)}, 'responses' {describe(responses)}; expected objects")
    questions: dict[str, list[Answer]] = {}
    if isinstance(responses, list):
        for one in responses:
            for name, answer in (one.get("values") or {}).items():
                questions.setdefault(name, []).append((answer.get("value"), one.get("user_id"), one.get("status")))
    else:
        for name, answers in (responses or {}).items():
            for one in answers or []:
                questions.setdefault(name, []).append((one.get("value"), one.get("user_id"), one.get("status")))
    return rankings_of(row.get("id"), fields, questions)


def flat(row: Row, options: Options) -> list[Row | LeftOut]:
    """Convert {id, …fields, "QUESTION.responses", "QUESTION.responses.users", "….status"}."""
    questions: dict[str, list[Answer]] = {}
    for key in columns_of(row):
        values = row[key] or []
        users, statuses = row.get(f"{key}.users") or [], row.get(f"{key}.status") or []
        if not isinstance(values, list) or len(users) != len(values):
            raise ValueError(f"'{key}' does not have one answer for each of '{key}.users'; export the data again")
        statuses = statuses if len(statuses) == len(values) else ["submitted"] * len(values)
        questions[key] = list(zip(values, users, statuses, strict=True))
    fields = {key: value for key, value in row.items() if "." not in key and key not in ("id", "status")}
    return rankings_of(row.get("id"), fields, questions)


def columns_of(row: Row) -> list[str]:
    """Return the columns with the answers to questions."""
    return [key for key in row if key.endswith(".responses") and f"{key}.users" in row]


def flat_keys(row: Row) -> list[str]:
    """Return the columns that are read: the answers, their users and status, and all fields."""
    answers = [f"{key}{end}" for key in columns_of(row) for end in ("", ".users", ".status")]
    return [*answers, *(key for key in row if "." not in key)]


def is_flat(row: Row) -> bool:
    """Return whether a row has the answers of users in columns."""
    return bool(columns_of(row))


def old_flat(row: Row, options: Options) -> list[Row | LeftOut]:
    """Convert {…fields, QUESTION: [{user_id, value: {value, rank}, status}]} of older versions."""
    questions: dict[str, list[Answer]] = {}
    for key, value in row.items():
        if has_answers(value):
            questions[key] = [(one.get("value"), one.get("user_id"), one.get("status")) for one in value]
    names = [*questions, "external_id", "metadata", "id"]
    fields = {key: value for key, value in row.items() if key not in names and "-suggestion" not in key}
    return rankings_of(row.get("external_id"), fields, questions)


def has_answers(value: object) -> bool:
    """Return whether a column holds the users' answers to a ranking question."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(one, dict) and {"user_id", "value", "status"} <= set(one) for one in value) and any(
        is_ranking(one["value"]) for one in value
    )


def is_old_flat(row: Row) -> bool:
    """Return whether any column holds the users' answers to a ranking question."""
    return any(has_answers(value) for value in row.values())


ARGILLA_NESTED = Form(("fields", "responses"), ("id",), nested, name="Argilla records")
ARGILLA_FLAT = Form(("status",), ("id",), flat, name="Argilla table", fits=is_flat, reads=flat_keys)
ARGILLA_OLD = Form(("metadata",), (), old_flat, name="Argilla 1 table", fits=is_old_flat, reads=list)
ARGILLA = (ARGILLA_NESTED, ARGILLA_FLAT, ARGILLA_OLD)

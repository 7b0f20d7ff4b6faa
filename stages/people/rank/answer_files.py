"""Read files of answers, and of rankings that are known to be right, as tasks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.check.guess import guess_kind
from data.error_lines import shorten
from data.files.reading import Reading
from data.parsing import parse_ranking
from data.records import Demonstration, Ranking, prompt_key
from data.row_reader import records, source_rows
from data.source import Loaded, Source
from pipeline.errors import UserError
from stages.people.rank.tasks import MOST_ANSWERS, Given, NewTask, merge

UNJUDGED = ("prompt", "responses")
"""Keys of a row of answers that nobody has judged."""
BESIDE = ("models", "finished", "id", "kind", "user_id", "meta", "source")
"""Further keys that it may have; `models` names who gave each answer."""
FORMS = "rankings of any form, rows {prompt, responses}, or demonstrations with several answers to a prompt"


def read_answer_tasks(path: Path, key: str) -> list[NewTask]:
    """Read a file of answers as tasks, without any judgments that it may hold.

    Args:
        path: The file.
        key: The setting that names it, for error lines.

    Raises:
        UserError: With a line for every mistake in it.
    """
    source, reading = Source(path=path, templated="keep"), Reading()
    rows = list(source_rows(source, reading))
    if reading.errors:
        raise UserError(shorten(reading.errors))
    if rows and all(is_unjudged(value) for _, value in rows):
        return checked(unjudged_tasks(rows, path), key, path)
    kind = guess_kind(source)
    if kind == "rankings":
        return checked([ranking_task(ranking, path, place) for place, ranking in read_records(kind, source)], key, path)
    if kind == "demonstrations":
        return checked(grouped(path, list(read_records(kind, source))), key, path)
    raise UserError(f"{key}: {path} holds {kind or 'rows of no known kind'}; give {FORMS}")


def read_known_tasks(path: Path, key: str) -> list[NewTask]:
    """Read a file of rankings that are known to be right as tasks.

    Raises:
        UserError: With a line for every mistake in it.
    """
    rankings = list(read_records("rankings", Source(path=path, templated="keep")))
    return checked([ranking_task(ranking, path, place, is_known=True) for place, ranking in rankings], key, path)


def read_records(kind: str, source: Source) -> Iterator[tuple[str, Any]]:
    """Yield (location, record) of a file.

    Raises:
        UserError: With a line for every mistake, after the last record.
    """
    loaded = Loaded()
    yield from records(kind, source, loaded)
    if loaded.errors:
        raise UserError(shorten(loaded.errors))


def is_unjudged(value: object) -> bool:
    """Return whether a row holds answers to a prompt, and no judgment."""
    return isinstance(value, dict) and all(key in value for key in UNJUDGED) and value.keys() <= {*UNJUDGED, *BESIDE}


def unjudged_tasks(rows: Sequence[tuple[str, Any]], path: Path) -> list[NewTask]:
    """Return the tasks of rows {prompt, responses, models?}.

    Raises:
        UserError: With a line for every mistake.
    """
    tasks, errors = [], []
    for place, row in rows:
        answers, models = row["responses"], row.get("models")
        try:
            count = len(answers) if isinstance(answers, list) else 0
            if models is not None and not is_list_of_texts(models, count):
                raise ValueError("'models' needs a name for each response")
            plain = {name: value for name, value in row.items() if name != "models"}
            ranking = parse_ranking({**plain, "ranks": [None] * count})
            tasks.append(ranking_task(ranking, path, place, models))
        except ValueError as error:
            errors.append(f"{place}: {error}")
    if errors:
        raise UserError(shorten(errors))
    return tasks


def is_list_of_texts(value: object, count: int) -> bool:
    """Return whether a value is a list of so many texts."""
    return isinstance(value, list) and len(value) == count and all(isinstance(one, str) for one in value)


def ranking_task(
    ranking: Ranking, path: Path, place: str, models: Sequence[str] | None = None, is_known: bool = False
) -> NewTask:
    """Return the task of a ranking's answers.

    Args:
        ranking: The ranking.
        path: The file that it is in.
        place: Where in the file.
        models: Who gave each answer; None: the file is all that is known.
        is_known: Whether its ranks are the right ones.
    """
    names = models or [path.name] * len(ranking.responses)
    answers = tuple(Given(text, finished, name) for (text, finished), name in zip(ranking.answers, names, strict=True))
    prompt = ranking.prompt if isinstance(ranking.prompt, str) else list(ranking.prompt)
    known = ranking.ranks if is_known else None
    source = {"file": path.name, "place": place.rpartition("/")[2]}
    return NewTask(prompt, answers, ranking.kind, ranking.user_id, known, source)


def grouped(path: Path, rows: Sequence[tuple[str, Demonstration]]) -> list[NewTask]:
    """Return a task for each prompt of demonstrations."""
    by_prompt: dict[str, list[tuple[str, Demonstration]]] = {}
    for place, demonstration in rows:
        by_prompt.setdefault(prompt_key(demonstration.prompt), []).append((place, demonstration))
    tasks = []
    for group in by_prompt.values():
        place, first = group[0]
        answers = tuple(Given(one.completion, True, path.name) for _, one in group)
        prompt = first.prompt if isinstance(first.prompt, str) else list(first.prompt)
        source = {"file": path.name, "place": place.rpartition("/")[2]}
        tasks.append(NewTask(prompt, answers, first.kind, first.user_id, source=source))
    return tasks


def checked(tasks: list[NewTask], key: str, path: Path) -> list[NewTask]:
    """Return tasks that the page can show.

    Raises:
        UserError: One has too many answers, a known one no two ranks, or none two answers.
    """
    errors = []
    for task in tasks:
        place, count = f"{path}: {task.source['place']}", len(merge(task.answers))
        if count > MOST_ANSWERS:
            errors.append(f"{place}: {count} different answers; people rank at most {MOST_ANSWERS}, so split them")
        if task.known is not None and len({rank for rank in task.known if rank is not None}) < 2:
            errors.append(f"{place}: no answer is known to be better than another; leave the row out")
    if errors:
        raise UserError(shorten(errors))
    if not any(len({one.text for one in task.answers}) > 1 for task in tasks):
        raise UserError(f"{key}: {path} has no prompt with two different answers; give {FORMS}")
    return tasks

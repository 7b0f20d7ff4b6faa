"""Convert tasks of Label Studio: pairs, rankings, and answers sorted into buckets.

A task has data (the prompt and the answers) and the annotations of one or several people. Cancelled
annotations do not count, and neither do predictions. People become numbers: no name and no e-mail
address gets into a record.
"""

import re
from collections.abc import Iterator, Sequence

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.judged import NO_PREFERENCE, judged_pair, pseudonym
from data.forms.messages import read_messages
from data.forms.scores import ranks_of_scores
from data.parsing import describe

PROMPTS = ("prompt", "instruction", "question", "query", "input", "context", "dialogue", "conversation", "text")
"""Names of the prompt in a task's data, the most usual first."""
SIDES = (("1", "2"), ("a", "b"), ("A", "B"), ("left", "right"), ("0", "1"))
"""How the names of the left and the right answer end."""
CANCELLED = "an annotation that was cancelled"
NOTHING = "an annotation without a comparison"
UNLABELED = "a task that nobody has labeled"


def data_of(row: Row) -> Row:
    """Return the data of a task; keys that the source names (columns) stand beside them."""
    data = row["data"]
    if not isinstance(data, dict):
        raise ValueError(f"'data' is {describe(data)}; expected the task's prompt and answers")
    named = {key: row[key] for key in ("prompt", "response_1", "response_2", "items") if key in row}
    return {**data, **named}


def read_task_prompt(data: Row, taken: Sequence[str]) -> object:
    """Return the prompt of a task.

    Args:
        data: The data of the task.
        taken: Keys that hold answers.
    """
    others = {key: value for key, value in data.items() if key not in taken and isinstance(value, str | list) and value}
    key = next((name for name in PROMPTS if name in others), None)
    if key is None and len(others) == 1:
        key = next(iter(others))
    if key is None:
        found = ", ".join(data)
        raise ValueError(f"no key of the task holds the prompt (it has {found}); say columns: {{prompt: data.KEY}}")
    return read_messages(others[key]) if isinstance(others[key], list) else others[key]


def two_sides(data: Row) -> tuple[str, str]:
    """Return the keys of the left and the right answer: two that differ only in their end."""
    texts = [key for key, value in data.items() if isinstance(value, str)]
    for left, right in SIDES:
        for key in texts:
            stem = re.sub(f"{left}$", "", key)
            if stem != key and f"{stem}{right}" in texts:
                return key, f"{stem}{right}"
    found = ", ".join(data)
    raise ValueError(
        f"no two keys of the task hold the answers (it has {found}); say columns: "
        "{response_1: data.LEFT, response_2: data.RIGHT}"
    )


def sides_of(result: Row, data: Row) -> tuple[str, str]:
    """Return the keys of the left and the right answer of a comparison.

    The comparison names the two texts, the left one first. Where these names are not those of the
    data, the order of the data is taken.

    Args:
        result: The comparison.
        data: The data of the task.
    """
    names = str(result.get("to_name") or "").split(",")
    if len(names) == 2 and all(isinstance(data.get(name.strip()), str) for name in names):
        return names[0].strip(), names[1].strip()
    return two_sides(data)


def items_of(data: Row) -> tuple[str, dict[str, object]]:
    """Return the key of the list of answers, and {id: text} of its items."""
    for key, value in data.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) and "id" in one for one in value):
            return key, {str(one["id"]): one.get("body") or one.get("html") or one.get("title") for one in value}
    raise ValueError(f"no key of the task holds a list of answers {{id, body}} (it has {', '.join(data)})")


def results_of(row: Row) -> Iterator[tuple[str | None, Row] | LeftOut]:
    """Yield (labeler, result) of each comparison in a task, and why others do not count."""
    annotations = row["annotations"]
    if not isinstance(annotations, list) or any(not isinstance(one, dict) for one in annotations):
        raise ValueError(f"'annotations' is {describe(annotations)}; export the project as JSON")
    if not annotations:
        yield LeftOut(UNLABELED)
    for annotation in annotations:
        if annotation.get("was_cancelled"):
            yield LeftOut(CANCELLED)
            continue
        results = [one for one in annotation.get("result") or [] if one.get("type") in ("pairwise", "ranker")]
        if not results:
            yield LeftOut(NOTHING)
        for result in results:
            yield pseudonym(annotation.get("completed_by")), result


def ranking_of(row: Row, labeler: str | None, result: Row, options: Options) -> Row | LeftOut:
    """Return the ranking of one comparison, or why there is none.

    Args:
        row: The task.
        labeler: Who compared.
        result: What they chose.
        options: `tiers` gives the order of buckets.
    """
    data, value = data_of(row), result.get("value")
    value = value if isinstance(value, dict) else {}
    identifier = "-".join(str(part) for part in (row.get("id"), labeler) if part is not None) or None
    about: Row = {"labeler": labeler, "id": identifier, "user_id": None, "kind": None, "meta": None}
    if result["type"] == "pairwise":
        sides = sides_of(result, data)
        selected = value.get("selected")
        if selected in (None, "", "none"):
            return LeftOut(NO_PREFERENCE)
        if selected not in ("left", "right"):
            raise ValueError(f"'selected' is {describe(selected)}; expected left or right")
        answers = [data[key] for key in sides]
        return judged_pair(read_task_prompt(data, sides), answers, ("left", "right").index(selected), **about)
    key, items = items_of(data)
    scores = item_scores(value.get("ranker"), str(result.get("from_name")), options)
    unknown = set(scores) - set(items)
    if unknown:
        raise ValueError(f"a ranking names the item {sorted(unknown)[0]}, which the task does not have")
    ranks = ranks_of_scores([scores.get(name) for name in items])
    return {"prompt": read_task_prompt(data, [key]), "responses": list(items.values()), "ranks": ranks, **about}


def item_scores(ranker: object, name: str, options: Options) -> dict[str, float]:
    """Return {id of an item: its score} of a ranking or of buckets, higher being better.

    Args:
        ranker: Ids in order, or {bucket: ids}; "_" holds those that are in no bucket.
        name: The name of the control, under which older versions put the ids in order.
        options: `tiers` gives the order of buckets.
    """
    if isinstance(ranker, dict) and set(ranker) == {name}:
        ranker = ranker[name]
    if isinstance(ranker, list):
        return {str(item): -float(place) for place, item in enumerate(ranker)}
    if not isinstance(ranker, dict):
        raise ValueError(f"'ranker' is {describe(ranker)}; expected ids in order, or buckets of them")
    unknown = [bucket for bucket in ranker if bucket != "_" and bucket not in options.tiers]
    if unknown:
        raise ValueError(f"the bucket '{unknown[0]}' is not in tiers: [{', '.join(options.tiers)}]; add it")
    places = {bucket: place for place, bucket in enumerate(options.tiers)}
    return {str(item): -float(places[bucket]) for bucket in ranker if bucket != "_" for item in ranker[bucket]}


def tiers_of(rows: Sequence[tuple[str, Row]]) -> list[str]:
    """Return the names of all buckets in the tasks, in the order in which they come."""
    found: dict[str, None] = {}
    for _, row in rows:
        if not isinstance(row["annotations"], list):
            continue  # an error, later
        for one in results_of(row):
            ranker = None if isinstance(one, LeftOut) else (one[1].get("value") or {}).get("ranker")
            if isinstance(ranker, dict) and not isinstance(one, LeftOut) and set(ranker) != {one[1].get("from_name")}:
                found.update(dict.fromkeys(bucket for bucket in ranker if bucket != "_"))
    return list(found)


def gather(rows: Sequence[tuple[str, Row]], options: Options) -> Iterator[tuple[str, Row | ValueError]]:
    """Make a ranking of each person's comparison in each task.

    Args:
        rows: The tasks, with their locations.
        options: `tiers` gives the order of buckets.

    Raises:
        ValueError: There are buckets, and `tiers` does not say which is the best.
    """
    tiers = tiers_of(rows)
    if tiers and not options.tiers:
        names = ", ".join(tiers)
        raise ValueError(f"the answers are sorted into the buckets {names}; say tiers: [{names}] in order, best first")
    seen: dict[str, int] = {}
    for location, row in rows:
        try:
            items = [one if isinstance(one, LeftOut) else ranking_of(row, *one, options) for one in results_of(row)]
        except ValueError as error:
            yield location, error
            continue
        for item in items:
            if not isinstance(item, LeftOut) and item["id"] is not None:
                copies = seen[item["id"]] = seen.get(item["id"], 0) + 1
                item["id"] += f"-{copies}" if copies > 1 else ""
            yield location, item


def single_task(row: Row, options: Options) -> Row:
    """Refuse a single task: the names of buckets are gathered from all."""
    raise LeftOut("a single task")


def prompt_of(row: Row, options: Options) -> Row:
    """Take the prompt of a task."""
    data = data_of(row)
    lists = [key for key, value in data.items() if isinstance(value, list) and key not in PROMPTS]
    taken = lists or two_sides(data)
    return {"prompt": read_task_prompt(data, taken), "user_id": None, "meta": None}


def short_export(row: Row, options: Options) -> Row:
    """Refuse Label Studio's short exports, which do not say what is left and what is right."""
    raise ValueError("this is a short export of Label Studio (JSON-MIN or CSV); export the project as JSON")


TASKS = Form(
    ("annotations", "data"), ("id",), single_task, name="Label Studio", gather=gather, prompt=prompt_of, has_tiers=True
)
SHORT_EXPORT = Form(("annotation_id", "annotator", "lead_time"), (), short_export, name="Label Studio's short export")
LABEL_STUDIO = (TASKS, SHORT_EXPORT)

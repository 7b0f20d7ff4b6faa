"""Convert binary labels: rows whose answer is marked as good or bad, as of KTO.

As a demonstration, a row that is marked as good teaches its answer, and the others are left out and
counted. As rankings, the answers to one prompt are ranked together: the good ones first, the bad
ones behind them. Prompts whose answers are all good, or all bad, say nothing then; with
`by: labels` they stay, and every answer keeps its label, which dpo's loss kto learns from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from data.forms.form import Converted, Form, LeftOut, Options, Row
from data.forms.instructions import INSTRUCTION_DEMONSTRATION, INSTRUCTION_RESPONSE
from data.forms.messages import CONVERSATION_DEMONSTRATION, MESSAGES_DEMONSTRATION, SHAREGPT_DEMONSTRATION
from data.forms.plain import PROMPT_COMPLETION
from data.forms.questions import QUESTION_FORMS
from data.parsing import describe
from data.records import prompt_key, ranks_of_labels

NAME = "KTO"
BY = ("ranks", "labels")
"""What the marks make: ranks alone, or labels too."""
MARKS = ("label", "kto_tag")
"""Keys of the mark, the first that a row has."""
GOOD = ("true", "1", "good", "desirable", "chosen", "positive", "yes", "up", "upvote", "thumbs_up", "thumbsup", "like")
BAD = ("false", "0", "-1", "bad", "undesirable", "rejected", "negative", "no", "down", "downvote", "thumbs_down",
       "thumbsdown", "dislike")  # fmt: skip
IS_BAD = "an answer that is marked as bad ({} false)"
ONE_SORT = "an answer to a prompt whose answers are all marked as {}: no preference (by: labels keeps it)"


def mark_of(value: object, key: str) -> bool:
    """Return whether a mark says that the answer is good.

    Args:
        value: The mark, as the file writes it.
        key: Its key, for error lines.
    """
    word = str(value).strip().lower().removesuffix(".0")  # tables hold whole numbers as floats beside nulls
    if word in GOOD:
        return True
    if word in BAD:
        return False
    raise ValueError(
        f"'{key}' is {describe(value)}; expected true (a good answer) or false (a bad one), or say ignore: [{key}] "
        "if it means something else"
    )


def is_marked(row: Row, key: str) -> bool:
    """Return whether a row has a mark that may say good or bad: a word, a number, or a bool."""
    return isinstance(row.get(key), str | bool | int | float) and row.get(key) != ""


def is_of(base: Form, key: str, row: Row) -> bool:
    """Return whether a row is marked under a key, and is of a form without the mark."""
    return is_marked(row, key) and (base.fits is None or base.fits(row))


def one_of(base: Form, row: Row, options: Options) -> Row:
    """Return the demonstration in a marked row; only its last answer is what was marked."""
    converted = base.convert(row, options)
    parts = converted if isinstance(converted, list) else [converted]
    for part in parts:
        if not isinstance(part, LeftOut):
            return {**part, "learnt": None}
    raise ValueError("the row holds no answer that could be marked")


def demonstration_of(base: Form, key: str, row: Row, options: Options) -> Converted:
    """Read a row that is marked as good; raise LeftOut for one that is marked as bad."""
    if key in options.ignore:
        return base.convert(row, options)
    if not mark_of(row[key], key):
        raise LeftOut(IS_BAD.format(key))
    return one_of(base, row, options)


def prompt_of(base: Form, row: Row, options: Options) -> Row:
    """Read only the prompt, whatever the mark."""
    if base.prompt is not None:
        return base.prompt(row, options)
    return {"prompt": one_of(base, row, options)["prompt"]}


@dataclass
class Answers:
    """Hold the marked answers to one prompt."""

    location: str
    """Where the first of them is."""
    row: Row
    """The row of the first of them."""
    prompt: str | list[dict]
    """The prompt."""
    good: list[str] = field(default_factory=list)
    """The answers that are marked as good."""
    bad: list[str] = field(default_factory=list)
    """The answers that are marked as bad."""


def rankings_of(
    base: Form, key: str, rows: Sequence[tuple[str, Row]], options: Options
) -> Iterator[tuple[str, Row | ValueError]]:
    """Rank the answers to each prompt: the good ones tie on rank 1, the bad ones behind them.

    Args:
        base: The form of the rows without the mark.
        key: The key of the mark.
        rows: All rows of the file, with their locations.
        options: What the source says.
    """
    if key in options.ignore:
        yield rows[0][0], ValueError(f"'{key}' makes the ranks of these rows, and cannot be ignored; name other data")
        return
    prompts: dict[str, Answers] = {}
    for location, row in rows:
        try:
            good = mark_of(row[key], key)
            demonstration = one_of(base, row, options)
            prompt = demonstration["prompt"]
            answers = prompts.setdefault(prompt_key(prompt), Answers(location, row, prompt))
        except ValueError as error:
            yield location, error
            continue
        (answers.good if good else answers.bad).append(demonstration["completion"])
    for answers in prompts.values():
        labels = [True] * len(answers.good) + [False] * len(answers.bad)
        if options.by != "labels" and (not answers.good or not answers.bad):
            reason = ONE_SORT.format("good" if answers.good else "bad")
            for _ in answers.good + answers.bad:
                yield answers.location, LeftOut(reason)
            continue
        about = {name: answers.row[name] for name in ("user_id", "kind") if name in answers.row}
        about |= {"labels": labels} if options.by == "labels" else {}
        responses, ranks = answers.good + answers.bad, ranks_of_labels(labels)
        ranking = {"prompt": answers.prompt, "responses": responses, "ranks": ranks, **about}
        yield answers.location, ranking


def alone(row: Row, options: Options) -> Converted:
    """Count a row that is read without the others, as a guess of its kind does."""
    raise LeftOut("a marked answer without the other answers to its prompt")


def demonstrations_form(base: Form, key: str) -> Form:
    """Return the form of marked rows as demonstrations.

    Args:
        base: The form of the rows without the mark.
        key: The key of the mark.
    """
    return replace(
        base,
        needs=(*base.needs, key),
        convert=partial(demonstration_of, base, key),
        name=NAME,
        fits=partial(is_of, base, key),
        prompt=partial(prompt_of, base),
    )


def rankings_form(base: Form, key: str) -> Form:
    """Return the form of marked rows as rankings.

    Args:
        base: The form of the rows without the mark.
        key: The key of the mark.
    """
    marked = demonstrations_form(base, key)
    return replace(marked, convert=alone, gather=partial(rankings_of, base, key), by=BY)


BASES = (
    MESSAGES_DEMONSTRATION,
    SHAREGPT_DEMONSTRATION,
    CONVERSATION_DEMONSTRATION,
    INSTRUCTION_DEMONSTRATION,
    INSTRUCTION_RESPONSE,
    PROMPT_COMPLETION,
    *QUESTION_FORMS,
)
"""Forms that may be marked."""
MARKED_DEMONSTRATIONS = tuple(demonstrations_form(base, key) for base in BASES for key in MARKS)
MARKED_RANKINGS = tuple(rankings_form(base, key) for base in BASES for key in MARKS)

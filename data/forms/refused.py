"""Name data sets that look like preferences, and are none that can be read.

They judge single steps or single answers. Taken for prompts or demonstrations they would be read
wrongly without a word; so each is recognised, and refused with its name.
"""

from collections.abc import Callable

from data.forms.form import Form, Options, Row


def refusal(problem: str) -> Callable[[Row, Options], Row]:
    """Return a conversion that refuses a row with a problem "what is wrong; what to do"."""

    def convert(row: Row, options: Options) -> Row:
        """Refuse the row."""
        raise ValueError(problem)

    return convert


def why_refused(form: Form, row: Row) -> str:
    """Return the error text of a form that is refused.

    Args:
        form: One of REFUSED.
        row: A row of it.
    """
    try:
        form.convert(row, Options())
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{form.name} is not refused")


def has_steps(row: Row) -> bool:
    """Return whether `completions` and `labels` are lists of steps and their judgments."""
    return isinstance(row["completions"], list) and isinstance(row["labels"], list)


def has_step_tags(row: Row) -> bool:
    """Return whether `label` is a text in lines, the solution with a mark for each step."""
    return isinstance(row["label"], str) and isinstance(row["input"], str) and "\n" in row["label"]


def has_problem(row: Row) -> bool:
    """Return whether `label` holds PRM800K's steps."""
    return isinstance(row["label"], dict) and "steps" in row["label"]


STEPWISE = "judges the steps of solutions, not whole answers; only whole answers can be ranked"
PRM800K = Form(("question", "label"), (), refusal(f"PRM800K {STEPWISE}"), name="PRM800K (not read)", fits=has_problem)
STEPWISE_LABELS = Form(
    ("prompt", "completions", "labels"),
    (),
    refusal(f"a stepwise set (trl) {STEPWISE}"),
    name="stepwise labels (not read)",
    fits=has_steps,
)
MATH_SHEPHERD = Form(
    ("input", "label", "task"),
    (),
    refusal(f"Math-Shepherd {STEPWISE}"),
    name="Math-Shepherd (not read)",
    fits=has_step_tags,
)
RED_TEAM = Form(
    ("transcript", "min_harmlessness_score_transcript"),
    (),
    refusal("the red-team attempts rate whole conversations one by one, and compare none; take hh-rlhf's pairs"),
    name="red-team attempts (not read)",
)
BEAVERTAILS = Form(
    ("prompt", "response", "is_safe"),
    (),
    refusal("BeaverTails marks single answers as safe or not, and compares none; take PKU-SafeRLHF's pairs"),
    name="BeaverTails (not read)",
    prompt=lambda row, options: {"prompt": row["prompt"]},
)
REFUSED = (PRM800K, STEPWISE_LABELS, MATH_SHEPHERD, RED_TEAM, BEAVERTAILS)

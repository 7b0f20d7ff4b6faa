"""Convert NVIDIA's HelpSteer sets.

HelpSteer and HelpSteer2 rate single answers, so that a ranking takes several rows. HelpSteer2's
preferences and HelpSteer3 compare two answers by a number from -3 (the first is much better) to 3.
"""

from collections.abc import Iterator, Sequence

from data.forms.form import Form, LeftOut, Options, Row
from data.forms.judged import better_by_sign, judged_pair, kind_of, number
from data.forms.messages import read_messages
from data.forms.scores import ranks_of_scores
from data.forms.transcripts import helpsteer_prompt
from data.parsing import describe

ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""What each answer of HelpSteer is rated for."""


def rated_answer(row: Row, options: Options) -> Row:
    """Refuse a single row: rankings are gathered from all answers to a prompt."""
    raise LeftOut("a single rated answer")


def gather_ratings(rows: Sequence[tuple[str, Row]], options: Options) -> Iterator[tuple[str, Row | ValueError]]:
    """Make a ranking of the rated answers to each prompt.

    Args:
        rows: All rows, with their locations.
        options: `by` names the aspect.
    """
    aspect = options.by or ASPECTS[0]
    by_prompt: dict[str, list[tuple[str, Row]]] = {}
    for location, row in rows:
        by_prompt.setdefault(str(row["prompt"]), []).append((location, row))
    for answers in by_prompt.values():
        location, first = answers[0]
        if len(answers) < 2:
            yield location, LeftOut("a prompt with a single answer")
            continue
        try:
            scores = [number(row.get(aspect), aspect) for _, row in answers]
        except ValueError as error:
            yield location, error
            continue
        responses, ranks = [row["response"] for _, row in answers], ranks_of_scores(scores, options.tie_within)
        prompt = helpsteer_prompt(first["prompt"])
        yield location, {"prompt": prompt, "responses": responses, "ranks": ranks, "scores": scores}


def prompt_of(row: Row, options: Options) -> Row:
    """Take the prompt."""
    return {"prompt": helpsteer_prompt(row["prompt"])}


def preference(row: Row, options: Options) -> Row:
    """Convert {prompt, response_1, response_2, preference_strength}."""
    better = better_by_sign(row["preference_strength"], "preference_strength")
    answers = [row["response_1"], row["response_2"]]
    meta = {"preference_strength": row["preference_strength"]}
    return judged_pair(helpsteer_prompt(row["prompt"]), answers, better, meta=meta)


def context_preference(row: Row, options: Options) -> Row | list[Row | LeftOut]:
    """Convert {context, response1, response2, overall_preference}, or each person's preference.

    The persons have no names, so their rankings have no labeler.
    """
    prompt, answers = read_messages(row["context"]), [row["response1"], row["response2"]]
    kind = kind_of(row.get("domain"))
    if options.by != "individual":
        better = better_by_sign(row["overall_preference"], "overall_preference")
        meta = {"overall_preference": row["overall_preference"]}
        return judged_pair(prompt, answers, better, kind=kind, meta=meta)
    given = row.get("individual_preference")
    if not isinstance(given, list) or any(not isinstance(one, dict) for one in given):
        raise ValueError(f"'individual_preference' is {describe(given)}; expected a list of {{score}}")
    results: list[Row | LeftOut] = []
    for one in given:
        try:
            results.append(judged_pair(prompt, answers, better_by_sign(one.get("score"), "score"), kind=kind))
        except LeftOut as reason:
            results.append(reason)
    return results


def edit_quality(row: Row, options: Options) -> Row:
    """Convert {context, good_edited_response, bad_edited_response}."""
    answers = [row["good_edited_response"], row["bad_edited_response"]]
    return judged_pair(read_messages(row["context"]), answers, 0, kind=kind_of(row.get("domain")))


def edited_answer(row: Row, options: Options) -> Row:
    """Convert {context, original_response, edited_response}: the edited answer is better."""
    answers = [row["original_response"], row["edited_response"]]
    return judged_pair(read_messages(row["context"]), answers, 1, kind=kind_of(row.get("domain")))


def context_prompt(row: Row, options: Options) -> Row:
    """Take the conversation."""
    return {"prompt": read_messages(row["context"])}


HELPSTEER_RATINGS = Form(
    ("prompt", "response", "helpfulness", "correctness", "coherence"),
    ("complexity", "verbosity"),
    rated_answer,
    name="HelpSteer2",
    by=ASPECTS,
    gather=gather_ratings,
    prompt=prompt_of,
)
HELPSTEER_PREFERENCE = Form(
    ("prompt", "response_1", "response_2", "preference_strength"),
    (),
    preference,
    name="HelpSteer2-preference",
    prompt=prompt_of,
)
HELPSTEER3 = Form(
    ("context", "response1", "response2", "overall_preference"),
    ("individual_preference", "domain"),
    context_preference,
    name="HelpSteer3",
    by=("overall", "individual"),
    prompt=context_prompt,
)
HELPSTEER3_EDITS = Form(
    ("context", "good_edited_response", "bad_edited_response"),
    ("domain",),
    edit_quality,
    name="HelpSteer3 edits",
    prompt=context_prompt,
)
HELPSTEER3_EDITED = Form(
    ("context", "original_response", "edited_response"),
    ("domain",),
    edited_answer,
    name="HelpSteer3 edits",
    prompt=context_prompt,
)
HELPSTEER = (HELPSTEER_RATINGS, HELPSTEER_PREFERENCE, HELPSTEER3, HELPSTEER3_EDITS, HELPSTEER3_EDITED)

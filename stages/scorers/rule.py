"""Score responses by a rule that is built in: settings → a function of one response."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from stages.scorers.rules import answers, formats, instructions, words
from stages.scorers.scorer import ScoreRequest, ScorerSpec, Scores, part_columns
from stages.settings.scorers import rule as settings_of
from stages.settings.scorers.constraints import constraints_of_row

Score = tuple[float, dict[str, float]]
"""The score of a response, and its parts by name."""


@dataclass(frozen=True)
class Response:
    """A response and the row of data that its prompt comes from."""

    text: str
    """The text, without special tokens."""
    ids: Sequence[int]
    """The token ids, EOS included where the response has one."""
    row: Mapping[str, Any]
    """The row of data."""


class RuleScorer:
    """Score each response by the rule that the settings name."""

    reads_rows = False

    def __init__(self, spec: ScorerSpec) -> None:
        assert isinstance(spec.settings, settings_of.RuleSection)
        self.settings = spec.settings
        self.rule = RULES[type(spec.settings)](spec.settings)

    def score(self, request: ScoreRequest) -> Scores:
        """Return the scores and parts (B,), on the CPU.

        Raises:
            UserError: A row of data lacks what the rule compares with.
        """
        rows = request.data_rows or [{} for _ in request.responses]
        places = request.places or ["a prompt"] * len(rows)
        if problems := self.settings.row_problems(rows, places):
            raise UserError(problems[0])
        scores: list[float] = []
        parts: list[dict[str, float]] = []
        for text, ids, row in zip(request.response_texts(), request.responses, rows, strict=True):
            request.poll()
            score, named = self.rule(Response(text, ids, row))
            scores.append(score)
            parts.append(named)
        return Scores(torch.tensor(scores), part_columns(parts))

    def close(self) -> None:
        """Do nothing: a rule holds nothing."""


# ── one function a rule: settings → response → score ─────────────────────────────────────────────


def exact(settings: settings_of.ExactRule) -> Callable[[Response], Score]:
    """Return the rule `exact`."""

    def score(response: Response) -> Score:
        right = answers.is_exact(
            response.text,
            settings_of.answers_of(response.row[settings.answer]),
            settings.where,
            ignore_case=settings.ignore_case,
            ignore_punctuation=settings.ignore_punctuation,
        )
        return float(right), {}

    return score


def choice(settings: settings_of.ChoiceRule) -> Callable[[Response], Score]:
    """Return the rule `choice`, with whether a letter was chosen at all as its part."""

    def score(response: Response) -> Score:
        right = [one.strip().strip("().").upper() for one in settings_of.answers_of(response.row[settings.answer])]
        letter = answers.chosen_letter(response.text, settings.letters)
        return float(letter in right), {"chosen": float(letter is not None)}

    return score


def maths(settings: settings_of.MathsRule) -> Callable[[Response], Score]:
    """Return the rule `maths`, with whether the result was marked as its part."""

    def score(response: Response) -> Score:
        right = answers.is_equal(response.text, settings_of.answers_of(response.row[settings.answer]))
        return float(right), {"marked": float(answers.final_answer(response.text) is not None)}

    return score


def regex(settings: settings_of.RegexRule) -> Callable[[Response], Score]:
    """Return the rule `regex`."""
    pattern = re.compile(settings.pattern, re.DOTALL | (re.IGNORECASE if settings.ignore_case else 0))

    def score(response: Response) -> Score:
        return float(formats.matches(pattern, response.text, settings.whole) != settings.absent), {}

    return score


def json_form(settings: settings_of.JsonRule) -> Callable[[Response], Score]:
    """Return the rule `json`; with a schema, whether it is JSON at all is a part."""
    if settings.schema_file is None:
        return lambda response: (float(formats.is_json(response.text)), {})
    import jsonschema

    schema = json.loads(Path(settings.schema_file).expanduser().read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)

    def score(response: Response) -> Score:
        if not formats.is_json(response.text):
            return 0.0, {"parses": 0.0}
        return float(validator.is_valid(formats.json_value(response.text))), {"parses": 1.0}

    return score


def code_block(settings: settings_of.CodeBlockRule) -> Callable[[Response], Score]:
    """Return the rule `code_block`."""
    return lambda response: (float(formats.has_code_block(response.text, settings.language, settings.only)), {})


def tags(settings: settings_of.TagsRule) -> Callable[[Response], Score]:
    """Return the rule `tags`, with a part for each tag."""

    def score(response: Response) -> Score:
        right, alone = formats.tag_parts(response.text, settings.tags, settings.outside)
        return float(right), {tag: float(found) for tag, found in alone.items()}

    return score


def length(count: Callable[[Response], int]) -> Callable[[settings_of.LengthSection], Callable[[Response], Score]]:
    """Return what makes a rule on a length, whose part is that length.

    Args:
        count: The length of a response.
    """

    def rule(settings: settings_of.LengthSection) -> Callable[[Response], Score]:
        lowest = settings.at_least if settings.target is None else settings.target
        highest = settings.at_most if settings.target is None else settings.target

        def score(response: Response) -> Score:
            found = count(response)
            return words.range_score(found, lowest, highest, settings.tolerance), {"count": float(found)}

        return score

    return rule


def repetition(settings: settings_of.RepetitionRule) -> Callable[[Response], Score]:
    """Return the rule `repetition`."""

    def score(response: Response) -> Score:
        items = response.ids if settings.unit == "tokens" else words.words_of(response.text.lower())
        return -words.repeated_share(items, settings.ngram), {}

    return score


def word_list(settings: settings_of.WordListRule) -> Callable[[Response], Score]:
    """Return the rule `word_list`."""
    listed = settings.listed()
    return lambda response: (words.listed_score(listed, response.text, settings.score), {})


def sentiment(settings: settings_of.SentimentRule) -> Callable[[Response], Score]:
    """Return the rule `sentiment`."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda response: (0.5 + 0.5 * analyzer.polarity_scores(response.text)["compound"], {})


def instruction_rule(settings: settings_of.InstructionsRule) -> Callable[[Response], Score]:
    """Return the rule `instructions`, with a part for each instruction."""
    of_all = settings.of_settings()

    def score(response: Response) -> Score:
        constraints = [*of_all, *constraints_of_row(response.row)]
        share, parts = instructions.share_followed(response.text, constraints)
        return (float(share == 1) if settings.score == "all" else share), parts

    return score


RULES: dict[type[settings_of.RuleSection], Callable[[Any], Callable[[Response], Score]]] = {
    settings_of.ExactRule: exact,
    settings_of.ChoiceRule: choice,
    settings_of.MathsRule: maths,
    settings_of.RegexRule: regex,
    settings_of.JsonRule: json_form,
    settings_of.CodeBlockRule: code_block,
    settings_of.TagsRule: tags,
    settings_of.WordsRule: length(lambda response: len(words.words_of(response.text))),
    settings_of.CharactersRule: length(lambda response: len(response.text)),
    settings_of.TokensRule: length(lambda response: len(response.ids)),
    settings_of.RepetitionRule: repetition,
    settings_of.WordListRule: word_list,
    settings_of.SentimentRule: sentiment,
    settings_of.InstructionsRule: instruction_rule,
}
"""Class of a rule's settings → what makes the rule."""

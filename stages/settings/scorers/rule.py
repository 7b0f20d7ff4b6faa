"""Declare the scorers `rule:`, which are built in: one class a rule, with its own settings.

ppo.rewards: [{rule: words, at_most: 50}, {rule: regex, pattern: "^Dear ", weight: 0.5}]
"""

import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Tag

from pipeline.config.section import setting
from stages.settings.scorers.common import ScorerSection
from stages.settings.scorers.constraints import OF_SETTINGS, Constraint, constraints_of_row, has_constraints

RowCheck = Callable[[Mapping[str, Any]], str]
"""Row of data → what is wrong with it, "" if nothing is."""


class RuleSection(ScorerSection):
    """Hold what the settings of every rule share."""

    rule: str = setting(..., "the rule")

    def default_name(self) -> str:
        """Return the rule's name."""
        return self.rule

    def row_check(self) -> RowCheck | None:
        """Return what checks a row of data; None if the rule does not read rows."""
        return None

    def row_problems(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[str]:
        """Return a line for each row that the rule cannot score by."""
        check = self.row_check()
        if check is None:
            return []
        found = ((place, check(row)) for row, place in zip(rows, places, strict=True))
        return [f"{place}: {problem}" for place, problem in found if problem]


# ── answers under a key of the row ───────────────────────────────────────────────────────────────


class AnswerSection(RuleSection):
    """Hold what the settings of rules share that compare with an answer in the row."""

    answer: str = setting("answer", "key of the rows of data.prompts that holds the right answer")

    def row_check(self) -> RowCheck | None:
        """Return what looks for the answer."""
        return self.answer_problem

    def answer_problem(self, row: Mapping[str, Any]) -> str:
        """Return what is wrong with the answer of a row; "" if nothing is."""
        if row.get(self.answer) is None:
            known = ", ".join(sorted(set(row) - {"prompt"})) or "nothing but prompt"
            return (
                f"the rule {self.rule} finds no {self.answer!r}; add it, or name the key that holds the answer "
                f"(answer: KEY; this row has {known})"
            )
        if not answers_of(row[self.answer]):
            return f"{self.answer} is {row[self.answer]!r}; should be a text, a number, or a list of them"
        return ""


class ExactRule(AnswerSection):
    """Give 1 for a response that is the answer, white space around it aside, otherwise 0."""

    rule: Literal["exact"] = setting(..., "exact")
    where: Literal["whole", "start", "end", "anywhere"] = setting(
        "whole", "where the answer has to stand in the response; whole: it is all of it"
    )
    ignore_case: bool = setting(False, "whether capital and small letters are the same")
    ignore_punctuation: bool = setting(False, "whether punctuation, and how much white space there is, is ignored")


class ChoiceRule(AnswerSection):
    """Give 1 for a response that chooses the answer's letter, otherwise 0.

    The letter is the one in \\boxed{}, or else the last one in brackets or after "answer", or else
    the one that the response begins with or consists of.
    """

    rule: Literal["choice"] = setting(..., "choice")
    letters: str = setting("ABCDE", "the letters that can be chosen", pattern=r"^[A-Z]{2,26}$")

    def answer_problem(self, row: Mapping[str, Any]) -> str:
        """Return what is wrong with the answer of a row: it must be a letter."""
        if problem := super().answer_problem(row):
            return problem
        for one in answers_of(row[self.answer]):
            letter = one.strip().strip("().").upper()
            if len(letter) != 1 or letter not in self.letters:
                return (
                    f"{self.answer} is {one!r}, which is not one letter of {self.letters}; correct it, or set letters"
                )
        return ""


class MathsRule(AnswerSection):
    """Give 1 for a response whose result equals the answer as mathematics, otherwise 0.

    The result is the one in \\boxed{}, after "####", or the last one that is written. math-verify
    compares, so 1/2, 0.5 and \\frac{1}{2} are equal. An answer may be a whole solution of GSM8K's
    or MATH's kind.
    """

    rule: Literal["maths"] = setting(..., "maths")

    def missing(self, key: str) -> list[str]:
        """Return a line if math-verify is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            return [f"{key}.rule: maths needs math-verify; .venv/bin/pip install -e '.[math]'"]
        return []


# ── the form of the response ─────────────────────────────────────────────────────────────────────


class RegexRule(RuleSection):
    """Give 1 for a response in which a regular expression is found, otherwise 0."""

    rule: Literal["regex"] = setting(..., "regex")
    pattern: str = setting(..., "regular expression of Python's re; . matches line ends too")
    whole: bool = setting(False, "whether it has to match the whole response")
    ignore_case: bool = setting(False, "whether capital and small letters are the same")
    absent: bool = setting(False, "whether it must not be found")

    def problems(self, key: str) -> list[str]:
        """Return a line if the pattern is none."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            return [f"{key}.pattern: {self.pattern!r} is no regular expression ({error}); correct it"]
        return []


class JsonRule(RuleSection):
    """Give 1 for a response that is JSON, in a code block or not, otherwise 0."""

    rule: Literal["json"] = setting(..., "json")
    schema_file: str | None = setting(None, "file of a JSON schema that it has to satisfy too; null: any JSON will do")

    def problems(self, key: str) -> list[str]:
        """Return a line if the schema is missing, or no schema."""
        if self.schema_file is None:
            return []
        file = Path(self.schema_file).expanduser()
        if not file.is_file():
            return [f"{key}.schema_file: no such file: {file}; give a JSON schema"]
        if importlib.util.find_spec("jsonschema") is None:
            return []  # `missing` says so
        import jsonschema

        try:
            schema = json.loads(file.read_text(encoding="utf-8"))
            jsonschema.validators.validator_for(schema).check_schema(schema)
        except (ValueError, jsonschema.SchemaError) as error:
            first = " ".join(str(error).strip().splitlines()[0].split())
            return [f"{key}.schema_file: {file}: {first}; correct the schema"]
        return []

    def missing(self, key: str) -> list[str]:
        """Return a line if jsonschema is not installed."""
        if self.schema_file is None or importlib.util.find_spec("jsonschema") is not None:
            return []
        return [f"{key}.schema_file: needs jsonschema; .venv/bin/pip install -e '.[schema]'"]

    def files(self, key: str) -> dict[str, Path]:
        """Return the schema."""
        return {} if self.schema_file is None else {f"{key}.schema_file": Path(self.schema_file).expanduser()}


class CodeBlockRule(RuleSection):
    """Give 1 for a response with a closed code block (three backticks), otherwise 0."""

    rule: Literal["code_block"] = setting(..., "code_block")
    language: str | None = setting(None, "language that the block has to name, as python; null: any, or none")
    only: bool = setting(False, "whether there must be nothing beside one block")


class TagsRule(RuleSection):
    """Give 1 for a response in which each tag stands once, in this order and closed, otherwise 0.

    The part of each tag says whether that tag stands once and closed.
    """

    rule: Literal["tags"] = setting(..., "tags")
    tags: list[str] = setting(["think", "answer"], "tags, as think for <think>…</think>", min_length=1)
    outside: bool = setting(False, "whether text may stand outside of the tags")

    def problems(self, key: str) -> list[str]:
        """Return a line for each tag that is none."""
        wrong = [tag for tag in self.tags if not re.fullmatch(r"[A-Za-z_][\w.-]*", tag)]
        lines = [f"{key}.tags: {tag!r} is no tag; write think for <think>" for tag in wrong]
        if len(set(self.tags)) < len(self.tags):
            lines.append(f"{key}.tags: a tag is named twice; name each once")
        return lines


# ── length ───────────────────────────────────────────────────────────────────────────────────────


class LengthSection(RuleSection):
    """Give 1 for a response of a length within a range, and less the further it is outside."""

    at_least: int | None = setting(None, "shortest length that is right; null: any", ge=0)
    at_most: int | None = setting(None, "longest length that is right; null: any", ge=0)
    target: int | None = setting(None, "the one length that is right, in place of at_least and at_most", ge=0)
    tolerance: int | None = setting(
        None, "how far outside the score has fallen to 0, in a straight line; null: it is 0 at once", ge=1
    )

    def problems(self, key: str) -> list[str]:
        """Return a line if the limits state no range, or contradict each other."""
        if self.target is not None and (self.at_least is not None or self.at_most is not None):
            return [f"{key}.target: stands beside at_least or at_most; give it, or them"]
        if self.target is None and self.at_least is None and self.at_most is None:
            return [f"{key}.rule: {self.rule} has no limit; give at_most, at_least or target"]
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            return [f"{key}.at_least: {self.at_least} is over at_most {self.at_most}; swap them"]
        return []


class WordsRule(LengthSection):
    """Give 1 for a response with so many words, and less the further it is outside."""

    rule: Literal["words"] = setting(..., "words")


class CharactersRule(LengthSection):
    """Give 1 for a response with so many characters, and less the further it is outside."""

    rule: Literal["characters"] = setting(..., "characters")


class TokensRule(LengthSection):
    """Give 1 for a response with so many tokens (with EOS), and less the further it is outside."""

    rule: Literal["tokens"] = setting(..., "tokens")


# ── words ────────────────────────────────────────────────────────────────────────────────────────


class RepetitionRule(RuleSection):
    """Give minus the share of n-grams that repeat an earlier one: from 0 to almost −1."""

    rule: Literal["repetition"] = setting(..., "repetition")
    ngram: int = setting(3, "n, the length of the sequences that are compared", ge=1)
    unit: Literal["words", "tokens"] = setting("words", "what they are sequences of")


class WordListRule(RuleSection):
    """Score by which words of a list are in the response, as whole words, whatever their case."""

    rule: Literal["word_list"] = setting(..., "word_list")
    words: list[str] | None = setting(None, "words or phrases", min_length=1)
    file: str | None = setting(None, "text file with a word or phrase a line, in place of words")
    score: Literal["absent", "any", "share", "penalty"] = setting(
        "absent",
        "absent: 1 if none occurs; any: 1 if one does; share: the share of the listed words that occur; penalty: minus "
        "1 for each time that one occurs",
    )

    def problems(self, key: str) -> list[str]:
        """Return a line if there is not exactly one list."""
        if (self.words is None) == (self.file is None):
            return [f"{key}.words: give words or file, one of them"]
        if self.file is not None and not Path(self.file).expanduser().is_file():
            return [f"{key}.file: no such file: {self.file}; give a text file with a word a line"]
        if not self.listed():
            return [f"{key}.{'file' if self.words is None else 'words'}: holds no word; give some"]
        return []

    def files(self, key: str) -> dict[str, Path]:
        """Return the file of words."""
        return {} if self.file is None else {f"{key}.file": Path(self.file).expanduser()}

    def listed(self) -> list[str]:
        """Return the words and phrases, each once."""
        if self.words is not None:
            given = self.words
        else:
            assert self.file is not None
            given = Path(self.file).expanduser().read_text(encoding="utf-8").splitlines()
        return list(dict.fromkeys(word.strip() for word in given if word.strip()))


class SentimentRule(RuleSection):
    """Score how positive a response is: 0 is most negative, 0.5 neutral, 1 most positive.

    By the lexicon and rules of VADER (Hutto & Gilbert 2014), for English: half its compound score
    and a half.
    """

    rule: Literal["sentiment"] = setting(..., "sentiment")

    def missing(self, key: str) -> list[str]:
        """Return a line if vaderSentiment is not installed."""
        if importlib.util.find_spec("vaderSentiment") is None:
            return [f"{key}.rule: sentiment needs vaderSentiment; .venv/bin/pip install -e '.[sentiment]'"]
        return []


# ── instructions ─────────────────────────────────────────────────────────────────────────────────


class InstructionsRule(RuleSection):
    """Give the share of instructions that a response follows, those of IFEval's kind.

    They are those of the settings below, for all prompts, and those of the row, in the form of
    IFEval's data (`instruction_id_list` and `kwargs`). Each is a part of its own.
    """

    rule: Literal["instructions"] = setting(..., "instructions")
    score: Literal["share", "all"] = setting("share", "share: the share that is followed; all: 1 if all are, else 0")
    lower_case: bool = setting(False, "no capital letters")
    upper_case: bool = setting(False, "capital letters only")
    no_commas: bool = setting(False, "no commas")
    title: bool = setting(False, "a title in <<double angular brackets>>")
    quotation: bool = setting(False, "wrapped in double quotation marks")
    json_only: bool = setting(False, "JSON and nothing else, in a code block or not")
    at_least_words: int | None = setting(None, "fewest words", "words", ge=1)
    at_most_words: int | None = setting(None, "most words", "words", ge=1)
    at_least_sentences: int | None = setting(None, "fewest sentences", "sentences", ge=1)
    at_most_sentences: int | None = setting(None, "most sentences", "sentences", ge=1)
    paragraphs: int | None = setting(None, "number of paragraphs, blank lines between them", "paragraphs", ge=1)
    bullets: int | None = setting(None, "number of bullet points (lines with * or -)", "bullets", ge=1)
    highlights: int | None = setting(None, "fewest *highlighted* places", "places", ge=1)
    placeholders: int | None = setting(None, "fewest [placeholders]", "placeholders", ge=1)
    contains: list[str] | None = setting(None, "words or phrases that must occur", min_length=1)
    forbids: list[str] | None = setting(None, "words or phrases that must not occur", min_length=1)
    starts_with: str | None = setting(None, "what it begins with", min_length=1)
    ends_with: str | None = setting(None, "what it ends with", min_length=1)
    postscript: str | None = setting(None, "how its postscript begins, as P.S.", min_length=1)

    def of_settings(self) -> list[Constraint]:
        """Return the instructions for all prompts."""
        values = {name: getattr(self, name) for name in OF_SETTINGS}
        return [Constraint(name, value) for name, value in values.items() if value not in (None, False)]

    def row_problems(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[str]:
        """Return a line for each row whose instructions are not known, or that has none."""
        lines = []
        for row, place in zip(rows, places, strict=True):
            try:
                constraints_of_row(row)
            except ValueError as error:
                lines.append(f"{place}: {error}")
            if not self.of_settings() and not has_constraints(row):
                lines.append(
                    f"{place}: the rule instructions finds no instruction_id_list; add it, or set what all prompts ask "
                    f"for, as lower_case: true"
                )
        return lines


def answers_of(value: Any) -> list[str]:
    """Return the answers that a row's value holds as texts, any of which is right.

    Args:
        value: A text, a number, or a list of them. Anything else holds none.
    """
    values = value if isinstance(value, list | tuple) else [value]
    right = [one for one in values if isinstance(one, str | int | float) and not isinstance(one, bool)]
    return [str(one) for one in right] if len(right) == len(values) else []


RULES: dict[str, type[RuleSection]] = {
    "exact": ExactRule,
    "maths": MathsRule,
    "choice": ChoiceRule,
    "regex": RegexRule,
    "words": WordsRule,
    "characters": CharactersRule,
    "tokens": TokensRule,
    "json": JsonRule,
    "code_block": CodeBlockRule,
    "tags": TagsRule,
    "instructions": InstructionsRule,
    "repetition": RepetitionRule,
    "word_list": WordListRule,
    "sentiment": SentimentRule,
}
"""Name of a rule → the class of its settings."""

Rule = (
    Annotated[ExactRule, Tag("ExactRule")]
    | Annotated[MathsRule, Tag("MathsRule")]
    | Annotated[ChoiceRule, Tag("ChoiceRule")]
    | Annotated[RegexRule, Tag("RegexRule")]
    | Annotated[WordsRule, Tag("WordsRule")]
    | Annotated[CharactersRule, Tag("CharactersRule")]
    | Annotated[TokensRule, Tag("TokensRule")]
    | Annotated[JsonRule, Tag("JsonRule")]
    | Annotated[CodeBlockRule, Tag("CodeBlockRule")]
    | Annotated[TagsRule, Tag("TagsRule")]
    | Annotated[InstructionsRule, Tag("InstructionsRule")]
    | Annotated[RepetitionRule, Tag("RepetitionRule")]
    | Annotated[WordListRule, Tag("WordListRule")]
    | Annotated[SentimentRule, Tag("SentimentRule")]
)
"""The settings of any rule; the tag is the name of the class."""

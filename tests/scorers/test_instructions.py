"""Test the rule `instructions`: each instruction in IFEval's form, and those of the settings."""

import pytest

from stages.scorers.rules.instructions import CHECKS, is_followed, share_followed
from stages.scorers.rules.words import sentence_count
from stages.settings.scorers.constraints import OF_SETTINGS, READERS, Constraint, constraint_of, constraints_of_row
from stages.settings.scorers.rule import InstructionsRule
from tests.scorers.test_rules import score

LESS, AT_LEAST = {"relation": "less than"}, {"relation": "at least"}
# Id, its arguments, responses that follow it, responses that do not
IFEVAL = [
    ("change_case:english_lowercase", {}, ["a fox, 3 foxes."], ["a Fox", "123"]),
    ("change_case:english_capital", {}, ["A FOX, 3 FOXES."], ["A fOX", "123"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["A BIG fox", "NO, NO"],
        ["a Big fox", "NO"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ["a BIG fox"],
        ["NO, NO"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, ["say hi. Hi."], ["Hi. Say hi."]),
    (
        "combination:two_responses",
        {},
        ["a\n******\nb", "******a******b******"],
        ["a", "a****** a", "a******b******c", "a************b"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] and [b]"], ["[a] and b"]),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye\n\nP.S. more", "bye p. s. more"],
        ["PS more"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S more"], ["P.S. more"]),
    ("detectable_format:constrained_response", {}, ["My answer is no."], ["No.", "my answer is no."]),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": 1}\n```'], ["a: 1"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1\na\nSection b"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b"],
        ["* a", "* a\n* b\n* c", "** a\n** b"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*"],
        ["*a* and b", "* * and *b*"],
    ),
    ("detectable_format:title", {}, ["<<A fox>>\nIt is red."], ["<A fox>", "<< >>"]),
    ("keywords:existence", {"keywords": ["fox", "Red"]}, ["Foxes are red"], ["A fox"]),
    ("keywords:forbidden_words", {"forbidden_words": ["fox"]}, ["foxes are red"], ["a FOX!"]),
    ("keywords:frequency", {"keyword": "fox", "frequency": 2, **AT_LEAST}, ["fox, foxes"], ["a fox"]),
    ("keywords:frequency", {"keyword": "fox", "frequency": 2, **LESS}, ["a fox"], ["fox, foxes"]),
    (
        "keywords:letter_frequency",
        {"letter": "O", "let_frequency": 3, "let_relation": "at least"},
        ["Oh, good"],
        ["good"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "foxes"},
        ["a\n\n'Foxes, they"],
        ["Foxes\n\na", "a\n\nfoxes\n\nb"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "a *** b ***"],
        ["a\n\nb", "a *** b *** c", "a *** *** b"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, **AT_LEAST},
        ["A fox. It is red."],
        ["Dr. Fox is red."],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, **LESS}, ["It is 3.5 feet."], ["A fox? Red!"]),
    ("length_constraints:number_words", {"num_words": 3, **AT_LEAST}, ["a red fox"], ["red fox"]),
    ("length_constraints:number_words", {"num_words": 3, **LESS}, ["red fox!"], ["a red fox"]),
    ("punctuation:no_comma", {}, ["a red fox"], ["a red, quick fox"]),
    (
        "startend:end_checker",
        {"end_phrase": "Any other questions?"},
        ['So. "any other questions?"'],
        ["Any other questions? No."],
    ),
    ("startend:quotation", {}, ['"a fox"'], ['"a fox', '"']),
]


@pytest.mark.parametrize("identity, arguments, good, bad", IFEVAL)
def test_ifevals_instructions(identity, arguments, good, bad):
    constraint = constraint_of(identity, arguments | {"num_stars": None})
    for text in good:
        assert is_followed(text, constraint), text
    for text in [*bad, "", " \n"]:
        assert not is_followed(text, constraint), text


def test_every_id_is_tested_and_every_constraint_has_a_check():
    assert {identity for identity, *_ in IFEVAL} == set(READERS)
    assert set(OF_SETTINGS) <= set(CHECKS) and set(OF_SETTINGS) <= set(InstructionsRule.model_fields)
    made = {constraint_of(identity, arguments).name for identity, arguments, *_ in IFEVAL}
    assert made <= set(CHECKS)
    assert set(CHECKS) == made | set(OF_SETTINGS)


OF_ALL = [
    ({"paragraphs": 2}, "a b\n \nc", "a\nb"),
    ({"starts_with": "Dear"}, '"dear Ada', "My dear"),
    ({"at_most_words": 2}, "red fox", "a red fox"),
    ({"at_least_sentences": 2}, "A. Fox. Red.", "A fox"),
    ({"at_most_sentences": 1}, "A fox is red", "A fox. It is red."),
    ({"highlights": 1}, "*a*", "a"),
    ({"contains": ["fox"]}, "Foxes", "dog"),
    ({"json_only": True}, "[]", "["),
]


@pytest.mark.parametrize("settings, good, bad", OF_ALL)
def test_instructions_of_the_settings(settings, good, bad):
    [name] = settings
    assert score([good, bad], [{}, {}], rule="instructions", **settings) == ([1, 0], {name: [1, 0]})


def test_the_share_and_its_parts():
    """Those of the settings and of the row together; two of one name share a part."""
    row = {
        "instruction_id_list": ["keywords:frequency", "keywords:frequency", "punctuation:no_comma"],
        "kwargs": [
            {"keyword": "fox", "frequency": 1, **AT_LEAST},
            {"keyword": "dog", "frequency": 1, **AT_LEAST},
            None,
        ],
    }
    total, parts = score(["a fox", "a fox, a dog"], [row, {}], rule="instructions", lower_case=True)
    assert total == [0.75, 1]
    assert parts["lower_case"] == [1, 1] and parts["keyword_frequency"][0] == 0.5 and parts["no_commas"][0] == 1
    total, _ = score(["a fox", "a fox and a dog"], [row, row], rule="instructions", score="all")
    assert total == [0, 1]


@pytest.mark.parametrize(
    "row, line",
    [
        ({"instruction_id_list": ["length:words"]}, "'length:words' is no instruction that can be checked"),
        ({"instruction_id_list": ["language:response_language"]}, "is no instruction that can be checked"),
        ({"instruction_id_list": "punctuation:no_comma"}, "should be a list of texts"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "a mapping for each of the 1 ids"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "has no 'keywords'"),
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "fox"}]}, "a list of texts"),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 3.5, **LESS}]},
            "num_words is 3.5",
        ),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 3, "relation": "over"}],
            },
            "relation is 'over'",
        ),
        ({}, "finds no instruction_id_list"),
    ],
)
def test_a_row_that_cannot_be_checked_is_a_line_with_its_place(row, line):
    [problem] = InstructionsRule(rule="instructions").row_problems([row], ["prompts.jsonl:4"])
    assert problem.startswith("prompts.jsonl:4: ") and line in problem


def test_rows_without_instructions_are_fine_beside_settings():
    settings = InstructionsRule(rule="instructions", no_commas=True)
    assert settings.row_problems([{}, {"instruction_id_list": []}], ["a:1", "a:2"]) == []
    assert constraints_of_row({}) == []


def test_an_instruction_from_a_table_may_be_a_float():
    """Parquet holds whole numbers beside nulls as floats."""
    assert constraint_of("detectable_format:number_bullet_lists", {"num_bullets": 3.0}) == Constraint("bullets", 3)


@pytest.mark.parametrize(
    "text, count",
    [
        ("", 0),
        ("a fox", 1),
        ("A fox.", 1),
        ("A fox. It is red", 2),
        ('She said "A fox!" It ran.', 2),
        ("Dr. Ada J. Doe, e.g. here, is in at 3.5 p.m. today.", 1),
        ("So did I. He did not.", 2),
        ("What?! No... Yes.", 3),
        ("狐狸是红的。它跑了！", 2),
        ("A fox.\n\nIt is red.", 2),
    ],
)
def test_sentences(text, count):
    assert sentence_count(text) == count


def test_no_share_without_a_text():
    assert share_followed(" ", [Constraint("no_commas")]) == (0.0, {"no_commas": 0.0})

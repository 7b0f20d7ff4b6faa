"""Test pairs {chosen, rejected}: answers or whole conversations, prompts and scores beside them."""

import json

import pytest

from data.source import Source
from data.sources import read


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def loaded(tmp_path, *rows, kind="rankings", **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read(kind, Source(path, **fields))


def error_of(tmp_path, *rows, **fields) -> str:
    [error] = loaded(tmp_path, *rows, **fields).errors
    return error


HH = {"chosen": "\n\nHuman: p\n\nAssistant: x", "rejected": "\n\nHuman: p\n\nAssistant: y"}
LONG = {
    "chosen": HH["chosen"] + "\n\nHuman: q\n\nAssistant: x",
    "rejected": HH["chosen"] + "\n\nHuman: q\n\nAssistant: y",
}
PARTED = {**LONG, "rejected": HH["rejected"] + "\n\nHuman: q\n\nAssistant: y"}
MESSAGES = {"chosen": [user("p"), assistant("x")], "rejected": [user("p"), assistant("y")]}


# ── transcripts and conversations ────────────────────────────────────────────────────────────────


def test_transcripts_that_part_early_are_left_out_with_a_count(tmp_path):
    result = loaded(tmp_path, HH, LONG, PARTED, {**HH, "rejected": LONG["rejected"]})
    assert [record.responses for record in result.records] == [("x", "y"), ("x", "y")]
    assert result.records[1].prompt == (user("p"), assistant("x"), user("q"))
    assert list(result.left_out.values()) == [2] and not result.errors


def test_a_file_in_which_all_part_early_is_an_error(tmp_path):
    assert "part before" in error_of(tmp_path, PARTED, PARTED)


def test_parted_transcripts_still_give_the_prompt_that_they_share(tmp_path):
    [record] = loaded(tmp_path, PARTED, kind="prompts").records
    assert record.prompt == (user("p"),)


@pytest.mark.parametrize("chosen", ["\n\nHuman: p", "\n\nHuman: p\n\nAssistant: x\n\nHuman: bye"])
def test_a_transcript_without_a_last_answer_is_left_out(tmp_path, chosen):
    result = loaded(tmp_path, HH, {"chosen": chosen, "rejected": HH["rejected"]})
    assert len(result.records) == 1 and sum(result.left_out.values()) == 1 and not result.errors


def test_a_transcript_with_a_blank_turn_is_left_out(tmp_path):
    blank = {key: text.replace("p", "") for key, text in HH.items()}
    result = loaded(tmp_path, HH, blank)
    assert len(result.records) == 1 and sum(result.left_out.values()) == 1 and not result.errors


def test_a_transcript_may_begin_without_blank_lines(tmp_path):
    [record] = loaded(tmp_path, {key: text.strip() for key, text in HH.items()}).records
    assert (record.prompt, record.responses) == ((user("p"),), ("x", "y"))


def test_strings_with_a_common_start_are_no_pair_without_a_prompt(tmp_path):
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert "add a key 'prompt'" in error_of(tmp_path, row)


def test_a_prompt_that_is_a_transcript_is_split(tmp_path):
    row = {"prompt": "\n\nHuman: p\n\nAssistant:", "response": " x", "chosen": " x", "rejected": " y"}
    [record] = loaded(tmp_path, row).records
    assert (record.prompt, record.responses) == ((user("p"),), ("x", "y"))


def test_a_prompt_beside_whole_transcripts_is_not_doubled(tmp_path):
    [record] = loaded(tmp_path, {"prompt": "\n\nHuman: p\n\nAssistant:", **HH}).records
    assert (record.prompt, record.responses) == ((user("p"),), ("x", "y"))


# ── a prompt beside whole conversations ──────────────────────────────────────────────────────────


def test_a_system_message_in_the_conversations_belongs_to_the_prompt(tmp_path):
    system = {"role": "system", "content": "s"}
    row = {"prompt": "p", **{key: [system, *messages] for key, messages in MESSAGES.items()}}
    [record] = loaded(tmp_path, row).records
    assert record.prompt == (system, user("p"))


@pytest.mark.parametrize("prompt", ["p", "q"])
def test_further_turns_in_the_conversations_belong_to_the_prompt(tmp_path, prompt):
    before = [user("p"), assistant("a"), user("q")]
    row = {"prompt": prompt, "chosen": [*before, assistant("x")], "rejected": [*before, assistant("y")]}
    [record] = loaded(tmp_path, row).records
    assert record.prompt == tuple(before)


def test_another_prompt_than_that_of_the_conversations_is_an_error_unless_ignored(tmp_path):
    row = {"prompt": "something else", **MESSAGES}
    assert "another prompt" in error_of(tmp_path, row)
    [record] = loaded(tmp_path, row, ignore=("prompt",)).records
    assert record.prompt == (user("p"),)


def test_conversations_beside_a_prompt_that_part_early_are_left_out(tmp_path):
    early = {
        "chosen": [user("p"), assistant("a"), user("q"), assistant("x")],
        "rejected": [user("p"), assistant("b"), user("q"), assistant("y")],
    }
    result = loaded(tmp_path, {"prompt": "p", **early}, {"prompt": "p", **MESSAGES})
    assert len(result.records) == 1 and sum(result.left_out.values()) == 1


def test_messages_may_be_the_prompt_or_the_chosen_conversation(tmp_path):
    prompt = {"messages": [user("p")], "chosen": "x", "rejected": "y"}
    whole = {"messages": MESSAGES["chosen"], **MESSAGES}
    records = loaded(tmp_path, prompt, whole).records
    assert [record.responses for record in records] == [("x", "y"), ("x", "y")]


# ── scores ───────────────────────────────────────────────────────────────────────────────────────


NAMES = [
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
]


@pytest.mark.parametrize("names", NAMES)
def test_equal_scores_are_a_tie_under_every_name(tmp_path, names):
    rows = [{**MESSAGES, names[0]: 7, names[1]: 7.0}, {**MESSAGES, names[0]: 8, names[1]: 5}]
    tie, pair = loaded(tmp_path, *rows).records
    assert tie.ranks == (1, 1)
    assert (pair.ranks, pair.scores) == ((1, 2), (8.0, 5.0))


def test_scores_against_the_choice_are_an_error_unless_ignored(tmp_path):
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "score_chosen": 1, "score_rejected": 2}
    assert "lower score" in error_of(tmp_path, row)
    [record] = loaded(tmp_path, row, ignore=("score_chosen", "score_rejected")).records
    assert (record.ranks, record.scores) == ((1, 2), None)


def test_scores_within_tie_within_are_a_tie(tmp_path):
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "score_chosen": 2.1, "score_rejected": 2}
    far = {**row, "score_chosen": 4}
    assert [record.ranks for record in loaded(tmp_path, row, far, tie_within=0.5).records] == [(1, 1), (1, 2)]


def test_tie_within_without_scores_is_refused(tmp_path):
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    ranked = {"prompt": "p", "responses": ["x", "y"], "ranks": [1, 2], "scores": [2.1, 2]}
    for rows in ([row], [ranked], [row, ranked]):
        [error] = loaded(tmp_path, *rows, tie_within=0.5).errors
        assert "tie_within: no row makes its ranks of scores" in error
    scored = {**row, "score_chosen": 2.1, "score_rejected": 2}
    assert not loaded(tmp_path, row, scored, tie_within=0.5).errors  # one such row is enough
    assert not loaded(tmp_path, row).errors


def test_the_answers_that_a_pair_was_chosen_from_are_not_needed(tmp_path):
    row = {"instruction": "p", **MESSAGES, "responses": ["x", "y", "z"], "ratings": None}
    [record] = loaded(tmp_path, row).records
    assert record.responses == ("x", "y")


# ── what begins like a transcript, and a system message beside whole conversations ───────────────


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "Human: p\nAssistant: x", "rejected": "Human: p\nAssistant: y"},
        {"prompt": "Human: p\nAssistant:", "chosen": "x", "rejected": "y"},
        {"prompt": "Human: p\nAssistant:", "chosen": " x", "rejected": " y"},
    ],
)
def test_transcripts_without_blank_lines_are_split_too(tmp_path, row):
    [record] = loaded(tmp_path, row).records
    assert record.prompt == ({"role": "user", "content": "p"},) and record.responses == ("x", "y")


def test_a_prompt_that_only_begins_with_the_word_stays(tmp_path):
    [record] = loaded(tmp_path, {"prompt": "Human: is a word", "chosen": "x", "rejected": "y"}).records
    assert record.prompt == "Human: is a word"


def test_a_system_message_may_stand_beside_whole_conversations(tmp_path):
    [record] = loaded(tmp_path, {"system": "s", "prompt": "p", **MESSAGES}).records
    assert record.prompt == ({"role": "system", "content": "s"}, {"role": "user", "content": "p"})
    assert record.responses == ("x", "y")


def test_an_id_that_names_the_prompt_can_be_ignored(tmp_path):
    rows = [{"id": "1", "prompt": "p", "chosen": x, "rejected": "y"} for x in ("a", "b")]
    assert "ignore: [id]" in error_of(tmp_path, *rows)
    assert len({record.id for record in loaded(tmp_path, *rows, ignore=("id",)).records}) == 2


def test_answers_that_begin_with_the_assistants_name_lose_it_behind_a_transcript(tmp_path):
    row = {"prompt": "\n\nHuman: p", "chosen": "\n\nAssistant: x", "rejected": "\n\nAssistant: y"}
    [record] = loaded(tmp_path, row).records
    assert record.responses == ("x", "y")

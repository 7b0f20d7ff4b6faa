"""Figures across rounds: which labels are new, which prompts are apart, which pairs count."""

import json

import pytest

from data.records import write_jsonl
from stages.evaluation import rounds
from stages.evaluation.rounds import RoundFolders, Scored, gain, groups, new_in, trained_prompts
from tests.builders import tiny_tokenizer


def row(name, prompt, text="red"):
    return {"id": name, "prompt": prompt, "responses": [text, text + " fox"], "ranks": [1, 2], "labeler": "ann"}


@pytest.fixture
def place(tmp_path):
    """Return a round whose validation rows are partly of the round before."""
    write_jsonl(tmp_path / "train.jsonl", [row("a", "old"), row("b", "new")])
    write_jsonl(tmp_path / "validation.jsonl", [row("c-2", "kept"), row("d", "fresh")])
    write_jsonl(tmp_path / "old.jsonl", [row("a", "old"), row("c", "kept")])
    return RoundFolders(2, "talk-r2", None, tmp_path, tmp_path / "old.jsonl", None)


def test_labels_of_a_round_are_those_that_the_one_before_had_not(place):
    """Whatever their ids became in a mixture."""
    assert [one.prompt for one in new_in(place, "validation.jsonl")] == ["fresh"]
    assert [one.prompt for one in new_in(place, "train.jsonl")] == ["new"]
    assert trained_prompts([place]) == {rounds.prompt_key("old"), rounds.prompt_key("new")}


class Tools:
    """What encoding rankings needs."""

    def __init__(self, max_length):
        self.tokenizer, self.max_length = tiny_tokenizer(), max_length


def test_labels_that_are_too_long_are_not_measured(place, tmp_path):
    file = tmp_path / "validation.jsonl"
    some = new_in(place, "validation.jsonl")
    assert [group.id for group in groups(some, Tools(60), file)] == ["d"]
    assert groups(some, Tools(3), file) == []


def test_gain_is_paired_by_prompt():
    before = Scored([[0.0, 0.2], [1.0, 1.0], [0.5, 0.5]], ["a", "b", "c"], "kept")
    now = Scored([[0.3, 0.3], [1.0, 1.2], [0.9, 0.9]], ["a", "b", "c"], "kept")
    found = gain(now, before)
    assert found["value"] == pytest.approx((0.2 + 0.1 + 0.4) / 3) and found["ci95"][0] < found["value"]
    assert gain(now, now)["ci95"] is None and gain(now, None) is None


def test_what_an_earlier_round_answered_to_other_prompts_is_not_compared(tmp_path):
    from types import SimpleNamespace

    rows = [{"policy": "ppo", "prompt": "p", "sample": 0, "response": "r", "finished": True, "gold": {"overall": 0.25}}]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    prompts = SimpleNamespace(prompts=["p"], clusters=["p"], chat_ids=[[1]])
    scored = rounds.scored_before(tmp_path, "ppo", SimpleNamespace(judges={}), prompts, "gold")
    assert scored.values == [[0.25]] and scored.estimate()["value"] == 0.25
    others = SimpleNamespace(prompts=["p", "q"], clusters=["p", "q"], chat_ids=[[1], [2]])
    assert rounds.scored_before(tmp_path, "ppo", SimpleNamespace(judges={}), others, "gold") is None
    assert rounds.scored_before(tmp_path, "ppo", SimpleNamespace(judges={}), prompts, "kept") is None
    assert rounds.scored_before(None, "ppo", SimpleNamespace(judges={}), prompts, "gold") is None

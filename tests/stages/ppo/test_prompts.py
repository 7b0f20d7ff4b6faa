"""Test that PPO's prompts are kept, split by their text, used again, and refused as before."""

import json
from types import SimpleNamespace

import pytest

from data import sources
from data.encode import encode_prompt
from data.records import prompt_key
from data.streams import held_out
from data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from pipeline.stage import Source
from pipeline.store import integrity
from pipeline.store.cache import Cache
from stages.ppo.prompts import load_prompts, refuse_rows
from stages.ppo.state import Drawn, refuse_other_prompts
from stages.settings.ppo import PPOSettings
from stages.settings.scorers.common import ScorerSection
from stages.shared.data_notes import DataNotes
from stages.shared.inputs import GivenText
from stages.shared.row_cache import RowCache

ROWS = [{"prompt": f"what is {i} ?" + " please" * (i % 4), "answer": i} for i in range(20)]
ROWS += [{"prompt": [{"role": "user", "content": "say it"}], "meta": {"a": 1}}, ROWS[3]]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return what loads prompts as a new process does, and how often they were read."""
    file, model, reads, said = tmp_path / "mine.jsonl", tmp_path / "model", [], []
    tokenizer = train_tokenizer(["what is it please say"] * 9, 300)
    tokenizer.save_pretrained(model)
    stream = sources.stream
    monkeypatch.setattr(sources, "stream", lambda *given: reads.append(1) or stream(*given))

    def write(rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(**changed):
        said.clear()
        session = SimpleNamespace(stage="ppo", say=said.append, notes=DataNotes(said.append))
        c = PPOSettings(**{"max_length": 64, "response_length": 16, "eval_prompts": 4, **changed})
        given = GivenText(Source(path=file, sha256=integrity.sha256_file(file)), None)
        cache = RowCache(Cache(tmp_path / ".cache"), model, SimpleNamespace(stage="ppo"))
        return load_prompts(session, c, tokenizer, given, cache)

    write(ROWS)
    return SimpleNamespace(write=write, load=load, file=file, tokenizer=tokenizer, reads=reads, said=said)


def test_prompts_are_those_of_the_file_split_by_their_text(start):
    train, held = start.load()
    different = ROWS[:-1]  # the last row repeats a prompt
    indices = held_out([prompt_key(row["prompt"]) for row in different], 0.0, least=4)
    for found, expected in zip((train, held), indices, strict=True):
        rows = [different[i] for i in expected]
        assert [one.data_row for one in found] == rows and [one.prompt for one in found] == [r["prompt"] for r in rows]
        assert [one.ids for one in found] == [encode_prompt(start.tokenizer, row["prompt"]) for row in rows]
        assert [one.place for one in found] == [f"{start.file}:{i + 1}" for i in expected]
    assert len(held) == 4 and "1 repeated prompts left out" in start.said[0]


def test_a_second_start_reads_no_prompt_and_says_the_same(start):
    first, said = [list(part) for part in start.load()], list(start.said)
    again = [list(part) for part in start.load()]
    assert again == first and start.said == said and len(start.reads) == 1
    assert [len(part) for part in start.load(eval_prompts=2)] == [19, 2] and len(start.reads) == 1
    short = start.load(max_length=26, on_too_long="drop")
    assert 2 <= sum(map(len, short)) < 21 and len(start.reads) == 2 and "dropped" in start.said[-1]


def test_what_cannot_be_used_is_refused_with_its_place(start):
    with pytest.raises(UserError, match=rf"{start.file}:1: prompt of \d+ tokens, the limit is 1 \(max_length minus"):
        start.load(max_length=17, on_too_long="error")
    start.write([*ROWS, {"prompt": ""}, {"prompt": 7}])
    with pytest.raises(UserError) as caught:
        start.load()
    assert [line.partition(": ")[0] for line in caught.value.lines] == [f"{start.file}:23", f"{start.file}:24"]
    start.write(ROWS[:1])
    with pytest.raises(UserError, match=r"data\.prompts: 1 prompt; PPO needs at least 2"):
        start.load()


def test_scorers_see_all_rows_and_their_places(start):
    seen = []

    class Asks(ScorerSection):
        def row_problems(self, rows, places):
            seen.extend(zip(rows, places, strict=True))
            return [f"{places[0]}: no key; add it", *(f"{places[-1]}: {key}" for key in rows[-1] if key == "x")]

    train, held = start.load()
    with pytest.raises(UserError) as caught:
        refuse_rows([Asks()], train, held)
    assert caught.value.lines == [f"{train[0].place}: no key; add it"]
    assert seen == [(one.data_row, one.place) for one in [*train, *held]]


def test_a_run_goes_on_with_the_prompts_that_it_drew_from(start):
    train, _ = start.load()
    drawn = refuse_other_prompts(Drawn(), train)
    assert drawn.prompts_digest == integrity.sha256_json([one.ids for one in train])
    assert refuse_other_prompts(drawn, train) == drawn
    with pytest.raises(UserError, match="the prompts within the limits are not those"):
        refuse_other_prompts(drawn, start.load(eval_prompts=2)[0])

"""Test that encoded demonstrations are kept, split, used again, and made again when needed."""

import json
from types import SimpleNamespace

import pytest

from data import sources
from data.encode import encode_prompt, encode_response
from data.records import prompt_key
from data.streams import held_out
from data.text_rows import dataset_of, lengths_of
from data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from pipeline.stage import Source
from pipeline.store import integrity
from pipeline.store.cache import Cache
from stages.shared.data_notes import DataNotes
from stages.shared.demonstrations import Given, load_demonstrations
from stages.shared.inputs import LengthLimit
from stages.shared.row_cache import RowCache

ROWS = [{"prompt": f"red {i}", "completion": f"a fox {i}" * (1 + i % 3)} for i in range(20)]
GRADED = [
    *(row | {"label": True} for row in ROWS),
    {"prompt": "is it ?", "completion": "no", "label": False},
    {"prompt": "so ?", "completion": 7, "label": True},
]


class Start:
    """Start a stage's loading of demonstrations, again and again."""

    def __init__(self, folder, monkeypatch):
        self.file, self.model, self.folder = folder / "mine.jsonl", folder / "model", folder / ".cache"
        self.tokenizer = train_tokenizer(["red a fox hen"] * 9, 300)
        self.tokenizer.save_pretrained(self.model)
        self.said: list[str] = []
        self.reads = 0
        stream = sources.stream

        def counted(*given):
            self.reads += 1
            return stream(*given)

        monkeypatch.setattr(sources, "stream", counted)
        self.write(ROWS)

    def write(self, rows):
        """Write the file of demonstrations."""
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def source(self, **more):
        """Return the source as a stage gets it."""
        return Source(path=self.file, sha256=integrity.sha256_file(self.file), **more)

    def load(self, publish=None, source=None, fraction=0.3, max_length=64, on_too_long="truncate", turns="all"):
        """Load as a new process does."""
        self.said = []
        self.notes = DataNotes(self.said.append, publish)
        session = SimpleNamespace(say=self.said.append, notes=self.notes)
        limit = LengthLimit(max_length, on_too_long, "sft")
        given = Given(source or self.source(), None, fraction, limit, turns)
        cache = RowCache(Cache(self.folder), self.model, SimpleNamespace(stage="sft"))
        return load_demonstrations(session, given, self.tokenizer, cache)


@pytest.fixture
def start(tmp_path, monkeypatch):
    return Start(tmp_path, monkeypatch)


def content(data) -> tuple:
    """Return all that was loaded, as plain values."""
    figures = (data.shown, data.learnt_tokens, data.answer_tokens, data.turns, data.report)
    return list(data.train), list(data.held_out), *figures


def test_a_second_start_reads_no_demonstration_and_says_the_same(start, tmp_path):
    start.write(GRADED)
    folders = [tmp_path / "first", tmp_path / "second"]
    loaded, said, figures = [], [], []
    for folder in folders:
        folder.mkdir()
        source = start.source(reading={"on_bad_row": "drop", "max_bad": 0.5})
        loaded.append(content(start.load(folder, source)))
        said.append(start.said)
        figures.append(start.notes.figures)
    assert start.reads == 1 and loaded[0] == loaded[1]
    assert said[0] == said[1] and "1 bad rows dropped" in said[0][0] and "left out, 1: " in said[0][0]
    assert figures[0] == figures[1] == {"bad_rows": 1, "left_out": 1}
    lists = [[json.loads(line) for line in (folder / "left_out.jsonl").open()] for folder in folders]
    assert lists[0] == lists[1] and [row["line"] for row in lists[0]] == [22, 21]
    assert sorted(path.name for path in start.folder.iterdir()) == ["demonstrations.arrow", "demonstrations.json"]


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.999])
def test_rows_are_those_of_the_demonstrations_split_by_prompt(start, fraction):
    data = start.load(fraction=fraction)
    rows = []
    for row in ROWS:
        prompt, answer = (
            encode_prompt(start.tokenizer, row["prompt"]),
            encode_response(start.tokenizer, row["completion"]),
        )
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    train, valid = held_out([prompt_key(row["prompt"]) for row in ROWS], fraction)
    assert train and valid
    assert list(data.train) == [rows[i] for i in train] and list(data.held_out) == [rows[i] for i in valid]
    assert data.shown == [ROWS[i]["prompt"] for i in valid[:4]]
    assert data.train.labels() == sum(label != -100 for i in train for label in rows[i]["labels"])
    assert data.learnt_tokens == sum(label != -100 for row in rows for label in row["labels"])
    assert (data.turns.conversations, data.turns.learnt, data.report.kept) == (20, 20, 20)


def test_a_trainer_gets_the_rows_from_the_file(start):
    data = start.load()
    plain, order = list(data.train), [3, 0, 3, 5]
    taken = dataset_of(data.train, order)
    assert taken.cache_files[0]["filename"] == str(start.folder / "demonstrations.arrow")
    assert list(taken) == list(dataset_of(plain, order)) == [plain[i] for i in order]
    assert lengths_of(data.train) == lengths_of(plain) and taken.column_names == ["input_ids", "labels"]
    mixed = data.train.with_texts([[7, 8, 9]])
    assert list(mixed) == [*plain, {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}]
    after = data.train.with_texts([[7, 8, 9]], read_before=[4, 5])
    assert after[-1] == {"input_ids": [4, 5, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}
    assert after.labels() == mixed.labels() == data.train.labels() + 3
    assert lengths_of(mixed)[-1] == 3 and list(dataset_of(mixed, [len(plain), 1])) == [mixed[-1], plain[1]]


def test_rows_of_anything_else_are_made_again(start):
    first = content(start.load())
    short = start.load(max_length=8)
    assert short.report.truncated > 0 and content(short) != first and start.reads == 2
    start.load(turns="last")
    start.load(fraction=0.5)
    start.load(source=start.source(limit=10))
    assert start.reads == 5
    start.load()
    start.write(ROWS[1:])
    assert len(content(start.load())[0]) < len(first[0]) and start.reads == 7
    (start.model / "chat_template.jinja").write_text("{{ messages }}")
    start.load()
    assert start.reads == 8
    (start.model / "model.safetensors").write_text("weights say nothing about the tokenizer")
    start.load()
    assert start.reads == 8


def test_where_the_content_is_not_known_nothing_is_used_again(start):
    for source in (Source(path=start.file), Source(parts=(start.source(), Source(path=start.file)))):
        before = start.reads
        start.load(source=source)
        start.load(source=source)
        assert start.reads == before + 2


@pytest.mark.parametrize("kind", ["arrow", "json"])
def test_a_damaged_entry_is_made_again(start, kind):
    first = content(start.load())
    path = start.folder / f"demonstrations.{kind}"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert content(start.load()) == first and start.reads == 2
    path.unlink()
    assert content(start.load()) == first and start.reads == 3


def test_a_figure_that_was_changed_in_an_entry_is_not_believed(start):
    first = content(start.load())
    path = start.folder / "demonstrations.json"
    entry = json.loads(path.read_text())
    entry["says"]["learnt_tokens"] += 1
    path.write_text(json.dumps(entry))
    assert content(start.load()) == first and start.reads == 2


@pytest.mark.parametrize(
    "rows, settings, line",
    [
        ([{"prompt": "red", "completion": 7}], {}, "mine.jsonl:21: "),
        ([], {"max_length": 8, "on_too_long": "error"}, "mine.jsonl:1: demonstration of "),
        ([], {"source": "edited"}, "was edited since this command inspected it"),
    ],
)
def test_an_error_leaves_no_entry(start, rows, settings, line):
    start.write([*ROWS, *rows])
    if settings.get("source") == "edited":
        settings = {"source": start.source()}
        start.write(ROWS[:5])
    with pytest.raises(UserError) as error:
        start.load(**settings)
    assert line in error.value.lines[0] and not list(start.folder.iterdir())


def test_a_start_that_is_cut_short_leaves_what_was_there(start, monkeypatch):
    first = content(start.load())
    before = {path.name: path.read_bytes() for path in start.folder.iterdir()}
    stream = sources.stream

    def cut(*given):
        yield next(stream(*given))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sources, "stream", cut)
        start.load(max_length=32)
    assert {path.name: path.read_bytes() for path in start.folder.iterdir()} == before
    assert content(start.load()) == first

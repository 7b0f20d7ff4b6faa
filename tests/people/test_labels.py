"""What people said becomes rankings: snapshots, status, export, import, and clean keeps it."""

import json
import time
from pathlib import Path

import pytest

from data.source import Source
from data.sources import load
from pipeline import api, cli
from pipeline.api import Location
from pipeline.errors import UserError
from pipeline.fingerprints import sources
from stages.people.rank import lead, snapshots
from stages.people.rank.imports import import_rankings
from stages.people.rank.rules import Rules
from stages.people.rank.snapshots import rankings
from stages.people.rank.tasks import add_task
from stages.people.store.database import open_database
from tests.people.conftest import Page, task

CONFIG = "name: test\ndata: {rankings: ranked}\nlaunch: {device: cpu, threads: 1}\n"


@pytest.fixture
def experiment(tmp_path, monkeypatch, capsys):
    """Return rlhf(words …) of an experiment that trains on what people rank, with its `page`."""
    monkeypatch.chdir(tmp_path)
    Path("test.yaml").write_text(CONFIG)
    base = tmp_path / "artifacts/test"
    base.mkdir(parents=True)

    def rlhf(*words):
        code = cli.main([*words, "-c", "test.yaml"])
        out, err = capsys.readouterr()
        return code, out, err

    rlhf.page, rlhf.base = Page(base, Rules(overlap=1.0, repeat=0.0, known_share=0.0)), base
    yield rlhf
    rlhf.page.database.close()


def rows_of(page, **options):
    with page.database.read() as connection:
        return list(rankings(connection, **options))


def test_rows_have_ranks_and_everything_else_under_meta(experiment):
    page = experiment.page
    ada = page.labeler(code="ada")
    first = ada.next()["assignment"]
    a, b, c, d = (answer["id"] for answer in first["answers"])
    ada.move(first, "aside", answer=d)
    ada.move(first, "confidence", value=5)
    ada.rank(first, [c, [a, b]])
    ada.skip(ada.next()["assignment"], "unreadable")
    (row,) = rows_of(page)
    by_id = dict(zip(sorted([a, b, c, d]), range(4), strict=True))
    assert [row.ranks[by_id[answer]] for answer in (a, b, c, d)] == [2, 2, 1, None]
    assert row.labeler == "ada" and row.responses == tuple(f"answer 0.{k}" for k in range(4))
    assert row.meta["order_shown"] == [by_id[answer] for answer in (a, b, c, d)]
    assert row.meta["set_aside"] == [by_id[d]] and row.meta["confidence"] == 5 and row.meta["seconds"] == 9
    assert row.meta["models"] == [["ppo"], ["sft"], ["ppo"], ["sft"]] and row.meta["reason"] == "first"
    skipped = rows_of(page, skipped=True)[1]
    assert skipped.ranks == (None,) * 4 and skipped.meta["skipped"] == "unreadable"


def test_excluded_rows_repeats_and_known_answers_stay_out(experiment):
    page = experiment.page
    ada = page.labeler()
    for _ in range(2):
        ada.rank(ada.next()["assignment"])
    assert len(rows_of(page)) == 2
    with page.database.transaction() as connection:
        lead.judge(connection, 1, "excluded")
        connection.execute("UPDATE assignments SET reason = 'repeat' WHERE id = 2")
    assert rows_of(page) == []


def test_a_snapshot_stays_until_another_is_taken(experiment):
    page = experiment.page
    assert experiment("rank", "--snapshot")[0] == 2
    assert "ranked" not in experiment("status")[1].partition("└")[2]
    ada, ben = page.labeler(), page.labeler("Ben")
    ada.rank(ada.next()["assignment"])
    assert "ranked: 1 rankings of 1 labeler; the stage rankings takes them" in experiment("status")[1]
    code, out, _ = experiment("rank", "--snapshot")
    assert code == 0 and "data.rankings: ranked reads this" in out
    path = snapshots.current(experiment.base, "test")
    content = path.read_bytes()
    assert "1 rankings in the snapshot that the chain reads; none is new since" in experiment("status")[1]
    ben.rank(ben.next()["assignment"])
    assert "; 1 are new or changed since: `rlhf rank -c test.yaml --snapshot` takes that in" in experiment("status")[1]
    assert snapshots.current(experiment.base, "test") == path and path.read_bytes() == content
    with page.database.transaction() as connection:
        lead.judge(connection, 1, "accepted")
    assert "; 1 are new or changed since" in experiment("status")[1], "accepting changes nothing"
    assert experiment("rank", "--snapshot")[0] == 0
    assert len(load("rankings", Source(path=snapshots.current(experiment.base, "test")))) == 2
    assert path.read_bytes() == content, "the old one is still there"


def test_the_chain_reads_the_first_snapshot_that_a_run_takes(experiment):
    page = experiment.page
    loaded = api.load_experiment("test.yaml")
    place = Location(Path("artifacts"))
    api.open_store(loaded, place)
    stage = api.stages()["rankings"]
    assert loaded.ranked is None and loaded.data.prompts == "world", "the world's other data stay"
    assert sources(stage, loaded) == {}
    code, _, err = experiment("run", "rankings")
    assert code == 2 and "data.rankings: ranked, but nobody has ranked anything yet" in err
    ada = page.labeler()
    ada.rank(ada.next()["assignment"])
    api.open_store(loaded, place)
    assert loaded.ranked is None, "to look takes no snapshot"
    api.open_store_to_run(loaded, place)
    source = sources(stage, loaded)["rankings"]
    assert source.path == loaded.ranked == snapshots.current(Path("artifacts/test"), "test")
    ada.rank(ada.next()["assignment"])
    again = api.load_experiment("test.yaml")
    api.open_store_to_run(again, place)
    assert again.ranked == loaded.ranked
    mixed = api.load_experiment(
        "test.yaml", f"data.rankings=[{{path: ranked, weight: 2}}, {{path: {source.path}, weight: 1}}]"
    )
    api.open_store(mixed, place)
    parts = sources(stage, mixed)["rankings"].parts
    assert [part.path for part in parts] == [source.path, source.path]


def test_ranked_is_for_rankings_only(experiment):
    code, _, err = experiment("status", "data.prompts=ranked")
    assert code == 2 and "data.prompts: what people ranked are rankings" in err


def test_a_damaged_snapshot_is_named(experiment):
    ada = experiment.page.labeler()
    ada.rank(ada.next()["assignment"])
    path = snapshots.take(experiment.base, "test")
    path.write_bytes(path.read_bytes() + b"\n")
    code, _, err = experiment("status")
    assert code == 2 and path.name in err and "damaged" in err


def test_data_check_reads_the_snapshot(experiment):
    assert "there is no snapshot of it yet" in experiment("data", "check")[1]
    ada, ben = experiment.page.labeler(), experiment.page.labeler("Ben")
    for person in (ada, ben):
        person.rank(person.next()["assignment"])
    snapshots.take(experiment.base, "test")
    code, out, _ = experiment("data", "check")
    assert code == 0 and "agree" in out


def test_export_and_import_bring_the_same_rankings(experiment, tmp_path):
    page = experiment.page
    ada, ben = page.labeler(code="ada"), page.labeler(code="ben")
    one = ada.next()["assignment"]
    ids = [answer["id"] for answer in one["answers"]]
    ada.move(one, "aside", answer=ids[3])
    ada.rank(one, [ids[1], [ids[0], ids[2]]])
    ben.rank(ben.next()["assignment"])
    assert experiment("rank", "--export", "out.jsonl")[0] == 0
    assert experiment("rank", "--export", "out.jsonl")[0] == 2, "nothing is written over"
    for words in (("nowhere/out.jsonl",), ("nowhere/ls", "--to", "labelstudio")):
        code, _, said = experiment("rank", "--export", *words)
        assert code == 2 and "there is no folder" in said
    (tmp_path / "other").mkdir()
    other = open_database(tmp_path / "other", "other")
    counts = import_rankings(other, Path("out.jsonl"), (), time.time())
    assert counts == {"added": 2}
    assert import_rankings(other, Path("out.jsonl"), (), time.time()) == {"there already": 2}
    with pytest.raises(UserError, match="tiers: no row comes from a tool with buckets"):
        import_rankings(other, Path("out.jsonl"), ("good", "bad"), time.time())
    with other.read() as connection:
        got = [(row.prompt, row.labeler, row.ranks) for row in rankings(connection)]
    assert got == [(row.prompt, row.labeler, row.ranks) for row in rows_of(page)]
    other.close()


def test_tasks_go_to_other_tools_and_their_labels_come_back(experiment, tmp_path):
    page = experiment.page
    assert experiment("rank", "--export", "ls", "--to", "labelstudio")[0] == 0
    tasks = json.loads((tmp_path / "ls/tasks.json").read_text())
    assert len(tasks) == 5 and "sft" not in (tmp_path / "ls/tasks.json").read_text()
    items = [item["id"] for item in tasks[0]["data"]["items"]]
    ranker = {"best": [items[2]], "good": [items[0], items[1]], "fair": [], "poor": [], "worst": [], "_": [items[3]]}
    annotation = {
        "completed_by": 3,
        "result": [{"type": "ranker", "from_name": "rank", "to_name": "responses", "value": {"ranker": ranker}}],
    }
    (tmp_path / "export.json").write_text(
        json.dumps([{"id": 1, "data": tasks[0]["data"], "annotations": [annotation]}])
    )
    code, out, err = experiment("rank", "--import", "export.json")
    assert (code, err) == (0, "") and "1 rankings added" in out
    (row,) = rows_of(page)
    best = tasks[0]["data"]["items"][2]["body"]
    assert row.ranks[row.responses.index(best)] == 1 and sorted(map(str, row.ranks)) == ["1", "2", "2", "None"]
    assert len(page.rows("SELECT id FROM tasks")) == 5, "it found its task"
    assert experiment("rank", "--export", "argilla", "--to", "argilla")[0] == 0
    assert list((tmp_path / "argilla").glob("records_k4.json"))


def test_flags_that_do_nothing_are_refused(experiment):
    assert experiment("rank", "--to", "argilla")[0] == 2
    assert experiment("rank", "--tiers", "a,b")[0] == 2
    assert experiment("rank", "--snapshot", "--tasks-only")[0] == 2


def test_clean_never_takes_labels_along(experiment):
    ada = experiment.page.labeler()
    ada.rank(ada.next()["assignment"])
    experiment.page.database.close()
    folder = experiment.base / "people"
    (experiment.base / "sft").mkdir()
    (experiment.base / "pages" / "index.html").unlink()
    for path in sorted((experiment.base / "pages").iterdir()):
        path.unlink()
    (experiment.base / "pages").rmdir()
    code, out, _ = experiment("clean", "--yes")
    assert code == 0 and "people/ stays" in out
    assert sorted(path.name for path in experiment.base.iterdir()) == ["people"] and (folder / "people.sqlite").exists()
    assert "nothing but what people said" in experiment("clean", "--yes")[1]
    assert (folder / "people.sqlite").exists()
    from stages.people.web.lock import hold

    with hold(folder / "rank.lock", "rlhf rank"):
        code, _, err = experiment("clean", "--yes", "--with-labels")
        assert code == 2 and "a server writes there" in err and folder.exists()
    assert experiment("clean", "--yes", "--with-labels")[0] == 0
    assert not experiment.base.exists()


def test_known_tasks_have_tiers_of_positions(experiment):
    with experiment.page.database.transaction() as connection:
        add_task(connection, task(77, known=(2, 1, 2, None)), 0.0)
    (row,) = experiment.page.rows("SELECT known FROM tasks WHERE known IS NOT NULL")
    assert json.loads(row["known"]) == [[1], [0, 2]]

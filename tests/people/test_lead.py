"""The lead's requests: decisions, messages, lists and downloads; who is no lead gets nothing."""

import io
import json
import zipfile
from pathlib import Path

import pytest

from data.source import Source
from data.sources import load
from stages.people.rank import lead, snapshots
from stages.people.rank.lead_rows import PAGE
from tests.people.conftest import LEAD_TOKEN, WRITES, Page


class Lead:
    """A lead with a browser."""

    def __init__(self, page):
        self.client = page.browser(LEAD_TOKEN, "/lead")

    def get(self, path):
        return self.client.get(f"/api/lead/{path}")

    def post(self, path, **body):
        return self.client.post(f"/api/lead/{path}", json=body, headers=WRITES)


@pytest.fixture
def ada(page):
    return page.labeler(code="ada")


@pytest.fixture
def boss(page):
    return Lead(page)


def rank_next(person):
    """Rank what comes next as it is shown, and return the assignment."""
    assignment = person.next()["assignment"]
    assert person.rank(assignment).status_code == 200
    return assignment


def rows_of(page):
    with page.database.read() as connection:
        return list(snapshots.rankings(connection))


def test_labelers_get_nothing_of_the_leads(page, ada):
    rank_next(ada)
    for path in ("figures", "rows", "verdicts/1", "download"):
        assert ada.client.get(f"/api/lead/{path}").status_code == 403
    for path, body in (("verdicts/1", {"decision": "excluded"}), ("labelers/1/verdicts", {"decision": "excluded"})):
        assert ada.post(f"/api/lead/{path}", **body).status_code == 403
    assert len(rows_of(page)) == 1


def test_exclude_accept_and_take_back(page, ada, boss):
    rank_next(ada)
    for decision, count in (("excluded", 0), ("accepted", 1), ("sent_back", 0), ("pending", 1)):
        assert boss.post("verdicts/1", decision=decision).status_code == 200
        assert boss.get("rows").json()["rows"][0]["decision"] == decision
        assert len(rows_of(page)) == count
    assert boss.post("verdicts/1", decision="deleted").status_code == 400
    assert boss.post("verdicts/99", decision="accepted").status_code == 404
    assert boss.post("verdicts/1", decision="accepted", message="x" * 1001).status_code == 413


def test_excluded_rows_reach_neither_downloads_nor_the_chain(page, ada, boss, tmp_path):
    rank_next(ada)
    rank_next(ada)
    boss.post("verdicts/1", decision="excluded")
    lines = boss.get("download?format=rankings").text.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["prompt 1"]
    path = snapshots.take(tmp_path, "test", page.database)
    assert [row.prompt for row in load("rankings", Source(path=path))] == ["prompt 1"]
    boss.post("labelers/1/verdicts", decision="excluded")
    answer = boss.get("download")
    assert answer.status_code == 400 and "nobody has ranked anything yet" in answer.json()["error"]


def test_a_task_that_is_sent_back_comes_with_the_message(make_page):
    page = make_page(tasks=1)
    ada, boss = page.labeler(), Lead(page)
    first = rank_next(ada)
    boss.post("verdicts/1", decision="sent_back", message="Please read answer B again.")
    (item,) = ada.client.get("/api/history").json()["items"]
    assert (item["state"], item["message"]) == ("sent_back", "Please read answer B again.")
    back = ada.next()["assignment"]
    assert (back["id"], back["sent_back"], back["message"]) == (first["id"], True, "Please read answer B again.")
    page.clock.now += 2 * page.rules.abandon_after
    assert ada.next()["assignment"]["message"] == "Please read answer B again.", "it is still to be done"
    back = ada.next()["assignment"]
    assert ada.submit(back).status_code == 200
    (row,) = page.rows("SELECT accepted, sent_back, message FROM verdicts")
    assert row == {"accepted": "pending", "sent_back": 0, "message": ""}
    assert len(rows_of(page)) == 1


def test_an_excluded_task_that_is_opened_again_was_not_sent_back(page, ada, boss):
    first = rank_next(ada)
    boss.post("verdicts/1", decision="excluded", message="too fast")
    assert ada.client.get("/api/history").json()["items"][0]["message"] == "", "that is the lead's own note"
    opened = ada.post(f"/api/assignments/{first['id']}/reopen").json()["assignment"]
    assert (opened["sent_back"], opened["message"]) == (False, "")
    page.clock.now += 2 * page.rules.abandon_after
    page.labeler("Ben").next()
    assert page.rows("SELECT state FROM assignments WHERE id = 1") == [{"state": "done"}]


def test_a_skipped_task_can_be_sent_back(make_page):
    page = make_page(tasks=1)
    ada, boss = page.labeler(), Lead(page)
    ada.skip(ada.next()["assignment"])
    boss.post("verdicts/1", decision="sent_back")
    back = ada.next()["assignment"]
    assert back["sent_back"] and ada.rank(back).status_code == 200
    assert len(rows_of(page)) == 1


def test_all_rows_of_a_labeler_at_once(page, ada, boss):
    ben = page.labeler("Ben", code="ben")
    for person in (ada, ben, ada):
        rank_next(person)
    boss.post("verdicts/1", decision="excluded")
    assert boss.post("labelers/1/verdicts", decision="accepted").json() == {"ok": True, "changed": 1}
    assert [row["accepted"] for row in page.rows("SELECT accepted FROM verdicts")] == [
        "excluded",
        "pending",
        "accepted",
    ]
    assert boss.post("labelers/1/verdicts", decision="sent_back", message="again").json()["changed"] == 2
    assert [row.labeler for row in rows_of(page)] == ["ben"]
    assert boss.post("labelers/1/verdicts", decision="pending").json()["changed"] == 2
    assert len(rows_of(page)) == 3
    assert boss.post("labelers/9/verdicts", decision="pending").status_code == 404
    assert boss.post("labelers/1/verdicts", decision="gone").status_code == 400


def test_a_decision_on_what_has_changed_meanwhile_is_refused(page, ada, boss):
    first = rank_next(ada)
    seen = boss.get("rows").json()["rows"][0]["made"]
    opened = ada.post(f"/api/assignments/{first['id']}/reopen").json()["assignment"]
    ada.submit(opened)
    answer = boss.post("verdicts/1", decision="accepted", made=seen)
    assert answer.status_code == 409 and "changed this ranking meanwhile" in answer.json()["error"]
    assert boss.post("verdicts/1", decision="accepted", made="now").status_code == 400
    seen = boss.get("rows?labeler=1").json()["rows"][-1]["made"]
    assert boss.post("verdicts/1", decision="accepted", made=seen).status_code == 200


def test_a_decision_on_an_open_task_leaves_it_to_its_labeler(page, ada, boss):
    first = rank_next(ada)
    ada.post(f"/api/assignments/{first['id']}/reopen")
    boss.post("verdicts/1", decision="sent_back", message="look")
    assert page.rows("SELECT state FROM assignments WHERE id = 1") == [{"state": "open"}]
    assert ada.next()["assignment"]["message"] == "look"


def test_rows_can_be_narrowed_and_paged(make_page):
    page = make_page(tasks=PAGE + 5)
    ada, ben, boss = page.labeler(code="ada"), page.labeler("Ben", code="ben"), Lead(page)
    for _ in range(PAGE + 2):
        rank_next(ada)
    task = ben.next()["assignment"]
    ben.move(task, "note", text="hard")
    ben.move(task, "aside", answer=task["answers"][3]["id"])
    a, b, c, _ = (answer["id"] for answer in task["answers"])
    ben.rank(task, [b, [a, c]])
    ben.skip(ben.next()["assignment"], "makes no sense")
    first = boss.get("rows").json()
    assert len(first["rows"]) == PAGE and first["rows"][0]["skipped"] == "makes no sense"
    assert first["rows"][1]["order"] == "B, then A = C; cannot judge D"
    rest = boss.get(f"rows?before={first['more']}").json()
    assert len(rest["rows"]) == 4 and rest["more"] is None
    assert {row["labeler"] for row in boss.get("rows?labeler=2").json()["rows"]} == {"ben"}
    assert [row["note"] for row in boss.get("rows?show=noted").json()["rows"]] == ["hard"]
    assert (
        len(boss.get("rows?show=skipped").json()["rows"]) == 1 and boss.get("rows?show=excluded").json()["rows"] == []
    )
    assert boss.get("rows?show=' OR 1").status_code == boss.get("rows?before=-1").status_code == 400


def test_one_row_with_everything(page, ada, boss):
    rank_next(ada)
    row = boss.get("verdicts/1").json()
    assert [answer["label"] for answer in row["answers"]] == ["A", "B", "C", "D"]
    assert [answer["place"] for answer in row["answers"]] == [1, 2, 3, 4]
    assert row["answers"][0]["models"] in (["sft"], ["ppo"]) and row["others"] == []
    assert row["prompt"] == [{"role": "user", "content": "prompt 0"}]
    with page.database.transaction() as connection:
        connection.execute("UPDATE tasks SET known = '[[1], [0, 2, 3]]' WHERE id = 1")
    known = {answer["text"]: answer["known"] for answer in boss.get("verdicts/1").json()["answers"]}
    assert known == {"answer 0.0": 2, "answer 0.1": 1, "answer 0.2": 2, "answer 0.3": 2}
    assert boss.get("verdicts/7").status_code == boss.get(f"verdicts/{10**30}").status_code == 404


def test_what_others_said_is_in_the_letters_of_the_row(make_page):
    from stages.people.rank.rules import Rules

    page = make_page(rules=Rules(overlap=1.0, repeat=0.0, known_share=0.0), tasks=1)
    ada, ben, boss = page.labeler(code="ada"), page.labeler("Ben", code="ben"), Lead(page)
    one, two = ada.next()["assignment"], ben.next()["assignment"]
    order = [answer["id"] for answer in one["answers"]]
    ada.rank(one, order)
    ben.rank(two, order[::-1])
    (other,) = boss.get("verdicts/1").json()["others"]
    assert (other["labeler"], other["reason"], other["order"]) == ("ben", "overlap", "D, then C, then B, then A")
    (pair,) = boss.get("figures").json()["pairs"]
    assert (pair["labelers"], pair["value"], pair["n"]) == (["ada", "ben"], 0.0, 6)


def test_figures_with_and_without_what_is_excluded(page, ada, boss):
    rank_next(ada)
    boss.post("verdicts/1", decision="excluded")
    without, with_it = boss.get("figures").json(), boss.get("figures?excluded=1").json()
    assert without["labelers"][0]["figures"]["ties"] is None
    assert with_it["labelers"][0]["figures"]["ties"]["value"] == 0
    for found in (without, with_it):
        assert found["experiment"] == "test" and found["labelers"][0]["decisions"]["excluded"] == 1
        assert found["labelers"][0]["name"] == "Ada"


def test_downloads_have_a_name_and_the_right_type(page, ada, boss, tmp_path):
    rank_next(ada)
    ada.skip(ada.next()["assignment"], "unreadable")
    answer = boss.get("download?format=rankings")
    assert answer.headers["content-type"] == "application/x-ndjson; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="test-rankings-2023-11-14.jsonl"'
    assert int(answer.headers["content-length"]) == len(answer.content)
    Path(tmp_path / "got.jsonl").write_bytes(answer.content)
    assert [row.labeler for row in load("rankings", Source(path=tmp_path / "got.jsonl"))] == ["ada", "ada"]
    assert "Ada" not in answer.text, "a name is in no file"
    for form, name in (("labelstudio", "tasks.json"), ("argilla", "records_k4.json")):
        answer = boss.get(f"download?format={form}")
        assert (
            answer.headers["content-type"] == "application/zip"
            and f"test-{form}-" in answer.headers["content-disposition"]
        )
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert len(json.loads(archive.read(name))) == 5
    assert boss.get("download?format=exe").status_code == 400


def test_a_download_leaves_nothing_behind_and_labelers_go_on_meanwhile(page, ada, boss, monkeypatch):
    rank_next(ada)
    monkeypatch.setattr("tempfile.tempdir", str(page.database.path.parent))
    before = sorted(page.database.path.parent.iterdir())
    with page.database.read_beside() as connection:  # as a download that takes long
        assert connection.execute("SELECT COUNT(*) FROM verdicts").fetchone()[0] == 1
        rank_next(ada)
        assert connection.execute("SELECT COUNT(*) FROM verdicts").fetchone()[0] == 1, "one state"
    assert boss.get("download").status_code == 200
    assert sorted(page.database.path.parent.iterdir()) == before


def test_an_older_database_gets_the_new_columns_and_a_backup(tmp_path):
    from stages.people.store import database, schema

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "VERSION", 1)
        old = Page(tmp_path)
        old.database._connection.execute("SELECT 1")
        old.database.close()
    opened = database.open_database(tmp_path, "test")
    with opened.transaction() as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == schema.VERSION == 2
        assert connection.execute("SELECT message, sent_back FROM verdicts").fetchall() == []
        assert lead.judge_all(connection, add_labeler(connection), "excluded") == 0
    opened.close()
    assert len(list((tmp_path / "people/backups").glob("*-version-1.sqlite"))) == 1


def add_labeler(connection):
    return connection.execute("INSERT INTO labelers(code, name, key_hash, created) VALUES('a', 'A', 'h', 0)").lastrowid

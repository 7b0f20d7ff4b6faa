"""The ranking page's interface: join, move, undo, submit, skip, look back, and what is refused."""

import json

from stages.people.rank.rules import Flag, Rules
from tests.people.conftest import LEAD_TOKEN


def ids(assignment):
    return [answer["id"] for answer in assignment["answers"]]


def test_a_labeler_ranks_with_ties_and_sets_aside(page):
    ada = page.labeler()
    task = ada.next()["assignment"]
    a, b, c, d = ids(task)
    for answer, slot in ((a, 0), (b, 2), (c, 0)):
        ada.move(task, "place", answer=answer, tier=slot)
    refused = ada.submit(task)
    assert refused.status_code == 400 and "1 of the answers" in refused.json()["error"]
    ada.move(task, "aside", answer=d)
    ada.move(task, "confidence", value=4)
    ada.move(task, "note", text="hm")
    done = ada.submit(task)
    assert done.json()["ok"] and done.json()["next"]["assignment"]["id"] != task["id"]
    assert done.json()["next"]["progress"] == {"done_today": 1, "done": 1, "left": 3, "break_due": False}
    (verdict,) = page.rows("SELECT * FROM verdicts")
    assert json.loads(verdict["tiers"]) == [[a, c], [b]] and json.loads(verdict["set_aside"]) == [d]
    assert (verdict["confidence"], verdict["note"], verdict["accepted"]) == (4, "hm", "pending")


def test_what_a_labeler_sees_names_no_model_and_no_reason(page):
    text = json.dumps(page.labeler().next())
    assert "ppo" not in text and "sft" not in text and "reason" not in text and "known" not in text


def test_moves_and_undo(page):
    ada = page.labeler()
    task = ada.next()["assignment"]
    a, b, c, d = ids(task)
    empty = {"tiers": [[], [], [], []], "set_aside": [], "likert": {}, "confidence": None, "note": ""}
    assert task["draft"] == empty and not task["can_undo"]
    steps = [
        (("place", {"answer": a, "tier": 1}), [[], [a], [], []]),
        (("place", {"answer": b, "tier": 1}), [[], [a, b], [], []]),
        (("place", {"answer": b, "tier": 0, "new": True}), [[b], [a], [], []]),
        (("same", {"answer": c, "as": a}), [[b], [a, c], [], []]),
        (("place", {"answer": d, "tier": 1, "new": True}), [[b], [d], [a, c], []]),
        (("place", {"answer": c, "tier": None}), [[b], [d], [a], []]),
        (("aside", {"answer": a}), [[b], [d], [], []]),
    ]
    for (kind, body), tiers in steps:
        assert ada.move(task, kind, **body).status_code == 200 and task["draft"]["tiers"] == tiers, (kind, body)
    assert task["draft"]["set_aside"] == [a]
    ada.move(task, "tick")
    for _, tiers in steps[-2::-1]:
        ada.move(task, "undo")
        assert task["draft"]["tiers"] == tiers
    ada.move(task, "undo")
    assert task["draft"] == empty and not task["can_undo"]
    ada.move(task, "undo")
    assert task["draft"] == empty
    again = ada.next()["assignment"]
    assert again["id"] == task["id"] and again["seq"] == task["seq"] == 16 and again["draft"] == empty


def test_a_new_slot_takes_an_empty_one_behind_or_else_before(page):
    ada = page.labeler()
    task = ada.next()["assignment"]
    a, b, c, d = ids(task)
    for answer, slot in ((a, 1), (b, 2), (c, 3)):
        ada.move(task, "place", answer=answer, tier=slot)
    ada.move(task, "place", answer=d, tier=3, new=True)
    assert task["draft"]["tiers"] == [[a], [b], [d], [c]]


def test_senseless_moves_are_refused_and_not_stored(page):
    ada = page.labeler()
    task = ada.next()["assignment"]
    first, other = ids(task)[:2]
    senseless = [
        ("place", {"answer": 10**9, "tier": 0}),
        ("place", {"answer": first, "tier": 4}),
        ("place", {"answer": first, "tier": -1}),
        ("place", {"answer": str(first), "tier": 0}),
        ("place", {"answer": True, "tier": 0}),
        ("same", {"answer": first, "as": other}),
        ("likert", {"answer": first, "overall": 8}),
        ("flag", {"answer": first, "flag": "a", "value": 1}),
        ("confidence", {"value": 0}),
        ("explode", {}),
        ("submit", {}),
    ]
    for kind, body in senseless:
        assert ada.move(task, kind, **body).status_code == 400, kind
    assert ada.move(task, "note", text="a" * 4001).status_code == 413
    assert ada.next()["assignment"]["seq"] == 0


def test_a_second_tab_gets_a_conflict_with_todays_state(page):
    ada = page.labeler()
    task = ada.next()["assignment"]
    other_tab = dict(task)
    ada.move(task, "place", answer=ids(task)[0], tier=0)
    stale = ada.move(other_tab, "place", answer=ids(task)[1], tier=0)
    assert stale.status_code == 409 and stale.json()["seq"] == 1 and stale.json()["draft"] == task["draft"]
    assert ada.submit(other_tab).status_code == 409


def test_a_retry_does_nothing_twice(page):
    ada = page.labeler()
    task = ada.next()["assignment"]
    first = ids(task)[0]
    path = f"/api/assignments/{task['id']}/moves"
    body = {"seq": 0, "kind": "place", "body": {"answer": first, "tier": 0}, "active_ms": 1.5, "id": "abc"}
    one, two = ada.post(path, **body), ada.post(path, **body)
    assert one.status_code == two.status_code == 200 and two.json()["seq"] == 1
    for answer in ids(task)[1:]:
        task["seq"] = ada.post(
            path, **{**body, "seq": ada.next()["assignment"]["seq"], "id": None, "body": {"answer": answer, "tier": 1}}
        ).json()["seq"]
    one, two = ada.submit(task, id="end"), ada.submit(task, id="end")
    assert one.status_code == two.status_code == 200
    assert ada.submit(task).status_code == 409, "without the id it is a second wish"
    assert len(page.rows("SELECT * FROM verdicts")) == 1


def test_seconds_count_work_and_not_more_than_has_passed(page):
    ada = page.labeler()
    task = ada.next()["assignment"]
    page.clock.now += 30
    ada.move(task, "tick", active_ms=12_000)
    ada.move(task, "tick", active_ms=3_600_000)
    page.clock.now += 5
    ada.move(task, "tick", active_ms=3_600_000)
    assert page.rows("SELECT seconds FROM assignments")[0]["seconds"] == 12 + 0 + 5
    for wrong in (-1, "1", True, 10**12, float("1e300")):
        assert ada.move(task, "tick", active_ms=wrong).status_code == 400


def test_skip_needs_a_reason_and_goes_to_another(page):
    ada, ben = page.labeler(), page.labeler("Ben")
    task = ada.next()["assignment"]
    assert ada.skip(task, reason=" ").status_code == 400
    after = ada.skip(task, reason="cannot read it").json()["next"]["assignment"]
    assert after["id"] != task["id"] and after["task"]["prompt"] != task["task"]["prompt"]
    assert ben.next()["assignment"]["task"]["prompt"] == task["task"]["prompt"]
    (verdict,) = page.rows("SELECT * FROM verdicts")
    assert verdict["skipped"] == "cannot read it" and verdict["tiers"] == "[]"


def test_the_last_ten_can_be_opened_again(make_page):
    page = make_page(tasks=13)
    ada = page.labeler()
    done = []
    for _ in range(12):
        task = ada.next()["assignment"]
        ada.rank(task)
        done.append(task)
    items = ada.client.get("/api/history").json()["items"]
    assert [item["assignment"] for item in items] == [task["id"] for task in done[:1:-1]]
    assert items[0]["opening"] == done[-1]["task"]["prompt"][0]["content"] and items[0]["seconds"] == 9
    assert len(ada.client.get("/api/history?limit=3").json()["items"]) == 3
    assert ada.post(f"/api/assignments/{done[0]['id']}/reopen").status_code == 403
    current = ada.next()["assignment"]
    again = ada.post(f"/api/assignments/{done[5]['id']}/reopen").json()["assignment"]
    assert again["draft"]["tiers"] == [[answer] for answer in ids(done[5])] and again["reopened"]
    assert ada.next()["assignment"]["id"] == done[5]["id"]
    order = ids(done[5])[::-1]
    assert ada.rank(again, order).json()["next"]["assignment"]["id"] == current["id"]
    (verdict,) = page.rows("SELECT * FROM verdicts WHERE assignment_id = ?", done[5]["id"])
    assert json.loads(verdict["tiers"]) == [[answer] for answer in order]
    kinds = [row["kind"] for row in page.rows("SELECT kind FROM moves WHERE assignment_id = ?", done[5]["id"])]
    assert kinds.count("submit") == 2 and "reopen" in kinds


def test_a_task_that_is_reopened_and_left_counts_as_it_was(page):
    ada = page.labeler()
    task = ada.next()["assignment"]
    ada.rank(task)
    ada.post(f"/api/assignments/{task['id']}/reopen")
    page.clock.now += page.rules.abandon_after + 1
    ada.next()
    assert page.rows("SELECT state FROM assignments WHERE id = ?", task["id"])[0]["state"] == "done"


def test_likert_unlocks_the_ranking(make_page):
    flags = (Flag("false", "Is it false?"),)
    page = make_page(rules=Rules(overlap=0, repeat=0, known_share=0, likert=True, flags=flags))
    ada = page.labeler()
    task = ada.next()["assignment"]
    assert task["steps"] == {"likert": True, "flags": [{"name": "false", "question": "Is it false?"}]}
    refused = ada.rank(task)
    assert refused.status_code == 400 and "rated" in refused.json()["error"]
    for number, answer in enumerate(ids(task)):
        ada.move(task, "likert", answer=answer, overall=7 - number)
    ada.move(task, "flag", answer=ids(task)[0], flag="false", value=False)
    assert ada.submit(task).status_code == 200
    (verdict,) = page.rows("SELECT * FROM verdicts")
    assert json.loads(verdict["likert"])[str(ids(task)[0])] == {"overall": 7, "flags": {"false": False}}


def test_names_and_codes(page):
    ada, ben = page.labeler("Ada"), page.labeler("Ben", "ben-2")
    assert (ada.labeler["code"], ben.labeler["code"]) == ("L1", "ben-2")
    assert page.labeler("Cem").labeler["code"] == "L2"
    for wrong, status in (("BEN-2", 409), ("a b", 400), ("a@b.example", 400), ("a" * 25, 400)):
        assert ada.post("/api/labelers", name="Dee", code=wrong).status_code == status, wrong
    assert ada.post("/api/labelers", name=" ").status_code == 400
    stored = page.rows("SELECT * FROM labelers")
    assert all(ada.key not in str(row) for row in stored), "the key itself is nowhere in the file"


def test_a_key_brings_a_labeler_to_another_browser(page):
    ada = page.labeler()
    task = ada.next()["assignment"]
    other = page.browser()
    assert other.get("/api/next").json()["need"] == "labeler"
    assert other.post("/api/session", json={"key": "x"}, headers={"X-RLHF": "1"}).status_code == 404
    assert other.post("/api/session", json={"key": ada.key}, headers={"X-RLHF": "1"}).json()["labeler"] == ada.labeler
    assert other.get("/api/next").json()["assignment"]["id"] == task["id"]


def test_nobody_touches_the_tasks_of_others(page):
    ada, ben = page.labeler(), page.labeler("Ben")
    task = ada.next()["assignment"]
    assert ben.move(task, "place", answer=ids(task)[0], tier=0).status_code == 404
    assert ben.submit(task).status_code == 404 and ben.skip(task).status_code == 404
    assert ben.post(f"/api/assignments/{task['id']}/reopen").status_code == 404
    assert ben.post(f"/api/assignments/{10**30}/reopen").status_code == 404


def test_the_lead_sends_back_and_excludes(page):
    ada, ben = page.labeler(), page.labeler("Ben")
    task = ada.next()["assignment"]
    ada.rank(task)
    lead = page.browser(LEAD_TOKEN, "/lead")
    (verdict,) = page.rows("SELECT id FROM verdicts")
    path, headers = f"/api/lead/verdicts/{verdict['id']}", {"X-RLHF": "1"}
    assert lead.post(path, json={"decision": "sent_back"}, headers=headers).status_code == 200
    ada.skip(ada.next()["assignment"]) if ada.next()["assignment"]["id"] != task["id"] else None
    back = ada.next()["assignment"]
    assert back["id"] == task["id"] and back["sent_back"]
    ada.submit(back)
    assert page.rows("SELECT accepted FROM verdicts WHERE id = ?", verdict["id"])[0]["accepted"] == "pending"
    assert ben.next()["assignment"]["task"]["prompt"] != task["task"]["prompt"]
    ben.skip(ben.next()["assignment"])
    assert lead.post(path, json={"decision": "excluded"}, headers=headers).status_code == 200
    cem = page.labeler("Cem")
    assert cem.next()["assignment"]["task"]["prompt"] == task["task"]["prompt"], "an excluded row does not count"
    assert lead.post(path, json={"decision": "burnt"}, headers=headers).status_code == 400
    stop = f"/api/lead/labelers/{cem.labeler['id']}"
    assert lead.post(stop, json={"state": "stopped"}, headers=headers).status_code == 200
    cem.rank(cem.next()["assignment"])
    assert cem.next()["assignment"] is None


def test_a_break_is_due_after_work_without_one(make_page):
    page = make_page(rules=Rules(overlap=0, repeat=0, known_share=0, break_every=600, abandon_after=1e6))
    ada = page.labeler()
    task = ada.next()["assignment"]
    for _ in range(10):
        assert not ada.next()["progress"]["break_due"]
        ada.move(task, "tick")
        page.clock.now += 60
    assert ada.next()["progress"]["break_due"]
    page.clock.now += 301
    assert not ada.next()["progress"]["break_due"]


def test_an_error_is_a_sentence(page, monkeypatch):
    ada = page.labeler()
    task = ada.next()["assignment"]
    page.database._connection.execute("PRAGMA query_only=ON")  # as a disk that became read-only
    answer = ada.move(task, "place", answer=ids(task)[0], tier=0)
    assert answer.status_code == 503 and "not saved" in answer.json()["error"]
    page.database._connection.execute("PRAGMA query_only=OFF")
    assert ada.move(task, "place", answer=ids(task)[0], tier=0).json()["seq"] == 1
    assert ada.client.get("/api/nothing").json() == {"error": "there is nothing here"}

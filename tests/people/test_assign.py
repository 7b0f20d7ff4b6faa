"""Who gets which task: shares, orders, two at once, what is left behind."""

import threading
from collections import Counter

from stages.people.rank.assign import REPEAT_DISTANCE
from stages.people.rank.rules import Rules
from stages.people.rank.tasks import add_task
from tests.people.conftest import task

PLAIN = {"overlap": 0.0, "repeat": 0.0, "known_share": 0.0}


def prompt_of(assignment):
    return assignment["task"]["prompt"][0]["content"]


def work(people, rounds):
    """Let people rank in turn; return (person, prompt) of each."""
    done = []
    for _ in range(rounds):
        for number, person in enumerate(people):
            assignment = person.next()["assignment"]
            if assignment is not None:
                done.append((number, prompt_of(assignment)))
                person.rank(assignment)
    return done


def test_without_overlap_nobody_gets_what_another_has(make_page):
    page = make_page(rules=Rules(**PLAIN), tasks=20)
    people = [page.labeler(name) for name in ("Ada", "Ben", "Cem")]
    done = work(people, 10)
    assert len(done) == 20 and len({prompt for _, prompt in done}) == 20
    assert all(person.next()["assignment"] is None for person in people)
    assert people[0].next()["progress"]["left"] == 0


def test_overlap_is_a_share_of_the_tasks_for_so_many(make_page):
    page = make_page(rules=Rules(**{**PLAIN, "overlap": 0.3, "overlap_labelers": 3}), tasks=80)
    people = [page.labeler(name) for name in ("Ada", "Ben", "Cem", "Dee")]
    times = Counter(prompt for _, prompt in work(people, 80))
    assert set(times.values()) == {1, 3} and len(times) == 80
    assert 12 <= sum(count == 3 for count in times.values()) <= 36
    reasons = Counter(row["reason"] for row in page.rows("SELECT reason FROM assignments"))
    assert reasons["first"] == 80 and reasons["overlap"] == 2 * sum(count == 3 for count in times.values())
    per_task = page.rows("SELECT COUNT(DISTINCT labeler_id) AS people, COUNT(*) AS n FROM assignments GROUP BY task_id")
    assert all(row["people"] == row["n"] for row in per_task)


def test_repeats_come_later_and_known_answers_to_everybody(make_page):
    page = make_page(rules=Rules(overlap=0.0, repeat=0.2, known_share=0.1), tasks=150)
    with page.database.transaction() as connection:
        for number in range(900, 930):
            add_task(connection, task(number, known=(1, 2, 3, 4)), 0.0)
    ada, ben = page.labeler(), page.labeler("Ben")
    work([ada, ben], 90)
    reasons = Counter(row["reason"] for row in page.rows("SELECT reason FROM assignments"))
    assert 15 <= reasons["repeat"] <= 55 and 6 <= reasons["known"] <= 32, reasons
    pairs = page.rows(
        """SELECT b.number - a.number AS distance, a.order_shown AS one, b.order_shown AS two
           FROM assignments a JOIN assignments b USING (task_id, labeler_id)
           WHERE a.reason IN ('first', 'overlap') AND b.reason = 'repeat'"""
    )
    assert len(pairs) == reasons["repeat"] and all(row["distance"] > REPEAT_DISTANCE for row in pairs)
    assert any(row["one"] != row["two"] for row in pairs), "a repetition is shuffled anew"
    known = page.rows(
        "SELECT t.known, a.reason, COUNT(*) AS n FROM assignments a JOIN tasks t ON t.id = a.task_id "
        "GROUP BY t.known IS NULL, a.reason"
    )
    assert all((row["known"] is not None) == (row["reason"] == "known") for row in known)


def test_answers_are_shuffled_for_each_labeler(make_page):
    page = make_page(rules=Rules(**{**PLAIN, "overlap": 1.0, "overlap_labelers": 5}), tasks=40)
    people = [page.labeler(name) for name in "abcde"]
    work(people, 40)
    orders = page.rows("SELECT task_id, order_shown FROM assignments")
    first = Counter()
    for row in page.rows(
        "SELECT json_extract(order_shown, '$[0]') AS shown, x.position FROM assignments a "
        "JOIN answers x ON x.id = json_extract(a.order_shown, '$[0]')"
    ):
        first[row["position"]] += 1
    assert len({(row["task_id"], row["order_shown"]) for row in orders}) > 130
    assert all(30 <= first[position] <= 70 for position in range(4)), first


def test_an_abandoned_task_goes_to_the_next_and_nothing_is_lost(page):
    ada, ben = page.labeler(), page.labeler("Ben")
    mine = ada.next()["assignment"]
    a, b, c, d = (answer["id"] for answer in mine["answers"])
    ada.move(mine, "place", answer=a, tier=0)
    page.clock.now += page.rules.abandon_after - 1
    assert prompt_of(ben.next()["assignment"]) != prompt_of(mine)
    ben.skip(ben.next()["assignment"])
    page.clock.now += 2
    taken = page.labeler("Cem").next()["assignment"]
    assert prompt_of(taken) == prompt_of(mine) and taken["id"] != mine["id"]
    assert taken["draft"]["tiers"] == [[], [], [], []]
    # Ada comes back with the page still open: what she does is taken
    assert ada.move(mine, "place", answer=b, tier=1).status_code == 200
    assert mine["draft"]["tiers"][:2] == [[a], [b]]
    ada.move(mine, "place", answer=c, tier=1)
    ada.move(mine, "place", answer=d, tier=1)
    assert ada.submit(mine).status_code == 200


def test_a_clock_that_goes_back_loses_no_task(page):
    ada = page.labeler()
    mine = ada.next()["assignment"]
    ada.move(mine, "place", answer=mine["answers"][0]["id"], tier=0)
    page.clock.now -= 100 * page.rules.abandon_after
    assert prompt_of(page.labeler("Ben").next()["assignment"]) == prompt_of(mine)  # Ada's touch lies in the future
    assert ada.move(mine, "place", answer=mine["answers"][1]["id"], tier=1).status_code == 200
    assert mine["draft"]["tiers"][:2] == [[answer["id"]] for answer in mine["answers"][:2]]


def test_who_comes_back_to_a_task_that_nobody_took_goes_on_with_it(page):
    ada = page.labeler()
    mine = ada.next()["assignment"]
    ada.move(mine, "note", text="so far")
    page.clock.now += 10 * page.rules.abandon_after
    again = ada.next()["assignment"]
    assert again["id"] == mine["id"] and again["draft"]["note"] == "so far"


def test_the_same_history_leads_to_the_same_tasks(tmp_path):
    from tests.people.conftest import Page

    seen = []
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        page = Page(tmp_path / run, rules=Rules(overlap=0.4, repeat=0.2, known_share=0.0), tasks=40)
        people = [page.labeler(name) for name in ("Ada", "Ben")]
        work(people, 25)
        seen.append(page.rows("SELECT task_id, labeler_id, order_shown, reason, number FROM assignments"))
        page.database.close()
    assert seen[0] == seen[1] and len(seen[0]) > 40


def test_many_at_once_get_different_tasks(make_page):
    page = make_page(rules=Rules(**PLAIN), tasks=40)
    people = [page.labeler(f"P{number}") for number in range(8)]
    failed = []

    def rank_all(person):
        while (assignment := person.next()["assignment"]) is not None:
            if person.rank(assignment).status_code != 200:
                failed.append(person)
                return

    threads = [threading.Thread(target=rank_all, args=(person,)) for person in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    rows = page.rows("SELECT task_id, state FROM assignments")
    assert len(rows) == 40 and len({row["task_id"] for row in rows}) == 40
    assert {row["state"] for row in rows} == {"done"}


def test_identical_answers_are_merged_and_a_task_is_added_once(page):
    from stages.people.rank.tasks import Given, NewTask

    given = (Given("same", model="sft"), Given("other", model="sft"), Given("same", model="ppo"), Given("same", False))
    with page.database.transaction() as connection:
        assert add_task(connection, NewTask("p", given), 0.0) == "added"
        assert add_task(connection, NewTask("p", given[::-1]), 0.0) == "same"
        assert add_task(connection, NewTask("p", (Given("a"), Given("a"))), 0.0) == "alike"
    rows = page.rows("SELECT a.* FROM answers a JOIN tasks t ON t.id = a.task_id WHERE t.prompt = '\"p\"'")
    assert [(row["text"], row["finished"], row["models"]) for row in rows] == [
        ("same", 1, '["sft", "ppo"]'),
        ("other", 1, '["sft"]'),
        ("same", 0, "[]"),
    ]

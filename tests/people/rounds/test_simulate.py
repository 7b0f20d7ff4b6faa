"""Simulated labelers rank through the page's interface, and say what the world's labelers say."""

import json
import random
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from data.streams import derive_seed
from data.world.labelers import LABELERS, calibrate_noise, expected_agreement, rank
from pipeline.errors import Interrupted, UserError
from stages.evaluation.statistics import agreement_figures
from stages.people.rank.drafts import Move, apply
from stages.people.rank.moves import join
from stages.people.rank.rules import Rules
from stages.people.rank.snapshots import rankings
from stages.people.rounds import simulated_page
from stages.people.rounds.browser import Browser, NotAnswered
from stages.people.rounds.opinions import Opinion, SimulatedLabeler, names_of, next_move
from stages.people.rounds.simulate import work
from stages.people.store.rows import Draft
from tests.people.server import ROOT, Server, wait_until

ALL_TWICE = Rules(overlap=1.0, repeat=0.0, known_share=0.0)
ONCE = Rules(overlap=0.0, repeat=0.0, known_share=0.0)


def never():
    return False


def silent(*_):
    pass


def simulated(world, count, noise, seed=0):
    return {name: SimulatedLabeler(world, i % 5, name, noise, seed) for i, name in enumerate(names_of(count))}


def ranked(page):
    """Return the rankings that the chain would read."""
    with page.database.read() as connection:
        return list(rankings(connection))


class ByLength:
    """A judge with ties: the longest word is best, and what is no word cannot be judged."""

    def judge(self, assignment):
        texts = [answer["text"] for answer in assignment["answers"]]
        if all(not text.isalpha() for text in texts):
            return Opinion(skipped="no words")
        lengths = [len(text) if text.isalpha() else None for text in texts]
        known = [length for length in lengths if length is not None]
        ranks = [None if length is None else 1 + sum(other > length for other in known) for length in lengths]
        return Opinion(tuple(ranks), tuple(1 if rank is None else min(7, rank) for rank in ranks))


# -- what comes out ------------------------------------------------------------------------------


def test_their_rankings_are_those_of_the_worlds_labelers(served, world, world_answers):
    """Whole orders, by the labeler's taste and noise, whatever order the page showed."""
    noise = 0.08
    with_page = served(world_answers[:30], ONCE)
    counts = work(with_page.address, simulated(world, 3, noise, seed=5), {}, silent, never, silent)
    rows = ranked(with_page.page)
    assert counts.ranked == len(rows) == 30 and counts.moves == 120 and not counts.sent_again
    numbers = {row["id"]: row["number"] for row in with_page.page.rows("SELECT id, number FROM assignments")}
    shown = 0
    for row in rows:
        taste = [labeler.name for labeler in LABELERS].index(row.labeler)
        utilities = world.labeler_utilities(row.prompt, list(row.responses))[taste]
        rng = np.random.default_rng(derive_seed(5, "simulated", row.labeler, numbers[row.meta["assignment"]]))
        assert list(row.ranks) == rank(utilities, noise, rng, row.answers)
        shown += row.meta["order_shown"] != [0, 1, 2, 3]
    assert shown > 10 and {row.labeler for row in rows} == {"ada", "ben", "cleo"}


def test_ties_answers_that_cannot_be_judged_and_skips_come_out(served):
    tasks = [("a", ["xx", "yy", "zzzz", "q", "w"]), ("b", ["xxx", "yyy", "1", "z"]), ("c", ["1", "2"])]
    with_page = served(tasks, ONCE)
    counts = work(with_page.address, {"kim": ByLength(), "lea": ByLength()}, {}, silent, never, silent)
    assert {row.prompt: row.ranks for row in ranked(with_page.page)} == {"a": (2, 2, 1, 4, 4), "b": (1, 1, None, 3)}
    assert counts.ranked == 2 and counts.skipped == 2, "a task that one skips goes to one other"
    kinds = {row["kind"] for row in with_page.page.rows("SELECT DISTINCT kind FROM moves")}
    assert kinds == {"place", "same", "aside", "submit", "skip"}


def test_a_page_that_asks_for_ratings_gets_them(served):
    rules = Rules(overlap=0.0, repeat=0.0, known_share=0.0, likert=True)
    with_page = served([("a", ["xx", "y", "1"])], rules)
    work(with_page.address, {"kim": ByLength()}, {}, silent, never, silent)
    assert ranked(with_page.page)[0].meta["likert"] == [1, 2, None]


def test_overlap_gives_the_agreement_of_the_world(served, world, world_answers):
    tasks = world_answers[:60]
    utilities = [world.labeler_utilities(prompt, answers) for prompt, answers in tasks]
    answers = [answers for _, answers in tasks]
    noise = calibrate_noise(utilities, answers, 0.726)
    with_page = served(tasks, ALL_TWICE)
    work(with_page.address, simulated(world, 5, noise), {}, silent, never, silent)
    found = agreement_figures(ranked(with_page.page))
    low, high = found["labeler_agreement_ci95"]
    assert low < expected_agreement(utilities, answers, noise) < high and 0.6 < found["labeler_agreement"] < 0.85


def test_prompts_of_others_are_skipped(served, world, world_answers):
    prompt, answers = world_answers[0]
    with_page = served([("who are you ?", ["a", "b"]), (prompt, answers)], ONCE)
    counts = work(with_page.address, simulated(world, 3, 0.1), {}, silent, never, silent)
    assert (counts.ranked, counts.skipped) == (1, 2) and [row.prompt for row in ranked(with_page.page)] == [prompt]


# -- coming back, and answers that are lost ------------------------------------------------------


def test_they_come_back_with_their_keys_and_find_nothing_left(served, world, world_answers):
    with_page, keys = served(world_answers[:4], ONCE), {}
    work(with_page.address, simulated(world, 2, 0.1), keys, silent, never, silent)
    before = dict(keys)
    assert work(with_page.address, simulated(world, 2, 0.1), keys, silent, never, silent).ranked == 0
    assert keys == before and len(with_page.page.rows("SELECT * FROM labelers")) == 2


def test_a_code_that_somebody_has_stays_theirs(served, world, world_answers):
    with_page = served(world_answers[:2], ONCE)
    with with_page.page.database.transaction() as connection:
        join(connection, {"name": "Ada", "code": "Ada"}, 1.0)
    work(with_page.address, simulated(world, 1, 0.1), {"ada": "a key of another database"}, silent, never, silent)
    assert {row.labeler for row in ranked(with_page.page)} == {"ada-2"}


def test_a_draft_that_was_left_is_finished(served, world, world_answers):
    """Somebody, or an earlier run, has placed answers otherwise."""
    with_page, keys = served(world_answers[:1], ONCE), {}
    judges = simulated(world, 1, 0.1)
    work(with_page.address, judges, keys, silent, never, silent)
    expected = ranked(with_page.page)[0].ranks
    browser = Browser(with_page.address, never)
    browser.open()
    browser.ask("POST", "/api/session", {"key": keys["ada"]})
    (assignment,) = with_page.page.rows("SELECT id, number FROM assignments")
    opened = browser.ask("POST", f"/api/assignments/{assignment['id']}/reopen", {})["assignment"]
    for answer in opened["answers"]:
        body = {"seq": opened["seq"], "kind": "place", "body": {"answer": answer["id"], "tier": 0}}
        opened |= browser.ask("POST", f"/api/assignments/{assignment['id']}/moves", body)
    assert work(with_page.address, judges, keys, silent, never, silent).ranked == 1
    assert ranked(with_page.page)[0].ranks == expected


@pytest.mark.parametrize("seed", range(20))
def test_the_moves_lead_from_any_draft_to_the_opinion(seed):
    draw, ids = random.Random(seed), [11, 12, 13, 14, 15]
    shown = draw.sample(ids, 5)
    scores = [draw.choice([None, 1, 2, 3]) for _ in ids]
    known = [score for score in scores if score is not None]
    ranks = tuple(None if score is None else 1 + sum(other < score for other in known) for score in scores)
    assignment = {"answers": [{"id": one} for one in shown], "steps": {"likert": seed % 2 == 1}}
    draft = Draft(tiers=((),) * 5)
    for _ in range(8):
        body = {"answer": draw.choice(ids), "tier": draw.randrange(5)}
        draft = apply(draft, Move(draw.choice(["place", "aside"]), body), ids)
    opinion = Opinion(ranks, (4, 5, 6, 7, 1))
    moves = 0
    while (move := next_move(draft.as_json(), assignment, opinion)) is not None:
        draft, moves = apply(draft, Move(*move), ids), moves + 1
        assert moves <= 15
    place = {answer: slot + 1 for slot, tier in enumerate(draft.tiers) for answer in tier}
    assert tuple(place.get(answer) for answer in shown) == ranks
    assert {answer for answer, rank in zip(shown, ranks, strict=True) if rank is None} == set(draft.set_aside)
    if seed % 2:
        assert {int(answer) for answer in draft.likert} == set(place)


def test_an_answer_that_is_lost_changes_nothing(served, world, world_answers, monkeypatch):
    """Each third answer is lost after the server has done what was asked."""
    plain = served(world_answers[:8], ONCE)
    work(plain.address, simulated(world, 2, 0.1), {}, silent, never, silent)
    expected = [(row.id, row.ranks) for row in ranked(plain.page)]
    monkeypatch.setattr("stages.people.rounds.browser.FIRST_WAIT", 0.01)
    send, count = Browser.send, iter(range(10**6))

    def lossy(self, method, path, body):
        answer = send(self, method, path, body)
        if path != "/api/labelers" and next(count) % 3 == 2:
            raise NotAnswered("lost")
        return answer

    monkeypatch.setattr(Browser, "send", lossy)
    with plain.page.database.transaction() as connection:
        for table in ("verdicts", "moves", "assignments", "labelers"):
            connection.execute(f"DELETE FROM {table}")
    counts = work(plain.address, simulated(world, 2, 0.1), {}, silent, never, silent)
    assert [(row.id, row.ranks) for row in ranked(plain.page)] == expected and counts.sent_again > 10
    assert len(plain.page.rows("SELECT * FROM moves WHERE kind = 'place'")) == 32, "no move is made twice"


def test_a_page_that_is_gone_is_named(served, world, world_answers):
    with_page = served(world_answers[:1], ONCE)
    with_page.__exit__()
    with pytest.raises(UserError, match=r"http://127.0.0.1:\d+: the ranking page has not answered for 1 s"):
        work(with_page.address, simulated(world, 1, 0.1), {}, silent, never, silent, give_up=1.0)


def test_a_wrong_token_is_named(served, world, world_answers):
    with_page = served(world_answers[:1], ONCE)
    with pytest.raises(UserError, match="token is not valid"):
        work(with_page.address + "x", simulated(world, 1, 0.1), {}, silent, never, silent)


def test_they_stop_when_they_are_asked_to(served, world, world_answers):
    with_page, keys = served(world_answers, ONCE), {}

    def enough():
        return len(with_page.page.rows("SELECT 1 FROM verdicts")) >= 5

    with pytest.raises(Interrupted):
        work(with_page.address, simulated(world, 3, 0.1), keys, silent, enough, silent)
    left = work(with_page.address, simulated(world, 3, 0.1), keys, silent, never, silent).ranked
    assert len(ranked(with_page.page)) == len(world_answers) > left


# -- whole processes -----------------------------------------------------------------------------


def write_world(folder, world, world_answers, count):
    rows = [{"prompt": prompt, "responses": answers} for prompt, answers in world_answers[:count]]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rankings_of(database):
    """Return the rankings in a file, without what depends on the clock, by labeler."""
    import sqlite3

    connection = sqlite3.connect(database)
    query = """SELECT l.code, a.number, t.uid, a.order_shown, v.tiers FROM verdicts v
               JOIN assignments a ON a.id = v.assignment_id JOIN labelers l ON l.id = a.labeler_id
               JOIN tasks t ON t.id = a.task_id ORDER BY 1, 2"""
    rows = connection.execute(query).fetchall()
    connection.close()
    return rows


def rank_with_kills(folder, world, kills):
    """Let three labelers rank on a page that is killed some times, and return what they said."""
    server, draw = Server(folder, "rank.answers=answers.jsonl", "rank.overlap=0.3").start(), random.Random(1)
    outcome = []
    worker = threading.Thread(
        target=lambda: outcome.append(work(server.url, simulated(world, 3, 0.1), {}, silent, never, silent))
    )
    worker.start()
    for _ in range(kills):
        before = len(rankings_of(server.database))
        wait_until(lambda count=before: len(rankings_of(server.database)) > count + draw.randrange(4) or outcome)
        server.kill()
        server.start()
    worker.join(60)
    assert server.stop() == 0 and len(outcome) == 1
    return rankings_of(server.database), outcome[0]


def test_kills_of_the_page_change_nothing(tmp_path, world, world_answers):
    said = []
    for name, kills in (("whole", 0), ("killed", 3)):
        (tmp_path / name).mkdir()
        write_world(tmp_path / name, world, world_answers, 25)
        rows, counts = rank_with_kills(tmp_path / name, world, kills)
        said.append(rows)
    assert said[0] == said[1] and len(said[0]) > 25 and counts.sent_again


CONFIG = """
name: people
world: {documents: 100, demonstrations: 40, prompts: 80, evaluation_prompts: 40}
rank: {answers: answers.jsonl, overlap: 0.3}
seed: 3
launch: {device: cpu, threads: 1}
"""


def rlhf(folder, *words):
    command = [sys.executable, "-m", "pipeline.cli", *words, "-c", "people.yaml"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"})  # fmt: skip


def test_the_command_ranks_everything_and_goes_on_after_a_signal(tmp_path, world, world_answers):
    (tmp_path / "people.yaml").write_text(CONFIG)
    write_world(tmp_path, world, world_answers, 60)
    assert "has none; use data.prompts: world" in rlhf(tmp_path, "rank", "--simulate", "3").communicate()[1]
    assert rlhf(tmp_path, "run", "world").wait() == 0
    process = rlhf(tmp_path, "rank", "--simulate", "3")
    database = tmp_path / "artifacts/people/people/people.sqlite"
    wait_until(lambda: database.exists() and process.stdout.readline().startswith("simulate:"))
    wait_until(lambda: len(rankings_of(database)) > 3)
    process.send_signal(signal.SIGTERM)
    said, problem = process.communicate()
    assert process.returncode == 75 and "run again to resume" in problem, said + problem
    before = len(rankings_of(database))
    process = rlhf(tmp_path, "rank", "--simulate", "3")
    said, problem = process.communicate()
    assert process.returncode == 0 and not problem, problem
    (count,) = re.findall(r"3 labelers ranked (\d+) tasks", said)
    rows = rankings_of(database)
    assert 3 < before < len(rows) == before + int(count) and len({row[2] for row in rows}) == 60 < len(rows)
    kept = json.loads((tmp_path / "artifacts/people/people/simulated.json").read_text())
    assert set(kept["keys"]) == {"ada", "ben", "cleo"} and 0.01 < kept["noise"] < 1


def test_one_labeler_leaves_what_others_are_wanted_for(tmp_path, world, world_answers):
    (tmp_path / "people.yaml").write_text(CONFIG)
    write_world(tmp_path, world, world_answers, 20)
    assert rlhf(tmp_path, "run", "world").wait() == 0
    said, _ = rlhf(tmp_path, "rank", "--simulate", "1", "rank.host=0.0.0.0").communicate()  # others may watch
    assert re.search(r"simulate: 1 labelers ranked 20 tasks.*\nsimulate: \d+ tasks want further labelers", said)


def test_tasks_of_another_world_are_refused(make_page, world):
    page = make_page(rules=ONCE, tasks=3)
    with pytest.raises(UserError, match="none of the 3 tasks is a request of the embedded world"):
        simulated_page.world_tasks(world, page.database)


def test_they_do_not_mix_with_people(make_page):
    page = make_page(rules=ONCE, tasks=3)
    person = page.labeler("Ada")
    other = page.labeler("ben (simulated)")
    assert other.rank(other.next()["assignment"]).status_code == 200
    simulated_page.refuse_people(page.database)  # Ada has signed in, and said nothing yet
    assert person.rank(person.next()["assignment"]).status_code == 200
    with pytest.raises(UserError, match=r"people have ranked in this experiment \(1\)"):
        simulated_page.refuse_people(page.database)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "simulated.json").write_text("[1]")
    with pytest.raises(UserError, match="is no file of simulated labelers"):
        simulated_page.read_kept(tmp_path / "simulated.json")


def test_doubles_have_names_of_their_own():
    assert names_of(7) == ["ada", "ben", "cleo", "dan", "eva", "ada-2", "ben-2"]

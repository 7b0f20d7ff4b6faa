"""Give tests of the ranking page a database with tasks, a clock, and a browser without a screen."""

from dataclasses import dataclass

import pytest
from starlette.testclient import TestClient

from stages.people.rank.app import make_app
from stages.people.rank.rules import Rules
from stages.people.rank.state import RankState
from stages.people.rank.tasks import Given, NewTask, add_task
from stages.people.store.database import open_database
from stages.people.web.security import Gate

TOKEN, LEAD_TOKEN = "page-token-of-this-test", "lead-token-of-this-test"
WRITES = {"X-RLHF": "1", "Content-Type": "application/json"}


@dataclass
class Clock:
    """A clock that tests set."""

    now: float = 1_700_000_000.0

    def __call__(self):
        return self.now


def task(number, count=4, **more):
    """Return a task with `count` answers of two models."""
    answers = [Given(f"answer {number}.{k}", model="sft" if k % 2 else "ppo") for k in range(count)]
    return NewTask(f"prompt {number}", tuple(answers), **more)


class Page:
    """A ranking page, and people who use it."""

    def __init__(self, folder, rules=None, tasks=5):
        pages = folder / "pages"
        pages.mkdir(exist_ok=True)
        for name in ("index.html", "lead.html", "page.js"):
            (pages / name).write_text("<p>page</p>")
        self.clock = Clock()
        self.database = open_database(folder, "test")
        with self.database.transaction() as connection:
            for number in range(tasks):
                add_task(connection, task(number), self.clock())
        self.gate = Gate(TOKEN, LEAD_TOKEN)
        self.rules = rules or Rules(overlap=0.0, repeat=0.0, known_share=0.0)
        self.state = RankState("test", self.database, self.rules, self.gate, self.clock)
        self.app = make_app(self.state, pages)

    def browser(self, token=TOKEN, path="/"):
        """Return a browser that has opened the address with its token."""
        client = TestClient(self.app, base_url="http://127.0.0.1:8000")
        assert client.get(path, params={"token": token}).status_code == 200
        return client

    def labeler(self, name="Ada", code=None):
        """Return somebody who has joined."""
        return Person(self.browser(), self.clock, name, code)

    def rows(self, query, *values):
        """Return rows of the database as dictionaries."""
        with self.database.read() as connection:
            return [dict(row) for row in connection.execute(query, values)]


class Person:
    """A labeler with a browser."""

    def __init__(self, client, clock, name, code=None):
        self.client, self.clock = client, clock
        joined = self.post("/api/labelers", name=name, code=code)
        assert joined.status_code == 200, joined.text
        self.labeler, self.key = joined.json()["labeler"], joined.json()["key"]

    def post(self, path, **body):
        return self.client.post(path, json=body, headers=WRITES)

    def next(self):
        answer = self.client.get("/api/next")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def move(self, assignment, kind, active_ms=0, **body):
        """Make a move and return its answer; `seq` in the assignment follows."""
        path, key = f"/api/assignments/{assignment['id']}/moves", body.pop("key", None)
        answer = self.post(path, seq=assignment["seq"], kind=kind, body=body, active_ms=active_ms, idle_ms=0, id=key)
        if answer.status_code == 200:
            assignment.update(answer.json())
        return answer

    def rank(self, assignment, order=None):
        """Place all answers, the best first, and submit."""
        order = [answer["id"] for answer in assignment["answers"]] if order is None else order
        for slot, answer in enumerate(order):
            for one in answer if isinstance(answer, list) else [answer]:
                assert self.move(assignment, "place", answer=one, tier=slot).status_code == 200
        return self.submit(assignment)

    def submit(self, assignment, **more):
        self.clock.now += 10
        return self.post(f"/api/assignments/{assignment['id']}/submit", seq=assignment["seq"], active_ms=9000, **more)

    def skip(self, assignment, reason="makes no sense"):
        path = f"/api/assignments/{assignment['id']}/skip"
        return self.post(path, seq=assignment["seq"], active_ms=0, reason=reason)


@pytest.fixture
def page(tmp_path):
    page = Page(tmp_path)
    yield page
    page.database.close()


@pytest.fixture
def make_page(tmp_path):
    """Return what makes a page with rules of its own."""
    made = []

    def make(**options):
        made.append(Page(tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.database.close()

"""Give tests of simulated labelers a page on a real port, and answers in the embedded world."""

import random
import socket
import threading

import pytest
import uvicorn

from data.world import writers
from data.world.world import World
from stages.people.rank.tasks import Given, NewTask, add_task
from tests.people.conftest import TOKEN


@pytest.fixture(scope="session")
def world():
    return World.build(3, documents=100, demonstrations=40, prompts=80, evaluation_prompts=40)


@pytest.fixture(scope="session")
def world_answers(world):
    """Return (prompt, four different answers) of each prompt of the world, by careless writers."""
    rng, found = random.Random(0), []
    for row in world.prompts():
        task = world.task(row["prompt"])
        answers = {writers.demonstrate(world.language, rng, task, world.rates) for _ in range(40)}
        found.append((row["prompt"], sorted(answers)[:4]))
    return [(prompt, answers) for prompt, answers in found if len(answers) == 4]


class Served:
    """A page of a test on a port of this machine, while the block runs."""

    def __init__(self, page):
        listener = socket.create_server(("127.0.0.1", 0))
        self.listener, self.page = listener, page
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}/?token={TOKEN}"
        self.server = uvicorn.Server(
            uvicorn.Config(page.app, http="h11", ws="none", lifespan="off", log_level="warning")
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(60)
        self.listener.close()


@pytest.fixture
def served(make_page):
    """Return what serves a page with tasks of (prompt, answers) and rules of its own."""
    running = []

    def serve(tasks, rules):
        page = make_page(rules=rules, tasks=0)
        with page.database.transaction() as connection:
            for prompt, answers in tasks:
                add_task(connection, NewTask(prompt, tuple(Given(text) for text in answers)), page.clock())
        running.append(Served(page).__enter__())
        return running[-1]

    yield serve
    for one in running:
        one.__exit__()

"""Check the queue: order, bounds, who waits for nothing any more, and the end."""

import threading
import time

import pytest

from pipeline.errors import TrainingStopped, UserError
from stages.people.playground.engine import Busy, Engine, Failed, Options, Piece, Question, Reply, Unanswerable, Waiting

OPTIONS = Options(1.0, 1.0, 0, 8, 0)


def question(policy="a", text="hello"):
    return Question(policy, ({"role": "user", "content": text},), OPTIONS, True, False)


class Slow:
    """Answer when told to, and count how many answer at once."""

    def __init__(self):
        self.go, self.now, self.most, self.lock = threading.Semaphore(0), 0, 0, threading.Lock()
        self.order = []

    def __call__(self, question, emit, poll):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.order.append(question.messages[-1]["content"])
        try:
            emit(Piece("x"))
            while not self.go.acquire(timeout=0.005):
                poll()
            return Reply("x", True, 1, 1, None, 0)
        finally:
            with self.lock:
                self.now -= 1


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def slow():
    return Slow()


@pytest.fixture
def engine(slow):
    engine = Engine({"a": slow, "b": slow, "c": slow}, {"a": "cpu", "b": "cpu", "c": "gpu"}, max_queue=2)
    yield engine
    engine.close()


def ends(events):
    return bool(events) and isinstance(events[-1], (Reply, Failed))


def test_one_policy_a_device_at_a_time_in_order(engine, slow):
    heard = [[], [], []]
    for i, policy in enumerate("aba"):
        engine.submit([question(policy, str(i))], [heard[i].append])
    wait_for(lambda: slow.order)
    assert heard[1][0] == Waiting(1) and heard[2][0] == Waiting(2)
    for i in range(3):
        slow.go.release()
        wait_for(lambda i=i: ends(heard[i]))
    assert slow.most == 1 and slow.order == ["0", "1", "2"]
    assert Waiting(1) in heard[2] and isinstance(heard[2][-1], Reply)


def test_two_devices_answer_at_the_same_time(engine, slow):
    heard = [[], []]
    engine.submit([question("a"), question("c")], [heard[0].append, heard[1].append])
    wait_for(lambda: slow.now == 2)
    slow.go.release(2)
    wait_for(lambda: all(map(ends, heard)))


def test_a_full_queue_refuses_all_or_nothing_and_says_when_to_come_back(engine, slow):
    engine.submit([question()], [lambda event: None])
    wait_for(lambda: slow.now == 1)
    engine.submit([question()], [lambda event: None])
    with pytest.raises(Busy, match="1 answers wait") as refused:
        engine.submit([question("a"), question("b")], [lambda event: None] * 2)
    assert refused.value.retry_after >= 1 and engine.state()["cpu"] == {"running": 1, "waiting": 1}
    engine.submit([question("c")], [lambda event: None])  # the other device has room


def test_who_waits_no_more_makes_room_and_is_never_answered(engine, slow):
    heard = [[], [], []]
    (first,) = engine.submit([question(text="0")], [heard[0].append])
    wait_for(lambda: slow.now == 1)
    second, _ = engine.submit([question(text="1"), question(text="2")], [heard[1].append, heard[2].append])
    second.cancel()
    engine.submit([question(text="3")], [lambda event: None])
    first.cancel()
    wait_for(lambda: slow.order == ["0", "2"])
    assert heard[0][-1].code == "stopped"


@pytest.mark.parametrize(
    ("error", "is_users", "what"),
    [
        (Unanswerable("too long", "context_length_exceeded"), True, "too long"),
        (UserError("model.chat_template: is wrong; change it"), True, "is wrong"),
        (TrainingStopped("vLLM has ended"), False, "start the playground again"),
        (ZeroDivisionError(), False, "ZeroDivisionError"),
    ],
)
def test_an_answer_that_fails_is_told_and_the_next_one_works(error, is_users, what, capsys):
    def answer(question, emit, poll):
        if question.messages[-1]["content"] == "bad":
            raise error
        return Reply("x", True, 1, 1, None, 0)

    engine, heard = Engine({"a": answer}, {"a": "cpu"}, 4), [[], []]
    engine.submit([question(text="bad"), question()], [heard[0].append, heard[1].append])
    wait_for(lambda: ends(heard[1]))
    engine.close()
    assert what in heard[0][-1].sentence and heard[0][-1].is_users == is_users
    assert isinstance(heard[1][-1], Reply)


def test_closing_ends_what_runs_and_what_waits(engine, slow):
    heard = [[], []]
    for events in heard:
        engine.submit([question()], [events.append])
    wait_for(lambda: slow.now == 1)
    started = time.monotonic()
    engine.close()
    engine.close()
    assert time.monotonic() - started < 30 and slow.now == 0
    assert [events[-1].sentence for events in heard] == ["the server is stopping"] * 2
    with pytest.raises(Busy, match="stopping"):
        engine.submit([question()], [lambda event: None])

"""Test that PPO with rewards from outside resumes by bytes: a function, and a server's records."""

import json
import os
import signal
import time
from contextlib import contextmanager

import pytest
from resume_worker import CONFIG, copy_without, end, published, rlhf, rlhf_together, start

from tests.scorers.http_server import Given, free_port, serving

FUNCTION = """
def odd(responses, prompts):
    return [len(response) % 7 - len(prompt) % 3 for response, prompt in zip(responses, prompts)]
"""


def letters(body, _=0):
    """Score by the letters of a response."""
    return {"scores": [len(text) % 7 for text in body["responses"]]}


def other(body, _=0):
    """Score otherwise."""
    return {"scores": [5.0 - len(text) % 7 for text in body["responses"]]}


@contextmanager
def same_place(answer):
    """Serve at the same address in each test of a module: it is a part of the settings."""
    with serving(answer, PORT) as served:
        yield served


PORT = free_port()
REWARD = f"{{url: 'http://127.0.0.1:{PORT}/score', name: far, retries: 0, batch_size: 3}}"


def command(root, rewards):
    """Return the command that runs ppo."""
    settings = ("ppo.reward_ensemble=mean", "evaluate.reward_ensemble=mean", f"ppo.rewards=[{rewards}]")
    return ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only", *settings)


def texts(served):
    """Return what a server was asked: (prompt, response, finished)."""
    return [
        (json.dumps(prompt), response, finished)
        for body in served.requests
        for prompt, response, finished in zip(body["prompts"], body["responses"], body["finished"], strict=True)
    ]


def metrics(root):
    """Return the rows of ppo's metrics, without rates."""
    rows = [json.loads(line) for line in (root / "micro" / "ppo" / "metrics.jsonl").open()]
    return [{key: value for key, value in row.items() if key != "eps"} for row in rows]


@pytest.fixture(scope="module")
def straight(oracle, tmp_path_factory):
    """Return the artifacts of an undisturbed run with the server's reward."""
    root = copy_without(oracle, tmp_path_factory.mktemp("straight"), "ppo")
    with same_place(letters):
        assert rlhf(*command(root, f"{{model: rm}}, {REWARD}")) == 0
    return root


def test_a_function_gives_the_same_bytes_after_a_kill(oracle, tmp_path):
    file = tmp_path / "reward.py"
    file.write_text(FUNCTION)
    rewards = f"{{model: rm}}, {{python: '{file}:odd', weight: 0.3}}"
    once, killed = (copy_without(oracle, tmp_path / name, "ppo") for name in ("once", "killed"))
    assert rlhf(*command(once, rewards)) == 0
    assert rlhf(*command(killed, rewards), die=("ppo", 5)) == -9
    assert rlhf(*command(killed, rewards)) == 0
    assert published(killed / "micro" / "ppo") == published(once / "micro" / "ppo")


def test_recorded_scores_give_the_same_bytes_after_a_kill(oracle, straight, tmp_path):
    """What was asked is not asked again, and what comes out is the straight run's."""
    root = copy_without(oracle, tmp_path, "ppo")
    run = command(root, f"{{model: rm}}, {REWARD}")
    with same_place(letters) as first:
        assert rlhf(*run, die=("ppo", 5)) == -9
    with same_place(letters) as second:
        assert rlhf(*run) == 0
    assert not set(texts(first)) & set(texts(second)) and second.requests
    assert published(root / "micro" / "ppo") == published(straight / "micro" / "ppo")
    assert (root / "micro/ppo/checkpoints/scores/far/0of1.jsonl").is_file()


def test_a_server_that_answers_otherwise_now_changes_nothing_that_was_recorded(oracle, straight, tmp_path):
    """Update 5 is after the checkpoint: its scores are the recorded ones; then others come."""
    root = copy_without(oracle, tmp_path, "ppo")
    run = command(root, f"{{model: rm}}, {REWARD}")
    with same_place(letters):
        assert rlhf(*run, die=("ppo", 5)) == -9
    with same_place(other):
        assert rlhf(*run) == 0
    assert metrics(root)[:5] == metrics(straight)[:5] and metrics(root)[5:] != metrics(straight)[5:]


def test_a_server_that_is_gone_ends_the_run_with_a_checkpoint(oracle, straight, tmp_path):
    """Exit code 3; once it is back the run goes on, and gives the bytes of the straight one."""
    root, output = copy_without(oracle, tmp_path, "ppo"), tmp_path / "output"
    run = command(root, f"{{model: rm}}, {REWARD}")
    with same_place(lambda body, n: letters(body) if n < 12 else Given({}, 502)):
        assert rlhf(*run, output=output) == 3
    [line] = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
    assert "training stopped itself: far: http://127.0.0.1:" in line and "answers HTTP 502" in line
    assert list((root / "micro/ppo/checkpoints").glob("step-*/manifest.json"))
    with same_place(letters):
        assert rlhf(*run) == 0
    assert published(root / "micro" / "ppo") == published(straight / "micro" / "ppo")


def test_a_signal_does_not_wait_for_the_server(oracle, straight, tmp_path):
    """It ends the run within a second or so, though the answer takes a minute; exit code 75."""
    root, stuck = copy_without(oracle, tmp_path, "ppo"), []

    def answer(body, number):
        if number >= 12:
            stuck.append(number)
            return Given(letters(body), seconds=60)
        return letters(body)

    run = command(root, f"{{model: rm}}, {REWARD}")
    with same_place(answer):
        child = start(run)
        while not stuck:
            assert child.is_alive()
            time.sleep(0.02)
        time.sleep(0.3)
        began = time.monotonic()
        os.kill(child.pid, signal.SIGTERM)
        assert end([child], 60) == [75]
        assert time.monotonic() - began < 30  # a checkpoint is saved in it
    with same_place(letters):
        assert rlhf(*run) == 0
    assert published(root / "micro" / "ppo") == published(straight / "micro" / "ppo")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_served_reward_model_is_the_climbed_one_and_ends_on_a_signal(number, oracle, tmp_path):
    """To the bit: what was sampled is sent as ids. Exit code 0: nothing is left to resume."""
    output = tmp_path / "output"
    child = start(("serve-reward", "-c", str(CONFIG), "--artifacts", str(oracle)), output=output)
    while not (output.is_file() and " scores at " in output.read_text()):
        assert child.is_alive()
        time.sleep(0.05)
    url = output.read_text().split(" scores at ")[1].split()[0]
    if number == signal.SIGTERM:
        root = copy_without(oracle, tmp_path, "ppo")
        rewards = f"{{model: rm, how: min}}, {{url: '{url}', name: far}}"
        assert rlhf(*command(root, rewards), "evaluate.reward_ensemble=min") == 0
        assert all(row["rewards/far"] == pytest.approx(row["rewards/rm"], abs=1e-6) for row in metrics(root))
    os.kill(child.pid, number)
    assert end([child], 60) == [0]


@pytest.mark.slow
def test_killed_again_and_again_it_gives_the_same_bytes(oracle, straight, tmp_path):
    """Also in the middle of what is written to the records: half a line may be there."""
    root = copy_without(oracle, tmp_path, "ppo")
    run = command(root, f"{{model: rm}}, {REWARD}")
    asked = []
    for step in (3, 4, 5, 6, 7, 8):
        with same_place(letters) as served:
            assert rlhf(*run, die=("ppo", step)) == -9
        asked += texts(served)
        file = root / "micro/ppo/checkpoints/scores/far/0of1.jsonl"
        file.write_bytes(file.read_bytes() + b'{"key": "half')
    with same_place(letters) as served:
        assert rlhf(*run) == 0
    asked += texts(served)
    assert len(asked) == len(set(asked))  # each once in all these starts
    assert published(root / "micro" / "ppo") == published(straight / "micro" / "ppo")


def test_two_processes_ask_for_their_shares_and_resume_by_bytes(oracle, tmp_path):
    """Each response is asked by one of them; either is killed, and the next start goes on."""
    once, killed = (copy_without(oracle, tmp_path / name, "ppo") for name in ("once", "killed"))
    with same_place(letters) as served:
        assert rlhf_together(*command(once, REWARD)) == [0, 0]
    files = sorted((once / "micro/ppo/checkpoints/scores/far").iterdir())
    assert [file.name for file in files] == ["0of2.jsonl", "1of2.jsonl"]
    assert min(len(file.read_text().splitlines()) for file in files) > 5
    assert len(texts(served)) < 1.2 * len(set(texts(served)))
    with same_place(letters) as first:
        assert rlhf_together(*command(killed, REWARD), die=(0, "ppo", 5))[0] == -9
    with same_place(letters) as second:
        assert rlhf_together(*command(killed, REWARD)) == [0, 0]
    assert not set(texts(first)) & set(texts(second)) and second.requests
    assert published(killed / "micro" / "ppo") == published(once / "micro" / "ppo")

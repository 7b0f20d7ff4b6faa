"""Test the scorer `python:`: how a function is called, what it may return, and how it may fail."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.encode import encode_prompt, encode_response
from pipeline.errors import Interrupted, UserError
from stages.scorers.python_pool import Pool
from stages.scorers.python_worker import call
from stages.scorers.scorer import ScoreRequest, ScorerSpec
from stages.scorers.scorers import make_scorer
from stages.settings.scorers.python import PythonScorer
from tests.builders import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]
ROWS = [
    {"prompt": "what color is the fox ?", "answer": "red"},
    {"prompt": MESSAGES, "answer": "blue", "level": 3},
    {"prompt": "what ?", "answer": None},
]
TEXTS = ["the fox is red .", "blue", ""]
PLACES = [f"prompts.jsonl:{i}" for i in (3, 7, 8)]
IN_PROCESS, IN_WORKERS = {}, {"workers": 2}
BOTH = pytest.mark.parametrize("where", [IN_PROCESS, IN_WORKERS], ids=["here", "workers"])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a scorer of a file's text, and closes it afterwards."""
    made = []

    def build(text, function="score", **settings):
        file = tmp_path / "reward.py"
        file.write_text(textwrap.dedent(text), encoding="utf-8")
        spec = ScorerSpec(None, 0, None, 1, settings=PythonScorer(python=f"{file}:{function}", **settings), name="mine")
        scorer = make_scorer(ScorerSpec(**{**vars(spec), "say": said.append}))
        made.append(scorer)
        return scorer

    said = build.said = []
    yield build
    for scorer in made:
        scorer.close()


def request_of(tokenizer, texts=TEXTS, rows=ROWS, places=PLACES, **more):
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    responses = [encode_response(tokenizer, text, finished=i != 1) for i, text in enumerate(texts)]
    return ScoreRequest(prompts, responses, tokenizer, data_rows=rows, places=places, **more)


# ── arguments and answers ────────────────────────────────────────────────────────────────────────


@BOTH
def test_a_function_gets_what_it_has_parameters_for(make, tokenizer, where):
    """Each of its columns has an entry for each response, whichever process calls it."""
    scorer = make(
        """
        def score(prompts, responses, finished, answer, level, other=7):
            assert other == 7
            return [len(r) + 10 * f + 100 * (a == "red") + 1000 * (l or 0) + 10000 * isinstance(p, list)
                    for p, r, f, a, l in zip(prompts, responses, finished, answer, level)]
        """,
        **where,
    )
    assert scorer.score(request_of(tokenizer)).total.tolist() == [16 + 10 + 100, 4 + 3000 + 10000, 10]


@BOTH
def test_reward_functions_of_trl_run_unchanged(make, tokenizer, where):
    """They take **kwargs, messages where prompts are messages, ids; give None; may be async."""
    rows = [{"prompt": MESSAGES, "solution": "4"}, {"prompt": MESSAGES, "solution": None}]
    text = """
        async def score(completions, solution, completion_ids, log_extra=None, **kwargs):
            contents = [completion[0]["content"] for completion in completions]
            assert completions[0][0]["role"] == "assistant" and set(kwargs) >= {"prompts", "finished"}
            assert "prompt" not in kwargs and log_extra is None
            return [None if s is None else float(len(ids) + (s in c))
                    for c, s, ids in zip(contents, solution, completion_ids)]
    """
    texts = ["blue 4", "red"]
    request = request_of(tokenizer, texts, rows, PLACES[:2])
    scores = make(text, **where).score(request).total.tolist()
    assert scores[0] == len(request.responses[0]) + ("4" in request.response_texts()[0])
    assert math.isnan(scores[1])


def test_a_function_that_trl_ships(make, tokenizer):
    scorer = make("from trl.rewards import think_format_reward as score\n", completions="messages")
    request = request_of(tokenizer, ["<think> red </think> blue", "red", ""])
    right = [float(text.startswith("<think>") and "</think>" in text) for text in request.response_texts()]
    assert scorer.score(request).total.tolist() == right


def test_numbers_of_numpy_and_torch_and_named_parts(make, tokenizer):
    scorer = make(
        """
        import numpy, torch
        def score(responses):
            return [{"score": numpy.float32(0.5), "colors": True}, torch.tensor(2), {"score": 1, "length": 3.5}]
        """
    )
    scores = scorer.score(request_of(tokenizer))
    assert scores.total.tolist() == [0.5, 2, 1]
    assert scores.parts["colors"].nan_to_num(-9).tolist() == [1, -9, -9]
    assert scores.parts["length"].nan_to_num(-9).tolist() == [-9, -9, 3.5]


def test_modules_beside_the_file_can_be_imported_and_are_part_of_the_fingerprint(make, tokenizer, tmp_path):
    (tmp_path / "near_by.py").write_text("from deeper.inner import TWO\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "__init__.py").touch()
    (tmp_path / "deeper" / "inner.py").write_text("TWO = 2\n")
    (tmp_path / "not_imported.py").touch()
    scorer = make("import math, near_by\n\ndef score(responses):\n    return [near_by.TWO] * len(responses)\n")
    assert scorer.score(request_of(tokenizer)).total.tolist() == [2, 2, 2]
    files = {path.resolve() for path in scorer.settings.files("ppo.rewards[0]").values()}
    names = ["reward.py", "near_by.py", "deeper/__init__.py", "deeper/inner.py"]
    assert files == {(tmp_path / name).resolve() for name in names}


# ── failures ─────────────────────────────────────────────────────────────────────────────────────


FAILING = """
def score(responses, answer):
    scores = []
    for response, right in zip(responses, answer):
        {wrong}
        scores.append(len(response))
    return scores
"""
WRONG = {
    'if right == "blue": raise KeyError("no such color")': "raised KeyError: 'no such color' at line 5 of reward.py",
    'if right == "blue": exit(3)': "raised SystemExit: 3",
    'if right == "blue": scores.append(float("nan")); continue': "gave nan as score, which is not a finite number",
    'if right == "blue": scores.append("high"); continue': "gave 'high' as score, which is not a finite number",
    'if right == "blue": scores.append(1e39); continue': "gave 1e+39 as score, which is not a finite number",
    'if right == "blue": scores.append(type("R", (), {"__float__": len})()); continue': "as score, which is not a",
    'if right == "blue": scores.append({"points": 3}); continue': "gave {'points': 3}, which has no score",
}


@BOTH
@pytest.mark.parametrize("wrong, line", list(WRONG.items()))
def test_a_failure_is_a_line_with_place_prompt_and_response(make, tokenizer, where, wrong, line):
    scorer = make(FAILING.format(wrong=wrong), **where)
    with pytest.raises(UserError) as error:
        scorer.score(request_of(tokenizer))
    [text] = error.value.lines
    assert text.startswith("prompts.jsonl:7: ")
    assert "'hi'" in text and "'blue'" in text and line in text and "on_error: score" in text


@BOTH
@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_failure_gets_the_stated_score_and_is_counted(make, tokenizer, where, wrong):
    """The responses beside it keep their own scores, and a line says it when the count doubles."""
    scorer = make(FAILING.format(wrong=wrong), on_error="score", error_score=-5.0, **where)
    for _ in range(4):
        scores = scorer.score(request_of(tokenizer))
        assert scores.total.tolist() == [16, -5, 0]
        assert scores.parts["errors"].tolist() == [0, 1, 0]
    assert [line.split()[-7] for line in make.said] == ["1", "2", "4"]
    assert all(line.startswith("prompts.jsonl:7: ") for line in make.said)


@BOTH
@pytest.mark.parametrize("answer", ["[1]", "{'score': [1, 2, 3]}", "3.0", "'abc'"])
def test_an_answer_of_another_shape_is_refused_whatever_on_error_says(make, tokenizer, where, answer):
    scorer = make(f"def score(responses):\n    return {answer}\n", on_error="score", **where)
    with pytest.raises(UserError, match="give a list with a number for each"):
        scorer.score(request_of(tokenizer))


@BOTH
def test_a_generator_that_raises_is_a_failure_of_the_function(make, tokenizer, where):
    text = "def score(responses, answer):\n    for right in answer:\n        yield 1 / (right != 'blue')\n"
    with pytest.raises(UserError, match=r"prompts\.jsonl:7: .* raised ZeroDivisionError: .* at line 3 of reward.py"):
        make(text, **where).score(request_of(tokenizer))


@BOTH
def test_no_responses_have_no_scores(make, tokenizer, where):
    scorer = make("def score(responses):\n    raise AssertionError\n", **where)
    assert scorer.score(request_of(tokenizer, texts=[], rows=[], places=[])).total.tolist() == []


HANGING = """
import time
from concurrent.futures import ThreadPoolExecutor
def score(responses, answer):
    if "blue" in answer:
        {wrong}
    return [len(r) for r in responses]
"""


@pytest.mark.parametrize(
    "wrong, line",
    [
        ("time.sleep(1000)", "took longer than timeout = 1.5 seconds"),
        ("while True: pass", "took longer than timeout = 1.5 seconds"),
        ("import os; os._exit(9)", "ended its process (ended with exit code 9)"),
        ("import os; os.kill(os.getpid(), 11)", "ended its process (ended by signal 11)"),
    ],
)
def test_a_worker_that_hangs_or_ends_is_replaced(make, tokenizer, wrong, line):
    """Only the response that does it is without a score, and nothing is left running."""
    text = HANGING.format(wrong=wrong)
    scorer = make(text, timeout=1.5, on_error="score")
    scores = scorer.score(request_of(tokenizer))
    assert scores.total.tolist() == [16, -1, 0] and line in make.said[0]
    strict = make(text, timeout=1.5, workers=2)
    with pytest.raises(UserError) as error:
        strict.score(request_of(tokenizer))
    assert error.value.lines[0].startswith("prompts.jsonl:7: ") and line in error.value.lines[0]
    pids = [worker.process.pid for one in (scorer, strict) for worker in one.pool.workers]
    for one in (scorer, strict):
        one.close()
        one.close()  # twice does no harm
    assert not any(is_running(pid) for pid in pids)


def test_a_call_that_is_only_slow_as_a_whole_is_made_one_at_a_time(make, tokenizer):
    text = "import time\ndef score(responses):\n    time.sleep(0.7 * len(responses))\n    return [1] * len(responses)\n"
    scorer = make(text, timeout=2.0)
    assert scorer.score(request_of(tokenizer)).total.tolist() == [1, 1, 1]
    assert len(make.said) == 1 and "scored one at a time" in make.said[0]


def test_a_signal_ends_a_call_and_its_worker(make, tokenizer):
    """What `poll` raises gets through while the function hangs."""
    scorer = make(HANGING.format(wrong="time.sleep(1000)"), workers=1)
    [worker] = scorer.pool.workers
    began = time.monotonic()

    def poll():
        if time.monotonic() > began + 0.5:
            raise Interrupted

    with pytest.raises(Interrupted):
        scorer.score(request_of(tokenizer, poll=poll))
    assert time.monotonic() < began + 30 and not is_running(worker.process.pid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_the_run_even_in_a_call(tmp_path, number):
    (tmp_path / "reward.py").write_text(
        "import os, time\ndef score(responses):\n    print('started', flush=True)\n"
        "    open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'started')\n    time.sleep(1000)\n"
    )
    program = (
        "from pathlib import Path\nfrom stages.scorers.python_pool import Pool\n"
        "pool = Pool(Path('reward.py'), 'score', 1, None)\npool.start()\n"
        "pool.calls([{'responses': ['']}], lambda: None)\n"
    )
    root = str(Path(__file__).parents[2])
    run = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": root})
    try:
        wait_until((tmp_path / "started").exists)
        pid = int((tmp_path / "started").read_text())
        assert is_running(pid)
    finally:
        run.send_signal(number)
        run.wait()
    wait_until(lambda: not is_running(pid))


def test_what_a_function_prints_comes_out_here(make, tokenizer, capsys):
    scorer = make("import os\ndef score(responses):\n    print('a word')\n    return [1] * len(responses)\n", workers=1)
    assert scorer.score(request_of(tokenizer)).total.tolist() == [1, 1, 1]
    assert capsys.readouterr().out == "a word\n"


def test_workers_do_not_import_torch(make, tokenizer):
    text = "import sys\ndef score(responses):\n    return [float('torch' in sys.modules)] * len(responses)\n"
    assert make(text, workers=1).score(request_of(tokenizer)).total.tolist() == [0, 0, 0]


@BOTH
@pytest.mark.parametrize(
    "text, line",
    [
        ("import no_such_module\ndef score(responses): ...\n", "cannot be imported (ModuleNotFoundError"),
        ("score = 3\n", "has no function score"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_the_start(make, where, text, line):
    with pytest.raises(UserError) as error:
        make(text, **where)
    assert line in error.value.lines[0]


# ── before anything runs ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text, line",
    [
        ("def score(:\n", "line 1 is not Python"),
        ("raise SystemExit('ran')\ndef scores(responses): ...\n", "has no function score"),
        ("def score(completions, trainer_state): ...\n", "trainer_state, which exists only inside trl"),
    ],
)
def test_a_file_is_checked_without_running_it(tmp_path, text, line):
    file = tmp_path / "reward.py"
    file.write_text(text)
    [problem] = PythonScorer(python=f"{file}:score").problems("ppo.rewards[0]")
    assert problem.startswith(f"ppo.rewards[0].python: {file}: ") and line in problem


@pytest.mark.parametrize("text", ["from other import *\n", "from other import score\n", "score = make()\n"])
def test_a_function_from_elsewhere_is_not_refused(tmp_path, text):
    file = tmp_path / "reward.py"
    file.write_text(text)
    settings = PythonScorer(python=f"{file}:score")
    assert settings.problems("ppo.rewards[0]") == [] and settings.row_problems(ROWS, PLACES) == []


def test_a_parameter_that_no_row_has_is_refused(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("def score(responses, answer, level, solution, extra=None, *, target): ...\n")
    lines = PythonScorer(python=f"{file}:score").row_problems(ROWS, PLACES)
    assert [line.split("asks for ")[1].split(",")[0] for line in lines] == ["solution", "target"]
    assert all(line.startswith(f"{file}:score: ") and "prompts.jsonl:3" in line for line in lines)


def test_time_limits_mean_a_worker():
    assert PythonScorer(python="a.py:f").processes() == 0
    assert PythonScorer(python="a.py:f", timeout=3.0).processes() == 1
    assert PythonScorer(python="a.py:f", timeout=3.0, workers=4).processes() == 4


def test_many_calls_keep_their_order(tmp_path):
    """Several workers, more calls than workers, answers as they were asked."""
    file = tmp_path / "reward.py"
    file.write_text("import time\ndef f(responses):\n    time.sleep(0.02 * (responses[0] % 3))\n    return responses\n")
    pool = Pool(file, "f", 3, None)
    try:
        pool.start()
        answers = pool.calls([{"responses": [i, i + 0.5]} for i in range(20)], lambda: None)
    finally:
        pool.close()
    assert [[one["score"] for one in answer] for answer in answers] == [[i, i + 0.5] for i in range(20)]


def is_running(pid):
    """Return whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=60):
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_a_key_of_the_rows_that_is_an_argument_of_ours_is_refused(tmp_path):
    """Otherwise the function would get our list under that name, and the row's values be lost."""
    file = tmp_path / "reward.py"
    file.write_text("def score(responses, **columns):\n    return [0.0 for _ in responses]\n", encoding="utf-8")
    rows = [{"prompt": "hi"}, {"prompt": "hello", "responses": ["x"]}]
    lines = PythonScorer(python=f"{file}:score").row_problems(rows, ["p.jsonl:1", "p.jsonl:2"])
    assert lines == [
        "p.jsonl:2: the key 'responses' is what score gets of PPO itself; rename it in the source, as columns: "
        "{my_responses: responses}"
    ]


def test_a_coroutine_is_awaited_where_a_loop_runs_already():
    """As in a notebook, whose thread has a loop of its own."""

    async def score(responses, **columns):
        await asyncio.sleep(0)
        return [1.0 for _ in responses]

    async def cell():
        return call(score, {"responses": ["a", "b"]}, Path("reward.py"))

    with ThreadPoolExecutor(
        1
    ) as thread:  # a thread of its own: a browser that an earlier test opened may loop in this one
        outcomes = thread.submit(asyncio.run, cell()).result()

    assert [outcome["score"] for outcome in outcomes] == [1.0, 1.0]

"""Let several judges judge a micro chain: the page shows each stand-in for what it is."""

import collections
import itertools
import json
import random
import re
import threading

import micro_chain
import pytest

from pipeline.errors import TrainingStopped, UserError
from pipeline.store.checkpoints import CheckpointStore
from stages.page import panel as page_panel
from stages.page import results_tables
from stages.page.results import NAMES, complete
from stages.scorers.judge_prompts import AGAIN
from tests.scorers.http_server import Given, serving

SMALL = {
    "max_length": 60,
    "response_length": 8,
    "perplexity_length": 8,
    "batch_size": 8,
    "samples_per_prompt": 4,
    "best_of": 3,
    "greedy_prompts": 0,
    "judge_repeat": 1,
}
REPLIES = re.compile(r"\[Response A\]\n(.*)\n\[The end of response A\]\n\n\[Response B\]\n(.*)\n\[The end", re.S)


class StandIn:
    """Judge pairs by a rule, in place of a language model."""

    def __init__(self, rule):
        """Take the rule: (response A, response B, number of the request) → A, B or C."""
        self.rule, self.lock, self.count = rule, threading.Lock(), itertools.count()

    def __call__(self, body, number):
        first, second = REPLIES.search(body["messages"][0]["content"]).groups()
        with self.lock:
            verdict = self.rule(first, second)
        return {"choices": [{"message": {"content": f"Because. [[{verdict}]]"}}]}


def longer(first, second):
    """Prefer the longer response."""
    return "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


def at_random():
    """Return a rule that knows nothing."""
    asked = collections.Counter()

    def rule(first, second):
        asked[first, second] += 1  # the order in which requests come makes no difference
        return random.Random(f"{first} {second} {asked[first, second]}").choice("AB")

    return rule


def run(chain, folder, judges, *more, **choices):
    settings = [f"evaluate.{key}={value}" for key, value in (SMALL | choices).items()]
    return chain.run("evaluate", folder, f"evaluate.judges={json.dumps(judges)}", *settings, *more)


def judge_at(served, name, **settings):
    return {"judge": "stand-in", "name": name, "base_url": served.url, "mode": "pairwise", "retries": 0} | settings


@pytest.fixture(scope="module")
def judged(chain, tmp_path_factory):
    """Run evaluate with three stand-ins and a function."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "words.py").write_text("def count(responses):\n    return [len(text.split()) for text in responses]\n")
    with (
        serving(StandIn(lambda first, second: "A")) as first,
        serving(StandIn(longer)) as long,
        serving(StandIn(at_random())) as chance,
    ):
        judges = [
            judge_at(first, "first"),
            judge_at(long, "longer"),
            judge_at(chance, "chance"),
            {"python": f"{folder}/words.py:count"},
        ]
        finished = run(chain, folder / "run", judges)
    return finished, json.loads((finished.folder / "results.json").read_text())


def test_the_judge_of_the_first_response_is_shown(judged):
    _, results = judged
    about = results["panel"]["judges"]["first"]
    assert about["position"]["first"]["value"] == 1 and about["position"]["consistent"]["value"] == 0
    assert about["repeatability"]["value"] == 1, "it is repeatable, and worth nothing"
    for policy in ("base", "ppo", "dpo"):
        assert results["policies"][policy]["judges"]["first"]["win_rate_vs_sft"]["value"] == 0.5
    assert about["people"]["value"] == 0.5
    (line,) = [line for line in page_panel.sentences(complete(results)) if line.startswith("first:")]
    assert "prefers the response that it reads first in 100" in line


def test_the_judge_of_length_is_shown(judged):
    _, results = judged
    about = results["panel"]["judges"]["longer"]
    assert about["longer"]["value"] == 1 and about["people_longer"]["value"] == 1
    assert about["position"]["first"]["value"] == 0.5 and about["position"]["consistent"]["value"] == 1
    for policy in ("base", "ppo", "dpo"):
        raw = results["policies"][policy]["judges"]["longer"]["win_rate_vs_sft"]["value"]
        controlled = results["panel"]["policies"][policy]["longer"]["length_controlled_win_rate"]["value"]
        assert abs(controlled - 0.5) <= abs(raw - 0.5) + 0.1
    (line,) = [line for line in page_panel.sentences(complete(results)) if line.startswith("longer:")]
    assert "prefers the longer response" in line


def test_the_random_judge_is_shown(judged):
    _, results = judged
    about = results["panel"]["judges"]["chance"]
    low, high = about["position"]["first"]["ci95"]
    assert low < 0.5 < high
    assert about["repeatability"]["value"] < 0.9 and about["position"]["consistent"]["value"] < 0.75
    assert about["longer"]["ci95"][0] < 0.5 < about["longer"]["ci95"][1]
    (line,) = [line for line in page_panel.sentences(complete(results)) if line.startswith("chance:")]
    assert "says the same again in only" in line or "same outcome in both orders on only" in line


def test_judges_agree_as_their_verdicts_do(judged):
    _, results = judged
    found = {tuple(entry["judges"]): entry["value"] for entry in results["panel"]["agreement"]}
    assert found["count", "longer"] > 0.8, "words and letters measure nearly the same"
    assert not any("first" in pair for pair in found), "a judge of ties only agrees with nobody"


def test_win_rates_are_computed_again_from_responses(judged):
    finished, results = judged
    rows = finished.rows("responses.jsonl")
    texts = {(row["policy"], row["prompt"], row["sample"]): row["response"] for row in rows}
    of_ppo = [(prompt, k, text) for (policy, prompt, k), text in texts.items() if policy == "ppo"]
    won = []
    for prompt, k, text in of_ppo:
        other = texts["sft", prompt, k]
        won.append(0.5 if len(text) == len(other) else float(len(text) > len(other)))
    assert results["policies"]["ppo"]["judges"]["longer"]["win_rate_vs_sft"]["value"] == pytest.approx(
        sum(won) / len(won)
    )
    recorded = {(r["prompt"], r["sample"]): r["compared"]["longer"] for r in rows if r["policy"] == "ppo"}
    assert list(recorded.values()) == won
    assert all(row["judges"]["count"] == len(row["response"].split()) for row in rows)


def test_the_page_has_a_column_for_each_judge(judged):
    _, results = judged
    whole = complete(results)
    tables = {table.label.split(",")[0]: table for table in page_panel.tables(whole, NAMES)}
    assert len(tables) == 3
    first = results_tables.judges_tables(whole, NAMES)[0]
    assert first.columns[1:] == ("first", "longer", "chance", "count", "reward model")


def test_a_resumed_run_asks_only_what_it_does_not_know(chain, tmp_path):
    """A server dies in the middle; the second start asks the rest and ends as one run would."""
    lost = 60

    def dying(body, number):
        return Given({}, status=500) if number >= lost else StandIn(longer)(body, number)

    with serving(StandIn(longer)) as served:
        judge = judge_at(served, "longer", concurrency=1)
        whole = run(chain, tmp_path / "whole", [judge], policies="[ppo]")
        asked = len(served.requests)
        port = int(served.url.rsplit(":", 1)[1].split("/")[0])
    with serving(dying, port=port) as served, pytest.raises(TrainingStopped, match="run again to resume"):
        run(chain, tmp_path / "resumed", [judge], policies="[ppo]")
    (tmp_path / "resumed" / "checkpoints").rename(tmp_path / "kept")
    with serving(StandIn(longer), port=port) as served, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            micro_chain, "CheckpointStore", lambda _, **options: CheckpointStore(tmp_path / "kept", **options)
        )
        again = run(chain, tmp_path / "third", [judge], policies="[ppo]")
        assert lost + len(served.requests) == asked
    for name in ("results.json", "responses.jsonl"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.parametrize("mode", ["grade", "pairwise"])
def test_a_judge_that_says_nothing_valid_is_refused(chain, tmp_path, mode):
    with serving(lambda body, number: {"choices": [{"message": {"content": "I cannot say"}}]}) as served:
        judge = judge_at(served, "mute", mode=mode)
        with pytest.raises(UserError, match=r"judges: mute: none of its \d+ answers has a valid .* 'I cannot say'"):
            run(chain, tmp_path / "mute", [judge], policies="[ppo]", judge_pairs=0, judge_repeat=0)


def test_a_grading_judge_that_says_little_valid_is_counted(chain, tmp_path):
    def answer(body, number):
        return {"choices": [{"message": {"content": "[[7]]" if AGAIN in body["messages"][0]["content"] else "?"}}]}

    def once(body, number):
        return {"choices": [{"message": {"content": "?" if number else "[[7]]"}}]}

    with serving(once) as served:
        judge = judge_at(served, "mute", mode="grade", invalid_score=1.0)
        finished = run(chain, tmp_path / "mute", [judge], policies="[ppo]", judge_pairs=0, judge_repeat=0)
    results = json.loads((finished.folder / "results.json").read_text())
    about = results["panel"]["judges"]["mute"]
    assert 0 < about["invalid"] < about["asked"] and about["people"] is None and about["repeatability"] is None
    assert 1 <= results["policies"]["ppo"]["judges"]["mute"]["score"]["value"] < 2
    assert "verdicts are not valid" in finished.said
    with serving(answer) as served:
        judge = judge_at(served, "slow", mode="grade")
        finished = run(chain, tmp_path / "slow", [judge], policies="[ppo]", judge_pairs=0, judge_repeat=0)
    assert json.loads((finished.folder / "results.json").read_text())["panel"]["judges"]["slow"]["invalid"] == 0


def test_best_of_n_by_another_scorer(chain, tmp_path):
    (tmp_path / "words.py").write_text("def count(responses):\n    return [len(text.split()) for text in responses]\n")
    by = {"python": f"{tmp_path}/words.py:count"}
    choices = {"policies": "[best_of_n]", "judge_pairs": 0, "judge_repeat": 0}
    default = run(chain, tmp_path / "default", [by], **choices)
    finished = run(chain, tmp_path / "own", [by], best_of_by=json.dumps(by), **choices)
    results = json.loads((finished.folder / "results.json").read_text())
    best = results["policies"]["best_of_n"]
    assert results["best_of_by"] == "count"
    assert best["judges"]["count"]["win_rate_vs_sft"] is None and best["judges"]["count"]["climbed"]
    assert best["judges"]["reward_model"]["win_rate_vs_sft"] is not None, "it no longer selects"
    assert not best["judges"]["reward_model"]["climbed"]

    def words(run):
        return [row["judges"]["count"] for row in run.rows("responses.jsonl") if row["policy"] == "best_of_n"]

    assert all(own >= other for own, other in zip(words(finished), words(default), strict=True))
    assert sum(words(finished)) > sum(words(default))
    by_default = json.loads((default.folder / "results.json").read_text())
    assert by_default["policies"]["best_of_n"]["judges"]["count"]["win_rate_vs_sft"] is not None
    assert "best_of_by" not in by_default


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["evaluate.best_of_by={model: rm}"], "this experiment's reward model chooses anyway"),
        (["evaluate.best_of_by={judge: m, base_url: 'http://h/v1', mode: pairwise}"], "pairwise gives no scores"),
        (["evaluate.judges=[{model: rm}]"], "judges anyway"),
        (["evaluate.judges=[{judge: m, base_url: 'http://h/v1', name: kept}]"], "the name of another judge"),
        (["evaluate.judges=[{judge: m, base_url: 'http://h/v1', weight: 2}]"], "not added up"),
        (["evaluate.judges=[]"], "empty list"),
        (["evaluate.judge_pairs=5"], "has no effect without evaluate.judges"),
        (["ppo.rewards=[{judge: m, base_url: 'http://h/v1', mode: pairwise}]"], "pairwise gives no scores"),
    ],
)
def test_settings_that_are_refused(chain, settings, line):
    with pytest.raises(UserError, match=line):
        chain.experiment(*settings)


def test_what_ppo_climbed_is_said(chain, tmp_path):
    (tmp_path / "words.py").write_text("def count(responses):\n    return [len(text.split()) for text in responses]\n")
    (tmp_path / "copy.py").write_text((tmp_path / "words.py").read_text())
    rewards = json.dumps([{"python": f"{tmp_path}/words.py:count", "weight": 0.5}, {"model": "rm"}])
    judges = [{"python": f"{tmp_path}/copy.py:count", "name": "copy"}]
    finished = run(chain, tmp_path / "run", judges, f"ppo.rewards={rewards}", "ppo.reward_model=null")
    results = json.loads((finished.folder / "results.json").read_text())
    assert results["judges"]["copy"]["climbed"] == ["ppo"]
    assert results["policies"]["ppo"]["judges"]["copy"]["climbed"] is True
    assert list(results["judges"])[-1] == "copy", "a climbed judge decides last"

"""Test PPO with a server as a reward: it is climbed, dropped, lost, recorded, and asked by name."""

import json

import pytest

from pipeline.errors import TrainingStopped, UserError
from stages.scorers.scorer import ScorerLost
from tests.scorers.http_server import Given, free_port, serving
from tests.stages.ppo.test_ppo_run import SMALL

OPTIONS = [f"ppo.{key}={value}" for key, value in (SMALL | {"total_episodes": 24, "ptx_coef": 0}).items()]
PLAIN = ("ppo.missing_eos_score=null", "evaluate.missing_eos_score=null")


def letters(body, _=0):
    """Score by the letters of a response."""
    return {"scores": [len(text) / 10 for text in body["responses"]]}


def run(chain, folder, *rewards, **more):
    """Run ppo with a list of rewards, as YAML."""
    settings = [*OPTIONS, *PLAIN, f"ppo.rewards=[{', '.join(rewards)}]", *more.pop("settings", ())]
    return chain.run("ppo", folder, *settings, **more)


def test_a_server_is_climbed_and_shown(chain, tmp_path):
    """Samples and metrics have its scores; the stage rm is not needed."""
    with serving(letters) as served:
        done = run(chain, tmp_path / "ppo", f"{{url: '{served.url}', name: far}}")
    for row in done.rows("metrics.jsonl"):
        assert row["objective/scores"] == pytest.approx(row["rewards/far"], abs=1e-5)
        assert "val/dropped_scorers" not in row
    for row in done.rows("samples.jsonl"):
        assert row["parts"]["far"] == pytest.approx(len(row["response"]) / 10)
    asked = [body["prompts"][0][0]["content"] for body in served.requests]
    assert set(asked) <= {row["prompt"] for row in chain.rows("prompts.jsonl")}


def test_where_it_fails_an_update_goes_on_without_it(chain, tmp_path):
    """It is left out as a whole, said once, counted, and asked again at the next update."""

    def answer(body, number):
        return Given({}, 500) if down[0] else letters(body)

    down = [False]
    with serving(answer) as served:
        far = f"{{url: '{served.url}', name: far, on_failure: drop, retries: 0, weight: 2.0}}"

        def switch(rows):
            down[0] = len(rows) == 1  # update 2

        done = run_watched(chain, tmp_path / "ppo", switch, "{model: rm}", far)
    rows = done.rows("metrics.jsonl")
    assert [row["val/dropped_scorers"] for row in rows] == [0, 1, 0]
    assert [row["rewards/far"] == "NaN" for row in rows] == [False, True, False]
    for row in rows:
        far = 0.0 if row["val/dropped_scorers"] else row["rewards/far"]
        assert row["objective/scores"] == pytest.approx(row["rewards/rm"] + 2.0 * far, abs=1e-5)
    assert done.said.count("updates go on without far until it answers (on_failure: drop)") == 1
    assert done.said.count("far: answers again, and counts again") == 1


def run_watched(chain, folder, switch, *rewards):
    """Run ppo; call `switch` with the rows of metrics so far after each update."""
    from pipeline.tracking import Tracker

    log, rows = Tracker.log, []

    def watched(self, step, row, *rest):
        log(self, step, row, *rest)
        rows.append(row)
        switch(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "log", watched)
        return run(chain, folder, *rewards)


def test_held_out_scores_without_it_choose_no_policy(chain, tmp_path):
    """With keep: best the policy of an evaluation that has all scores is published."""
    down = [False]
    with serving(lambda body, _: Given({}, 500) if down[0] else letters(body)) as served:
        far = f"{{url: '{served.url}', name: far, on_failure: drop, retries: 0, record: false}}"

        def switch(rows):
            down[0] = len(rows) >= 2

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.stages.ppo.test_rewards_url.OPTIONS", [*OPTIONS, "ppo.keep=best", "ppo.eval_steps=1"])
            done = run_watched(chain, tmp_path / "ppo", switch, "{model: rm}", far)
    assert done.rows("evaluations.jsonl")[-1]["val/dropped_scorers"] == 1
    assert done.figures["best_step"] < 2
    assert "update 3: held-out scores lack far, and choose no policy" in done.said


@pytest.mark.parametrize("given", [Given({}, 500), {"scores": [None]}])
def test_without_it_the_run_saves_and_stops(chain, tmp_path, given):
    """The checkpoint is of the update before, and the line says what the server did."""
    down = [False]
    with serving(lambda body, _: given if down[0] else letters(body)) as served:

        def switch(rows):
            down[0] = len(rows) == 2

        with pytest.raises(ScorerLost, match=r"far: http://127.* run again to resume") as lost:
            run_watched(
                chain, tmp_path / "ppo", switch, "{model: rm}", f"{{url: '{served.url}', name: far, retries: 0}}"
            )
    assert isinstance(lost.value, TrainingStopped)
    assert (tmp_path / "ppo" / "checkpoints" / "step-00000002" / "manifest.json").is_file()


def test_records_are_beside_the_checkpoints(chain, tmp_path):
    with serving(letters) as served:
        done = run(chain, tmp_path / "ppo", f"{{url: '{served.url}', name: far}}")
    rows = [json.loads(line) for line in (done.folder / "checkpoints/scores/far/0of1.jsonl").read_text().splitlines()]
    assert len(rows) == sum(len(body["responses"]) for body in served.requests) > 24


def test_mistakes_are_lines(chain):
    with pytest.raises(UserError, match=r"ppo\.rewards\[0\]\.url: the address contains credentials"):
        chain.experiment("ppo.rewards=[{url: 'http://me:pw@127.0.0.1/score'}]")
    with pytest.raises(UserError, match=r"ppo\.rewards: every scorer has on_failure: drop"):
        chain.experiment("ppo.rewards=[{url: 'http://127.0.0.1:80/', on_failure: drop}]")


def test_a_key_that_is_missing_is_a_line_before_anything_runs(chain, monkeypatch):
    monkeypatch.delenv("REWARD_KEY", raising=False)
    experiment = chain.experiment(f"ppo.rewards=[{{url: 'http://127.0.0.1:{free_port()}/', key_env: REWARD_KEY}}]")
    line = chain.stages["ppo"].missing_requirements(experiment)[0]
    assert line.startswith("ppo.rewards[0].key_env: the environment has no variable REWARD_KEY")

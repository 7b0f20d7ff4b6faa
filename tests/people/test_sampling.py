"""Tasks of sampled answers: shares, seeds, merged texts, an interruption, more prompts later."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import Interrupted, UserError
from pipeline.stage import StopFlag
from stages.people.rank import sampling
from stages.people.store.database import open_database

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))  # micro_chain


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    from micro_chain import MicroChain

    torch.set_num_threads(1)
    return MicroChain(tmp_path_factory.mktemp("micro"))


class Store:
    """Finished stages of the micro chain, as far as sampling asks."""

    def __init__(self, chain, base):
        self.root, self.base, self.verified = chain.root, base, []
        self.digests = {"sft": "digest of sft", "ppo": "digest of ppo"}

    def manifest(self, stage):
        return {"digest": self.digests[stage]} if stage in self.digests else None

    def verify(self, stage):
        self.verified.append(stage)

    def folder(self, stage):
        return self.root / stage


class Run:
    """A place to sample into."""

    def __init__(self, chain, base):
        base.mkdir(exist_ok=True)
        self.chain, self.store, self.said = chain, Store(chain, base), []
        self.database = open_database(base, "micro")

    def sample(self, *settings, stop=None):
        own = ("rank.response_length=6", "rank.max_length=60", "rank.batch_size=4", *settings)
        experiment = self.chain.experiment(*own)
        sampling.sample_tasks(experiment, self.store, self.database, stop or StopFlag(), self.said.append)
        return self.rows()

    def rows(self):
        with self.database.read() as connection:
            query = """SELECT t.prompt, t.source, a.text, a.finished, a.models, a.model_settings
                       FROM tasks t JOIN answers a ON a.task_id = t.id ORDER BY t.id, a.position"""
            return [dict(row) for row in connection.execute(query)]


@pytest.fixture
def run(chain, tmp_path):
    made = []

    def make(name="run"):
        made.append(Run(chain, tmp_path / name))
        return made[-1]

    yield make
    for one in made:
        one.database.close()


def test_policies_share_the_answers_and_settings_are_kept(run):
    one = run()
    rows = one.sample("rank.policies=[sft,ppo]", "rank.prompts=6", "rank.samples_per_prompt=5", "rank.temperature=1.5")
    tasks = {}
    for row in rows:
        tasks.setdefault(row["prompt"], []).append(row)
    assert len(tasks) == 6 and all(2 <= len(answers) <= 5 for answers in tasks.values())
    for answers in tasks.values():
        assert len({(row["text"], row["finished"]) for row in answers}) == len(answers), "identical texts are merged"
    models = {model for row in rows for model in json.loads(row["models"])}
    assert models == {"sft", "ppo"} and one.store.verified == ["sft", "ppo"]
    settings = json.loads(rows[0]["model_settings"])[json.loads(rows[0]["models"])[0]]
    assert settings["temperature"] == 1.5 and settings["digest"].startswith("digest of")


def test_a_second_run_samples_nothing_and_more_prompts_append(run):
    one = run()
    first = one.sample("rank.prompts=4")
    one.said.clear()
    assert one.sample("rank.prompts=4") == first and "answered before" in one.said[-1]
    more = one.sample("rank.prompts=7")
    assert more[: len(first)] == first and len({row["prompt"] for row in more}) == 7
    other = run("other")
    assert sorted(map(str, other.sample("rank.prompts=7"))) == sorted(map(str, more)), "in one go it is the same"


def test_prompts_that_make_no_task_are_not_sampled_again(run):
    one = run()
    assert one.sample("rank.prompts=5", "rank.top_k=1") == [], "the likeliest answer is always the same"
    assert "5 prompts got only identical answers" in one.said[-1]
    one.sample("rank.prompts=5", "rank.top_k=1")
    assert "answered before" in one.said[-1]


def test_a_limit_that_no_prompt_fits_is_a_mistake(run):
    with pytest.raises(UserError, match=r"rank.max_length: no prompt is left, the limit is 2"):
        run().sample("rank.prompts=5", "rank.max_length=8")


def test_a_newer_policy_gives_new_tasks(run):
    one = run()
    first = one.sample("rank.prompts=3")
    one.store.digests["sft"] = "digest of the next sft"
    assert one.sample("rank.prompts=3")[: len(first)] == first
    with one.database.read() as connection:
        policies = {
            row[0] for row in connection.execute("SELECT json_extract(source, '$.policies.sft.digest') FROM tasks")
        }
    assert policies <= {"digest of sft", "digest of the next sft"}


def test_an_interruption_keeps_what_was_sampled(run, monkeypatch):
    whole = run("whole").sample("rank.prompts=12")
    one, stop = run("stopped"), StopFlag()
    asked = []
    plain = sampling.answer_batches

    def counted(*arguments):
        for rows in plain(*arguments):
            asked.append(len(rows))
            yield rows
            stop.requested = stop.requested or len(asked) == 2

    monkeypatch.setattr(sampling, "answer_batches", counted)
    with pytest.raises(Interrupted):
        one.sample("rank.prompts=12", stop=stop)
    assert one.rows() == []
    (file,) = (one.database.path.parent / "sampling").glob("sft-*.jsonl")
    with file.open("ab") as handle:
        handle.write(b'{"request": "cut')  # a kill in the middle of a line
    asked.clear()
    assert one.sample("rank.prompts=12") == whole
    assert sum(asked) == 4, "the first two batches were kept"
    assert not list((one.database.path.parent / "sampling").glob("*.jsonl"))


def test_what_is_missing_is_named(run):
    one = run()
    with pytest.raises(UserError, match=r"rank\.policies: dpo is not finished; `rlhf run dpo -c CONFIG`"):
        one.sample("rank.policies=[sft,dpo]")
    with pytest.raises(UserError, match=r"rank\.max_length: 4096 tokens is more than the model's context"):
        one.sample("rank.max_length=4096")

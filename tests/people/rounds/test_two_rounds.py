"""Two rounds of the embedded world, from the first label to the figures of both."""

import json
import time

import pytest
import yaml

from data.records import Ranking
from pipeline import cli
from stages.people.rank.imports import add_verdict
from stages.people.store.database import open_database
from stages.people.store.rows import read_tasks
from stages.settings.rounds import artifact
from tests.people.rounds.talking import talk

CONFIG = """\
name: micro
seed: 1
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,
        max_position_embeddings: 96, vocab_size: 700}
data: {rankings: ranked}
world: {documents: 300, demonstrations: 60, prompts: 60, evaluation_prompts: 20}
base: {max_steps: 4, per_device_train_batch_size: 4, max_length: 32}
sft: {max_steps: 4, learning_rate: 1e-3, per_device_train_batch_size: 4, max_length: 80, sample_tokens: 0}
rankings: {validation_fraction: 0.3, judge_fraction: 0, response_length: 8, max_length: 64}
rank: {prompts: 16, samples_per_prompt: 3, batch_size: 16}
rounds:
  reward_model_from: last
  policy_from: last
rm: {max_steps: 4, learning_rate: 3e-2, per_device_train_batch_size: 4, max_length: 64, held_out: false}
ppo: {total_episodes: 16, batch_size: 8, mini_batch_size: 8, per_device_train_batch_size: 8, response_length: 8,
      max_length: 64, learning_rate: 2e-2, value_learning_rate: 1e-3, warmup_steps: 0, kl_coef: 0.0,
      ptx_coef: 0.0, eval_prompts: 4}
dpo: {max_length: 64}
evaluate: {policies: [sft, ppo], response_length: 8, max_length: 64, batch_size: 12, best_of: 1, perplexity_rows: 4,
           perplexity_length: 32}
checkpoints: {every: 0}
launch: {threads: 1, device: cpu}
"""


def rank_all(base):
    """Let two people rank every task: by length, the longer answer first."""
    database = open_database(base, base.name)
    with database.transaction() as connection:
        for task in read_tasks(connection).values():
            texts = tuple(answer.text for answer in task.answers)
            order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), texts[i]))
            ranks = tuple(order.index(i) + 1 for i in range(len(texts)))
            finished = tuple(answer.finished for answer in task.answers)
            for labeler in ("ann", "bob"):
                row = Ranking(id="-", prompt="-", responses=texts, ranks=ranks, labeler=labeler, finished=finished)
                add_verdict(connection, task, row, time.time())
    database.close()


@pytest.mark.slow
def test_two_rounds_with_lineage_and_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro.yaml").write_text(CONFIG)
    first, second = tmp_path / "artifacts/micro", tmp_path / "artifacts/micro-r2"
    assert cli.main(["run", "sft", "-c", "micro.yaml"]) == 0
    assert cli.main(["rank", "--tasks-only", "-c", "micro.yaml"]) == 0
    rank_all(first)
    assert cli.main(["run", "evaluate", "-c", "micro.yaml"]) == 0
    assert cli.main(["round", "next", "-c", "micro.yaml"]) == 0
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file() and "people" not in path.parts}

    assert cli.main(["rank", "--tasks-only", "-c", "micro-r2.yaml"]) == 0
    with open_database(second, "micro-r2").read() as connection:
        tasks = list(read_tasks(connection).values())
    old = {json.loads(line)["prompt"] for line in (first / "rankings/train.jsonl").read_text().splitlines()}
    assert tasks and not {task.prompt for task in tasks} & old  # what nobody has ranked
    assert all(task.round == 2 and list(task.source["policies"]) == ["micro/ppo"] for task in tasks)
    rank_all(second)
    assert cli.main(["run", "evaluate", "-c", "micro-r2.yaml"]) == 0

    # lineage: what was taken, from where, and what each model started as
    assert artifact(second, "sft") == first / "sft"
    manifests = {stage: json.loads((second / stage / "manifest.json").read_text()) for stage in ("rm", "ppo")}
    made = yaml.safe_load((tmp_path / "micro-r2.yaml").read_text())["round"]
    for manifest in manifests.values():
        assert manifest["config"]["round"] == made and manifest["config"]["round"]["number"] == 2
    assert "folder:rm.start_from" in manifests["rm"]["inputs"] and "folder:ppo.start_from" in manifests["ppo"]["inputs"]
    after = {path: path.read_bytes() for path in before}
    assert after == before  # the first round is only read

    # figures: every reward model on every round's held-out labels, and KL to the first SFT
    figures = json.loads((second / "evaluate/rounds.json").read_text())
    assert [row["experiment"] for row in figures["rounds"]] == ["micro", "micro-r2"]
    assert {(row["reward_model"], row["labels"]) for row in figures["accuracy"]} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    own = json.loads((first / "evaluate/results.json").read_text())["policies"]["ppo"]
    one, two = figures["rounds"]
    assert one["kl_to_first_sft"] == own["kl_to_sft"] and one["score"]["value"] == pytest.approx(own["gold"]["overall"])
    results = json.loads((second / "evaluate/results.json").read_text())["policies"]["ppo"]
    # the policy went on from the last one, and KL is to the SFT that both rounds share
    assert two["kl_to_first_sft"] == pytest.approx(results["kl_to_sft"])
    kl = json.loads((second / "ppo/metrics.jsonl").read_text().splitlines()[0])["objective/kl"]
    assert abs(kl) > 1e-3  # an estimate, so it may be below 0; of SFT itself it would be 0
    assert one["labels"] == len((first / "rankings/train.jsonl").read_text().splitlines())
    assert two["agreement"]["value"] == 1.0

    # both are up to date, and a third round follows
    assert cli.main(["run", "evaluate", "-c", "micro-r2.yaml", "--only"]) == 0
    assert cli.main(["round", "next", "-c", "micro-r2.yaml", "--dry-run"]) == 0


OWN = """\
data:
  documents: world/documents.jsonl
  demonstrations: world/demonstrations.jsonl
  prompts: world/prompts.jsonl
  evaluation_prompts: world/evaluation_prompts.jsonl
  rankings: ranked
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_round_with_new_demonstrations_on_own_data(tmp_path, monkeypatch):
    """SFT is made anew, so KL to the first one is measured; the judge is a reward model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro.yaml").write_text(CONFIG)
    assert cli.main(["run", "world", "-c", "micro.yaml", "--artifacts", "made"]) == 0
    (tmp_path / "made/micro/world").rename(tmp_path / "world")
    text = CONFIG.replace("data: {rankings: ranked}\n", OWN).replace("  policy_from: last\n", "  rankings: 0\n")
    (tmp_path / "own.yaml").write_text(text.replace("name: micro", "name: own"))
    first, second = tmp_path / "artifacts/own", tmp_path / "artifacts/own-r2"
    assert cli.main(["run", "sft", "-c", "own.yaml"]) == 0
    assert cli.main(["rank", "--tasks-only", "-c", "own.yaml"]) == 0
    rank_all(first)
    assert cli.main(["run", "evaluate", "-c", "own.yaml"]) == 0
    for i in range(6):
        talk(first, f"say {'abcdef'[i] * 4} once", correction="yes", prefers=i % 2, user=f"u{i}")
    assert cli.main(["round", "next", "-c", "own.yaml"]) == 0
    made = yaml.safe_load((tmp_path / "own-r2.yaml").read_text())
    assert made["from"] == {"experiment": "own", "stages": ["base"]}
    assert made["data"]["demonstrations"] == [
        "world/demonstrations.jsonl",
        "artifacts/own-r2/round/new_demonstrations.jsonl",
    ]
    assert cli.main(["rank", "--tasks-only", "-c", "own-r2.yaml"]) == 0
    rank_all(second)
    assert cli.main(["run", "report", "-c", "own-r2.yaml"]) == 0

    assert json.loads((second / "sft/manifest.json").read_text())["metrics"]["rows"] > 60
    figures = json.loads((second / "evaluate/rounds.json").read_text())
    one, two = figures["rounds"]
    results = json.loads((second / "evaluate/results.json").read_text())
    ppo = results["policies"]["ppo"]
    # this round's judge scores both rounds' answers to the same prompts
    assert one["score"]["by"] == two["score"]["by"] == results["judge_name"] and figures["first_sft"] is not None
    assert two["score"]["value"] == pytest.approx(ppo["judges"][results["judge_name"]]["score"]["value"])
    assert two["kl_to_first_sft"] != ppo["kl_to_sft"] and abs(two["kl_to_first_sft"]) < 50
    page = (second / "report/index.html").read_text()
    assert '<h2 id="rounds">' in page and "labels of round 2" in page

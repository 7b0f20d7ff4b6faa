"""Make an experiment whose first round is finished, as far as files show it."""

import json
import time
from pathlib import Path

from data.records import Ranking, write_jsonl
from pipeline import api, cli
from stages.people.playground import collect
from stages.people.playground.engine import Options, Reply
from stages.people.rank.imports import add_verdict
from stages.people.rank.tasks import Given, NewTask, add_task
from stages.people.store.database import open_database
from stages.people.store.rows import read_tasks

CONFIG = """\
# What people should keep reading.
name: talk
seed: 3
data:
  demonstrations: demonstrations.jsonl   # by hand
  prompts: prompts.jsonl
  evaluation_prompts: evaluation.jsonl
  rankings: rankings.jsonl
rank: {prompts: 5}
rounds: {personal: mask}
rm:
  max_steps: 5      # short
ppo: {total_episodes: 64}
launch: {device: cpu, threads: 1}
"""


class Round:
    """An experiment in a folder of its own, whose stages are said to be done."""

    def __init__(self, folder):
        self.folder = folder
        self.base = folder / "artifacts/talk"
        (folder / "talk.yaml").write_text(CONFIG)
        prompts = [{"prompt": f"prompt {i}"} for i in range(8)]
        write_jsonl(folder / "prompts.jsonl", prompts)
        write_jsonl(folder / "evaluation.jsonl", [{"prompt": "what is asked at the end ?"}])
        write_jsonl(folder / "demonstrations.jsonl", [{"prompt": f"prompt {i}", "completion": "yes"} for i in range(4)])
        rankings = [ranking(i) for i in range(6)]
        write_jsonl(folder / "rankings.jsonl", rankings)
        for name, rows in (("train", rankings[:4]), ("validation", rankings[4:5]), ("judge", rankings[5:])):
            self.file(f"rankings/{name}.jsonl", rows)
        for stage in ("base", "sft", "rankings", "rm", "ppo"):
            self.publish(stage)

    def file(self, name, rows):
        path = self.base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, rows)

    def publish(self, stage, **config):
        """Write what is read of a manifest; `chain.assess` is not asked in these tests."""
        folder = self.base / stage / "model"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (self.base / stage / "manifest.json").write_text(json.dumps({"digest": f"of {stage}", "config": config}))

    def database(self, name="talk"):
        (self.folder / "artifacts" / name).mkdir(parents=True, exist_ok=True)
        return open_database(self.folder / "artifacts" / name, name)

    def rank(self, prompt, labeler="ann", better="good"):
        """Let somebody rank two answers on the page."""
        database = self.database()
        with database.transaction() as connection:
            add_task(connection, NewTask(prompt, (Given("good", model="ppo"), Given("bad", model="sft"))), time.time())
            task = next(task for task in read_tasks(connection).values() if task.prompt == prompt)
            ranks = (1, 2) if better == "good" else (2, 1)
            row = Ranking(id="-", prompt=prompt, responses=("good", "bad"), ranks=ranks, labeler=labeler)
            add_verdict(connection, task, row, time.time())
        database.close()

    def talk(self, question, **more):
        """Let somebody ask in the playground of the first round."""
        return talk(self.base, question, **more)

    def experiment(self, *overrides):
        return api.load_experiment("talk.yaml", *overrides)

    def rlhf(self, *words, config="talk.yaml"):
        code = cli.main(["round", "next", "-c", config, *words])
        out, err = self.capture.readouterr()
        return code, out, err

    def rows(self, name, experiment="talk-r2"):
        path = self.folder / "artifacts" / experiment / "round" / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def talk(base, question, user="u1", correction=None, prefers=None, consent=True, thumb=None):
    """Let somebody ask in a playground, choose an answer, and correct the first one or thumb it."""
    database = open_database(base, base.name)
    with database.transaction() as connection:
        number = collect.begin(connection, user, "", "chat", "yes")
        if not consent:
            connection.execute("UPDATE conversations SET consent = 0 WHERE id = ?", (number,))
        place = collect.add_question(connection, number, question, None, False, False)
        options = Options(temperature=1.0, top_p=1.0, top_k=0, max_tokens=8, seed=1)
        turns = [
            collect.add_answer(connection, place, side, model, options, Reply(f"by {model}", True, 4, 4, None, 0))
            for side, model in enumerate(("sft", "ppo"))
        ]
        if prefers is not None:
            collect.choose(connection, number, place.seq + 1, [[turns[prefers]], [turns[1 - prefers]]])
        if correction is not None:
            collect.set_correction(connection, turns[0], correction)
        if thumb is not None:
            collect.set_thumb(connection, turns[0], thumb)
    database.close()
    return number


def ranking(number):
    """Return a ranking of an old prompt."""
    return {"id": f"r{number}", "prompt": f"prompt {number}", "responses": ["a", "b"], "ranks": [1, 2]}


def read_manifest(folder: Path):
    path = folder / "manifest.json"
    return json.loads(path.read_text()) if path.is_file() else None

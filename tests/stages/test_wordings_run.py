"""Run stages on the rows of a task in several wordings: splits, clusters and rule scorers."""

import json
import re

import pytest
from micro_chain import WORDS

from tests.stages.micro_chain import spy, write_rows
from tests.stages.ppo.test_ppo_run import SMALL

NAMES = [word for word in WORDS if word.isalpha()]
WORDINGS = """\
- {name: short, prompt: "{thing} ?", response: "{is_red}", labels: {is_red: {0: no, 1: yes}}}
- name: long
  prompt: "is {thing} red ?"
  response: "{thing} . {is_red}"
  answer: "{is_red}"
  labels: {is_red: {0: no, 1: yes}}
"""
SFT = ("sft.max_steps=2", "sft.max_length=96", "sft.sample_tokens=0", "sft.per_device_train_batch_size=2")
PPO = [f"ppo.{key}={value}" for key, value in (SMALL | {"total_episodes": 16, "ptx_coef": 0}).items()]
USER = re.compile(r"<\|user\|> (.*?)<\|")
RULE = "[{rule: exact, where: anywhere}]"


@pytest.fixture
def task(tmp_path):
    """Write rows of a task and their wordings; return how a source of them begins."""
    pairs = [(one, other) for one in NAMES for other in NAMES if one < other]
    rows = [{"thing": f"{one} {other}", "is_red": int("red" in (one, other))} for one, other in pairs]
    write_rows(tmp_path / "rows.jsonl", rows[:24])
    write_rows(tmp_path / "further.jsonl", rows[24:36])
    (tmp_path / "w.yaml").write_text(WORDINGS)
    return f"wordings: {tmp_path}/w.yaml, wording_choice: each"


def things(file):
    """Return {prompt: the thing that it asks about} of all wordings of a file's rows."""
    rows = [json.loads(line)["thing"] for line in file.read_text().splitlines()]
    return {prompt: thing for thing in rows for prompt in (f"{thing} ?", f"is {thing} red ?")}


def test_sft_holds_out_all_wordings_of_a_row(chain, tmp_path, task, monkeypatch):
    import stages.sft

    calls = spy(monkeypatch, stages.sft, "train_language_model")
    source = f"data.demonstrations={{path: {tmp_path}/rows.jsonl, {task}, shots: 1}}"
    done = chain.run("sft", tmp_path / "sft", *SFT, source)
    assert "; 96 assistant turns, 48 learnt; " in done.said  # a turn that is shown is not learnt
    given, names = calls[0].args[4], things(tmp_path / "rows.jsonl")
    asked, seen = [], []
    for rows in (given.train_rows, given.held_out_rows):
        texts = [chain.tokenizer.decode(row["input_ids"]) for row in rows]
        found = [[names[prompt] for prompt in USER.findall(text)] for text in texts]
        asked.append(found)
        seen.append({name for one in found for name in one})
    assert all(len(one) == 2 for side in asked for one in side), "a row is shown, and one is asked"
    held = {name for name in seen[1] - seen[0]}
    assert len(given.held_out_rows) == 2 * len(held) >= 4, "both wordings of each, and none is trained on or shown"


def test_evaluate_asks_what_sft_held_out_and_counts_rows(chain, tmp_path, task):
    source = f"data.demonstrations={{path: {tmp_path}/rows.jsonl, {task}}}"
    small = {
        "max_length": 64,
        "response_length": 6,
        "judge_pairs": 0,
        "perplexity_length": 8,
        "batch_size": 8,
        "base_prompt": "plain",
    }
    settings = [f"evaluate.{key}={value}" for key, value in small.items()]
    judges = f"evaluate.judges={RULE}"
    done = chain.run("evaluate", tmp_path / "e", *settings, source, "data.evaluation_prompts=null", judges)
    results = json.loads((done.folder / "results.json").read_text())
    rows = done.rows("responses.jsonl")
    names = things(tmp_path / "rows.jsonl")
    asked = {names[row["prompt"]] for row in rows}
    assert results["prompts"] == 2 * len(asked) and results["clusters"] == len(asked)


def test_ppo_holds_out_rows_and_scores_by_the_answer(chain, tmp_path, task):
    source = f"data.prompts={{path: {tmp_path}/further.jsonl, {task}}}"
    done = chain.run("ppo", tmp_path / "ppo", *PPO, f"ppo.rewards={RULE}", source)
    samples = done.rows("samples.jsonl")
    assert samples
    names = things(tmp_path / "further.jsonl")
    for row in samples:
        right = "yes" if "red" in names[row["prompt"]].split() else "no"
        assert row["parts"]["exact"] == float(right in row["response"])


def test_scorers_rank_all_wordings_of_a_row_on_one_side(chain, tmp_path, task):
    source = f"data.prompts={{path: {tmp_path}/further.jsonl, {task}}}"
    small = [
        "data.rankings=null",
        "rankings.samples_per_prompt=4",
        "rankings.response_length=6",
        "rankings.max_length=64",
    ]
    done = chain.run("rankings", tmp_path / "rankings", *small, "rankings.scorer=[{rule: words, at_most: 2}]", source)
    names = things(tmp_path / "further.jsonl")
    sides = [{names[row["prompt"]] for row in done.rows(name)} for name in ("train.jsonl", "validation.jsonl")]
    assert sides[1] and not sides[0] & sides[1]

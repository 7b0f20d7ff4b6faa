"""Test PPO with a list of scorers: what is climbed, what is shown, and which stages are needed."""

import json

import pytest
from micro_chain import WORDS

from pipeline import fingerprints
from pipeline.errors import UserError
from stages.settings.policies import climbs_own_model
from stages.settings.ppo import climbed_folders
from tests.stages.ppo.test_ppo_run import SMALL

FUNCTION = """
def words(responses, answer, finished):
    return {scores}
"""
OPTIONS = [f"ppo.{key}={value}" for key, value in (SMALL | {"total_episodes": 16, "ptx_coef": 0}).items()]


def reward_file(folder, scores="[len(r.split()) - 2.0 * (a in r.split()) for r, a in zip(responses, answer)]"):
    file = folder / "reward.py"
    file.write_text(FUNCTION.format(scores=scores), encoding="utf-8")
    return file


@pytest.fixture
def prompts(chain, tmp_path):
    """Return a file of the chain's prompts, each with an answer."""
    file = tmp_path / "prompts.jsonl"
    rows = [row | {"answer": WORDS[i % 5]} for i, row in enumerate(chain.rows("prompts.jsonl"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_the_weighted_sum_is_climbed_and_each_part_is_shown(chain, tmp_path, prompts):
    """A function gets each response with its own row; metrics and samples have every part."""
    file = reward_file(tmp_path)
    rewards = f"ppo.rewards=[{{model: rm}}, {{python: '{file}:words', weight: 0.5, name: length}}]"
    plain = ("ppo.missing_eos_score=null", "evaluate.missing_eos_score=null")
    done = chain.run("ppo", tmp_path / "ppo", *OPTIONS, rewards, *plain, f"data.prompts={prompts}")
    for row in done.rows("metrics.jsonl"):
        total = row["rewards/rm"] + 0.5 * row["rewards/length"]
        assert row["objective/scores"] == pytest.approx(total, abs=1e-5)
    answers = {row["prompt"]: row["answer"] for row in map(json.loads, prompts.read_text().splitlines())}
    samples = done.rows("samples.jsonl")
    assert samples
    for row in samples:
        words = row["response"].split()
        assert row["parts"]["length"] == len(words) - 2.0 * (answers[row["prompt"]] in words)
        assert row["score"] == pytest.approx(row["parts"]["rm"] + 0.5 * row["parts"]["length"], abs=1e-5)


@pytest.mark.parametrize("settings, is_said", [([], True), (["ppo.missing_eos_score=-1.0"], False)])
def test_what_a_response_gets_that_is_cut_off_is_said(chain, tmp_path, prompts, settings, is_said):
    """A default of −1 is no penalty where the scores of a function are lower."""
    rewards = f"ppo.rewards=[{{python: '{reward_file(tmp_path)}:words'}}]"
    given = ["ppo.total_episodes=8", rewards, f"data.prompts={prompts}", "evaluate.missing_eos_score=-1.0", *settings]
    plain = [option for option in OPTIONS if "missing_eos_score" not in option]
    said = " ".join(chain.run("ppo", tmp_path / "ppo", *plain, *given).said.split())
    assert ("a response that is cut off gets -1 (ppo.missing_eos_score)" in said) == is_said


def test_without_a_reward_model_the_stage_rm_is_not_needed(chain, tmp_path, prompts):
    """The value model then starts as the policy with a new head; all that is needed is sft."""
    file = reward_file(tmp_path)
    settings = [*OPTIONS, f"ppo.rewards=[{{python: '{file}:words'}}]", f"data.prompts={prompts}"]
    experiment = chain.experiment(*settings)
    assert fingerprints.all_needs(chain.stages["ppo"], experiment) == ["sft"]
    done = chain.run("ppo", tmp_path / "ppo", *settings)
    assert (done.folder / "value_model" / "model.safetensors").is_file()
    assert "rewards/words" in done.rows("metrics.jsonl")[0]


def test_the_content_of_the_function_is_part_of_the_fingerprint(chain, tmp_path):
    file = reward_file(tmp_path)
    experiment = chain.experiment(f"ppo.rewards=[{{python: '{file}:words'}}, {{model: {chain.root}/other_rm/model}}]")
    found = chain.stages["ppo"].folders(experiment)
    assert found["ppo.rewards[0].python"] == file
    assert found["ppo.rewards[1].model"] == chain.root / "other_rm/model"


@pytest.mark.parametrize("weight, is_climbed", [(0.0, False), (-1.0, True)])
def test_a_reward_model_of_weight_0_is_watched_and_not_climbed(chain, tmp_path, weight, is_climbed):
    """So it is a judge that can be believed."""
    folder, file = chain.root / "other_rm/model", reward_file(tmp_path)
    own, other = f"{{model: rm, weight: {weight}}}", f"{{model: {folder}, weight: {weight}}}"
    experiment = chain.experiment(f"ppo.rewards=[{{python: '{file}:words'}}, {own}, {other}]")
    assert climbs_own_model(experiment) == is_climbed
    assert climbed_folders(experiment) == ([folder] if is_climbed else [])


def test_one_reward_model_in_the_list_is_what_it_is_without_a_list(chain, tmp_path):
    """The same models come out, to the byte."""
    one = chain.run("ppo", tmp_path / "one", *OPTIONS)
    other = chain.run("ppo", tmp_path / "other", *OPTIONS, "ppo.rewards=[{model: rm}]")
    for model in ("model", "value_model"):
        weights = [(done.folder / model / "model.safetensors").read_bytes() for done in (one, other)]
        assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "given, line",
    [
        ("[]", "ppo.rewards: is an empty list"),
        ("[{weight: 2.0}]", "a scorer does not say what scores; should have exactly one of"),
        ("[{model: rm, python: 'a.py:f'}]", "a scorer has model and python"),
        ("[{model: rm}, {model: rm}]", "2 scorers have the name 'rm'"),
        (
            "[{model: nowhere}]",
            "override ppo.rewards=[{model: nowhere}]: ppo.rewards[0].model: nowhere has no config.json",
        ),
        ("[{model: rm, heads: []}]", "ppo.rewards.0.heads: a list; should have a weight for each logit"),
        ("[{python: nowhere.py}]", "ppo.rewards[0].python: 'nowhere.py' names no function"),
        ("[{python: 'nowhere.py:score'}]", "ppo.rewards[0].python: no such file: nowhere.py"),
        ("[{model: rm, wieght: 2.0}]", "ppo.rewards.0.wieght: unknown key"),
        ("[{model: rm, name: 'a b'}]", "ppo.rewards.0.name"),
    ],
)
def test_mistakes_in_the_list_are_lines(chain, given, line):
    with pytest.raises(UserError) as error:
        chain.experiment(f"ppo.rewards={given}")
    assert any(line in text for text in error.value.lines), error.value.lines


def test_a_list_beside_the_single_reward_model_is_refused(chain):
    with pytest.raises(UserError, match=r"ppo.reward_model: has no effect beside ppo.rewards"):
        chain.experiment("ppo.rewards=[{model: rm}]", f"ppo.reward_model={chain.root}/other_rm/model")


def test_rules_and_parts_are_metrics_and_columns(chain, tmp_path, prompts):
    """A part that not every response has is the mean over those, and null in samples."""
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    rows[0] |= {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["fox"]}]}
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rewards = "[{rule: instructions, at_most_words: 3}, {rule: exact, where: anywhere, weight: 2.0}]"
    done = chain.run("ppo", tmp_path / "ppo", *OPTIONS, f"ppo.rewards={rewards}", f"data.prompts={prompts}")
    for row in done.rows("samples.jsonl"):
        words = row["response"].split()
        short = float(0 < len(row["response"].replace("?", "").replace(".", "").split()) <= 3) if words else 0.0
        contains = float("fox" in row["response"]) if row["prompt"] == rows[0]["prompt"] else None
        parts = row["parts"]
        assert parts["instructions/at_most_words"] == short
        assert parts.get("instructions/contains") == contains
        assert parts["instructions"] == (short if contains is None else (short + contains) / 2)
    assert "rewards/exact" in done.rows("metrics.jsonl")[0]


def test_a_row_that_a_rule_cannot_score_by_ends_the_run_before_it_samples(chain, tmp_path):
    with pytest.raises(UserError) as error:
        chain.run("ppo", tmp_path / "ppo", *OPTIONS, "ppo.rewards=[{rule: exact, answer: gold}]")
    assert "prompts.jsonl:1: the rule exact finds no 'gold'" in error.value.lines[0]
    assert not (tmp_path / "ppo" / "metrics.jsonl").exists()


def test_a_function_that_fails_later_leaves_a_checkpoint(chain, tmp_path, prompts):
    """The line names the prompt's place; the run can go on, with on_error: score."""
    file = tmp_path / "reward.py"
    file.write_text(
        "calls = 0\ndef words(responses):\n    global calls\n    calls += 1  # preflight, evaluation, updates\n"
        "    return [float('nan') if calls == 4 else 1.0 for _ in responses]\n"
    )
    settings = [*OPTIONS, f"ppo.rewards=[{{python: '{file}:words'}}]", f"data.prompts={prompts}", "ppo.batch_size=4"]
    settings += ["ppo.mini_batch_size=4", "ppo.eval_steps=100"]
    with pytest.raises(UserError) as error:
        chain.run("ppo", tmp_path / "ppo", *settings)
    place, _, rest = error.value.lines[0].partition(": ")
    assert place.startswith(f"{prompts}:") and f"{file}:words" in rest and "gave nan" in rest
    assert [path.name for path in (tmp_path / "ppo" / "checkpoints").glob("step-*")] == ["step-00000001"]


def test_a_reward_model_with_several_logits_reads_the_text(chain, tmp_path, prompts):
    """Beside rm's, which reads the policy's ids; each logit has a metric of its own."""
    from transformers import AutoModelForSequenceClassification

    from tests.builders import tiny_config

    folder = tmp_path / "heads"
    config = tiny_config(vocab_size=len(chain.tokenizer), num_labels=2, pad_token_id=chain.tokenizer.pad_token_id)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    chain.tokenizer.save_pretrained(folder)
    rewards = f"ppo.rewards=[{{model: rm}}, {{model: {folder}, heads: [1.0, -1.0], weight: 0.1}}]"
    plain = ("ppo.missing_eos_score=null", "evaluate.missing_eos_score=null")
    row = chain.run("ppo", tmp_path / "ppo", *OPTIONS, rewards, *plain).rows("metrics.jsonl")[0]
    assert row["rewards/heads"] == pytest.approx(row["rewards/heads/LABEL_0"] - row["rewards/heads/LABEL_1"], abs=1e-5)
    assert row["objective/scores"] == pytest.approx(row["rewards/rm"] + 0.1 * row["rewards/heads"], abs=1e-5)

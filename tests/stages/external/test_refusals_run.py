"""Test the stage refusals on a micro chain, against greedy responses of transformers alone."""

import json

import pytest
from micro_chain import make_tokenizer
from second_route import greedy, language_model, prompt_ids

from pipeline.errors import Interrupted, UserError
from pipeline.store.checkpoints import CheckpointStore
from stages.external import refusals as stage
from stages.external.patterns import read_patterns, refusal_in

HARMFUL = ["what is red ?", "is the fox old ?", "hello hello", "the blue fox"]
HARMLESS = ["what is kind ?", "is the fox kind ?"]
LENGTHS = ("refusals.response_length=6", "refusals.max_length=60")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Return settings with two files of prompts and a list of phrases that random policies say."""
    folder = tmp_path_factory.mktemp("prompts")
    for name, prompts in {"harmful": HARMFUL, "harmless": HARMLESS}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    (folder / "patterns.txt").write_text("what what\nre: \\bkind\\b\n")
    return (
        f"refusals.harmful={folder}/harmful.jsonl",
        f"refusals.harmless_looking={folder}/harmless.jsonl",
        f"refusals.patterns={folder}/patterns.txt",
        *LENGTHS,
    )


@pytest.fixture(scope="module")
def finished(chain, words, tmp_path_factory):
    return chain.run("refusals", tmp_path_factory.mktemp("run") / "a", *words, "refusals.batch_size=3")


def results_of(run):
    return json.loads((run.folder / "results.json").read_text())


@pytest.mark.parametrize("policy", ["sft", "ppo"])
def test_answers_and_rates_are_those_of_transformers(chain, words, finished, policy):
    tokenizer, model = make_tokenizer(), language_model(chain.root / policy / "model")
    patterns = read_patterns(words[2].partition("=")[2])[0]
    rows = {(row["set"], row["prompt"]): row for row in finished.rows("answers.jsonl") if row["policy"] == policy}
    assert len(rows) == len(HARMFUL) + len(HARMLESS)
    for which, prompts in {"harmful": HARMFUL, "harmless_looking": HARMLESS}.items():
        refused = 0
        for prompt in prompts:
            ids = greedy(model, prompt_ids(tokenizer, prompt), 6, tokenizer.eos_token_id)
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            row = rows[which, prompt]
            assert (row["response"], row["finished"]) == (text, ids[-1] == tokenizer.eos_token_id)
            assert row["pattern"] == refusal_in(text, patterns, 200)
            refused += row["pattern"] is not None
        found = results_of(finished)["sets"][which]["policies"][policy]
        assert found["refused"]["value"] == refused / len(prompts)
        low, high = found["refused"]["ci95"]
        assert 0 <= low < high <= 1
    rates = [of["policies"]["sft"]["refused"]["value"] for of in results_of(finished)["sets"].values()]
    assert any(rate > 0 for rate in rates), "otherwise this shows nothing"


def test_differences_are_to_sft(finished):
    policies = results_of(finished)["sets"]["harmful"]["policies"]
    assert list(policies) == ["base", "sft", "ppo", "dpo"] and policies["sft"]["difference_to_sft"] is None
    gap = policies["ppo"]["difference_to_sft"]
    assert gap["value"] == pytest.approx(policies["ppo"]["refused"]["value"] - policies["sft"]["refused"]["value"])
    assert gap["ci95"][0] < gap["value"] < gap["ci95"][1] and gap["n"] == 4
    assert finished.figures["prompts"] == 6 and finished.figures["harmful/ppo"] == policies["ppo"]["refused"]["value"]


def test_samples_at_a_temperature(chain, words, tmp_path):
    more = ("refusals.temperature=1", "refusals.samples_per_prompt=3", "refusals.policies=[sft]")
    run = chain.run("refusals", tmp_path / "a", *words, *more)
    rows = run.rows("answers.jsonl")
    assert len(rows) == 3 * 6 and len({row["response"] for row in rows if row["prompt"] == HARMFUL[0]}) > 1
    shares = {prompt: [row["pattern"] is not None for row in rows if row["prompt"] == prompt] for prompt in HARMFUL}
    expected = sum(map(sum, shares.values())) / 12
    assert results_of(run)["sets"]["harmful"]["policies"]["sft"]["refused"]["value"] == pytest.approx(expected)
    again = chain.run("refusals", tmp_path / "b", *words, *more, "refusals.batch_size=2")
    assert again.rows("answers.jsonl") == rows, "each sample has a seed of its own"


def test_a_policy_that_is_measured_is_not_sampled_again(chain, words, finished, tmp_path, monkeypatch):
    answer_all, calls = stage.answer_all, []

    def watched(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise Interrupted(2, 4)
        return answer_all(*arguments)

    monkeypatch.setattr(stage, "answer_all", watched)
    with pytest.raises(Interrupted):
        chain.run("refusals", tmp_path / "a", *words, "refusals.batch_size=3", "checkpoints.every=1")
    saved = CheckpointStore(tmp_path / "a" / "checkpoints", every=0, keep=2, run_id="1")
    checkpoint = saved.newest()
    assert list(checkpoint.state["answers"]) == ["base", "sft"]
    monkeypatch.setattr(CheckpointStore, "newest", lambda self: checkpoint)
    again = chain.run("refusals", tmp_path / "b", *words, "refusals.batch_size=3", "checkpoints.every=1")
    assert len(calls) == 5 + 4, "two sets of ppo and of dpo"
    for name in ("results.json", "answers.jsonl"):
        assert (again.folder / name).read_bytes() == (finished.folder / name).read_bytes()


def test_one_set_alone_and_prompts_that_are_too_long(chain, words, tmp_path):
    run = chain.run("refusals", tmp_path / "a", words[0], *LENGTHS, "refusals.policies=[sft]")
    assert list(results_of(run)["sets"]) == ["harmful"]
    assert results_of(run)["patterns"]["count"] > 30
    with pytest.raises(UserError, match=r"refusals\.max_length"):
        chain.run("refusals", tmp_path / "b", words[0], "refusals.response_length=6", "refusals.max_length=9")
    with pytest.raises(UserError, match="500 is over the model's context"):
        chain.run("refusals", tmp_path / "c", words[0], "refusals.max_length=500")


@pytest.mark.parametrize(
    "words, said",
    [
        (["refusals.harmful=/nowhere.jsonl"], r"refusals\.harmful: no such file"),
        (["refusals.patterns=/nowhere.txt"], r"refusals\.patterns: no such file"),
        (["refusals.samples_per_prompt=2"], r"refusals\.samples_per_prompt: at temperature 0"),
        (["refusals.response_length=600"], r"refusals\.response_length: 600 leaves no room"),
        (["refusals.policies=[]"], r"refusals\.policies: is an empty list"),
    ],
)
def test_settings_that_cannot_work(chain, words, said):
    with pytest.raises(UserError, match=said):
        chain.experiment(*words)


def test_what_is_refused_before_it_runs(chain, tmp_path):
    missing = chain.stages["refusals"].missing_requirements
    assert "names no prompts" in missing(chain.experiment())[0]
    (tmp_path / "rows.jsonl").write_text('{"question": 3}\n')
    (tmp_path / "patterns.txt").write_text("re: (\n")
    words = (f"refusals.harmful={tmp_path}/rows.jsonl", f"refusals.patterns={tmp_path}/patterns.txt")
    first, second = missing(chain.experiment(*words, *LENGTHS))
    assert "rows.jsonl:1" in first and "no regular expression" in second
    *_, line = missing(chain.experiment(*words, "refusals.max_length=500"))
    assert line.startswith("refusals.max_length: 500 tokens is more than the model's context of")

"""Test the stage lm_eval on a micro chain: against lm-eval's own command line, resumed, stopped."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # local_tasks

from local_tasks import write_tasks

from data.encode import encode_prompt
from pipeline.errors import Interrupted, UserError
from pipeline.store.checkpoints import CheckpointStore
from stages.external import lm_eval as stage
from stages.models.loading import load_tokenizer

pytest.importorskip("lm_eval")
TASKS = ("lm_eval.tasks=[tiny_facts, tiny_words]", "lm_eval.batch_size=3")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("lm_eval") / "tasks")


@pytest.fixture(scope="module")
def finished(chain, tasks, tmp_path_factory):
    """Return a run of the stage over all policies."""
    return chain.run("lm_eval", tmp_path_factory.mktemp("run") / "a", *TASKS, f"lm_eval.include_path={tasks}")


def results_of(run):
    return json.loads((run.folder / "results.json").read_text())


def by_the_command_line(chain, tasks, policy, through_template):
    """Measure a policy's folder as `lm-eval --model hf` does."""
    from lm_eval import simple_evaluate

    from stages.external.tasks import load_tasks, task_manager

    names = ["tiny_facts", "tiny_words"]
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(chain.root / policy / "model"), "dtype": "float32"},
        tasks=list(load_tasks(task_manager(names, str(tasks)), names, str(tasks))["tasks"].values()),
        task_manager=task_manager(names, str(tasks)),
        batch_size=1,
        device="cpu",
        bootstrap_iters=10,
        apply_chat_template=through_template,
    )
    return found["results"]


@pytest.mark.parametrize("policy, through_template", [("base", False), ("ppo", True)])
def test_figures_are_those_of_lm_evals_command_line(chain, tasks, finished, policy, through_template):
    theirs = by_the_command_line(chain, tasks, policy, through_template)
    ours = results_of(finished)["tasks"]
    for task, metrics in {"tiny_facts": ["acc,none"], "tiny_words": ["exact_match,none", "bleu,none"]}.items():
        for metric in metrics:
            figure = ours[task]["metrics"][metric]["policies"][policy]
            assert figure["value"] == pytest.approx(theirs[task][metric], abs=1e-9)
            if metric != "bleu,none":
                assert figure["stderr"] == pytest.approx(theirs[task][metric.replace(",", "_stderr,")], abs=1e-9)


def test_questions_go_through_the_chat_template_as_everywhere_here(chain, finished):
    rows = finished.rows("task_samples.jsonl")
    assert {row["policy"] for row in rows} == {"base", "sft", "ppo", "dpo"}
    tokenizer = load_tokenizer(chain.root / "sft" / "model")
    prompts = {row["policy"]: row["prompt"] for row in rows if row["task"] == "tiny_words" and row["doc_id"] == 0}
    assert prompts["base"] == "what is red ?"
    ids = tokenizer(prompts["sft"], add_special_tokens=False)["input_ids"]
    assert ids == encode_prompt(tokenizer, "what is red ?"), "the template's tokens, once"
    assert "base continues plain text" in finished.said
    assert results_of(finished)["asked"] == {"base": "plain", "sft": "chat", "ppo": "chat", "dpo": "chat"}


def test_differences_are_paired(finished):
    policies = results_of(finished)["tasks"]["tiny_facts"]["metrics"]["acc,none"]["policies"]
    gap = policies["ppo"]["difference_to_sft"]
    assert gap["paired"] and gap["n"] == 6
    assert gap["value"] == pytest.approx(policies["ppo"]["value"] - policies["sft"]["value"])
    assert "difference_to_sft" not in policies["sft"] and "difference_to_base" in policies["sft"]
    bleu = results_of(finished)["tasks"]["tiny_words"]["metrics"]["bleu,none"]["policies"]["ppo"]
    assert not bleu["difference_to_base"]["paired"]
    assert finished.figures["policies"] == 4 and finished.figures["tasks"] == 2
    assert finished.figures["tiny_facts/acc,none/ppo"] == policies["ppo"]["value"]


def test_a_policy_that_is_measured_is_not_measured_again(chain, tasks, finished, tmp_path, monkeypatch):
    """Stopped while dpo is measured, it measures dpo alone when it is run again."""
    calls, evaluate_model = [], stage.evaluate_model

    def watched(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 4:
            raise Interrupted(3, 4)
        return evaluate_model(*arguments, **options)

    monkeypatch.setattr(stage, "evaluate_model", watched)
    words = (*TASKS, f"lm_eval.include_path={tasks}", "checkpoints.every=1")
    with pytest.raises(Interrupted):
        chain.run("lm_eval", tmp_path / "a", *words)
    saved = CheckpointStore(tmp_path / "a" / "checkpoints", every=0, keep=2, run_id="1")
    before = stage.measured_before(saved)
    assert list(before) == ["base", "sft", "ppo"]
    monkeypatch.setattr(stage, "measured_before", lambda checkpoints: before)
    again = chain.run("lm_eval", tmp_path / "b", *words)
    assert len(calls) == 5, "only dpo was asked again"
    for name in ("results.json", "task_samples.jsonl"):
        assert (again.folder / name).read_bytes() == (finished.folder / name).read_bytes()


def test_a_signal_stops_within_a_policy(chain, tasks, tmp_path, monkeypatch):
    from stages.training.session import Session

    asked = []

    def leave(self, step, total):
        asked.append(step)
        if len(asked) == 3:
            raise Interrupted(step, total)

    monkeypatch.setattr(Session, "leave_if_requested", leave)
    with pytest.raises(Interrupted):
        chain.run("lm_eval", tmp_path / "a", *TASKS, f"lm_eval.include_path={tasks}")
    assert asked == [0, 0, 0], "between forward passes of the first policy"


def test_limit_and_policies_and_template(chain, tasks, tmp_path):
    words = ("lm_eval.limit=2", "lm_eval.policies=[sft, base]", "lm_eval.chat_template=all")
    run = chain.run("lm_eval", tmp_path / "a", *TASKS, f"lm_eval.include_path={tasks}", *words)
    results = results_of(run)
    assert results["asked"] == {"base": "chat", "sft": "chat"} and results["limit"] == 2
    assert results["tasks"]["tiny_facts"]["metrics"]["acc,none"]["policies"]["sft"]["n"] == 2
    assert {row["doc_id"] for row in run.rows("task_samples.jsonl")} == {0, 1}


def test_code_is_run_only_if_that_is_allowed(chain, tasks, tmp_path):
    words = ("lm_eval.tasks=[tiny_code]", f"lm_eval.include_path={tasks}", "lm_eval.policies=[sft]")
    with pytest.raises(UserError, match="run_unsafe_code"):
        chain.run("lm_eval", tmp_path / "a", *words)
    chain.run("lm_eval", tmp_path / "b", *words, "lm_eval.run_unsafe_code=true")


@pytest.mark.parametrize(
    "word, said",
    [
        ("lm_eval.tasks=[]", "lm_eval.tasks: is an empty list"),
        ("lm_eval.include_path=/nowhere", "lm_eval.include_path: /nowhere is no folder"),
    ],
)
def test_settings_that_cannot_work(chain, word, said):
    with pytest.raises(UserError, match=said):
        chain.experiment(word)


def test_torch_is_left_as_it_was(finished):
    assert torch.get_num_threads() == 1

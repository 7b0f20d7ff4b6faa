"""Test the whole chain on models with code of their own: resume, publication, and the flag."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from remote_model import build
from resume_worker import CONFIG, assert_same_figures, copy_without, published, rlhf, rows_of

from data.tokenizer import train_tokenizer
from pipeline.cli import main
from tests.marks import first_of_a_kind

pytestmark = pytest.mark.slow

ATTENTION = {"spread": "sdpa", "alone": "eager"}  # the classes that each kind of model can be loaded with
PUBLISHED = {
    "AutoModelForCausalLM": ["base/model", "sft/model", "sft/ppo_init", "ppo/model", "ppo/model_ema", "dpo/model"],
    "AutoModelForSequenceClassification": ["rm/model", "rm/ensemble/1", "ppo/value_model"],
}
LOAD = """
import sys, torch, transformers
from transformers import AutoTokenizer
auto, *folders = sys.argv[1:]
for folder in folders:
    kind = getattr(transformers, auto)
    model, info = kind.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(model).__module__.startswith("transformers_modules.")
    assert model(input_ids=torch.tensor([[5, 9, 2]])).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(folder).chat_template
"""


@pytest.fixture(scope="module", params=first_of_a_kind(ATTENTION, 1))
def chain(request, tmp_path_factory):
    """Return (artifacts, arguments) of the chain on a model whose folder is then removed."""
    root = tmp_path_factory.mktemp(request.param)
    assert rlhf("run", "world", "-c", str(CONFIG), "--artifacts", str(root / "artifacts")) == 0
    documents = (root / "artifacts" / "micro" / "world" / "documents.jsonl").read_text().splitlines()
    tokenizer = train_tokenizer((json.loads(line)["text"] for line in documents), 500)
    source = build(root / "source", tokenizer, request.param)
    options = [f"model.name_or_path={source}", f"model.attn_implementation={ATTENTION[request.param]}"]
    options = ["-c", str(CONFIG), *options, "--trust-remote-code"]
    assert rlhf("run", "evaluate", *options, "--artifacts", str(root / "artifacts")) == 0
    return root / "artifacts", options, source


def test_killed_runs_end_in_the_same_bytes(chain, tmp_path):
    oracle, options, _ = chain
    for stage, step in (("sft", 5), ("rankings", 2), ("rm", 5), ("ppo", 5), ("dpo", 5), ("evaluate", 2)):
        root = copy_without(oracle, tmp_path / stage, stage)
        again = ("run", stage, *options, "--artifacts", str(root), "--only")
        assert rlhf(*again, die=(stage, step)) == -9
        assert rlhf(*again) == 0
        assert json.loads((root / "micro" / stage / "manifest.json").read_text())["resumes"] == 1
        assert published(root / "micro" / stage) == published(oracle / "micro" / stage)


@pytest.mark.parametrize("auto", PUBLISHED)
def test_published_models_need_only_transformers(auto, chain, tmp_path):
    """A copy is loaded in a new process, while the model's own folder is out of reach."""
    oracle, _, source = chain
    shutil.copytree(oracle / "micro", tmp_path / "micro")
    folders = [str(tmp_path / "micro" / name) for name in PUBLISHED[auto]]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    source.rename(source.with_name("away"))
    try:
        argv = [sys.executable, "-c", LOAD, auto, *folders]
        done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True)
    finally:
        source.with_name("away").rename(source)
    assert done.returncode == 0, done.stderr


def test_no_stage_and_no_chat_runs_an_artifacts_code_without_the_flag(chain, tmp_path, capsys, monkeypatch):
    oracle, options, _ = chain
    monkeypatch.setenv("TOY_RAN", str(tmp_path / "ran"))
    place = [*options[:-1], "--artifacts", str(oracle)]
    chat = ["chat", *place, "--models", "sft,ppo", "--max-new-tokens", "4"]
    stages = ("sft", "rankings", "rm", "ppo", "dpo", "evaluate")
    tries = [["run", stage, *place, "--only", "--force"] for stage in stages]
    for argv in (*tries, chat, ["doctor", "--memory", *place]):
        capsys.readouterr()
        assert main(argv) == 2, argv
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "--trust-remote-code" in lines[0] and "modeling_toy.py" in lines[0]
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main([*chat, "--trust-remote-code"]) == 0
    assert "score" in capsys.readouterr().out


@pytest.mark.parametrize("stage, strategy", first_of_a_kind([("ppo", "fsdp2"), ("sft", "ddp"), ("rm", "fsdp2")], 1))
def test_several_processes_pass_on_the_flag(stage, strategy, chain, tmp_path):
    """Two processes with a module cache each publish the figures of one, and all of the code."""
    oracle, options, _ = chain
    root = copy_without(oracle, tmp_path, stage)
    argv = ["run", stage, *options, "launch.processes=2", f"launch.strategy={strategy}", "--only", "--artifacts"]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-m", "pipeline.cli", *argv, str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "modules-1").is_dir()
    # rm's rate of 3e-2 magnifies last bits: Adam's second step is about as large for a gradient
    # close to 0
    first = 5e-5 if stage == "rm" else 1e-5
    assert_same_figures(rows_of(root / "micro" / stage), rows_of(oracle / "micro" / stage), first=first)
    assert published(root / "micro" / stage).keys() == published(oracle / "micro" / stage).keys()


def test_jobs_get_the_flag(chain, tmp_path, capsys):
    oracle, options, _ = chain
    root = copy_without(oracle, tmp_path, "sft")
    assert main(["run", "sft", *options, "--artifacts", str(root), "--submit", "slurm", "--dry-run"]) == 0
    assert "--trust-remote-code" in capsys.readouterr().out


def test_memory_is_predicted(chain, capsys, tmp_path):
    """The model has no class for sequence classification; it is measured as base published it."""
    oracle, options, source = chain
    place = ["doctor", "--memory", *options, "--artifacts", str(oracle)]
    lacks = source.parent.name.startswith("alone")
    assert main(place) == (2 if lacks else 0)
    if lacks:
        assert "no sequence classification" in capsys.readouterr().err
        assert main([*place, f"model.name_or_path={oracle / 'micro' / 'base' / 'model'}"]) == 0
    assert "ppo" in capsys.readouterr().out


def test_with_an_adapter(chain, tmp_path):
    """With a shared trunk and separate adapters, a killed ppo ends with the same bytes."""
    _, options, _ = chain
    options = [*options, "model.peft={method: lora, r: 4}", "--artifacts"]
    assert rlhf("run", "evaluate", *options, str(tmp_path / "whole")) == 0
    root = copy_without(tmp_path / "whole", tmp_path, "ppo")
    again = ("run", "ppo", *options, str(root), "--only")
    assert rlhf(*again, die=("ppo", 5)) == -9
    assert rlhf(*again) == 0
    assert published(root / "micro" / "ppo") == published(tmp_path / "whole" / "micro" / "ppo")

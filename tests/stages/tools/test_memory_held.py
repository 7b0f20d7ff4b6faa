"""Count the models that stages and chat hold at once; `doctor --memory` must say the same."""

import weakref
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from pipeline.api import load_experiment
from pipeline.store.artifacts import ArtifactStore
from stages.models import loading
from stages.tools import memory, memory_frozen
from stages.tools.memory_step import take_passes

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
EVALUATE = ["max_length=48", "response_length=8", "perplexity_length=8", "batch_size=4", "num_prompts=3"]
PPO = ["batch_size=4", "mini_batch_size=4", "total_episodes=4", "response_length=8", "max_length=48", "ptx_length=16"]
LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture
def held(monkeypatch):
    """Return the most bytes of weights that were there while a policy, and a reward model, read.

    Every loaded model goes through `prepare`; weights that models share count once. In 16 bits only
    passes under autocast count: a model is tried on a few tokens before its weights are cast.

    Returns:
        (policy or reward model, whether in 16 bits) → bytes.
    """
    models: list[weakref.ref] = []
    found: dict[tuple[str, bool], int] = defaultdict(int)
    real = loading.prepare

    def watched(model: nn.Module) -> nn.Module:
        models.append(weakref.ref(real(model)))
        return model

    def count(module: nn.Module, inputs: tuple) -> None:
        alive = [model for one in models if (model := one()) is not None]
        owner = [model for model in alive if module is model.get_input_embeddings()]
        if owner:
            weights = {p.data_ptr(): p.nbytes for model in alive for p in model.parameters()}
            name = "reward model" if hasattr(owner[0], "score") else "policy"
            key = name, torch.is_autocast_enabled("cpu")
            found[key] = max(found[key], sum(weights.values()))

    monkeypatch.setattr(loading, "prepare", watched)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    yield found
    handle.remove()


def passing(experiment, dtype):
    """Return an experiment's configuration of the model, and what passes rows through it."""
    config = memory.model_config(experiment.model)

    def passes(steps, config=config):
        return take_passes(config, steps, dtype, "cpu")

    return config, passes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluate_holds_one_policy_or_one_judge(chain, tmp_path, held, dtype):
    settings = [f"evaluate.{one}" for one in EVALUATE] + [f"model.dtype={dtype}", "rm.ensemble=2"]
    chain.run("evaluate", tmp_path / "evaluate", *settings)
    experiment = chain.experiment(*settings)
    config, passes = passing(experiment, dtype)
    half = dtype == "bfloat16"
    assert held["policy", half] == memory_frozen.answering(experiment, config, passes, dtype).weights
    assert held["reward model", half] == memory_frozen.judging(experiment, config, passes).weights


def test_ppo_holds_its_roles(chain, tmp_path, held):
    settings = [f"ppo.{one}" for one in PPO] + ["evaluate.policies=[sft]", "rm.ensemble=2"]
    chain.run("ppo", tmp_path / "ppo", *settings)
    experiment = chain.experiment(*settings)
    needs = memory.needs_of(experiment, "cpu", *[memory.model_config(experiment.model)] * 2)
    need = next(need for need in needs if need.stage == "ppo")
    assert max(held.values()) == pytest.approx(need.weights, rel=0.01)  # equal norms are shared


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chat_holds_two_policies_and_the_judge(chain, monkeypatch, held, dtype):
    from stages.tools import chat
    from stages.tools.chat_commands import Settings
    from stages.tools.chat_speakers import reply

    monkeypatch.setattr(ArtifactStore, "manifest", lambda store, stage: {"metrics": {}})
    monkeypatch.setattr(ArtifactStore, "verify", lambda store, stage: None)
    monkeypatch.setattr(ArtifactStore, "folder", lambda store, stage: chain.root / stage)
    experiment = chain.experiment(f"model.dtype={dtype}", "rm.ensemble=2")
    store = ArtifactStore(chain.root, "micro")
    folders = [chain.root / name / "model" for name in ("sft", "ppo")]
    speakers, judge = chat.load(experiment, store, ["sft", "ppo"], folders, False, "transformers")
    settings = Settings(max_new_tokens=2, temperature=1.0, top_p=1.0, top_k=0, seed=0)
    for speaker in speakers:
        assert not reply(speaker, "what color is the fox ?", settings, 1, dtype, judge).problem
    config, passes = passing(experiment, dtype)
    needs = {need.stage: need for need in memory.of_commands(experiment, config, passes, dtype, "cpu")}
    assert held["reward model", dtype == "bfloat16"] == pytest.approx(needs["chat"].weights, rel=0.01)


def of_8b(monkeypatch, *settings):
    """Return configs/llama3-8b.yaml, whose model's configuration needs no network here."""
    monkeypatch.setattr(memory, "model_config", lambda *_, **__: LLAMA_3_1_8B)
    return load_experiment(CONFIGS / "llama3-8b.yaml", *settings)


def test_an_8b_model_is_evaluated_and_talked_to_on_80_gb(monkeypatch):
    experiment = of_8b(monkeypatch)

    def passes(steps, config=LLAMA_3_1_8B):
        return take_passes(config, steps, "bfloat16", "cuda")

    given = (experiment, LLAMA_3_1_8B, passes, "bfloat16")
    needs = [memory.of_rankings(*given), memory.of_evaluate(*given), *memory.of_commands(*given, "cuda")]
    assert [need.stage for need in needs] == ["rankings", "evaluate", "chat", "playground", "serve-reward"]
    assert all(10e9 < need.most < 80e9 for need in needs), needs
    assert 16e9 < needs[1].weights < 18e9 and 32e9 < needs[2].weights < 51e9, "one model; two policies and a judge"


@pytest.mark.slow
def test_every_stage_of_the_8b_config_needs_less_than_80_gb(monkeypatch):
    needs = list(memory.of_experiment(of_8b(monkeypatch), "cuda"))
    stages = ["sft", "ppo", "rm", "dpo", "evaluate", "chat", "playground", "serve-reward"]
    assert sorted(need.stage for need in needs) == sorted(stages)
    assert all(10e9 < need.most < 80e9 for need in needs), needs

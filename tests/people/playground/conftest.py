"""Publish tiny policies and a reward model for the playground's tests."""

from types import SimpleNamespace

import pytest

from data.tokenizer import train_tokenizer
from pipeline.config.sections import VllmSettings
from pipeline.store.artifacts import ArtifactStore
from stages.models.loading import from_scratch, new_reward_model
from stages.models.publish import save_model
from stages.settings.playground import PlaygroundSettings

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 128,
    "attn_implementation": "sdpa",
}


def experiment_of(**playground):
    """Return what the playground reads of an experiment."""
    return SimpleNamespace(
        name="fake",
        launch=SimpleNamespace(device="cpu", strategy="ddp", processes=1, nodes=1, timeout=600.0, vllm=VllmSettings()),
        evaluate=SimpleNamespace(
            response_length=12,
            reward_ensemble="min",
            missing_eos_score=None,
            base_prompt="auto",
            few_shot_examples=4,
            rollout=None,
        ),
        model=SimpleNamespace(attn_implementation="sdpa", dtype="float32", name_or_path=None),
        playground=PlaygroundSettings(**playground),
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Publish sft, ppo and base with different weights, and rm."""
    store = ArtifactStore(tmp_path_factory.mktemp("artifacts"), "fake")
    tokenizer = train_tokenizer(["the fox is red . what colour is the fox ? naïve 狐 answer"] * 3, 300)
    for seed, stage in enumerate(("sft", "ppo", "rm", "base")):
        with store.lock(stage):
            content = store.folder(stage) / ".tmp-publish"
            if stage == "rm":
                model = new_reward_model(store.folder("sft") / "model", seed=0)
                model.config.reward_bias = 1.0
            else:
                model = from_scratch(tokenizer, seed=seed, **SHAPE)
            save_model(model, tokenizer, content / "model", card="")
            fields = ("fingerprint", "config", "inputs", "metrics", "finished_at", "run_id")
            store.publish(stage, content, {"stage": stage} | dict.fromkeys(fields, ""))
    return store

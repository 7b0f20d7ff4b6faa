"""Publish tiny policies and a reward model for the playground's tests."""

import pytest

from data.tokenizer import train_tokenizer
from pipeline.store.artifacts import ArtifactStore
from stages.models.loading import from_scratch, new_reward_model
from stages.models.publish import save_model

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 128,
    "attn_implementation": "sdpa",
}


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Publish sft, ppo and base with different weights, and rm, an ensemble of two models."""
    store = ArtifactStore(tmp_path_factory.mktemp("artifacts"), "fake")
    tokenizer = train_tokenizer(["the fox is red . what colour is the fox ? naïve 狐 answer"] * 3, 300)
    for seed, stage in enumerate(("sft", "ppo", "rm", "base")):
        with store.lock(stage):
            content = store.folder(stage) / ".tmp-publish"
            if stage == "rm":
                model = new_reward_model(store.folder("sft") / "model", seed=0)
                model.config.reward_bias = 1.0
                other = new_reward_model(store.folder("sft") / "model", seed=1)
                other.config.reward_bias = 0.5
                save_model(other, tokenizer, content / "ensemble" / "1", card="")
            else:
                model = from_scratch(tokenizer, seed=seed, **SHAPE)
            save_model(model, tokenizer, content / "model", card="")
            fields = ("fingerprint", "config", "inputs", "metrics", "finished_at", "run_id")
            store.publish(stage, content, {"stage": stage} | dict.fromkeys(fields, ""))
    return store

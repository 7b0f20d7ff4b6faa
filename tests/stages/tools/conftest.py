"""Make one finished stage for the tests of push and export."""

import json
import random
from types import SimpleNamespace

import pytest

CONFIG = """\
name: small
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, vocab_size: 300}
data: {documents: my_secret_documents.jsonl}
base: {max_steps: 2, per_device_train_batch_size: 4, max_length: 32}
launch: {device: cpu, threads: 1}
"""


@pytest.fixture(scope="session")
def finished_base(tmp_path_factory):
    """Return the config and artifacts of an experiment whose base is done, to be left as it is."""
    from pipeline import api

    folder = tmp_path_factory.mktemp("finished")
    words, draw = ["the", "fox", "is", "red", "and", "old", "what", "color", "kind", "blue"], random.Random(0)
    rows = [{"text": " ".join(draw.choices(words, k=20))} for _ in range(120)]
    (folder / "my_secret_documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "small.yaml"
    config.write_text(CONFIG.replace("my_secret", str(folder / "my_secret")), encoding="utf-8")
    api.run("base", api.load_experiment(config), folder / "artifacts")
    return SimpleNamespace(root=folder, config=config, artifacts=folder / "artifacts")

"""Load published folders with transformers 4, in its own environment: same loss, score and ids."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from data.tokenizer import train_tokenizer
from stages.models.loading import load_policy, load_scalar_model, load_tokenizer
from stages.models.publish import save_model

pytestmark = pytest.mark.slow
PACKAGES = ("transformers==4.57.*", "huggingface-hub>=0.34,<1.0", "tokenizers>=0.22,<=0.23.0")
TEXT = "the fox is red . what colour is the <|one|> fox ?"
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
THETA = {"rope_type": "default", "rope_theta": 77.0}  # far from any class's default: one that is lost shows
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 77.0}
MODELS = {
    "llama": ("llama", SHAPE | {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    "qwen2": ("qwen2", SHAPE | {"rope_parameters": THETA, "tie_word_embeddings": True}),
    "gemma3": (
        "gemma3_text",
        SHAPE
        | {
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 770.0},
                "sliding_attention": THETA,
            },
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
        | {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}},
    ),
    "phi3": (
        "phi3",
        SHAPE
        | {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 77.0,
                "short_factor": [1.5] * 4,
                "long_factor": [3.0] * 4,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}),
}
SCRIPT = """\
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
assert transformers.__version__.startswith("4."), transformers.__version__
asked, found = json.load(sys.stdin), {}
ids = torch.tensor([asked["ids"]])
for name, folder in asked["folders"].items():
    tokenizer, scalar = AutoTokenizer.from_pretrained(folder), name == "reward"
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model = auto.from_pretrained(folder).float().eval()
    with torch.no_grad():
        value = model(input_ids=ids).logits[0, 0] if scalar else model(input_ids=ids, labels=ids).loss
    message = [{"role": "user", "content": asked["text"]}]
    found[name] = {
        "value": value.item(),
        "ids": tokenizer(asked["text"])["input_ids"],
        "chat": tokenizer.apply_chat_template(message, add_generation_prompt=True),
        "ends": tokenizer.eos_token_id,
        "sampling": None if scalar else GenerationConfig.from_pretrained(folder).top_k,
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def python4(tmp_path_factory) -> Path:
    """Return a Python with transformers 4; its other packages are this environment's."""
    home = tmp_path_factory.mktemp("transformers4")
    venv.create(home, with_pip=False)
    site = next(home.glob("lib/python3*/site-packages"))
    (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--ignore-installed"]
    done = subprocess.run([*install, *PACKAGES], capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"transformers 4 cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
    return python


def tokenizer_with_more():
    tokenizer = train_tokenizer([TEXT] * 3, 300)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|one|>"]})
    return tokenizer


def published(folder: Path, kind: str, settings: dict, tokenizer, scalar: bool = False) -> Path:
    """Return a random model, published as a stage does, loaded, and published again as the next
    does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(kind, **settings, **special, vocab_size=len(tokenizer))
    config.num_labels = 1
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model = auto.from_config(config).float().eval()
    model.config.reward_bias = 0.25
    save_model(model, tokenizer, folder / "first", card="", temperature=None if scalar else 1.0)
    read = load_scalar_model if scalar else load_policy
    again, tokens = read(folder / "first"), load_tokenizer(folder / "first")
    save_model(again, tokens, folder / "second", card="", temperature=None if scalar else 1.0)
    return folder / "second"


def test_transformers_4_reads_what_is_published_as_it_was_meant(python4, tmp_path):
    tokenizer = tokenizer_with_more()
    folders = {name: published(tmp_path / name, *of, tokenizer) for name, of in MODELS.items()}
    folders["reward"] = published(tmp_path / "reward", *MODELS["llama"], tokenizer, scalar=True)
    ids = [5 + 7 * i % (len(tokenizer) - 10) for i in range(60)]
    asked = {"folders": {name: str(folder) for name, folder in folders.items()}, "ids": ids, "text": TEXT}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python4, "-c", SCRIPT], input=json.dumps(asked), capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, row, message = json.loads(done.stdout), torch.tensor([ids]), [{"role": "user", "content": TEXT}]
    for name, folder in folders.items():
        tokens = load_tokenizer(folder)
        with torch.no_grad():
            if name == "reward":
                expected = load_scalar_model(folder)(input_ids=row).logits[0, 0].item()
            else:
                expected = load_policy(folder)(input_ids=row, labels=row).loss.item()
        assert found[name]["value"] == pytest.approx(expected, abs=1e-5), name
        assert found[name]["ids"] == tokens(TEXT)["input_ids"], name
        chat = tokens.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        assert found[name]["chat"] == chat, name
        assert found[name]["ends"] == tokens.eos_token_id and found[name]["sampling"] in (0, None)

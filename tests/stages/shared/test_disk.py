"""Check that a stage writes as many bytes as it announces."""

import re

import pytest
import torch

from pipeline.store.files import human_bytes
from stages.shared.disk import Written, written
from tests.stages.micro_chain import MicroChain, make_tokenizer, random_policy

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
LORA = "model.peft={method: lora, r: 2, lora_alpha: 2}"
STEPS = {"sft": "sft.max_steps=9", "rm": "rm.max_steps=9", "dpo": "dpo.max_steps=9", "ppo": "ppo.total_episodes=36"}
SMALL = ("ppo.batch_size=4", "ppo.mini_batch_size=4", "ppo.response_length=8", "ppo.max_length=64", "ppo.ptx_length=32",
         "sft.max_length=64", "rm.max_length=64", "dpo.max_length=64", "sft.sample_tokens=0", "dpo.sample_tokens=0",
         "ppo.eval_steps=99", "sft.per_device_train_batch_size=2", "rm.gradient_accumulation_steps=1",
         "rm.per_device_train_batch_size=2", "dpo.per_device_train_batch_size=2", "dpo.gradient_accumulation_steps=1",
         "sft.gradient_accumulation_steps=1", "ppo.on_too_long=drop", "checkpoints.every=2")  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return MicroChain(tmp_path_factory.mktemp("chain"))


def weights(folder) -> int:
    """Return the bytes of the tensors below a folder, of transformers' optimizer too."""
    found = 0
    for path in folder.rglob("*.safetensors"):
        found += path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    for path in folder.rglob("optimizer.pt"):
        state = torch.load(path, weights_only=True)["state"]
        found += sum(x.nbytes for values in state.values() for x in values.values() if x.dim())
    return found


@pytest.mark.parametrize(
    "stage, more",
    [
        ("sft", ()),
        ("sft", ("sft.ppo_init={}", "sft.keep=best", "sft.eval_steps=2")),
        ("sft", (LORA,)),
        ("rm", ("rm.ensemble=2",)),
        ("rm", (LORA, "rm.keep=best")),
        ("dpo", (LORA,)),
        ("ppo", ("ppo.publish_ema=true",)),
        ("ppo", (LORA, "ppo.keep=best")),
    ],
)
def test_the_predicted_size_is_the_written_size(chain, tmp_path, stage, more):
    done = chain.run(stage, tmp_path / stage, STEPS[stage], *SMALL, *more)
    line = next(line for line in done.said.splitlines() if line.startswith(f"{stage}: writes "))
    models, each, in_all = ((float(n), unit) for n, unit in re.findall(r"([\d.]+) (B|kB|MB|GB)", line)[:3])
    folders = [path for path in done.folder.iterdir() if path.is_dir() and path.name not in ("checkpoints", "cache")]
    assert human_bytes(sum(map(weights, folders))) == f"{models[0]:g} {models[1]}"
    saved = sorted((done.folder / "checkpoints").glob("step-*"))
    assert f"keeps {len(saved)} checkpoints of " in line and len(saved) == 2
    assert max(map(weights, saved)) == pytest.approx(each[0] * UNITS[each[1]], rel=0.06)
    assert in_all[0] * UNITS[in_all[1]] == pytest.approx(weights(done.folder), rel=0.06)


def test_a_model_of_known_size():
    """Published weights are float32; a checkpoint has the trained weights and two moments."""
    model = random_policy(make_tokenizer(), 0)
    size = 4 * sum(p.numel() for p in model.parameters())
    assert written([model], [model], saves=9, keep=2) == Written(size, 3 * size, 2)
    assert written([model], [model], saves=1, keep=2).in_all == 4 * size
    assert written([model], [model], saves=0, sets=1) == Written(size, 4 * size, 0)
    assert written([model], [model], copies=3, bytes_per_weight=2).models == 3 * size // 2

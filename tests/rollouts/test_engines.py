"""Check the table of rollout engines, and that each of them has the whole interface."""

import inspect
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from stages.rollouts.engine import EngineSpec, RolloutEngine, SampleRequest
from stages.rollouts.engines import ENGINES
from stages.settings.rollout import RolloutSettings

EOS, PAD = 1, 0
VLLM_DEFAULTS = {  # of the section launch.vllm
    "python": None,
    "devices": None,
    "tensor_parallel_size": 1,
    "gpu_memory_utilization": 0.3,
    "folder": None,
    "hand_over": "files",
    "adapter_alone": False,
    "sleep": False,
    "options": {},
}


def spec(tmp_path: Path, **changed) -> EngineSpec:
    """Return what an engine is built from."""
    fields = {
        "model": tmp_path / "model",
        "scratch": tmp_path / "scratch",
        "log": tmp_path / "log",
        "device": torch.device("cpu"),
        "dtype": "float32",
        "autocast": nullcontext,
        "pad_id": PAD,
        "max_length": 32,
        "batch_size": 4,
        "timeout": 60.0,
        "launch": VLLM_DEFAULTS,
    }
    return EngineSpec(**fields | changed)


def test_the_table_has_the_names_that_the_settings_allow():
    names = get_args(RolloutSettings.model_fields["engine"].annotation)
    assert sorted(ENGINES) == sorted(names)


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_an_engine_has_the_methods_of_the_interface(name, tmp_path):
    """The same names and parameters; close() also before start()."""
    engine = ENGINES[name](spec(tmp_path))
    for method in ("start", "update_weights", "sample", "close"):
        expected = list(inspect.signature(getattr(RolloutEngine, method)).parameters)[1:]
        assert list(inspect.signature(getattr(engine, method)).parameters) == expected
    assert isinstance(engine.is_policy, bool)
    engine.close()
    engine.close()


def test_vllm_gets_the_settings_of_launch(tmp_path):
    launch = VLLM_DEFAULTS | {"python": "there/python", "devices": "6,7", "options": {"enforce_eager": True, "seed": 5}}
    options = ENGINES["vllm"](spec(tmp_path, launch=launch)).options
    assert options.python == "there/python" and options.devices == "6,7" and options.folder == tmp_path / "scratch"
    assert options.arguments == {
        "seed": 5,  # what the user sets goes before
        "max_model_len": 32,
        "max_num_seqs": 4,
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.3,
        "trust_remote_code": False,
        "enforce_eager": True,
    }


def test_runs_that_share_a_folder_for_weights_have_a_folder_each(tmp_path):
    launch = VLLM_DEFAULTS | {"folder": str(tmp_path / "shared")}
    folders = {ENGINES["vllm"](spec(tmp_path, launch=launch, scratch=tmp_path / run)).options.folder for run in "ab"}
    assert len(folders) == 2 and {folder.parent for folder in folders} == {tmp_path / "shared"}


def test_the_policy_itself_samples_as_the_request_says(causal, tmp_path):
    engine, model = ENGINES["transformers"](spec(tmp_path)), causal(spread=0.1)
    engine.start(model, lambda: None)
    prompts = [[5, 9, 2]] * 2 + [[7]] * 2
    request = SampleRequest(prompts, [1, 2, 3, 4], 2, response_length=6, temperature=0.8, eos_id=EOS)
    sampled = engine.sample(request, lambda: None)
    assert len(sampled.responses) == 4 and all(1 <= len(r) <= 6 for r in sampled.responses)
    assert sampled.logprobs.shape == sampled.entropy.shape == (4, max(map(len, sampled.responses)))
    again = engine.sample(request, lambda: None)
    assert again.responses == sampled.responses and torch.equal(again.logprobs, sampled.logprobs)
    likeliest = [engine.sample(replace(request, **one), lambda: None) for one in ({"top_k": 1}, {"top_p": 1e-9})]
    assert likeliest[0].responses == likeliest[1].responses != sampled.responses
    assert not likeliest[0].logprobs.any()  # nothing else can be drawn

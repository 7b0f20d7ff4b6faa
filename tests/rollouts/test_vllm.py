"""The line to vLLM, with a stand-in behind it that computes by transformers (stand_in/vllm.py); and the real one, where
RLHF_VLLM names the Python of an environment with it."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import Interrupted, UserError
from stages.models.adapters import trainable, with_adapter
from stages.rollouts.vllm import EngineLost, Vllm, names_in, write_weights

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 11]]
SEEDS = [11, 12, 13]
EOS = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as files."""
    return saved(tmp_path_factory.mktemp("start") / "model")


def saved(folder, **options) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    ids = {"vocab_size": 20, "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**shape | ids | options, initializer_range=0.3)).save_pretrained(folder)
    return folder


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).with_name("stand_in")))
        yield


def start(folder, line, python=sys.executable, **options):
    """The model in `folder`, by a stand-in that is told `options`."""
    where = {"python": python, "devices": None, "dtype": "float32", "timeout": 300.0, "poll": lambda: None}
    return Vllm(folder, line, **where, arguments={"max_model_len": 64} | options)


@pytest.fixture(scope="module")
def engine(folder, tmp_path_factory):
    with contextlib.closing(start(folder, tmp_path_factory.mktemp("engine") / "line")) as engine:
        yield engine


def sample(engine, poll=lambda: None, temperature=0.7, length=6, prompts=PROMPTS, seeds=SEEDS, eos=EOS):
    options = {"response_length": length, "temperature": temperature, "eos_id": eos}
    return engine.sample(prompts, seeds, **options, poll=poll, device=torch.device("cpu"))


def logprobs_of(model, prompt, response, temperature):
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logp = (model(ids).logits[0].float() / temperature).log_softmax(-1)
    return torch.stack([logp[len(prompt) - 1 + i, token] for i, token in enumerate(response)])


def assert_of(model, sampled, temperature=0.7, within=1e-5, prompts=PROMPTS):
    for prompt, response, row in zip(prompts, sampled.responses, sampled.logprobs, strict=True):
        expected = logprobs_of(model, prompt, response, temperature)
        torch.testing.assert_close(row[: len(response)], expected, atol=within, rtol=0)
        assert not row[len(response) :].any()


def test_samples_and_their_log_probs(folder, engine):
    sampled = sample(engine)
    assert_of(loaded(folder), sampled)
    assert all(1 <= len(r) <= 6 and EOS not in r[:-1] for r in sampled.responses)
    assert sampled.logprobs.shape == sampled.entropy.shape == (3, max(map(len, sampled.responses)))
    assert sample(engine).responses == sampled.responses
    assert sample(engine, seeds=[1, 2, 3]).responses != sampled.responses
    swapped = sample(engine, prompts=PROMPTS[::-1], seeds=SEEDS[::-1])
    assert swapped.responses == sampled.responses[::-1]


@pytest.mark.parametrize("method", [None, "lora", "dora"])
def test_weights_follow_the_policy(folder, engine, method):
    policy = with_adapter(loaded(folder), method=method, r=2)
    engine.load(policy)
    assert_of(policy, sample(engine))
    for p in trainable(policy).values():
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    with pytest.raises(AssertionError):
        assert_of(policy, sample(engine))
    engine.load(policy)
    assert_of(policy, sample(engine))


def test_weights_in_several_files(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("stages.rollouts.vllm.FILE", 1000)
    write_weights(loaded(folder), tmp_path / "out", torch.bfloat16, folder)
    assert len(list((tmp_path / "out").iterdir())) > 3
    assert names_in(tmp_path / "out") == names_in(folder)


def test_a_model_whose_files_name_weights_otherwise_is_refused(folder, tmp_path):
    model = loaded(folder)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="vllm cannot follow a llama model.*extra.*use transformers"):
        write_weights(model, tmp_path / "out", torch.float32, folder)


def test_an_error_of_it_is_told_and_it_goes_on(engine):
    with pytest.raises(EngineLost, match="vLLM says AssertionError"):
        sample(engine, length=100)  # longer than max_model_len
    assert len(sample(engine).responses) == 3


def test_a_start_that_fails_is_told_in_its_words(folder, tmp_path):
    with pytest.raises(UserError, match="launch.vllm.python: vLLM does not start .*ValueError: no room on the GPU"):
        start(folder, tmp_path / "line", refuses="no room on\nthe GPU")
    assert not (tmp_path / "line").exists()


def test_a_python_without_vllm_is_told(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(UserError, match="No module named 'vllm'.*pip install vllm"):
        start(folder, tmp_path / "line")


def test_its_end_is_noticed(folder, tmp_path):
    engine = start(folder, tmp_path / "line", dies_at=2)
    sample(engine)
    with pytest.raises(EngineLost, match="vLLM is gone: it dies"):
        sample(engine)
    engine.close()
    assert not engine.running and not (tmp_path / "line").exists()


def test_a_signal_is_heard_while_it_works_and_it_ends_with_us(folder, tmp_path):
    def stop():
        raise Interrupted(1, 2)

    engine = start(folder, tmp_path / "line")
    with pytest.raises(Interrupted):
        sample(engine, poll=stop)
    engine.connection.close()  # as at the end of this process
    assert engine.process.wait(20) == 0


def test_one_that_hangs_is_killed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.rollouts.vllm.PATIENCE", 0.5)
    engine = start(folder, tmp_path / "line")
    engine.process.send_signal(signal.SIGSTOP)
    engine.timeout = 0.5
    with pytest.raises(EngineLost, match="vLLM has not answered for 0.5 seconds"):
        sample(engine)
    engine.close()
    assert engine.process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif("RLHF_VLLM" not in os.environ, reason="RLHF_VLLM names no Python with vLLM")
def test_the_real_one(tmp_path, monkeypatch):
    """A model of a width that vLLM's kernels know; weights that change; the same seeds, the same samples."""
    shape = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": 64}
    folder = saved(tmp_path / "model", **shape, vocab_size=64)
    policy = with_adapter(loaded(folder), method="lora", r=2)
    options = {"max_model_len": 48, "gpu_memory_utilization": 0.1, "enforce_eager": True, "skip_tokenizer_init": True}
    monkeypatch.delenv("PYTHONPATH")
    with contextlib.closing(start(folder, tmp_path / "line", python=os.environ["RLHF_VLLM"], **options)) as engine:
        sampled = sample(engine)
        assert_of(policy, sampled, within=1e-3)
        assert sample(engine).responses == sampled.responses
        for p in trainable(policy).values():
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        with pytest.raises(AssertionError):
            assert_of(policy, sampled, within=1e-3)
        engine.load(policy)
        assert_of(policy, sample(engine), within=1e-3)

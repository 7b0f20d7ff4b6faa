"""Check the connection to vLLM, with a stand-in that computes with transformers (stand_in/vllm.py).

And the real vLLM, where RLHF_VLLM names the Python of an environment with it.
"""

import contextlib
import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.groups import make_rows
from pipeline.errors import Interrupted, UserError
from stages.models.adapters import AdapterSettings, trainable_parameters, with_adapter
from stages.models.forward import response_logprobs
from stages.models.soft_prompts import SoftPrompt
from stages.rollouts.engine import EngineLost, SampleRequest
from stages.rollouts.handover import batches
from stages.rollouts.vllm import Vllm, VllmOptions, write_model
from tests.builders import EOS, tiny_causal

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 11]]
SEEDS = [11, 12, 13]
MEMORY, ALONE = {"through_memory": True}, {"adapter_alone": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a model."""
    return saved(tmp_path_factory.mktemp("start") / "model")


def saved(folder, **options) -> Path:
    """Save a tiny Llama, whose configuration `options` change, and return its folder."""
    tiny_causal("llama", **{"vocab_size": 20, **options}).save_pretrained(folder)
    return folder


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Return the Python of an environment with the stand-in."""
    script = tmp_path_factory.mktemp("environment") / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{Path(__file__).with_name("stand_in")}" exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


def made(folder, line, python, poll=lambda: None, policy=None, how=None, **options):
    """Return a started vLLM with the model in `folder`; a stand-in gets `options`.

    how: Fields of VllmOptions about handing weights over, and sleep.
    """
    settings = VllmOptions(
        model=folder,
        folder=line,
        log=line.with_name("log"),
        python=python,
        devices=None,
        dtype="float32",
        timeout=300.0,
        arguments={"max_model_len": 64} | options,
        **(how or {}),
    )
    engine = Vllm(settings)
    engine.start(loaded(folder) if policy is None else policy, poll)
    return engine


@pytest.fixture(scope="module")
def engine(folder, python, tmp_path_factory):
    with contextlib.closing(made(folder, tmp_path_factory.mktemp("engine") / "line", python)) as engine:
        yield engine


def sample(engine, poll=lambda: None, temperature=0.7, length=6, prompts=PROMPTS, seeds=SEEDS, eos=EOS, **truncation):
    request = SampleRequest(prompts, list(seeds), 1, length, temperature, eos, **truncation)
    return engine.sample(request, poll)


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


def test_top_k_and_top_p_reach_it(engine):
    whole = sample(engine)
    for truncation in ({"top_k": 1}, {"top_p": 1e-6}):
        likeliest = sample(engine, **truncation)
        assert likeliest.responses != whole.responses and not likeliest.logprobs.any()
    assert sample(engine, top_k=20, top_p=1.0).responses == whole.responses


def test_other_end_tokens_of_the_published_model_end_no_response(folder, engine, python, tmp_path):
    """Only the tokenizer's EOS ends a response, whatever generation_config.json names."""
    shutil.copytree(folder, tmp_path / "model")
    ends = tmp_path / "model" / "generation_config.json"
    ends.write_text(json.dumps(json.loads(ends.read_text()) | {"eos_token_id": list(range(20))}))
    with contextlib.closing(made(tmp_path / "model", tmp_path / "line", python)) as other:
        assert sample(other).responses == sample(engine).responses


@pytest.mark.parametrize("method", [None, "lora", "dora"])
def test_weights_follow_the_policy(folder, engine, method):
    policy = with_adapter(loaded(folder), AdapterSettings(method=method, r=2))
    engine.update_weights(policy)
    assert_of(policy, sample(engine))
    for p in trainable_parameters(policy).values():
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    with pytest.raises(AssertionError):
        assert_of(policy, sample(engine))
    engine.update_weights(policy)
    assert_of(policy, sample(engine))
    assert not list(engine.options.folder.iterdir()), "the weights are left there"


def change(policy, by=0.2):
    """Move all weights that train."""
    for p in trainable_parameters(policy).values():
        p.data += by * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method, size", [(None, 2000), ("dora", 2**31)])
def test_weights_in_shared_memory(folder, python, tmp_path, monkeypatch, method, size):
    """In one batch and in several; nothing is written, and the policy stays where it is."""
    monkeypatch.setattr("stages.rollouts.vllm.batches", lambda tensors: batches(tensors, size))
    policy = with_adapter(loaded(folder), AdapterSettings(method=method, r=2))
    with contextlib.closing(made(folder, tmp_path / "line", python, how={"through_memory": True})) as engine:
        change(policy)
        monkeypatch.setattr("stages.rollouts.vllm.write_model", None)
        engine.update_weights(policy)
        assert not any(p.is_shared() for p in policy.parameters())
        assert_of(policy, sample(engine))
        change(policy)
        engine.update_weights(policy)
        assert_of(policy, sample(engine))
        assert not list(engine.options.folder.iterdir())


def test_batches_hold_every_tensor_once():
    tensors = {str(n): torch.zeros(n) for n in (3, 1, 50, 2, 2)}
    found = list(batches(iter(tensors.items()), 20))
    assert [list(batch) for batch, _ in found] == [["3", "1"], ["50"], ["2"]]
    assert [is_last for _, is_last in found] == [False, False, True]


def test_an_error_in_the_middle_of_shared_weights_is_reported(folder, python, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.rollouts.vllm.batches", lambda tensors: batches(tensors, 2000))
    with contextlib.closing(made(folder, tmp_path / "line", python, how={"through_memory": True})) as engine:
        monkeypatch.setattr("stages.rollouts.vllm.handle_of", lambda x: "bm9uc2Vuc2U=")
        with pytest.raises(EngineLost, match="vLLM says UnpicklingError"):
            engine.update_weights(loaded(folder))
        monkeypatch.undo()
        engine.update_weights(loaded(folder))
        assert_of(loaded(folder), sample(engine))


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_alone(python, tmp_path, tied):
    """vLLM starts with the base model's own files, and gets every adapter; the last one stays."""
    folder = saved(tmp_path / "model", tie_word_embeddings=tied)
    policy = with_adapter(loaded(folder), AdapterSettings(method="lora", r=2))
    change(policy)
    options = {"policy": policy, "how": {"adapter_alone": True}}
    with contextlib.closing(made(folder, tmp_path / "line", python, **options)) as engine:
        assert_of(policy, sample(engine))
        for n in (2, 3):
            change(policy)
            engine.update_weights(policy)
            assert_of(policy, sample(engine))
            written = [file.relative_to(engine.options.folder).as_posix() for file in engine.options.folder.rglob("*")]
            assert sorted(written) == [
                f"adapter-{n}", f"adapter-{n}/adapter_config.json", f"adapter-{n}/adapter_model.safetensors"
            ]  # fmt: skip


def test_a_policy_without_an_adapter_is_handed_over_whole(folder, python, tmp_path):
    with contextlib.closing(made(folder, tmp_path / "line", python, how={"adapter_alone": True})) as engine:
        policy = loaded(folder)
        change(policy)
        engine.update_weights(policy)
        assert_of(policy, sample(engine))


@pytest.mark.parametrize("method, why", [("dora", "only LoRA"), ("ia3", "only LoRA"), ("lora", "no rank above 512")])
def test_adapters_that_vllm_does_not_take_alone(folder, python, tmp_path, method, why):
    policy = with_adapter(loaded(folder), AdapterSettings(method=method, r=513 if method == "lora" else 2))
    with pytest.raises(UserError, match=f"launch.vllm.adapter_alone: .*{why}.*; set it to false"):
        made(folder, tmp_path / "line", python, policy=policy, how={"adapter_alone": True})


@pytest.mark.parametrize("how", [MEMORY, ALONE])
def test_it_sleeps_between_rollouts(folder, python, tmp_path, how):
    """It wakes up for weights and for samples, whatever comes first."""
    policy = with_adapter(loaded(folder), AdapterSettings(method="lora", r=2))
    options = {"policy": policy, "how": {"sleeps": True} | how}
    with contextlib.closing(made(folder, tmp_path / "line", python, **options)) as engine:
        for _ in range(2):
            assert_of(policy, sample(engine))
            assert_of(policy, sample(engine))
            change(policy)
            engine.update_weights(policy)
        assert (tmp_path / "log").read_text().count("asleep") == 4


@pytest.mark.parametrize("method", [None, "lora"])
def test_a_head_that_is_the_embedding_follows_too(python, tmp_path, method):
    folder = saved(tmp_path / "model", tie_word_embeddings=True)
    policy = with_adapter(loaded(folder), AdapterSettings(method=method, r=2))
    with contextlib.closing(made(folder, tmp_path / "line", python, policy=policy)) as engine:
        for p in trainable_parameters(policy).values():
            p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        engine.update_weights(policy)
        assert_of(policy, sample(engine), within=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_soft_prompt_is_handed_over_and_never_drawn(python, tmp_path, tied):
    ids = [17, 18, 19]
    folder = saved(tmp_path / "model", tie_word_embeddings=tied, soft_prompt_ids=ids)
    soft = SoftPrompt("p_tuning", len(ids))
    policy = with_adapter(loaded(folder), AdapterSettings(method="p_tuning", soft_prompt=soft))
    prompts = [ids + prompt for prompt in PROMPTS] * 8
    with contextlib.closing(made(folder, tmp_path / "line", python, policy=policy)) as engine:
        for _ in range(2):
            sampled = sample(engine, prompts=prompts, seeds=range(len(prompts)), temperature=1.0)
            assert not {token for response in sampled.responses for token in response} & {*ids}
            rows = make_rows(prompts, sampled.responses, 0)
            torch.testing.assert_close(sampled.logprobs, response_logprobs(policy, rows).detach(), atol=1e-4, rtol=0)
            change(policy)
            engine.update_weights(policy)


def test_what_the_user_overrides_stays_where_the_head_is_untied(python, tmp_path):
    folder, overrides = saved(tmp_path / "model", tie_word_embeddings=True), {"rms_norm_eps": 0.5}
    policy = type(loaded(folder)).from_pretrained(folder, dtype=torch.float32, **overrides).eval()
    with contextlib.closing(made(folder, tmp_path / "line", python, policy=policy, hf_overrides=overrides)) as engine:
        assert_of(policy, sample(engine))


def test_weights_in_several_files(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("stages.rollouts.vllm.FILE_BYTES", 1000)
    assert write_model(loaded(folder), tmp_path / "out", torch.bfloat16, folder) is None
    written = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(written) > 3 and (tmp_path / "out" / "config.json").is_file()
    found = {name: x for part in written for name, x in part.items()}
    expected = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x.to(torch.bfloat16)) for name, x in expected.items())


def test_weights_for_which_there_is_no_room(folder, engine, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("stages.rollouts.vllm.save_file", full)
        with pytest.raises(EngineLost, match=r"cannot be given the weights: .*No space left"):
            engine.update_weights(loaded(folder))
    engine.update_weights(loaded(folder))


def test_a_model_whose_files_name_weights_differently_is_refused(folder, python, tmp_path):
    model = loaded(folder)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"vllm cannot be given the weights of a llama model.*extra.*use transformers"):
        made(folder, tmp_path / "line", python, policy=model)


def test_an_error_is_reported_and_it_continues(engine):
    with pytest.raises(EngineLost, match="vLLM says AssertionError"):
        sample(engine, length=100)  # longer than max_model_len
    assert len(sample(engine).responses) == 3


def test_a_start_that_fails_is_reported_with_its_message(folder, python, tmp_path):
    with pytest.raises(EngineLost, match="vLLM says ValueError: no room on the GPU"):
        made(folder, tmp_path / "line", python, refuses="no room on\nthe GPU")


def test_a_python_without_vllm_is_reported(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).with_name("stand_in")))  # ours is not that environment's
    with pytest.raises(EngineLost, match="No module named 'vllm'"):
        made(folder, tmp_path / "line", sys.executable)


def test_no_folder_for_its_files_is_an_error_of_the_settings(folder, python):
    with pytest.raises(UserError, match=r"launch.vllm: .*/proc/nowhere"):
        made(folder, Path("/proc/nowhere"), python)


def test_its_end_is_noticed_and_its_log_stays(folder, python, tmp_path):
    engine = made(folder, tmp_path / "line", python, dies_at=2)
    sample(engine)
    with pytest.raises(EngineLost, match=r"vLLM ended with exit code 9; its last words: it dies .more in .*log"):
        sample(engine)
    engine.close()
    assert not (tmp_path / "line").exists()
    assert "it dies" in (tmp_path / "log").read_text()


def test_it_ignores_signals_and_ends_with_us(folder, python, tmp_path):
    def stop():
        raise Interrupted(1, 2)

    engine = made(folder, tmp_path / "line", python)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):  # a scheduler may send them to all of a job
        engine.process.send_signal(number)
    assert len(sample(engine).responses) == 3
    with pytest.raises(Interrupted):
        sample(engine, poll=stop)
    process, folder = engine.process, engine.options.folder
    del engine  # as at the end of this process
    gc.collect()
    assert process.returncode == 0 and not folder.exists()


def test_a_signal_that_ended_it_interrupts_us_first(folder, python, tmp_path):
    engine = made(folder, tmp_path / "line", python)
    engine.process.kill()
    engine.process.wait()
    signals = iter([None])

    def poll():
        if (signal_come := next(signals, Interrupted(1, 2))) is not None:
            raise signal_come

    with pytest.raises(Interrupted):
        sample(engine, poll=poll)


@pytest.mark.parametrize("many", [1, 30_000])
def test_if_it_hangs_it_is_lost_and_killed(folder, python, tmp_path, monkeypatch, many):
    """Also where the connection takes no more of a message."""
    monkeypatch.setattr("stages.rollouts.vllm.SECONDS_TO_END", 0.5)
    engine = made(folder, tmp_path / "line", python)
    engine.process.send_signal(signal.SIGSTOP)
    engine.timeout = 0.5
    polled = []
    with pytest.raises(EngineLost, match=r"vLLM has not answered for 0\.5 seconds"):
        sample(engine, poll=lambda: polled.append(1), prompts=PROMPTS * many, seeds=SEEDS * many)
    engine.close()
    assert polled and engine.process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif("RLHF_VLLM" not in os.environ, reason="RLHF_VLLM names no Python with vLLM")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method, how", [(None, {}), ("lora", {}), (None, MEMORY), ("lora", MEMORY), ("lora", ALONE)])
def test_the_real_one(tmp_path, method, how, tied):
    """A model of a width that vLLM's kernels support; weights that change; seeds that repeat."""
    shape = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": 64}
    folder = saved(tmp_path / "model", **shape, vocab_size=64, tie_word_embeddings=tied)
    policy = with_adapter(loaded(folder), AdapterSettings(method=method, r=2))
    options = {"max_model_len": 48, "max_num_batched_tokens": 64, "gpu_memory_utilization": 0.1}
    options |= {"enforce_eager": True, "skip_tokenizer_init": True, "policy": policy, "how": how}
    with contextlib.closing(made(folder, tmp_path / "line", os.environ["RLHF_VLLM"], **options)) as engine:
        sampled = sample(engine)
        assert_of(policy, sampled, within=1e-3)
        assert sample(engine).responses == sampled.responses
        many = 200 * PROMPTS  # more tokens than it reads at a time
        assert_of(policy, sample(engine, prompts=many, seeds=range(600)), within=1e-3, prompts=many)
        for p in trainable_parameters(policy).values():
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        with pytest.raises(AssertionError):
            assert_of(policy, sampled, within=1e-3)
        engine.update_weights(policy)
        assert_of(policy, sample(engine), within=1e-3)
        for truncation in ({"top_k": 1}, {"top_p": 1e-6}):
            assert not sample(engine, **truncation).logprobs.any()

"""Test the choice of device and dtype, with stand-ins for GPUs that are not here."""

import sys
from types import SimpleNamespace

import pytest
import torch

from pipeline.config.checks import apple_problems
from pipeline.config.sections import Common
from pipeline.config.validation import load_experiment
from pipeline.errors import UserError
from pipeline.launch import devices, environment, hardware
from stages.settings.experiment import Experiment
from stages.shared.runtime import device_of, dtype_of
from stages.tools import doctor_machine


@pytest.fixture
def has(monkeypatch):
    """Return a function that says which GPUs torch sees: has("cuda", bfloat16=False)."""

    def say(*kinds, bfloat16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: "cuda" in kinds)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Tesla T4 {index}")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=16 * 10**9))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)
        monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M3", raising=False)
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 24 * 10**9)
        monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 5)
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 7)
        monkeypatch.setattr(devices, "computes_in", lambda kind, dtype: bfloat16)

    return say


def experiment(device="auto", dtype="auto", **launch):
    return Experiment.model_validate(
        {"name": "x", "model": {"dtype": dtype}, "launch": {"device": device, "threads": 1, **launch}}
    )


@pytest.mark.parametrize(
    "kinds, bfloat16, device, dtype",
    [
        ((), True, "cpu", None),
        (("cuda",), True, "cuda", "bfloat16"),
        (("cuda",), False, "cuda", "float16"),  # T4, V100
        (("cuda", "mps"), True, "cuda", "bfloat16"),
        (("mps",), True, "mps", "bfloat16"),
        (("mps",), False, "mps", "float32"),
    ],
)
def test_auto_takes_what_is_there(kinds, bfloat16, device, dtype, has, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    has(*kinds, bfloat16=bfloat16)
    assert device_of(experiment()) == device
    assert dtype_of(experiment()) == (dtype or "float32")
    assert dtype_of(experiment(device="cpu")) == "float32"
    assert dtype_of(experiment(dtype="float16")) == "float16"


def test_it_counts_names_and_measures(has):
    has("cuda")
    assert (devices.count("cuda"), devices.name("cuda", 1), devices.total_memory("cuda")) == (2, "Tesla T4 1", 16e9)
    assert (devices.in_use(), devices.peak("cuda")) == ("cuda", 3)
    assert environment.facts("auto")["device"] == "Tesla T4 0"
    has("mps")
    assert (devices.count("mps"), devices.count("cuda"), devices.name("mps")) == (1, 0, "Apple M3")
    assert (devices.in_use(), devices.peak("mps")) == ("mps", 7)
    assert environment.facts("auto")["device"] == "Apple M3" and environment.facts("cpu")["device"] == "cpu"
    found = hardware.describe_hardware()
    assert (found["devices"], found["device_memory_gb"]) == (1, 24.0)
    has()
    assert (devices.in_use(), devices.count("cpu"), devices.peak("cpu"), devices.total_memory("cpu")) == (
        *("cpu", 0, None, None),
    )
    assert hardware.describe_hardware()["device_memory_gb"] is None


def test_a_device_that_is_not_there_is_refused(has):
    has()
    for kind in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"launch.device: {kind}, and torch sees no such GPU; use auto or cpu, or "):
            environment.prepare(experiment(device=kind))


def test_what_apples_gpu_cannot_do_is_refused_whether_it_is_named_or_found(has, tmp_path, monkeypatch):
    has("mps")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment.prepare(experiment())  # nothing is asked that it cannot do
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: x\nmodel: {attn_implementation: flash_attention_2, dtype: bfloat16}\n"
        "rm: {peft: {method: qlora}}\nppo: {rollout: {engine: vllm}}\nlaunch: {processes: 2, threads: 1}\n"
    )
    keys = ["launch.processes", "model.attn_implementation", "rm.peft.method", "ppo.rollout.engine"]
    with pytest.raises(UserError) as named:
        load_experiment(path, ["launch.device=mps"], Experiment, [])
    assert [line.split(": ")[1] for line in named.value.lines] == keys
    with pytest.raises(UserError) as found:
        environment.prepare(load_experiment(path, [], Experiment, []))
    assert [line.split(": ")[0] for line in found.value.lines] == keys
    environment.prepare(load_experiment(path, ["launch.device=cpu"], Experiment, []))


def test_torchrun_cannot_start_two_processes_on_apples_gpu(has, monkeypatch):
    has("mps")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, and Apple's GPU"):
        environment.prepare(experiment())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_that_the_trial_refuses_is_refused(dtype, has, monkeypatch):
    has("mps", bfloat16=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(UserError, match=f"model.dtype: {dtype} was tried on this Apple GPU"):
        environment.prepare(experiment(dtype=dtype))
    environment.prepare(experiment(dtype="float32"))


def test_the_trial_computes_a_product_and_its_gradient():
    assert devices.computes_in("cpu", "bfloat16") and devices.computes_in("cpu", "float16")
    assert not devices.computes_in("cpu", "float64")  # autocast leaves it out
    assert not devices.computes_in("meta", "bfloat16")  # no numbers come out
    if not torch.backends.mps.is_available():
        assert not devices.computes_in("mps", "bfloat16")


def test_doctor_names_the_gpu_and_its_memory(has, monkeypatch):
    monkeypatch.setattr(doctor_machine, "check_16_bits", lambda *_: None)
    has("mps")
    lines = {line.what: line for line in filter(None, doctor_machine.check_machine(None))}
    assert lines["device mps"].found == "Apple M3, 24 GB of the machine's memory"
    has("cuda")
    monkeypatch.setattr(torch.version, "hip", "6.4", raising=False)
    lines = {line.what: line for line in filter(None, doctor_machine.check_machine(None))}
    assert lines["device cuda:1"].found == "Tesla T4 1, 16 GB, ROCm 6.4, which torch calls cuda"


def test_doctor_proposes_float16_where_bfloat16_is_not_native(has):
    has("cuda", bfloat16=False)
    line = doctor_machine.check_16_bits(experiment(dtype="bfloat16"), "cuda")
    assert line.remedy == "set model.dtype: float16, or auto"


def test_random_numbers_continue_from_a_saved_state(monkeypatch):
    state = devices.random_state("cpu")
    drawn = torch.rand(3)
    devices.set_random_state("cpu", state)
    assert torch.equal(torch.rand(3), drawn)
    kept = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.mps, "set_rng_state", kept.append)
    devices.set_random_state("mps", devices.random_state("mps"))
    assert kept[0].tolist() == [7]


def test_cores_are_counted_where_there_is_no_affinity(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert environment.usable_cores() == 6
    monkeypatch.setattr(environment.os, "environ", dict(environment.os.environ))
    environment.set_environment({})
    assert environment.os.environ["OMP_NUM_THREADS"] == "6"


def test_nothing_imports_torch_to_say_which_device_is_in_use(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    assert devices.in_use() == "cpu" and "torch" not in sys.modules


def test_a_config_without_stages_is_checked(has):
    """`apple_problems` walks whatever sections there are."""
    has("mps")
    environment.check_device(Common.model_validate({"name": "x", "launch": {"device": "mps"}}))


@pytest.mark.parametrize("key, value", [("offload", "all"), ("offload_activations", True)])
def test_apples_gpu_has_nothing_to_offload_to(key, value):
    experiment = Common.model_validate({"name": "x", "launch": {"device": "mps", key: value}})
    assert [line.split(":")[0] for line in apple_problems(experiment)] == [f"launch.{key}"]
    for nothing in ("none", None) if key == "offload" else (False, None):
        assert not apple_problems(Common.model_validate({"name": "x", "launch": {"device": "mps", key: nothing}}))

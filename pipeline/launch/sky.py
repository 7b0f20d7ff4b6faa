"""Write an experiment as a task of SkyPilot, and hand it to the tool `sky`.

One task runs the whole command on machines that SkyPilot finds: in a cloud, on Kubernetes, or on
machines behind SSH. SkyPilot sends the project's folder, and starts the task again elsewhere when
its machines are taken away. What must outlive them is on object storage or on a volume.
"""

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store import files

ENVIRONMENT = ".sky-venv"
"""Folder of the environment that SETUP makes, in the project's folder there."""
SETUP = (
    "command -v uv > /dev/null || pip install --quiet uv",
    f"[ -x {ENVIRONMENT}/bin/python ] || uv venv --quiet --python 3.12 {ENVIRONMENT}",
    "uv pip install --quiet --python {python} -c constraints.txt -e '{package}'",
)
STOPPED, PORT = 75, 29500
TASK = """\
# {stage} of {name}, written by `rlhf run --submit sky`.
"""


def task(experiment: Any, stage: str, words: Sequence[str], artifacts: str) -> dict[str, Any]:
    """Return the task: what SkyPilot's YAML says.

    Args:
        experiment: The validated experiment.
        stage: The stage to bring up to date, after what it needs.
        words: What follows `rlhf run STAGE`, without --artifacts.
        artifacts: Where artifacts are: an address, or a folder on a volume.
    """
    launch, sky = experiment.launch, experiment.launch.sky
    resources: dict[str, Any] = {
        "infra": sky.infra,
        "accelerators": sky.accelerators,
        "use_spot": sky.use_spot or None,
        "job_recovery": {"max_restarts_on_errors": sky.max_restarts, "recover_on_exit_codes": [STOPPED]},
    }
    if sky.cluster is not None:
        del resources["job_recovery"]  # only managed jobs are started again
    resources |= sky.resources
    filled: dict[str, Any] = {
        "name": f"{experiment.name}-{stage}".replace(".", "-").replace("_", "-").lower(),
        "workdir": ".",
        "num_nodes": launch.nodes,
        "resources": {key: value for key, value in resources.items() if value is not None},
        "volumes": sky.volumes,
        "secrets": dict.fromkeys(sky.secrets),
        "setup": "\n".join(["set -e", *setup_lines(experiment, artifacts)]) + "\n",
        "run": run_text(experiment, stage, words, artifacts),
    }
    return {key: value for key, value in filled.items() if value not in ({}, None)}


def setup_lines(experiment: Any, artifacts: str) -> list[str]:
    """Return the shell lines that install the project on a new machine."""
    if experiment.launch.sky.setup is not None:
        return list(experiment.launch.sky.setup)
    package = ".[s3]" if artifacts.startswith("s3://") else "."
    return [line.replace("{package}", package).replace("{python}", f"{ENVIRONMENT}/bin/python") for line in SETUP]


def run_text(experiment: Any, stage: str, words: Sequence[str], artifacts: str) -> str:
    """Return the shell lines that run the stage on each machine."""
    launch = experiment.launch
    lines = ["set -e", f'export PATH="$PWD/{ENVIRONMENT}/bin:$PATH"']
    if "://" in artifacts and launch.sky.volumes:
        lines.append(f"export RLHF_CACHE={shlex.quote(next(iter(launch.sky.volumes)))}/rlhf-cache")
    command = shlex.join(["-m", "pipeline.cli", "run", stage, *words, "--artifacts", artifacts])
    if launch.nodes == 1:  # rlhf starts the processes of one machine itself, and keeps their exit code
        lines.append(f"exec python {command}")
    else:
        lines += [
            'MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
            f'exec torchrun --nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK" --nproc-per-node '
            f'{launch.processes} --master-addr "$MASTER_ADDR" --master-port {PORT} {command}',
        ]
    return "\n".join(lines) + "\n"


def text_of(content: dict[str, Any], experiment: Any, stage: str) -> str:
    """Return a task as YAML."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Write scripts as blocks."""

    def block(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, block)
    text = yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return TASK.format(stage=stage, name=experiment.name) + text


def problems(experiment: Any, config: Path, artifacts: str, root: Path) -> list[str]:
    """Return a line for each reason why the task would fail on a machine elsewhere.

    Args:
        experiment: The validated experiment.
        config: Its file.
        artifacts: Where artifacts are, as the command says.
        root: The project's folder, which is what SkyPilot sends.
    """
    launch, sky = experiment.launch, experiment.launch.sky
    lines = []
    if not (root / "pyproject.toml").is_file() or Path.cwd() != root:
        lines.append(f"--submit sky: sends the folder in which it runs; run it in the project's folder, {root}")
    on_volume = any(Path(artifacts).is_relative_to(mount) for mount in sky.volumes)
    if "://" not in artifacts and not on_volume:
        lines.append(
            f"--artifacts: {artifacts} would be lost with the machine; give an address such as s3://BUCKET/PREFIX, or "
            "a folder below a mount of launch.sky.volumes"
        )
    if "://" in artifacts and launch.nodes > 1 and not sky.volumes:
        lines.append(
            "launch.sky.volumes: several machines work in one folder; name a volume that all of them mount, such as "
            "{/mnt/rlhf: my-volume}"
        )
    given = {f"data.{kind}": path for kind, path in local_paths(experiment.data.model_dump(mode="json"))}
    model = experiment.model.name_or_path
    if model is not None and Path(model).expanduser().exists():
        given["model.name_or_path"] = model
    for key, path in {"-c": str(config), **given}.items():
        place = Path(path).expanduser().absolute()
        if not place.is_relative_to(root):
            lines.append(f"{key}: {path} is outside of {root}, which is all that is sent; move it there")
        elif is_ignored(place, root):
            lines.append(f"{key}: {path} is ignored by git, and SkyPilot does not send it; list what it may leave out "
                         "in a file .skyignore instead")  # fmt: skip
    return lines


def local_paths(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Return (kind of data, path) of every file or folder here that the section `data` names."""
    if isinstance(value, list):
        return [found for inner in value for found in local_paths(inner, key)]
    if isinstance(value, dict):
        return [found for name, inner in value.items() for found in local_paths(inner, key or name)]
    is_path = isinstance(value, str) and (os.sep in value or "." in value) and "\0" not in value
    return [(key, value)] if is_path and len(value) < 1000 and Path(value).expanduser().exists() else []


def is_ignored(path: Path, root: Path) -> bool:
    """Return whether SkyPilot leaves a file out because git ignores it (without a .skyignore)."""
    if (root / ".skyignore").exists():
        return False
    try:
        return subprocess.run(["git", "check-ignore", "-q", str(path)], cwd=root, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def launch(path: Path, text: str, experiment: Any, environment: dict[str, str]) -> int:
    """Write the task and hand it to `sky`, which returns as soon as it is submitted.

    Args:
        path: File to write.
        text: The task.
        experiment: The validated experiment.
        environment: The user's variables; the values of `launch.sky.secrets` are among them.

    Raises:
        UserError: There is no `sky`, a secret is not set, or it refuses.
    """
    sky = experiment.launch.sky
    if unset := [name for name in sky.secrets if not environment.get(name)]:
        raise UserError(f"launch.sky.secrets: {', '.join(unset)} is not set in the environment; export it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.name_in_errors(path):
        path.write_text(text, encoding="utf-8")
    command = ["sky", "launch", "-c", sky.cluster] if sky.cluster is not None else ["sky", "jobs", "launch"]
    command += ["--yes", "--detach-run"]
    for name in sky.secrets:  # a name alone: sky takes the value from its environment
        command += ["--secret", name]
    try:
        code = subprocess.run([*command, os.path.relpath(path)], env=environment).returncode
    except FileNotFoundError:
        raise UserError(
            "--submit sky: sky is not on the PATH; install SkyPilot (`uv tool install 'skypilot[aws]'`), or print the "
            f"task with --dry-run; it is written to {path}"
        ) from None
    if code:
        raise UserError(f"--submit sky: sky refused {path} (exit code {code}); see what it says above")
    return 0

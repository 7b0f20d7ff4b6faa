"""One stage under its lock: begin or go on, run, publish, say what came of it."""

import hashlib
import os
import platform
import random
import shlex
import socket
import subprocess
import time
import uuid
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.changes import Change
from pipeline.errors import UserError
from pipeline.fingerprints import Today, all_needs, folders, hub_model, sources
from pipeline.launch import environment as launch
from pipeline.launch import hardware
from pipeline.launch.processes import Peers, detect_lost_peers
from pipeline.stage import Source, StageRun, StopFlag
from pipeline.store import checkpoints, files
from pipeline.store.artifacts import ArtifactStore, now
from pipeline.store.cache import Cache
from pipeline.store.digests import Digests
from pipeline.tracking import Dashboard, Tracker, format_duration, format_number, json_value

if TYPE_CHECKING:
    from pipeline.plan import StageState

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "datasets",
    "accelerate",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "numpy",
)


@dataclass(frozen=True)
class Flags:
    """The flags of `rlhf run`, as the command line says them."""

    only: bool = False
    force: bool = False
    restart: bool = False
    override_config: bool = False
    allow_elastic: bool = False
    trust_remote_code: bool = False
    command: str = ""  # as it was typed, recorded in the manifests of what it makes


@dataclass(frozen=True)
class Job:
    """A stage that is to run now, and all there is to know about it."""

    name: str
    is_target: bool  # named on the command line, and not only needed by what was
    module: Any
    experiment: Any
    store: ArtifactStore
    state: "StageState"
    today: Today
    digests: Digests
    manifests: dict[str, dict[str, Any]]  # of the stages it needs, verified
    flags: Flags
    stop: StopFlag
    console: Console
    peers: Peers | None = None  # the other processes that work on it
    dashboard: Dashboard = field(default_factory=Dashboard)  # the command's
    wanted: tuple[str, ...] = ()  # all stages that the command brings up to date

    def say(self, line: str) -> None:
        self.console.print(f"{self.name}: {line}", markup=False, highlight=False, soft_wrap=True)


def run_stage(job: Job) -> dict[str, Any]:
    """Runs a stage and publishes what it made; returns the new manifest. What the stage raises goes through:
    what it saved stays for the next time."""
    started = time.monotonic()
    if lines := refusals(job.name, job.is_target, job.state, job.flags):
        raise UserError(lines)
    run = resumable_run(job) or begin_run(job)
    context = prepare(job, run)
    finished = False
    if job.peers is not None and getattr(job.module, "SHARED", False):
        checkpoint = context.checkpoints.newest()
        made_of = {"inputs": run["inputs"], "config": run["config"]}
        job.peers.send({"stage": job.name, "at": None if checkpoint is None else checkpoint.step, "made_of": made_of})
    try:
        with files.name_in_errors(context.publish), detect_lost_peers(job.peers):
            metrics = json_value(job.module.run(context))
        if lines := remade(job, context) + edited(job, run, context):
            raise UserError(lines)
        finished = True
    finally:
        context.tracker.close()
        if not finished:
            files.remove(context.publish)
            if not checkpoints.step_folders(context.checkpoints.folder):
                job.store.drop_run(job.name)  # nothing to go on from: the stage is what it was before
    context.checkpoints.prune()
    manifest = job.store.publish(job.name, context.publish, record(job, run, metrics, context.tracker.tracker_run_id))
    done = " · ".join([f"done in {format_duration(time.monotonic() - started)}", *headline(job.module, metrics)])
    job.say(f"{done} → {job.store.folder(job.name)}")
    return manifest


def remade(job: Job, context: StageRun) -> list[str]:
    """A line for each stage that this one needs and that another command made anew meanwhile: what was read here may
    be of both, and the manifest would name the old one."""
    remedy = "run again with --restart" if has_checkpoints(context) else "run again"
    return [
        f"{job.name}: {need} was made anew while this stage ran; {remedy}"
        for need, manifest in job.manifests.items()
        if (job.store.manifest(need) or {}).get("digest") != manifest["digest"]
    ]


def edited(job: Job, run: dict[str, Any], context: StageRun) -> list[str]:
    """A line for each file and folder from outside that this stage is made of, and that was edited or removed while it
    ran: the manifest would name what was there before."""
    outside = {f"data:{kind}": (f"data.{kind}", source.path) for kind, source in context.sources.items()}
    outside |= {f"folder:{key}": (key, folder) for key, folder in folders(job.module, job.experiment).items()}
    remedy = "put it back, or add --restart, and run again" if has_checkpoints(context) else "run again"
    lines = []
    for name, (key, path) in outside.items():
        if path is None or name not in run["inputs"]:  # on the Hub, or of the world
            continue
        try:
            what = "was edited" if job.digests.facts(path).sha256 != run["inputs"][name] else None
        except UserError:
            what = "cannot be read any more"
        if what is not None:
            lines.append(f"{job.name}: {path} ({key}) {what} while this stage ran; {remedy}")
    return lines


def has_checkpoints(context: StageRun) -> bool:
    """Whether the run has saved anything: that is of the old inputs, and `refusals` will say so."""
    return bool(checkpoints.step_folders(context.checkpoints.folder))


def headline(module: Any, metrics: dict[str, Any]) -> list[str]:
    """The figures that a stage puts first, as far as it has them: "kl 3.2"."""
    return [f"{key} {format_number(metrics[key])}" for key in module.HEADLINE if metrics.get(key) is not None]


# -- begin or go on --------------------------------------------------------------------------------------


def refusals(name: str, is_target: bool, state: "StageState", flags: Flags, processes: int | None = None) -> list[str]:
    """Why a stage can neither begin nor go on, a line each; empty when it can (or need not). processes: how many will
    work on it, where that are not this run's."""
    wanted = is_target and flags.force
    if state.kind == "damaged":
        return [] if wanted or (is_target and flags.restart) else state.reasons
    if state.kind not in ("interrupted", "done") or (state.kind == "done" and not wanted):
        return []
    if state.step is None or is_dropped(is_target, state, flags):
        return []
    inputs = state.waiting + [change.text for change in state.changes if not change.is_setting]
    settings = [change for change in state.changes if change.is_setting]
    at = f"{name}: interrupted at step {state.step}, since then"
    if inputs:
        return [f"{at} {text}; --restart begins anew" for text in inputs + [change.text for change in settings]]
    then = {word.partition("=")[0]: word for word in state.run["config"].get("command_line", [])}

    def as_before(change: Change) -> str:
        """The command that says again what the command line of the run said."""
        word = then.get(change.key)
        return "" if word is None else f"`rlhf run {name} -c CONFIG {shlex.quote(word)}` goes on as it began, "

    fixed = "which an interrupted run keeps; set it back to go on, --restart begins anew"
    remedy = "--restart begins anew, --override-config goes on with the new settings"
    lines = [f"{at} {change.text}, {fixed}" for change in settings if change.is_fixed]
    if not flags.override_config:
        lines += [f"{at} {change.text}; {as_before(change)}{remedy}" for change in settings if not change.is_fixed]
    if lines:
        return lines
    before, today = state.run["world_size"], processes or launch.facts()["world_size"]
    if before != today and not flags.allow_elastic:
        return [f"{at} the number of processes {before} → {today}; --allow-elastic goes on"]
    return []


def is_dropped(is_target: bool, state: "StageState", flags: Flags) -> bool:
    """--restart drops the target's interrupted run, and another's only where that could not go on."""
    return flags.restart and (is_target or bool(state.changes or state.waiting))


def begin_run(job: Job) -> dict[str, Any]:
    """A run from the beginning: its run.json."""
    kind = job.state.kind
    why = {"done": "forced, ", "missing": "", "damaged": "damaged, ", "interrupted": ""}
    job.say(f"{why.get(kind, f'{job.state.sentence()}; ')}running")
    run = {
        "run_id": uuid.uuid4().hex,
        "stage": job.name,
        "fingerprint": job.today.fingerprint,
        "config": job.today.config,
        "inputs": job.today.inputs,
        "started_at": now(),
        "resumes": 0,
        **here(job.experiment),
    }
    job.store.begin(job.name, run)
    return run


def resumable_run(job: Job) -> dict[str, Any] | None:
    """The interrupted run to go on with, brought up to today; None = begin. Changed settings are recorded with the
    first checkpoint that they made (see `prepare`): a stage that refuses them leaves the run as it was."""
    run, state = job.state.run, job.state
    if run is None:
        return None
    if state.step is None:
        job.say("was interrupted before anything was saved")
        return None
    if is_dropped(job.is_target, state, job.flags):
        job.say(f"the interrupted run (at step {state.step}) is dropped")
        return None
    facts, settings = here(job.experiment), [change for change in state.changes if change.is_setting]
    before = {key: run.get(key) for key in ("world_size", "threads", "device", "strategy")}
    if different := [f"{key} {value} → {facts[key]}" for key, value in before.items() if value != facts[key]]:
        job.say(f"{', '.join(different)}: last bits may differ from an uninterrupted run's")
    for change in settings:
        job.say(f"going on with {change.text}")
    run = run | {"resumes": run["resumes"] + 1} | facts
    job.store.record_run(job.name, run)
    overridden = run["config"].get("overridden", {})
    for item in settings:
        first = overridden.get(item.key, [item.old])[0]
        overridden = overridden | {item.key: [first, item.new]}
    config = job.today.config | ({"overridden": overridden} if overridden else {})
    return run | {"fingerprint": job.today.fingerprint, "config": config}


def here(experiment: Any) -> dict[str, Any]:
    """Who runs, and what its last bits may depend on."""
    facts = launch.facts()
    strategy = experiment.launch.strategy if facts["world_size"] > 1 else None
    return {"pid": os.getpid(), "host": socket.gethostname(), **facts, "strategy": strategy}


def prepare(job: Job, run: dict[str, Any]) -> StageRun:
    """What the stage gets: journals that end where its newest checkpoint does, an empty folder, seeded
    generators."""
    experiment, store = job.experiment, job.store
    folder, work = store.folder(job.name), store.work_folder(job.name)
    work.mkdir(exist_ok=True)

    def before_save() -> None:
        tracker.sync()
        store.record_run(job.name, run)

    told = (experiment.tracking, run["run_id"], experiment.name, run["config"], job.console)
    tracker = Tracker(work, job.name, *told, dashboard=job.dashboard)
    marks = {"run_id": run["run_id"], "fingerprint": run["fingerprint"]}
    saved = checkpoints_of(experiment, work, **marks, say=job.say, before_save=before_save)
    checkpoint = saved.newest()
    if checkpoint is None:
        tracker.rewind(-1)
    else:
        tracker.rewind(checkpoint.step, checkpoint.state.get("owes_look", False))
        job.say(f"going on from step {checkpoint.step}")
    content = folder / ".tmp-publish"
    files.remove(content)
    content.mkdir()
    set_seeds(experiment.seed, job.name)
    return StageRun(
        publish=content,
        checkpoints=saved,
        cache=Cache(folder / ".cache"),
        tracker=tracker,
        stop=job.stop,
        trust_remote_code=job.flags.trust_remote_code,
        wanted=job.wanted,
        confirm_folders=partial(confirm_folders, job, run, touched_folders(job)),
        **what_it_reads(job.name, job.module, experiment, store, job.manifests, run),
    )


def touched_folders(job: Job) -> dict[str, tuple]:
    """What shows whether somebody touches a folder from outside that the stage is made of, by its key."""
    return {key: job.digests.facts(path).signature for key, path in folders(job.module, job.experiment).items()}


def confirm_folders(job: Job, run: dict[str, Any], before: dict[str, tuple]) -> None:
    """UserError if a folder from outside is not what the run's record says, or was touched since `before`: what was
    loaded from it meanwhile may be anything."""
    for key, path in folders(job.module, job.experiment).items():
        facts = job.digests.facts(path)
        if facts.sha256 != run["inputs"].get(f"folder:{key}") or facts.signature != before[key]:
            raise UserError(f"{job.name}: {path} ({key}) was edited while it was loaded; run again")


def checkpoints_of(experiment: Any, work: Path, **options: Any) -> checkpoints.CheckpointStore:
    """The checkpoints of a run that works in that folder. Where `checkpoints.every` is null: every 50 steps, and fewer
    where that would take too much of the time."""
    every, keep = experiment.checkpoints.every, experiment.checkpoints.keep
    rhythm = {"every": 50, "max_share": 0.035} if every is None else {"every": every}
    return checkpoints.CheckpointStore(work / "checkpoints", **rhythm, keep=keep, **options)


def what_it_reads(
    name: str,
    module: Any,
    experiment: Any,
    store: ArtifactStore,
    manifests: dict[str, dict[str, Any]],
    made_of: dict[str, Any],
) -> dict[str, Any]:
    """The part of a StageRun that is the same in all processes. made_of: the run's inputs and config, as recorded."""

    def placed(kind: str, source: Source) -> Source:
        if source.path:
            return replace(source, sha256=made_of["inputs"][f"data:{kind}"])
        if source.hub:
            return replace(source, revision=made_of["config"]["data"][kind].get("revision") or source.revision)
        file = f"{kind}.jsonl"
        entry = manifests["world"]["outputs"].get(file, {})
        return replace(source, path=store.folder("world") / file, sha256=entry.get("sha256"))

    model = {} if hub_model(module, experiment) is None else made_of["config"]["model"]
    return {
        "stage": name,
        "experiment": experiment,
        "config": getattr(experiment, name, None),
        "seed": experiment.seed,
        "inputs": {need: store.folder(need) for need in manifests},
        "manifests": manifests,
        "sources": {kind: placed(kind, source) for kind, source in sources(module, experiment).items()},
        "data": made_of["config"]["data"],
        "model_revision": model.get("revision") or model.get("asked_revision"),  # where nobody knows the commit
    }


def follow(peers: Peers, experiment: Any, store: ArtifactStore, stages: dict[str, Any], flags: Flags) -> bool:
    """What a process does that is not the first: its share of each stage that the first one names, until that one is
    done; → whether all went well. What it publishes goes to a folder of its own and away when the stage ends."""
    while "end" not in (message := peers.receive()):
        name = message["stage"]
        module = stages[name]
        manifests = {need: store.manifest(need) for need in all_needs(module, experiment)}  # verified by the first
        folder = store.folder(name) / f".tmp-process-{peers.rank}"
        files.remove(folder)
        folder.mkdir()
        try:
            saved = checkpoints_of(
                experiment, store.work_folder(name), run_id="", writes=False, resume_step=message["at"]
            )
            set_seeds(experiment.seed, name)
            context = StageRun(
                publish=folder,
                checkpoints=saved,
                cache=Cache(store.folder(name) / ".cache", writes=False),
                tracker=Tracker(folder, name, console=Console(quiet=True), writes=False),
                stop=StopFlag(),  # the first one alone hears a signal
                trust_remote_code=flags.trust_remote_code,
                **what_it_reads(name, module, experiment, store, manifests, message["made_of"]),
            )
            with detect_lost_peers(peers):
                module.run(context)
        finally:
            files.remove(folder)
    return message["end"]


def set_seeds(seed: int, stage: str) -> None:
    """Every generator that a library may draw from, from the experiment's seed and the stage's name."""
    import numpy
    import torch

    value = int.from_bytes(hashlib.sha256(f"{seed}/{stage}".encode()).digest()[:4], "big")
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)


# -- what is recorded ------------------------------------------------------------------------------------


def record(job: Job, run: dict[str, Any], metrics: dict[str, Any], tracker_run_id: str | None) -> dict[str, Any]:
    """The manifest, without what publication adds."""
    return {
        "stage": job.name,
        "status": "done",
        "run_id": run["run_id"],
        "fingerprint": run["fingerprint"],
        "config": run["config"],
        "inputs": run["inputs"],
        "metrics": metrics,
        "versions": versions(),
        "git": git_state(),
        "seed": job.experiment.seed,
        "world_size": run["world_size"],
        "threads": run["threads"],
        "device": run.get("device"),
        "strategy": run.get("strategy"),
        "hardware": hardware.describe_hardware(),
        "command": job.flags.command or None,
        "started_at": run["started_at"],
        "finished_at": now(),
        "resumes": run["resumes"],
        "tracker_run_id": tracker_run_id,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("rlhf-pipeline", *LIBRARIES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the code that ran and whether it had changes beside it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, timeout=10, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}

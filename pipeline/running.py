"""Run one stage under its lock: start or resume it, publish what it made, and report the result."""

import hashlib
import random
import time
import uuid
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config.sections import AXES, Common
from pipeline.errors import PeerLost, UserError
from pipeline.fingerprints import Today, all_needs, sources
from pipeline.launch.processes import Peers, detect_lost_peers
from pipeline.record import headline, manifest_of, process_facts
from pipeline.stage import Source, Stage, StageRun, StopFlag
from pipeline.state import Flags, StageState, is_dropped, refusals
from pipeline.store import checkpoints, files
from pipeline.store.artifacts import ArtifactStore, now
from pipeline.store.cache import Cache
from pipeline.store.digests import Digests
from pipeline.trackers.relay import Relay
from pipeline.trackers.run import TrackedRun, tracker_run_id
from pipeline.tracking import Tracker, format_duration, json_value

DEFAULT_EVERY = 50  # steps between two checkpoints where checkpoints.every is null
MOST_TIME_SAVING = 0.035  # fraction of the time that saving may then take


@dataclass(frozen=True)
class Job:
    """Hold a stage that is going to run, and all that its run needs."""

    name: str
    """The stage."""
    is_target: bool
    """Whether the command names it; otherwise a stage that the command names needs it."""
    stage: Stage
    """Its declaration."""
    experiment: Common
    """The validated experiment."""
    store: ArtifactStore
    """The artifacts of the experiment."""
    state: StageState
    """Its state, assessed under its lock."""
    today: Today
    """What it would be made of now."""
    digests: Digests
    """Digests of files and folders, as known so far."""
    manifests: dict[str, dict[str, Any]]
    """Verified manifests of the stages that it needs."""
    flags: Flags
    """The flags of the command."""
    stop: StopFlag
    """Set when the command is asked to stop."""
    console: Console
    """Where progress is printed."""
    peers: Peers | None = None
    """The other processes of this run; None if there are none."""
    relay: Relay = field(default_factory=Relay)
    """The command's way to its trackers."""
    wanted: tuple[str, ...] = ()
    """All stages that the command brings up to date, in order."""

    def say(self, line: str) -> None:
        """Print a line that begins with the name of the stage."""
        self.console.print(f"{self.name}: {line}", markup=False, highlight=False, soft_wrap=True)


def run_stage(job: Job) -> dict[str, Any]:
    """Run a stage and publish what it made.

    What the run saved stays when an error or an interruption ends it, so that it can be resumed.

    Returns:
        The new manifest.

    Raises:
        UserError: If the stage can neither start nor resume, or if its inputs changed meanwhile.
        Exception: Whatever the stage raises, such as Interrupted or TrainingStopped.
    """
    started = time.monotonic()
    if lines := refusals(job.name, job.is_target, job.state, job.flags):
        raise UserError(lines)
    run = resumable_run(job) or begin_run(job)
    context = prepare(job, run)
    finished = False
    if job.peers is not None and job.stage.shared:
        checkpoint = context.checkpoints.newest()
        made_of = {"inputs": run["inputs"], "config": run["config"]}
        job.peers.send({"stage": job.name, "at": None if checkpoint is None else checkpoint.step, "made_of": made_of})
    try:
        with files.name_in_errors(context.publish), detect_lost_peers(job.peers):
            metrics = json_value(job.stage.run(context))
        if lines := replaced_inputs(job, context) + edited_inputs(job, run, context):
            raise UserError(lines)
        finished = True
    except PeerLost:
        context.checkpoints.settle(peers_are_lost=True)
        raise
    finally:
        context.checkpoints.settle()
        context.tracker.close(finished)
        if not finished:
            files.remove(context.publish)
            if not checkpoints.step_folders(context.checkpoints.folder):
                job.store.drop_run(job.name)  # there is nothing to resume: the stage is what it was before
    context.checkpoints.prune()
    record = manifest_of(run, job.experiment.seed, metrics, job.flags.command, context.tracker.tracker_run_id)
    manifest = job.store.publish(job.name, context.publish, record)
    done = " · ".join([f"done in {format_duration(time.monotonic() - started)}", *headline(job.stage, metrics)])
    job.say(f"{done} → {job.store.folder(job.name)}")
    return manifest


def replaced_inputs(job: Job, context: StageRun) -> list[str]:
    """Return a line for each needed stage that another command replaced during the run.

    The run may have read the old artifact and the new one, and the manifest would name only the
    old one.
    """
    remedy = "run again with --restart" if has_checkpoints(context) else "run again"
    return [
        f"{job.name}: {need} was replaced while this stage ran; {remedy}"
        for need, manifest in job.manifests.items()
        if (job.store.manifest(need) or {}).get("digest") != manifest["digest"]
    ]


def edited_inputs(job: Job, run: dict[str, Any], context: StageRun) -> list[str]:
    """Return a line for each file or folder of the user's that changed during the run.

    The manifest would name the content that it had before.
    """
    outside: list[tuple[str, Path, str]] = []  # (setting, path, the digest that it had)
    for kind, source in context.sources.items():
        for part in source.parts or (source,):
            for name, setting in (("wordings", "wordings_sha256"), ("shots_from", "shots_sha256")):
                if setting in part.reading:
                    file = Path(part.reading[name]).expanduser()
                    outside.append((f"data.{kind}.{name}", file, part.reading[setting]))
        for part in source.parts:
            if part.path is not None and part.sha256 is not None:
                outside.append((f"data.{kind}", part.path, part.sha256))
        recorded = run["inputs"].get(f"data:{kind}")
        if source.path is not None and recorded is not None:  # otherwise on the Hub, or written by the stage `world`
            outside.append((f"data.{kind}", source.path, recorded))
    for key, folder in job.stage.folders(job.experiment).items():
        if f"folder:{key}" in run["inputs"]:
            outside.append((key, folder, run["inputs"][f"folder:{key}"]))
    remedy = "put it back, or add --restart, and run again" if has_checkpoints(context) else "run again"
    lines = []
    for key, path, digest in outside:
        try:
            if job.digests.facts(path).sha256 == digest:
                continue
            what = "was edited"
        except UserError:
            what = "became unreadable"
        lines.append(f"{job.name}: {path} ({key}) {what} while this stage ran; {remedy}")
    return lines


def has_checkpoints(context: StageRun) -> bool:
    """Return whether the run saved anything: those checkpoints come from the old inputs."""
    return bool(checkpoints.step_folders(context.checkpoints.folder))


# -- start or resume -----------------------------------------------------------------------------


def begin_run(job: Job) -> dict[str, Any]:
    """Start a run from the beginning and return the content of its run.json."""
    prefixes = {"done": "forced, ", "missing": "", "damaged": "damaged, ", "interrupted": ""}
    job.say(f"{prefixes.get(job.state.kind, f'{job.state.sentence()}; ')}running")
    run = {
        "run_id": uuid.uuid4().hex,
        "stage": job.name,
        "fingerprint": job.today.fingerprint,
        "config": job.today.config,
        "inputs": job.today.inputs,
        "started_at": now(),
        "resumes": 0,
        **process_facts(job.experiment),
    }
    job.store.begin(job.name, run)
    return run


def resumable_run(job: Job) -> dict[str, Any] | None:
    """Return the run.json of the interrupted run that is resumed, with today's settings.

    Changed settings are written to disk only with the first checkpoint made under them (see
    `prepare`): a stage that refuses them leaves the run as it was.

    Returns:
        None if there is no run to resume.
    """
    run, state = job.state.run, job.state
    if run is None:
        return None
    if state.step is None:
        job.say("was interrupted before anything was saved")
        return None
    if is_dropped(job.is_target, state, job.flags):
        job.say(f"dropping the interrupted run (at step {state.step})")
        return None
    facts = process_facts(job.experiment)
    changed = [
        f"{key} {run.get(key)} → {facts.get(key)}"
        for key in ("world_size", "threads", "device", "strategy", *AXES)
        if run.get(key) != facts.get(key)
    ]
    if changed:
        job.say(f"{', '.join(changed)}: the last bits may differ from those of an uninterrupted run")
    run = {key: value for key, value in run.items() if key not in AXES}
    run |= {"resumes": run["resumes"] + 1} | facts
    job.store.record_run(job.name, run)
    overridden = dict(run["config"].get("overridden", {}))
    for change in state.changes:
        if change.is_setting:
            job.say(f"resuming with {change.text}")
            first = overridden.get(change.key, [change.old])[0]
            overridden[change.key] = [first, change.new]
    config = job.today.config | ({"overridden": overridden} if overridden else {})
    return run | {"fingerprint": job.today.fingerprint, "config": config}


def prepare(job: Job, run: dict[str, Any]) -> StageRun:
    """Build the StageRun of a stage that starts or resumes.

    The journals are cut back to the newest checkpoint, the folder to publish is emptied, and the
    random generators are seeded.
    """
    experiment, store = job.experiment, job.store
    folder, work = store.folder(job.name), store.work_folder(job.name)
    work.mkdir(exist_ok=True)

    def before_save() -> None:
        tracker.sync()
        store.record_run(job.name, run)

    tracker = Tracker(work, job.name, tracked_run(job, run, work), console=job.console, relay=job.relay)
    saved = checkpoints_of(
        experiment, work, run_id=run["run_id"], fingerprint=run["fingerprint"], say=job.say, before_save=before_save
    )
    checkpoint = saved.newest()
    if checkpoint is None:
        tracker.rewind(-1)
    else:
        tracker.rewind(checkpoint.step, checkpoint.state.get("owes_look", False))
        job.say(f"resuming from step {checkpoint.step}")
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
        confirm_folders=partial(confirm_folders, job, run, folder_signatures(job)),
        **shared_fields(job.name, job.stage, experiment, store, job.manifests, run),
    )


def tracked_run(job: Job, run: dict[str, Any], work: Path) -> TrackedRun:
    """Return what trackers are told of a run whose journals are in a folder."""
    tracking = job.experiment.tracking
    return TrackedRun(
        names=tracking.trackers,
        folder=str(work.absolute()),
        base=str(job.store.base.absolute()),
        experiment=job.experiment.name,
        stage=job.name,
        run_id=tracker_run_id(run["run_id"], run["config"], run["fingerprint"]),
        project=tracking.project,
        config=run["config"],
        resumes=run["resumes"],
        wandb_mode=tracking.wandb_mode,
        options=tracking.options,
    )


def folder_signatures(job: Job) -> dict[str, tuple]:
    """Return a signature per folder of the user's that changes whenever a file in it is touched."""
    return {key: job.digests.facts(path).signature for key, path in job.stage.folders(job.experiment).items()}


def confirm_folders(job: Job, run: dict[str, Any], before: dict[str, tuple]) -> None:
    """Check that the user's model folders are unchanged since the run was planned.

    Args:
        job: The stage.
        run: Content of its run.json, with the digests of the folders.
        before: Signatures of the folders before they were loaded.

    Raises:
        UserError: If a folder changed: the weights loaded from it cannot be trusted.
    """
    for key, path in job.stage.folders(job.experiment).items():
        facts = job.digests.facts(path)
        if facts.sha256 != run["inputs"].get(f"folder:{key}") or facts.signature != before[key]:
            raise UserError(f"{job.name}: {path} ({key}) was edited while it was loaded; run again")


def checkpoints_of(experiment: Common, work: Path, **options: Any) -> checkpoints.CheckpointStore:
    """Return the checkpoints of a run.

    Args:
        experiment: The experiment, whose section `checkpoints` says how often to save.
        work: Folder of the run.
        **options: Further arguments of CheckpointStore.
    """
    every, keep = experiment.checkpoints.every, experiment.checkpoints.keep
    rhythm: dict[str, Any] = {"every": every}
    if every is None:
        rhythm = {"every": DEFAULT_EVERY, "max_share": MOST_TIME_SAVING}
    return checkpoints.CheckpointStore(work / "checkpoints", **rhythm, keep=keep, **options)


def with_aside(source: Source, record: dict[str, Any]) -> Source:
    """Return a source with the digests of the files that it names beside its own.

    Args:
        source: The source.
        record: What the run recorded of it.
    """
    digests = {key: record[key] for key in ("wordings_sha256", "shots_sha256") if key in record}
    return replace(source, reading=source.reading | digests) if digests else source


def shared_fields(
    name: str,
    stage: Stage,
    experiment: Common,
    store: ArtifactStore,
    manifests: dict[str, dict[str, Any]],
    made_of: dict[str, Any],
) -> dict[str, Any]:
    """Return the fields of a StageRun that are the same in all processes.

    Args:
        name: The stage.
        stage: Its declaration.
        experiment: The validated experiment.
        store: The artifacts.
        manifests: Verified manifests of the stages that it needs.
        made_of: Inputs and config of the run, as recorded in its run.json.
    """

    def located(kind: str, source: Source) -> Source:
        """Return a source with its path, and with the digest or commit that the run recorded."""
        if source.parts:
            recorded = made_of["config"]["data"][kind]["parts"]
            parts = []
            for number, part in enumerate(source.parts, 1):
                entry = recorded[str(number)]
                part = with_aside(part, entry)
                if part.path:
                    parts.append(replace(part, sha256=entry["sha256"]))
                else:
                    parts.append(replace(part, revision=entry.get("revision") or part.revision))
            return replace(source, parts=tuple(parts))
        if source.path or source.hub:
            source = with_aside(source, made_of["config"]["data"][kind])
        if source.path:
            return replace(source, sha256=made_of["inputs"][f"data:{kind}"])
        if source.hub:
            return replace(source, revision=made_of["config"]["data"][kind].get("revision") or source.revision)
        file = f"{kind}.jsonl"
        entry = manifests["world"]["outputs"].get(file, {})
        return replace(source, path=store.folder("world") / file, sha256=entry.get("sha256"))

    model = {} if stage.hub_model(experiment) is None else made_of["config"]["model"]
    seen = stage.view(experiment)
    return {
        "stage": name,
        "experiment": seen,
        "config": getattr(seen, stage.section or name),
        "seed": experiment.seed,
        "inputs": {need: store.folder(need) for need in manifests},
        "manifests": manifests,
        "sources": {kind: located(kind, source) for kind, source in sources(stage, experiment).items()},
        "data": made_of["config"]["data"],
        "model_revision": model.get("revision") or model.get("asked_revision"),  # offline the commit may be unknown
    }


def follow(peers: Peers, experiment: Common, store: ArtifactStore, stages: dict[str, Stage], flags: Flags) -> bool:
    """Do this process's share of every stage that rank 0 announces, until rank 0 is done.

    What this process publishes goes to a folder of its own, which is removed when the stage ends.

    Returns:
        Whether rank 0 ended without an error.
    """
    while "end" not in (message := peers.receive()):
        name = message["stage"]
        stage = stages[name]
        # rank 0 has verified these manifests
        manifests = {need: store.manifest(need) or {} for need in all_needs(stage, experiment)}
        folder = store.folder(name) / f".tmp-process-{peers.rank}"
        files.remove(folder)
        folder.mkdir()
        saved = checkpoints_of(experiment, store.work_folder(name), run_id="", writes=False, resume_step=message["at"])
        try:
            set_seeds(experiment.seed, name)
            context: StageRun = StageRun(
                publish=folder,
                checkpoints=saved,
                cache=Cache(store.folder(name) / ".cache", writes=False),
                tracker=Tracker(folder, name, console=Console(quiet=True), writes=False),
                stop=StopFlag(),  # only rank 0 listens to signals
                trust_remote_code=flags.trust_remote_code,
                **shared_fields(name, stage, experiment, store, manifests, message["made_of"]),
            )
            with detect_lost_peers(peers):
                stage.run(context)
        finally:
            saved.settle()
            files.remove(folder)
    return message["end"]


def set_seeds(seed: int, stage: str) -> None:
    """Seed Python's, numpy's and torch's generators from the seed and the stage's name."""
    import numpy
    import torch

    value = int.from_bytes(hashlib.sha256(f"{seed}/{stage}".encode()).digest()[:4], "big")
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)

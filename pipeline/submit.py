"""Submit stages to other machines: `rlhf run STAGE --submit slurm` and `--submit sky`."""

import argparse
import os
from pathlib import Path
from typing import Any

from pipeline import api
from pipeline.api import Location
from pipeline.errors import UserError


def submit_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf run STAGE --submit`: as jobs of SLURM, or as a task of SkyPilot."""
    if arguments.submit is None:
        raise UserError("command line: --dry-run shows what --submit would do; add --submit slurm or --submit sky")
    return submit_to_sky(arguments) if arguments.submit == "sky" else submit_to_slurm(arguments)


def submit_to_sky(arguments: argparse.Namespace) -> int:
    """Submit one task that brings the stage up to date, after what it needs, on other machines.

    What is up to date there is not known here, and is left alone there.
    """
    from pipeline.launch import sky

    environment = dict(os.environ)  # the user's: `load` adds what holds only on this machine
    experiment = api.load_experiment(arguments.config, *arguments.overrides)
    root, config = Path(__file__).resolve().parents[1], Path(arguments.config).absolute()
    lines = sky.problems(experiment, config, arguments.artifacts, root)
    if arguments.restart and experiment.launch.sky.cluster is None:
        lines.append(
            "command line: with --restart every start of a managed job would drop what the one before has saved; run "
            "on a cluster (launch.sky.cluster), or choose another name or prefix"
        )
    if lines:
        raise UserError(lines)
    words = ["-c", str(config.relative_to(root)), *flags_of_job(arguments)]
    for flag in ("only", "force", "restart"):
        if getattr(arguments, flag):
            words.append(f"--{flag}")
    content = sky.task(experiment, arguments.stage, words + arguments.overrides, arguments.artifacts)
    text = sky.text_of(content, experiment, arguments.stage)
    path = Path("artifacts", experiment.name, "sky", f"{arguments.stage}.yaml")
    if arguments.dry_run:
        print(f"# -- {path}\n{text}", end="")
        return 0
    return sky.launch(path, text, experiment, environment)


def submit_to_slurm(arguments: argparse.Namespace) -> int:
    """Submit one job per stage that is not up to date."""
    from pipeline.chain import Chain
    from pipeline.launch import slurm
    from pipeline.plan import refuse_unready

    environment = dict(os.environ)  # the user's: `load` adds what holds only on this machine
    experiment = api.load_experiment(arguments.config, *arguments.overrides)
    stages, location = api.all_stages(), Location.of(arguments.artifacts)
    store = api.open_store_to_run(experiment, location)
    chain = Chain(experiment, store, stages)
    order = chain.closure(arguments.stage)
    for name in order:
        chain.states[name] = chain.assess(name)
    waiting = [
        name for name in order if chain.states[name].kind != "done" or (arguments.force and name == arguments.stage)
    ]
    if arguments.only:
        refuse_unready({need: chain.states[need] for need in chain.needs(arguments.stage)})
        waiting = [arguments.stage]
    refuse_to_submit(chain, waiting, arguments)
    folder = (store.base / "slurm").absolute()
    scripts = {}
    for name in waiting:
        is_target = name == arguments.stage
        scripts[name] = slurm.script(
            name,
            experiment,
            folder,
            job_words(arguments, location, is_target),
            restart=is_dropped_by(arguments, chain, name),
            shared=stages[name].shared,
        )
    if not scripts:
        print(f"{arguments.stage}: up to date")
    elif arguments.dry_run:
        for name, text in scripts.items():
            print(f"# -- {folder / name}.sbatch\n{text}")
    else:
        needs = {name: chain.needs(name) for name in order}
        for name, number in slurm.submit(scripts, needs, folder, environment).items():
            print(f"{name}: job {number}, log {folder / name}-{number}.log")
    return 0


def refuse_to_submit(chain: Any, waiting: list[str], arguments: argparse.Namespace) -> None:
    """Raise UserError with a line for each reason why a job would fail.

    Args:
        chain: The assessed stages.
        waiting: The stages to submit.
        arguments: The arguments of the command.
    """
    from pipeline.state import flags_of, refusals

    store, launch, flags = chain.store, chain.experiment.launch, flags_of(arguments)
    lines = [
        f"{store.folder(name)}: {store.holder(name)} works on it; wait for it"
        for name in waiting
        if chain.states[name].kind == "running"
    ]
    if lines:
        raise UserError(lines)
    for name in waiting:
        is_target = name == arguments.stage
        lines += refusals(name, is_target, chain.states[name], flags, launch.nodes * launch.processes)
    if lines:
        raise UserError(lines)
    if lines := chain.conflicts(waiting, arguments.stage, flags):
        raise UserError(lines)


def job_words(arguments: argparse.Namespace, location: Location, is_target: bool) -> list[str]:
    """Return the words after `rlhf run STAGE` of a job.

    Args:
        arguments: The arguments of the command that submits it.
        location: Where finished stages are kept.
        is_target: Whether the command names the job's stage.
    """
    artifacts = location.url or str(location.folder.absolute())
    words = ["-c", str(Path(arguments.config).absolute()), "--artifacts", artifacts]
    words += flags_of_job(arguments)
    if arguments.force and is_target:
        words.append("--force")
    return words + arguments.overrides


def flags_of_job(arguments: argparse.Namespace) -> list[str]:
    """Return the flags of the command that hold for each of its stages."""
    flags = ("override-config", "allow-elastic", "trust-remote-code", "debug")
    return [f"--{flag}" for flag in flags if getattr(arguments, flag.replace("-", "_"))]


def is_dropped_by(arguments: argparse.Namespace, chain: Any, name: str) -> bool:
    """Return whether the command drops the interrupted run of a stage."""
    from pipeline.state import flags_of, is_dropped

    return is_dropped(name == arguments.stage, chain.states[name], flags_of(arguments))

"""Submit one SLURM job per stage: the command `rlhf run STAGE --submit slurm`."""

import argparse
import os
from pathlib import Path
from typing import Any

from pipeline import api
from pipeline.api import Location
from pipeline.errors import UserError


def submit_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf run STAGE --submit slurm`: submit one job per stage that is not up to date."""
    from pipeline.chain import Chain
    from pipeline.launch import slurm
    from pipeline.plan import refuse_unready

    if arguments.submit is None:
        raise UserError("command line: --dry-run shows what --submit would do; add --submit slurm")
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
    for flag in ("override-config", "allow-elastic", "trust-remote-code", "debug"):
        if getattr(arguments, flag.replace("-", "_")):
            words.append(f"--{flag}")
    if arguments.force and is_target:
        words.append("--force")
    return words + arguments.overrides


def is_dropped_by(arguments: argparse.Namespace, chain: Any, name: str) -> bool:
    """Return whether the command drops the interrupted run of a stage."""
    from pipeline.state import flags_of, is_dropped

    return is_dropped(name == arguments.stage, chain.states[name], flags_of(arguments))

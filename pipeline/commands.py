"""Implement the commands of `rlhf`. Each takes parsed arguments and returns an exit code.

Libraries and stages are imported late, because environment variables and signal handlers must be
set before torch is imported.
"""

import argparse
import importlib
import os
import sys
import threading
from datetime import datetime
from functools import partial
from typing import Any

from pipeline import api, hints, sweep_commands
from pipeline.api import Location
from pipeline.clean import clean_command
from pipeline.errors import UserError
from pipeline.init import init_command
from pipeline.store import files
from pipeline.submit import submit_command

RUN_HELP = f"""\
usage: rlhf run STAGE -c CONFIG [flags] [key=value ...]

Brings a stage up to date, and first what it needs. What is already up to date is left alone.

stages, in order:  {" ".join(api.STAGES)}
with rm.base:      {" ".join(api.OPTIONAL)}, before rm
beside them:       {" ".join(api.TESTS)}, also by `rlhf evaluate`
`rlhf run STAGE --help` lists every setting of a stage.

  -c, --config FILE      the experiment, such as configs/tiny.yaml
  --artifacts DIR        where finished stages are kept (default: artifacts); with s3://bucket/prefix they are fetched
                         from there when needed, and uploaded when done
  key=value ...          settings on top of the file, such as ppo.kl_coef=0.05
  'key=[a,b,c]'          a sweep: the stage is run for each value, each as an experiment of its own that takes
                         what does not depend on it from there; several make all combinations (in the file: `sweep:`)

  --only                 run only this stage; it is an error if what it needs is missing or stale
  --force                run it even if it is up to date or damaged
  --restart              drop what an interrupted run has saved and start again
  --override-config      resume an interrupted run under changed settings; both are recorded (the seed, the data and
                         the order of rows stay). Also: replace finished stages that another YAML with the same
                         name: made, or that were made with settings on the command line which are missing now;
                         without this flag that is refused, or asked at a terminal
  --allow-elastic        resume an interrupted run with another number of processes
  --debug                show tracebacks
  --trust-remote-code    run code that a model's folder or repository brings, also the copy in its artifacts
  --submit slurm         submit one job per stage to sbatch (settings: launch.slurm)
  --submit sky           submit one task to SkyPilot, for clouds and Kubernetes (settings: launch.sky), such as
                         rlhf run ppo -c configs/tiny.yaml --artifacts s3://bucket/prefix --submit sky --dry-run
  --dry-run              with --submit: print the scripts, submit nothing

exit codes: 0 done or up to date; 2 a mistake in config, data or artifacts; 3 training stopped itself;
75 stopped by a signal, run again to resume."""

STYLES = {
    "done": "green",
    "stale": "yellow",
    "interrupted": "yellow",
    "running": "cyan",
    "missing": "dim",
    "damaged": "red",
}
PIPE_COLUMNS = 140  # width of tables that are not printed to a terminal: rich would assume 80 and cut text


def load(arguments: argparse.Namespace) -> Any:
    """Load the experiment that the arguments name, and set the environment as it asks."""
    return api.load_experiment(arguments.config, *arguments.overrides)


def make_console(caller: hints.Caller | None = None) -> Any:
    """Return a console for tables and lines.

    Args:
        caller: How the user calls this command: commands in printed text are filled in accordingly.
    """
    from pipeline.console import FilledConsole

    class CommandConsole(FilledConsole):
        """Print to the terminal, with the commands in plain text filled in."""

        def on_broken_pipe(self) -> None:
            """Continue without output when a reader such as `head` ends; rich would exit with 1."""
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return CommandConsole(caller, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_COLUMNS)


# -- run -----------------------------------------------------------------------------------------


def run_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf run`: bring a stage up to date."""
    if arguments.show_help:
        return help_command(arguments)
    if arguments.stage is None or arguments.config is None:
        missing = "STAGE" if arguments.stage is None else "-c CONFIG"
        raise UserError(f"command line: {missing} is missing; see `rlhf run --help`")
    if (found := sweep_commands.sweep_in(arguments)) is not None:
        return sweep_commands.run_sweep(arguments, found)
    if arguments.submit is not None or arguments.dry_run:
        return submit_command(arguments)
    return bring_up_to_date(arguments, [arguments.stage])


def bring_up_to_date(arguments: argparse.Namespace, targets: list[str]) -> int:
    """Bring stages up to date one after the other, each after what it needs.

    Args:
        arguments: The arguments of `rlhf run`, or of `rlhf evaluate`.
        targets: The stages.
    """
    from pipeline.launch.signals import stop_on_signals
    from pipeline.stage import StopFlag

    stop = StopFlag()
    with stop_on_signals(stop):
        from pipeline import plan, running
        from pipeline.config.sections import names_hub
        from pipeline.config.yaml_tree import read_tree
        from pipeline.launch import environment, launcher, processes
        from pipeline.state import flags_of
        from pipeline.store.remote import Remote

        tree = read_tree(arguments.config, arguments.overrides)
        if (count := launcher.processes_to_start(tree.values)) > 1:
            return launcher.start(arguments.words, count)
        met = threading.Event()
        launcher.watch_launcher(stop, met)
        experiment, stages = api.validate(tree), api.all_stages()
        location, console = Location.of(arguments.artifacts), make_console(hints.caller_from(arguments))
        store = api.open_store_to_run(experiment, location)
        flags = flags_of(arguments)
        wanted = experiment.launch.processes * experiment.launch.nodes
        is_alone = wanted == processes.rank_and_size_from_environment()[1] == 1 and location.url is None
        # the Hub is asked for a name once a command, and that takes longer than importing torch
        is_local = is_alone and not names_hub(tree.values)
        if is_local and plan.nothing_to_do(targets, experiment, store, stages, flags, console):
            for target in targets:
                stages[target].show(store.folder(target), console)
            return 0
        environment.prepare(experiment)  # imports torch
        patience = experiment.launch.timeout
        peers = processes.join(wanted, patience)
        met.set()
        from pipeline.launch import parallel  # imports torch

        parallel.arrange_as(experiment.launch)
        if peers is not None and peers.rank > 0:
            well = running.follow(peers, experiment, store, stages, flags)
            processes.disconnect(peers, patience, well)
            return 0 if well else 1
        try:
            remote = None if location.url is None else Remote(location.url, store)
            for target in targets:
                plan.bring_up_to_date(target, experiment, store, stages, flags, stop, console, peers, remote)
        except BaseException:
            processes.disconnect(peers, 1.0, succeeded=False)
            raise
        processes.disconnect(peers, patience)
        for target in targets:
            stages[target].show(store.folder(target), console)
    return 0


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf evaluate`: the stage evaluate, or the tests that its flags ask for."""
    if arguments.config is None:
        raise UserError("command line: -c CONFIG is missing; see `rlhf evaluate --help`")
    if arguments.tests:
        return bring_up_to_date(arguments, arguments.tests)
    as_run = {"stage": "evaluate", "show_help": False, "submit": None, "dry_run": False}
    return run_command(argparse.Namespace(**{**vars(arguments), **as_run}))


def help_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf run --help`, or `rlhf run STAGE --help` with every setting of the stage."""
    if arguments.stage is None:
        print(RUN_HELP)
        return 0
    from rich.text import Text

    from pipeline.config.help import describe
    from pipeline.config.sections import COMMON
    from pipeline.launch import environment
    from pipeline.tracking import TIMES, TIMING

    environment.set_environment({})
    stage, console = api.all_stages()[arguments.stage], make_console()
    console.print(Text(stage.summary), soft_wrap=False)
    print_settings(console, "settings", describe(stage.settings, arguments.stage))
    common = [row for name, section in COMMON.items() for row in describe(section, name)]
    print_settings(console, "settings of every stage", common)
    if stage.metrics:
        for title, meanings in (("metrics", stage.metrics), (f"{TIMING}, one row per step", TIMES)):
            console.print(f"\n[bold]{title}[/bold]")
            for name, meaning in meanings.items():
                console.print(Text(f"{name}: {meaning}"))
    return 0


def print_settings(console: Any, title: str, rows: list[Any]) -> None:
    """Print a table of settings.

    Args:
        console: Where to print.
        title: Title of the table.
        rows: SettingRows; nothing is printed if there are none.
    """
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for heading in ("key", "type", "default", "unit", "meaning"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "key")
    for row in rows:
        table.add_row(*(Text(cell) for cell in (row.key, row.type, row.default, row.unit, row.meaning)))
    console.print()
    console.print(table)


# -- status --------------------------------------------------------------------------------------


def status_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf status`: print a table of the stages' states."""
    from rich.table import Table
    from rich.text import Text

    from pipeline import chain, plan
    from pipeline.record import headline

    if (sweep := sweep_commands.sweep_in(arguments)) is not None:
        return sweep_commands.show_sweep(arguments, sweep, make_console(hints.caller_from(arguments)))
    experiment, stages = load(arguments), api.all_stages()
    caller = hints.caller_from(arguments)
    store, console = api.open_store(experiment, Location.of(arguments.artifacts)), make_console(caller)
    table = Table(title=f"{experiment.name} in {store.base}", title_justify="left")
    columns = ["stage", "state", "when", "size", "result"]
    if console.width < 72:
        columns = columns[:2]  # five columns of a few letters each would be unreadable
    for title in columns:
        justify: Any = "right" if title == "size" else "left"
        table.add_column(title, overflow="fold", justify=justify, no_wrap=title == "stage")
    store.digests.trusts = not arguments.verify
    wanted = chain.wanted_stages(experiment, stages)
    states = chain.assess(experiment, store, stages)
    for name, state in states.items():
        is_asked_for = name not in api.TESTS and stages[name].used(experiment)
        if not is_asked_for and state.kind == "missing":
            continue  # it runs only where somebody asks for it
        when = size = result = ""
        if state.manifest is not None:
            when = f"{datetime.fromisoformat(state.manifest['finished_at']).astimezone():%Y-%m-%d %H:%M}"
            result = " · ".join(headline(stages[name], state.manifest["metrics"]))
        if not state.taken_from and store.folder(name).is_dir():
            size = files.human_bytes(store.size(name))
        sentence = hints.filled(state.sentence(), caller)
        if state.kind == "missing" and not state.taken_from and name not in wanted:
            sentence = reason_not_needed(name, list(stages)[-1])
        row = (name, Text(sentence, style=STYLES[state.kind]), when, size, Text(result))
        table.add_row(*row[: len(columns)])
    console.print(table)
    for line in store.digests.sentences():
        chain.print_line(console, line)
    for line in plan.lines_of_remembered_settings(states, arguments.overrides):
        chain.print_line(console, line)
    if (store.base / "people").is_dir():
        snapshots = importlib.import_module("stages.people.rank.snapshots")
        for line in snapshots.status_lines(store.base, experiment):
            chain.print_line(console, line)
    rounds = importlib.import_module("stages.people.rounds.status")
    for line in rounds.status_lines(store.base, experiment):
        chain.print_line(console, line)
    return 0


def reason_not_needed(name: str, last: str) -> str:
    """Return what `status` shows of a missing stage that the last stage does not need."""
    if name == "world":
        return "not needed: no data is the world's"
    return f"not needed by {last}"


# -- doctor, chat, serve-reward, data -----------------------------------------------------------


def doctor_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf doctor`: check this machine, or compute the memory that an experiment needs."""
    experiment = load_if_given(arguments)
    if arguments.memory:
        if experiment is None:
            raise UserError("doctor --memory: needs an experiment; add -c CONFIG, such as configs/tiny.yaml")
        memory_table = importlib.import_module("stages.tools.memory_table")
        return memory_table.print_memory(experiment, trust_remote_code=arguments.trust_remote_code)
    artifacts = str(Location.of(arguments.artifacts).folder)
    doctor = importlib.import_module("stages.tools.doctor")
    return doctor.run(experiment, artifacts=artifacts, fill=partial(hints.filled, caller=hints.caller_from(arguments)))


def load_if_given(arguments: argparse.Namespace) -> Any:
    """Load the experiment if -c names one; otherwise set the usual environment and return None."""
    if arguments.config is not None:
        return load(arguments)
    from pipeline.launch import environment

    environment.set_environment({})
    return None


def chat_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf chat`: talk to several policies side by side."""
    from pipeline.launch import environment
    from pipeline.launch.processes import rank_and_size_from_environment

    experiment = load(arguments)
    if rank_and_size_from_environment()[1] > 1:
        raise UserError("chat: it is one process, and was started as several; start it without torchrun or srun")
    one_node = experiment.launch.model_copy(update={"nodes": 1})  # chat runs here, whatever the stages do
    environment.prepare(experiment.model_copy(update={"launch": one_node}))
    chat = importlib.import_module("stages.tools.chat")
    length = arguments.max_new_tokens
    return chat.run(
        experiment,
        api.open_store(experiment, Location.of(arguments.artifacts)),
        [name.strip() for name in arguments.models.split(",") if name.strip()],
        chat.Settings(
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            seed=arguments.seed,
            max_new_tokens=experiment.evaluate.response_length if length is None else length,
            system=arguments.system or "",
        ),
        trust_remote_code=arguments.trust_remote_code,
        engine=arguments.engine,
    )


def playground_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf playground`: serve the page, or export what people shared on it."""
    from pipeline.launch import environment
    from pipeline.launch.processes import rank_and_size_from_environment

    check_new_tokens(arguments.new_tokens, ["--export"] if arguments.export is not None else [])
    experiment = load(arguments)
    store = api.open_store(experiment, Location.of(arguments.artifacts))
    playground = importlib.import_module("stages.people.playground.command")
    if arguments.export is not None:
        return playground.export(experiment, store, arguments.export, make_console())
    if rank_and_size_from_environment()[1] > 1:
        raise UserError("playground: it is one process, and was started as several; start it without torchrun or srun")
    one_node = experiment.launch.model_copy(update={"nodes": 1})  # it runs here, whatever the stages do
    environment.prepare(experiment.model_copy(update={"launch": one_node}))
    return playground.run(experiment, store, make_console(), arguments.trust_remote_code, arguments.new_tokens)


def check_new_tokens(is_asked: bool, other: list[str]) -> None:
    """Raise UserError if --new-tokens is given with a flag that opens no page."""
    if is_asked and other:
        raise UserError(f"command line: --new-tokens does nothing with {other[0]}, which opens no page; leave one out")


def rank_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf rank`: let people rank answers in a browser."""
    from pipeline import chain
    from pipeline.stage import StopFlag

    asked = {"--tasks-only": arguments.tasks_only, "--snapshot": arguments.snapshot}
    asked |= {"--export": arguments.export is not None, "--import": arguments.imported is not None}
    asked |= {"--simulate": arguments.simulate is not None}
    if len(names := [name for name, is_asked in asked.items() if is_asked]) > 1:
        raise UserError(f"command line: {' and '.join(names)} are two commands; give them one after the other")
    check_new_tokens(arguments.new_tokens, [name for name in names if name != "--simulate"])
    for flag, value, other in (("to", arguments.to, "export"), ("tiers", arguments.tiers, "imported")):
        if value is not None and getattr(arguments, other) is None:
            name = "import" if other == "imported" else other
            raise UserError(f"command line: --{flag} does nothing without --{name}; add it")
    experiment = load(arguments)
    console = make_console(hints.caller_from(arguments))
    rank = importlib.import_module("stages.people.rank.command")
    options = rank.Options(
        tasks_only=arguments.tasks_only,
        new_tokens=arguments.new_tokens,
        snapshot=arguments.snapshot,
        export=arguments.export,
        to=arguments.to or "rankings",
        imported=arguments.imported,
        tiers=tuple(name.strip() for name in (arguments.tiers or "").split(",") if name.strip()),
        simulate=arguments.simulate,
        trust_remote_code=arguments.trust_remote_code,
    )
    store = api.open_store(experiment, Location.of(arguments.artifacts))
    return rank.run(experiment, store, options, partial(chain.print_line, console), StopFlag())


def round_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf round next`: make the next round of an experiment."""
    experiment = load(arguments)
    store = api.open_store(experiment, Location.of(arguments.artifacts))
    rounds = importlib.import_module("stages.people.rounds.command")
    options = rounds.Options(dry_run=arguments.dry_run, artifacts=arguments.artifacts)
    return rounds.run(experiment, store, options, make_console(hints.caller_from(arguments)))


def serve_reward_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf serve-reward`: score what other programs send."""
    from pipeline.launch.signals import stop_on_signals
    from pipeline.stage import StopFlag

    stop = StopFlag()
    with stop_on_signals(stop, b"\nstopping; send the signal again to stop at once\n"):
        from pipeline.launch import environment

        experiment = load(arguments)
        environment.prepare(experiment)
        serve_reward = importlib.import_module("stages.tools.serve_reward")
        return serve_reward.run(
            experiment,
            api.open_store(experiment, Location.of(arguments.artifacts)),
            serve_reward.Options(
                model=arguments.model,
                host=arguments.host,
                port=arguments.port,
                key_env=arguments.key_env,
                batch_size=arguments.batch_size,
                how=arguments.how,
            ),
            stop,
            trust_remote_code=arguments.trust_remote_code,
            say=lambda line: print(line, flush=True),
        )


def push_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf push`: upload the model of a finished stage to the Hub."""
    # no other command goes online without a name on the Hub in its config; a dry run asks nobody
    if arguments.dry_run:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "0")
    if sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
        os.environ.setdefault("TQDM_DISABLE", "0")
    experiment = load(arguments)
    push = importlib.import_module("stages.tools.push")
    options = push.Options(
        stage=arguments.stage,
        repository=arguments.repository,
        folder=arguments.folder,
        public=arguments.public,
        update=arguments.update,
        revision=arguments.revision,
        message=arguments.message,
        dry_run=arguments.dry_run,
    )
    store = api.open_store(experiment, Location.of(arguments.artifacts))
    return push.run(experiment, store, api.all_stages(), options)


def export_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf export`: write the policy of a finished stage for other programs."""
    experiment = load(arguments)
    export = importlib.import_module("stages.tools.export")
    store = api.open_store(experiment, Location.of(arguments.artifacts))
    return export.run(
        experiment,
        store,
        api.all_stages(),
        export.Options(
            stage=arguments.stage,
            output=arguments.output,
            folder=arguments.folder,
            dtype=arguments.dtype,
            overwrite=arguments.overwrite,
        ),
    )


def compare_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf compare`: write a page that compares experiments, and print tables."""
    from pipeline.launch import environment

    environment.set_environment({})
    location = Location.of(arguments.artifacts)
    compare = importlib.import_module("stages.page.compare")
    return compare.run(arguments.experiments, location.folder, arguments.output, make_console())


def data_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf data`: the action that the arguments name."""
    return importlib.import_module("pipeline.data_commands").ACTIONS[arguments.action](arguments)


COMMANDS = {
    "run": run_command,
    "evaluate": evaluate_command,
    "status": status_command,
    "init": init_command,
    "clean": clean_command,
    "doctor": doctor_command,
    "chat": chat_command,
    "playground": playground_command,
    "rank": rank_command,
    "round": round_command,
    "serve-reward": serve_reward_command,
    "push": push_command,
    "export": export_command,
    "compare": compare_command,
    "data": data_command,
}

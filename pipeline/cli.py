"""The command `rlhf`: arguments in, an exit code out. The only file in this room that names the stages.

Exit codes: 0 done or up to date · 1 a fault of ours · 2 the user's mistake · 3 training stopped itself · 75
stopped by a signal: run again to go on. Signal handlers and environment variables stand before torch is
imported, so imports are late.
"""

import argparse
import errno
import importlib
import os
import shlex
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pipeline import hints
from pipeline.config import sections
from pipeline.errors import Interrupted, PeerLost, TrainingStopped, UserError
from pipeline.stage import StopFlag
from pipeline.store import files

STAGES = ("world", "base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate", "report")

RUN_HELP = f"""\
usage: rlhf run STAGE -c CONFIG [flags] [key=value ...]

Brings a stage up to date, and before it what it needs. What is up to date already is left alone.

stages, in their order:  {" ".join(STAGES)}
`rlhf run STAGE --help` lists every setting of a stage.

  -c, --config FILE      the experiment, as configs/tiny.yaml
  --artifacts DIR        where finished stages are kept (default: artifacts); or s3://bucket/prefix: they come from
                         there when they are needed, and go there when they are done
  key=value ...          settings on top of the file, as ppo.kl_coef=0.05

  --only                 this stage alone: missing or stale inputs are an error
  --force                redo it though it is up to date, or damaged
  --restart              drop what an interrupted run has saved and begin anew
  --override-config      go on with an interrupted run under changed settings; both are recorded (seed, data and what
                         orders a stage's rows stay). Also: replace finished stages that another YAML of the same
                         name: made, or that were made with settings of a command line which this one leaves out;
                         without it that is refused, or asked at a terminal
  --allow-elastic        go on with an interrupted run at another number of processes
  --debug                show tracebacks
  --trust-remote-code    run code that a model's folder or repository brings, also the copy in its artifacts
  --submit slurm         hand the stages to sbatch, a job each (settings: launch.slurm)
  --dry-run              with --submit: print the scripts, submit nothing

exit codes: 0 done or up to date; 2 a mistake in config, data or artifacts; 3 training stopped itself;
75 stopped by a signal, run again to go on."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = None
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no → must not end a run
        stream.reconfigure(errors="replace")
    try:
        arguments = parse(argv)
        at_hand(arguments)
        return COMMANDS[arguments.command](arguments)
    except SystemExit as error:  # argparse's --help
        return int(error.code or 0)
    except KeyboardInterrupt:  # in status, doctor, chat: `run` has its own way to stop
        return 130
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        return explain(error, caller_of(arguments))


def at_hand(arguments: argparse.Namespace) -> None:
    """Of artifacts on object storage `remote` is the address, and `artifacts` the folder of this machine."""
    from pipeline.store.remote import is_url, local_folder

    place = getattr(arguments, "artifacts", None)
    arguments.remote = place if place is not None and is_url(place) else None
    if arguments.remote is not None:
        arguments.artifacts = str(local_folder(arguments.remote))


def caller_of(arguments: argparse.Namespace | None) -> hints.Caller:
    """How the user calls this command; None: the command line could not be read."""
    if arguments is None:
        return hints.caller_of(None, None)
    place = getattr(arguments, "remote", None) or getattr(arguments, "artifacts", None)
    flags = ["--trust-remote-code"] if getattr(arguments, "trust_remote_code", False) else []
    return hints.caller_of(getattr(arguments, "config", None), place, getattr(arguments, "overrides", []), flags)


def explain(error: Exception, caller: hints.Caller | None = None) -> int:
    """Says in a line (or a line a mistake) what ended the command; returns the exit code. caller: by whose config,
    artifacts and settings the commands in it are filled in."""
    if isinstance(error, Interrupted):
        at = f" at step {error.step}" + (f" of {error.total}" if error.total else "") if error.step is not None else ""
        print(f"stopped{at}; run again to go on", file=sys.stderr)
        return 75
    if isinstance(error, TrainingStopped):
        print(f"error: training stopped itself: {error}", file=sys.stderr)
        return 3
    if isinstance(error, UserError):
        for line in error.lines:
            print(f"error: {hints.filled(line, caller or hints.Caller())}", file=sys.stderr)
        return 2
    if isinstance(error, PeerLost):
        from pipeline.launch import processes

        what = f"another process of this run is gone, or took longer than launch.timeout ({error})"
        print(f"error: {what}; run again to go on", file=sys.stderr)
        return 1 if processes.place_in_environment()[0] == 0 else processes.LOST_ANOTHER
    if isinstance(error, BrokenPipeError):  # `rlhf status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if (line := disk_trouble(error) or hub_trouble(error)) is not None:
        print(f"error: {line}", file=sys.stderr)
        return 2
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        # gradient_checkpointing is the model's, and so every stage's: none that is done or interrupted stays
        remedy = (
            "lower per_device_train_batch_size (base, sft, rm, dpo: raise gradient_accumulation_steps as much, so that "
            "a step's batch stays), per_device_train_tokens or ppo.local_rollout_forward_batch_size, and to go on with "
            "an interrupted run add --override-config; or set model.gradient_checkpointing=true, with which all "
            "stages are made anew"
        )
        print(f"error: out of memory; {remedy}", file=sys.stderr)
        return 1
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    what = f"{type(error).__name__}: {text[:300]} ({Path(frame.filename).name}:{frame.lineno})"
    print(f"error: unexpected {what}; run again with --debug to see where", file=sys.stderr)
    return 1


def disk_trouble(error: Exception) -> str | None:
    """A line for what a disk can refuse; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number not in files.DISK:
        return None
    path = Path(getattr(error, "filename", None) or ".")
    line = f"{path}: {os.strerror(number)}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        there = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
        line += f" ({shutil.disk_usage(there).free:,} bytes free); make room and run again"
    return line if ";" in line else f"{line}; make it writable, or choose another place with --artifacts"


def hub_trouble(error: Exception) -> str | None:
    """A line for what the Hub or the way to it refused; None for any other error."""
    causes = {"HfHubHTTPError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "DatasetNotFoundError"}
    causes |= {"ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError"}
    seen: BaseException | None = error
    while seen is not None:
        if causes & {kind.__name__ for kind in type(seen).__mro__}:
            first = str(seen).strip().split("\n")[0] or type(seen).__name__
            return f"the Hub: {first}; check the id, the network and `hf auth login`, or name local files"
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def signal_handlers(stop: StopFlag) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 ask for a stop at the next step; a second SIGTERM or SIGINT kills at once (one after
    SIGUSR1 is the first: a queue that warned ends the job with it, and a save may be under way)."""

    from pipeline.launch.processes import place_in_environment

    first, ended = place_in_environment()[0] == 0, []

    def ask(number: int, frame: Any) -> None:
        if not first:
            return  # the first process saves for all, and ends the others
        if number != signal.SIGUSR1 and ended:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number != signal.SIGUSR1:
            ended.append(number)
        if not stop.requested:
            stop.requested = True
            text = "\nstopping after this step and saving; once more stops at once\n"
            os.write(2, text.encode())  # print is not safe inside a handler

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- arguments -------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but its errors are UserErrors like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see `{self.prog} --help`")


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of one command; `overrides` are its words `key=value`, wherever they stand."""
    parser = Parser(prog="rlhf", description="RLHF in the shape of InstructGPT, stage by stage.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, text: str, config: str = "required", help: bool = True) -> Parser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=help)
        if config:
            made.add_argument(
                "-c", "--config", required=config == "required", metavar="FILE", help="the experiment's YAML"
            )
        made.add_argument(
            "--artifacts",
            default="artifacts",
            metavar="DIR",
            help="where finished stages are kept: a folder, or an address as s3://bucket/prefix",
        )
        made.add_argument("--debug", action="store_true", help="show tracebacks")
        return made

    run = command("run", "bring a stage up to date, and before it what it needs", config="optional", help=False)
    run.add_argument("stage", nargs="?", choices=STAGES)
    run.add_argument("-h", "--help", action="store_true", dest="show_help")
    for flag in ("only", "force", "restart", "override-config", "allow-elastic", "trust-remote-code", "dry-run"):
        run.add_argument(f"--{flag}", action="store_true")
    run.add_argument("--submit", choices=["slurm"])
    command("status", "show which stages are done, stale, interrupted, missing or damaged")
    doctor = command("doctor", "look at versions, device, threads and disk", config="optional")
    text = "print what each stage will need of a device's memory (launch.device=cuda: of a GPU that is not here)"
    doctor.add_argument("--memory", action="store_true", help=text)
    doctor.add_argument("--trust-remote-code", action="store_true", help="with --memory: run code that a model brings")
    clean = command("clean", "say what an experiment's artifacts are, ask, and remove them")
    clean.add_argument("--yes", action="store_true", help="remove them without asking")
    chat = command("chat", "talk to several policies side by side")
    chat.add_argument("--models", required=True, metavar="A,B", help="stages whose models answer, as sft,ppo")
    chat.add_argument(
        "--temperature", type=float, default=0.0, help="of sampling; 0 (the default) = always the likeliest token"
    )
    chat.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability"
    )
    chat.add_argument("--seed", type=int, default=0, help="of sampling")
    text = "longest answer, in tokens (default: evaluate.response_length)"
    chat.add_argument("--max-new-tokens", type=int, default=None, help=text)
    chat.add_argument("--system", default=None, metavar="TEXT", help="system message")
    chat.add_argument("--trust-remote-code", action="store_true", help="run code that a model brings")
    data = commands.add_parser("data", help="look at data files without training", allow_abbrev=False)
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    text = "show kind, rows, lengths, duplicates, leaks and every bad row of a file, or of all data that a config names"
    check = actions.add_parser("check", help=text, description=text, allow_abbrev=False)
    check.add_argument("file", metavar="FILE", nargs="?", help="without one: all data that CONFIG names")
    check.add_argument("-c", "--config", metavar="FILE", help="the experiment whose tokenizer and max_length count")
    check.add_argument("--kind", choices=sections.KINDS, help="read the file as this kind instead of guessing")
    check.add_argument("--artifacts", default="artifacts", metavar="DIR", help="where the experiment's tokenizer is")
    check.add_argument("--debug", action="store_true", help="show tracebacks")

    words, settings = without_settings(argv) if argv[:1] in (["run"], ["data"]) else (argv, [])
    arguments, rest = parser.parse_known_args(words)
    arguments.words = argv
    arguments.overrides = settings + [word for word in rest if is_setting(word)]
    if unknown := [word for word in rest if not is_setting(word)]:
        raise UserError(
            f"command line: {unknown[0]!r} is no flag of `rlhf {arguments.command}` and no key=value; "
            f"see `rlhf {arguments.command} --help`"
        )
    if arguments.overrides and arguments.config is None and not getattr(arguments, "show_help", False):
        raise UserError(f"command line: {arguments.overrides[0]!r} changes a setting of no config; give one with -c")
    return arguments


def is_setting(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def without_settings(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command but its key=value, and these: argparse would take the first of them for the stage, or for
    the data file."""
    words, settings = [], []
    for before, word in zip(["", *argv], argv, strict=False):
        is_value = before in ("-c", "--config", "--artifacts") or (argv[0] == "data" and Path(word).exists())
        (settings if is_setting(word) and not is_value else words).append(word)
    return words, settings


# -- commands --------------------------------------------------------------------------------------------


def stage_modules() -> dict[str, Any]:
    """The stages by name, each after what it needs."""
    return {name: importlib.import_module(f"stages.settings.{name}") for name in STAGES}


def load(
    arguments: argparse.Namespace, stages: dict[str, Any] | None = None, tree: Any = None
) -> tuple[Any, dict[str, Any]]:
    """The validated experiment and the stage modules. The environment is set between reading the file (if `tree` is
    not what it says) and the imports."""
    from pipeline.config import validation as config
    from pipeline.launch import environment as launch

    tree = tree or config.read_tree(arguments.config, arguments.overrides)
    launch.set_environment(tree.values)
    modules = stages or stage_modules()
    sections = {name: module.Config for name, module in modules.items() if hasattr(module, "Config")}
    checks = [module.check for module in modules.values() if hasattr(module, "check")]
    return config.validate_tree(tree, config.experiment_type(sections), checks), modules


def open_store(arguments: argparse.Namespace, experiment: Any, stages: dict[str, Any] | None = None) -> Any:
    """The artifacts of an experiment. stages: of a command that may make them."""
    from pipeline.origin import Origin
    from pipeline.store.artifacts import ArtifactStore

    checks = [module.check for module in (stages or {}).values() if hasattr(module, "check")]
    shared = getattr(arguments, "remote", None) is not None
    said = tuple(arguments.overrides)
    origin = None if stages is None else Origin.of(arguments.config, type(experiment), checks, shared, said)
    return ArtifactStore(arguments.artifacts, experiment.name, origin)


def make_console(caller: hints.Caller | None = None) -> Any:
    """A console for tables and lines. caller: by whom the commands in plain text are filled in."""
    from rich.console import Console

    # in a pipe rich believes in 80 columns, and tables would lose their text
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)

    def go_on_unheard() -> None:  # `rlhf run ppo --help | head -1`: rich would exit with 1
        console.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    console.on_broken_pipe = go_on_unheard
    if caller is not None:
        as_it_is = console.print

        def say(*things: Any, **options: Any) -> None:
            as_it_is(*(hints.filled(x, caller) if isinstance(x, str) else x for x in things), **options)

        console.print = say
    return console


def run_command(arguments: argparse.Namespace) -> int:
    if arguments.show_help:
        return help_command(arguments)
    if arguments.stage is None or arguments.config is None:
        missing = "STAGE" if arguments.stage is None else "-c CONFIG"
        raise UserError(f"command line: {missing} is missing; see `rlhf run --help`")
    if arguments.submit is not None or arguments.dry_run:
        return submit_command(arguments)
    stop = StopFlag()
    with signal_handlers(stop):
        from pipeline import plan, running
        from pipeline.config import validation as config
        from pipeline.launch import environment as launch
        from pipeline.launch import processes
        from pipeline.store.remote import Remote

        tree = config.read_tree(arguments.config, arguments.overrides)
        if (count := processes.wanted(tree.values)) > 1:
            return processes.start(arguments.words, count)
        met = threading.Event()
        processes.watch_launcher(stop, met)
        experiment, stages = load(arguments, tree=tree)
        launch.prepare(experiment)
        store, console = open_store(arguments, experiment, stages), make_console(caller_of(arguments))
        flags = flags_of(arguments)
        patience = experiment.launch.timeout
        peers = processes.join(experiment.launch.processes * experiment.launch.nodes, patience)
        met.set()
        if peers is not None and peers.rank > 0:
            well = running.follow(peers, experiment, store, stages, flags)
            processes.leave(peers, patience, well)
            return 0 if well else 1
        try:
            remote = None if arguments.remote is None else Remote(arguments.remote, store)
            plan.bring_up_to_date(arguments.stage, experiment, store, stages, flags, stop, console, peers, remote)
        except BaseException:
            processes.leave(peers, 1.0, well=False)
            raise
        processes.leave(peers, patience)
        if hasattr(stages[arguments.stage], "show"):
            stages[arguments.stage].show(store.folder(arguments.stage), console)
    return 0


def submit_command(arguments: argparse.Namespace) -> int:
    """`rlhf run STAGE --submit slurm`: a job for each stage that is not up to date."""
    from pipeline import plan, running
    from pipeline.launch import slurm

    if arguments.submit is None:
        raise UserError("command line: --dry-run shows what --submit would do; give --submit slurm, too")
    environment = dict(os.environ)  # as the user has it: what `load` sets is this machine's
    experiment, stages = load(arguments)
    store = open_store(arguments, experiment, stages)
    chain = plan.Chain(experiment, store, stages)
    order = chain.closure(arguments.stage)
    for name in order:
        chain.states[name] = chain.assess(name)
    waiting = [n for n in order if chain.states[n].kind != "done" or (arguments.force and n == arguments.stage)]
    if arguments.only:
        plan.refuse_unready({need: chain.states[need] for need in chain.needs(arguments.stage)})
        waiting = [arguments.stage]
    if held := [name for name in waiting if chain.states[name].kind == "running"]:
        raise UserError([f"{store.folder(name)}: {store.holder(name)} works on it; wait for it" for name in held])
    flags, processes = flags_of(arguments), experiment.launch.nodes * experiment.launch.processes
    if lines := [
        line for n in waiting for line in running.refusals(n, n == arguments.stage, chain.states[n], flags, processes)
    ]:
        raise UserError(lines)
    if lines := chain.replaced(waiting, arguments.stage, flags):
        raise UserError(lines)
    folder = (store.base / "slurm").absolute()
    artifacts = arguments.remote or str(store.root.absolute())
    place = ["-c", str(Path(arguments.config).absolute()), "--artifacts", artifacts]
    always = [f"--{flag}" for flag in ("override-config", "allow-elastic", "trust-remote-code", "debug")
              if getattr(arguments, flag.replace("-", "_"))]  # fmt: skip
    scripts = {}
    for name in waiting:
        is_target = name == arguments.stage
        argv = [*place, *always, *["--force"] * (arguments.force and is_target), *arguments.overrides]
        restart = running.is_dropped(is_target, chain.states[name], flags)
        scripts[name] = slurm.script(
            name, experiment, folder, argv, restart=restart, shared=getattr(stages[name], "SHARED", False)
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


def flags_of(arguments: argparse.Namespace) -> Any:
    from pipeline.running import Flags

    names = ("only", "force", "restart", "override_config", "allow_elastic", "trust_remote_code")
    command = shlex.join(["rlhf", *arguments.words])
    return Flags(**{name: getattr(arguments, name) for name in names}, command=command)


def help_command(arguments: argparse.Namespace) -> int:
    """`rlhf run --help`, and `rlhf run STAGE --help` with every setting of the stage."""
    if arguments.stage is None:
        print(RUN_HELP)
        return 0
    from rich.table import Table
    from rich.text import Text

    from pipeline.config import validation as config
    from pipeline.launch import environment as launch
    from pipeline.tracking import TIMES, TIMING

    launch.set_environment({})
    module = stage_modules()[arguments.stage]
    console = make_console()
    if summary := (module.__doc__ or "").strip().split("\n\n")[0]:
        console.print(Text(" ".join(summary.split())), soft_wrap=False)
    own = config.describe(module.Config, arguments.stage) if hasattr(module, "Config") else []
    common = [row for name, section in config.COMMON.items() for row in config.describe(section, name)]
    for title, rows in (("settings", own), ("settings of every stage", common)):
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for heading in ("key", "type", "default", "unit", "meaning"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "key")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        if rows:
            console.print()
            console.print(table)
    if module.METRICS:
        for title, figures in (("metrics", module.METRICS), (f"{TIMING}, a row a step", TIMES)):
            console.print(f"\n[bold]{title}[/bold]")
            for name, sentence in figures.items():
                console.print(Text(f"{name}: {sentence}"))
    return 0


def status_command(arguments: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from pipeline import plan
    from pipeline.fingerprints import all_needs
    from pipeline.running import headline

    experiment, stages = load(arguments)
    caller = caller_of(arguments)
    store, console = open_store(arguments, experiment), make_console(caller)
    styles = {
        "done": "green",
        "stale": "yellow",
        "interrupted": "yellow",
        "running": "cyan",
        "missing": "dim",
        "damaged": "red",
    }
    table = Table(title=f"{experiment.name} in {store.base}", title_justify="left")
    columns = ("stage", "state", "when", "size", "result")
    columns = columns if console.width >= 72 else columns[:2]  # five columns of a few letters are unreadable
    for title in columns:
        options = {"justify": "right" if title == "size" else "left", "no_wrap": title == "stage"}
        table.add_column(title, overflow="fold", **options)
    needed = {need for module in stages.values() for need in all_needs(module, experiment)}
    states = plan.assess(experiment, store, stages)
    for name, state in states.items():
        when = size = result = ""
        if state.manifest is not None:
            when = f"{datetime.fromisoformat(state.manifest['finished_at']).astimezone():%Y-%m-%d %H:%M}"
            result = " · ".join(headline(stages[name], state.manifest["metrics"]))
        if store.folder(name).is_dir():
            size = files.human_bytes(store.size(name))
        idle = name == "world" and name not in needed and state.kind == "missing"
        sentence = "not needed: no data is the world's" if idle else hints.filled(state.sentence(), caller)
        row = (name, Text(sentence, style=styles[state.kind]), when, size, Text(result))
        table.add_row(*row[: len(columns)])
    console.print(table)
    for line in plan.remembered(states, store, arguments.overrides):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def clean_command(arguments: argparse.Namespace) -> int:
    """Removes artifacts/NAME and nothing else, if a person at the terminal or --yes says so; refuses where a process
    works there, or something else lies there."""
    from pipeline.config import validation as config
    from pipeline.origin import ask, at_terminal
    from pipeline.store.artifacts import ArtifactStore

    tree = config.read_tree(arguments.config, arguments.overrides)
    store = ArtifactStore(arguments.artifacts, config.read_name(tree))
    doomed = store.base.with_name(f".tmp-{store.base.name}")
    files.remove(doomed)  # of a clean that was killed
    if not store.base.is_dir():
        print(f"{store.base}: nothing there")
        return 0
    found = sorted(path.name for path in store.base.iterdir())
    stages = [name for name in STAGES if name in found]
    strays = [name for name in found if name not in (*STAGES, "wandb", "slurm") and not name.startswith(".")]
    lines = [f"{store.base / name}: is no stage's; move it away, then clean" for name in strays]
    lines += [f"{store.folder(name)}: {store.holder(name)} works on it; wait for it or stop it"
              for name in stages if store.is_held(name)]  # fmt: skip
    if lines:
        raise UserError(lines)
    with ExitStack() as held:
        for name in stages:  # a process may have come since
            held.enter_context(store.hold(name))
        size = files.human_bytes(sum(store.size(name) for name in found))
        what = f"{store.base} ({size}): {' '.join(found) or 'empty'}"
        if not arguments.yes:
            if not at_terminal():
                raise UserError(f"{what}; nobody is there to be asked: --yes (make: YES=1) removes it")
            if not ask(f"{what}\nRemove it?", StopFlag()):
                print("nothing removed")
                return 0
        print(f"removing {what}")
        # away at once, and removed with no lock file open: NFS would keep that, and its folder
        os.rename(store.base, doomed)
    files.remove(doomed)
    return 0


def doctor_command(arguments: argparse.Namespace) -> int:
    experiment = None
    if arguments.config is not None:
        experiment, _ = load(arguments)
    else:
        from pipeline.launch import environment as launch

        launch.set_environment({})
    stage = importlib.import_module("stages.tools.doctor")
    if arguments.memory:
        if experiment is None:
            raise UserError("doctor --memory: of which experiment? Add -c CONFIG, as configs/tiny.yaml")
        return stage.plan_memory(experiment, trust_remote_code=arguments.trust_remote_code)
    return stage.run(experiment, artifacts=arguments.artifacts, fill=partial(hints.filled, caller=caller_of(arguments)))


def chat_command(arguments: argparse.Namespace) -> int:
    from pipeline.launch import environment as launch

    experiment, _ = load(arguments)
    launch.prepare(experiment)
    return importlib.import_module("stages.tools.chat").run(
        experiment,
        open_store(arguments, experiment),
        models=[name.strip() for name in arguments.models.split(",") if name.strip()],
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        system=arguments.system,
        trust_remote_code=arguments.trust_remote_code,
    )


def data_command(arguments: argparse.Namespace) -> int:
    from pipeline.launch import environment as launch

    experiment = None
    if arguments.config is not None:
        experiment, _ = load(arguments)
    else:
        launch.set_environment({})
    check = importlib.import_module("data.check.command")
    if arguments.file is None:
        if experiment is None or arguments.kind is not None:
            lacking = "--kind needs a FILE" if experiment is not None else "give a FILE, or -c CONFIG for all its data"
            raise UserError(f"command line: {lacking}; see `rlhf data check --help`")
        return check.run_all(experiment, artifacts=arguments.artifacts)
    return check.run(arguments.file, arguments.kind, experiment, artifacts=arguments.artifacts)


COMMANDS = {
    "run": run_command,
    "status": status_command,
    "clean": clean_command,
    "doctor": doctor_command,
    "chat": chat_command,
    "data": data_command,
}


def entry() -> NoReturn:
    """`rlhf`, and `python -m pipeline.cli`: `main`, and the end of the process."""
    code = main()
    from pipeline.launch.processes import end_this_one

    end_this_one(code)


if __name__ == "__main__":
    entry()

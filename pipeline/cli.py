"""Parse the command line `rlhf`, call the command, and turn its outcome into an exit code.

Exit codes: 0 done or up to date · 1 a bug or a lost process · 2 a mistake of the user's ·
3 training stopped itself · 75 stopped by a signal, run again to resume.
"""

import argparse
import errno
import io
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from pipeline import api, data_arguments, hints
from pipeline.errors import Interrupted, PeerLost, TrainingStopped, UserError
from pipeline.store import files

OUT_OF_MEMORY = (
    "out of memory; lower per_device_train_batch_size (base, sft, rm, dpo: and raise gradient_accumulation_steps by "
    "the same factor, so that the batch of a step stays the same), per_device_train_tokens or "
    "ppo.local_rollout_forward_batch_size; to resume an interrupted run add --override-config. Or set "
    "model.gradient_checkpointing=true: that is a setting of the model, so all stages run again"
)
HUB_ERRORS = {  # names of exception classes, so that no library has to be imported
    "HfHubHTTPError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "DatasetNotFoundError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "ConnectionError",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The words after `rlhf`; None: those of this process.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show → must not end a run
    try:
        arguments = parse(argv)
        from pipeline import commands

        return commands.COMMANDS[arguments.command](arguments)
    except SystemExit as error:  # argparse ends --help and --version so
        return int(error.code or 0)
    except KeyboardInterrupt:  # `run` has its own way to stop
        if arguments is not None and arguments.command == "data":
            print("stopped; nothing is left half-written", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        return explain(error, hints.caller_from(arguments))


def entry() -> NoReturn:
    """Run `main` and end the process: the program `rlhf`, and `python -m pipeline.cli`."""
    code = main()
    from pipeline.launch.processes import exit_process

    exit_process(code)


# -- errors --------------------------------------------------------------------------------------


def explain(error: Exception, caller: hints.Caller | None = None) -> int:
    """Print what ended the command, in one line per mistake, and return the exit code.

    Args:
        error: The error.
        caller: How the user calls this command.
    """
    if isinstance(error, Interrupted):
        print(f"{stopped_at(error)}; run again to resume", file=sys.stderr)
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

        what = f"another process of this run ended, or took longer than launch.timeout ({error})"
        print(f"error: {what}; run again to resume", file=sys.stderr)
        return 1 if processes.rank_and_size_from_environment()[0] == 0 else processes.EXIT_PEER_LOST
    if isinstance(error, BrokenPipeError):  # `rlhf status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if (cause := disk_error(error) or hub_error(error)) is not None:
        print(f"error: {cause}", file=sys.stderr)
        return 2
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        print(f"error: {OUT_OF_MEMORY}", file=sys.stderr)
        return 1
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    what = f"{type(error).__name__}: {text[:300]} ({Path(frame.filename).name}:{frame.lineno})"
    print(f"error: unexpected {what}; run again with --debug to see where", file=sys.stderr)
    return 1


def stopped_at(error: Interrupted) -> str:
    """Return at which step a run stopped, as far as it is known."""
    if error.step is None:
        return "stopped"
    return f"stopped at step {error.step}" + (f" of {error.total}" if error.total else "")


def disk_error(error: Exception) -> str | None:
    """Return a line for an error of the disk, such as a full one; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None or number not in files.DISK_ERRORS:
        return None
    if (named := getattr(error, "filename", None)) is None:
        return f"{os.strerror(number)}, in a file without a name, probably standard output; run again"
    path = Path(named)
    line = f"{path}: {os.strerror(number)}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        existing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
        return f"{line} ({shutil.disk_usage(existing).free:,} bytes free); make room and run again"
    return f"{line}; make it writable, or choose another place with --artifacts"


def hub_error(error: Exception) -> str | None:
    """Return a line for an error of the Hub or of the network; None for any other error."""
    cause: BaseException | None = error
    while cause is not None:
        if HUB_ERRORS & {kind.__name__ for kind in type(cause).__mro__}:
            first = str(cause).strip().split("\n")[0] or type(cause).__name__
            return f"the Hub: {first}; check the id, the network and `hf auth login`, or name local files"
        cause = cause.__cause__ or cause.__context__
    return None


# -- arguments -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Parse arguments as argparse does, but report mistakes as UserError."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError instead of ending the process."""
        raise UserError(f"command line: {message}; see `{self.prog} --help`")


class VersionAction(argparse.Action):
    """Print the version and exit; it is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the version and end the process."""
        from importlib import metadata

        try:
            print(f"rlhf {metadata.version('rlhf-pipeline')}")
        except metadata.PackageNotFoundError:  # run from a checkout that was never installed
            print("rlhf, not installed")
        parser.exit()


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="rlhf", description="RLHF in the shape of InstructGPT, stage by stage.", allow_abbrev=False)
    parser.add_argument("--version", action=VersionAction, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    add_run(commands)
    add_evaluate(commands)
    add_status(commands)
    add_init(commands)
    add_doctor(commands)
    add_clean(commands)
    add_chat(commands)
    add_playground(commands)
    add_rank(commands)
    add_round(commands)
    add_serve_reward(commands)
    add_push(commands)
    add_export(commands)
    add_compare(commands)
    add_data(commands)
    return parser


def add_command(commands: Any, name: str, text: str, config: str = "required", **options: Any) -> Parser:
    """Add a command with the arguments that all commands have.

    Args:
        commands: argparse's subparsers.
        name: Name of the command.
        text: Its help.
        config: "required" or "optional": whether -c must be given.
        **options: Further arguments of `add_parser`.

    Returns:
        The parser of the command.
    """
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **options)
    is_required = config == "required"
    command.add_argument("-c", "--config", required=is_required, metavar="FILE", help="the experiment's YAML")
    command.add_argument(
        "--artifacts",
        default="artifacts",
        metavar="DIR",
        help="where finished stages are kept: a folder, or an address as s3://bucket/prefix (default: artifacts)",
    )
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    command.set_defaults(trust_remote_code=False)
    return command


def settings_line(example: str) -> str:
    """Return what the help of a command says of settings."""
    return f"Settings on top of the file are given as key=value: {example}. configs/SETTINGS.md lists them all."


def add_run(commands: Any) -> None:
    """Add `rlhf run`, whose help is `commands.RUN_HELP`."""
    run = add_command(commands, "run", "bring a stage up to date, and first what it needs", "optional", add_help=False)
    run.add_argument("stage", nargs="?", choices=(*api.STAGES, *api.OPTIONAL, *api.TESTS))
    run.add_argument("-h", "--help", action="store_true", dest="show_help")
    for flag in ("only", "force", "restart", "override-config", "allow-elastic", "trust-remote-code", "dry-run"):
        run.add_argument(f"--{flag}", action="store_true")
    run.add_argument("--submit", choices=["slurm", "sky"])


def add_evaluate(commands: Any) -> None:
    """Add `rlhf evaluate`, whose flags are settings of `api.TESTS`."""
    text = "compare the policies (as `rlhf run evaluate` does), or run tests from outside on them"
    evaluate = add_command(commands, "evaluate", text, "optional")
    flags = evaluate.add_argument_group("tests (key=value sets anything else, as lm_eval.chat_template=all)")
    flags.add_argument(
        "--lm-eval", nargs="?", const="", metavar="TASKS", help="tasks of lm-evaluation-harness, with commas"
    )
    flags.add_argument("--include-path", metavar="DIR", help="with --lm-eval: folder with tasks of your own")
    flags.add_argument("--limit", metavar="N", help="with --lm-eval: documents per task")
    flags.add_argument("--num-fewshot", metavar="N", help="with --lm-eval: examples before each question")
    flags.add_argument(
        "--reward-bench",
        nargs="?",
        const="",
        metavar="DATA",
        help="rows of RewardBench 2 or RewardBench: a file, or an id on the Hub",
    )
    flags.add_argument("--harmful", metavar="DATA", help="prompts that should be refused; counts refusals")
    flags.add_argument("--harmless-looking", metavar="DATA", help="prompts that look harmful and should be answered")
    flags.add_argument("--refusals", action="store_true", help="count refusals on the prompts that the config names")
    for flag in ("only", "force", "restart", "override-config", "allow-elastic", "trust-remote-code"):
        evaluate.add_argument(f"--{flag}", action="store_true", help="as of `rlhf run`")


FLAGS_OF_TESTS = {
    "lm_eval": {"lm_eval": "tasks", "include_path": "include_path", "limit": "limit", "num_fewshot": "num_fewshot"},
    "reward_bench": {"reward_bench": "data"},
    "refusals": {"harmful": "harmful", "harmless_looking": "harmless_looking"},
}
"""Test → its flags of `rlhf evaluate`, and the setting that each is."""


def read_tests(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the tests that the flags of `rlhf evaluate` ask for, and the flags as settings.

    Raises:
        UserError: A flag of --lm-eval is given without it.
    """
    asked = {
        "lm_eval": arguments.lm_eval is not None,
        "reward_bench": arguments.reward_bench is not None,
        "refusals": arguments.refusals or arguments.harmful is not None or arguments.harmless_looking is not None,
    }
    settings = []
    for test, flags in FLAGS_OF_TESTS.items():
        for flag, key in flags.items():
            value = getattr(arguments, flag)
            if value is None or value == "":
                continue
            if not asked[test]:
                raise UserError(f"command line: --{flag.replace('_', '-')} does nothing without --lm-eval; add it")
            if flag == "lm_eval":
                value = json.dumps([name.strip() for name in value.split(",") if name.strip()])
            elif flag not in ("limit", "num_fewshot"):
                value = json.dumps(value)  # a file may be named as a number is
            settings.append(f"{test}.{key}={value}")
    return [test for test, is_asked in asked.items() if is_asked], settings


def add_status(commands: Any) -> None:
    """Add `rlhf status`."""
    status = add_command(commands, "status", "show which stages are done, stale, interrupted, missing or damaged")
    status.add_argument(
        "--verify",
        action="store_true",
        help="read all files, also those that look unchanged since they were read (a damaged disk changes no times)",
    )


def add_init(commands: Any) -> None:
    """Add `rlhf init`."""
    text = "write a short config for a base model and data files"
    init = commands.add_parser("init", help=text, description=text, allow_abbrev=False)
    init.add_argument("-o", "--output", default="my.yaml", metavar="FILE", help="file to write (default: my.yaml)")
    init.add_argument("--model", metavar="NAME", help="base model: a folder or a Hub id (default: train from scratch)")
    init.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="data files, folders or globs; their kinds are guessed, and several of a kind become a mixture",
    )
    init.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="device to compute on")
    init.add_argument("--debug", action="store_true", help="show tracebacks")
    init.set_defaults(config=None, artifacts="artifacts", trust_remote_code=False)


def add_doctor(commands: Any) -> None:
    """Add `rlhf doctor`."""
    doctor = add_command(commands, "doctor", "check versions, device, threads and disk", "optional")
    doctor.add_argument(
        "--memory",
        action="store_true",
        help="print how much device memory each stage will need (launch.device=cuda: of a GPU that need not be here)",
    )
    doctor.add_argument("--trust-remote-code", action="store_true", help="with --memory: run code that a model brings")


def add_clean(commands: Any) -> None:
    """Add `rlhf clean`."""
    clean = add_command(commands, "clean", "list an experiment's artifacts, ask, and remove them")
    clean.add_argument("--yes", action="store_true", help="remove them without asking")
    clean.add_argument(
        "--with-labels",
        action="store_true",
        help="remove what people said, too (people/), which nothing can make again",
    )


def add_chat(commands: Any) -> None:
    """Add `rlhf chat`."""
    chat = add_command(commands, "chat", "talk to several policies side by side")
    chat.add_argument("--models", required=True, metavar="A,B", help="stages whose models respond, such as sft,ppo")
    chat.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 (default): always the likeliest token"
    )
    chat.add_argument(
        "--top-k", type=int, default=0, help="sample from so many of the likeliest tokens; 0 (default): from all"
    )
    chat.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability"
    )
    chat.add_argument("--seed", type=int, default=0, help="seed of sampling")
    chat.add_argument(
        "--max-new-tokens",
        type=int,
        default=None,
        help="largest length of a response, in tokens (default: evaluate.response_length)",
    )
    chat.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default=None,
        help="what samples the responses; vllm runs as launch.vllm says, on several GPUs if need be (default: that of "
        "evaluate.rollout, otherwise transformers)",
    )
    chat.add_argument("--system", default=None, metavar="TEXT", help="system message")
    chat.add_argument("--trust-remote-code", action="store_true", help="run code that a model brings")


def add_playground(commands: Any) -> None:
    """Add `rlhf playground`."""
    text = "talk to the policies in a browser, or with any OpenAI client"
    playground = add_command(commands, "playground", text, epilog=settings_line("playground.policies=[sft,ppo]"))
    playground.add_argument(
        "--export",
        type=Path,
        default=None,
        metavar="DIR",
        help="write what people shared as prompts, rankings, demonstrations and thumbs into a folder, and end",
    )
    playground.add_argument("--new-tokens", action="store_true", help="make earlier addresses worth nothing")
    playground.add_argument("--trust-remote-code", action="store_true", help="run code that a model brings")


def add_rank(commands: Any) -> None:
    """Add `rlhf rank`."""
    text = "let people rank answers in a browser"
    rank = add_command(commands, "rank", text, epilog=settings_line("rank.prompts=300 rank.policies=[sft,ppo]"))
    rank.add_argument("--tasks-only", action="store_true", help="make the tasks, and do not open the page")
    rank.add_argument("--new-tokens", action="store_true", help="make new addresses; earlier ones are worth nothing")
    rank.add_argument(
        "--snapshot", action="store_true", help="let `data.rankings: ranked` mean all that people have ranked by now"
    )
    rank.add_argument("--export", metavar="PATH", help="write what people said into a file (or, with --to, a folder)")
    rank.add_argument(
        "--to",
        choices=["rankings", "labelstudio", "argilla"],
        default=None,
        help="with --export: rankings as JSON lines (default), or the tasks for another tool",
    )
    rank.add_argument(
        "--import", dest="imported", metavar="FILE", help="take in rankings of any form, such as exports of other tools"
    )
    rank.add_argument(
        "--tiers", metavar="A,B", help="with --import of Label Studio: its buckets, the best first (default: our own)"
    )
    rank.add_argument(
        "--simulate",
        metavar="N",
        type=int,
        help="let N simulated labelers of the embedded world rank on the page until nothing is left, and end",
    )
    rank.add_argument("--trust-remote-code", action="store_true", help="run code that a model brings")


def add_round(commands: Any) -> None:
    """Add `rlhf round next`."""
    text = "make the next round of an experiment from what people gave since"
    round_ = add_command(commands, "round", text, epilog=settings_line("rounds.old.rankings=0.5"))
    round_.add_argument(
        "action", choices=["next"], help="next: write the config and the data of the round after CONFIG"
    )
    round_.add_argument("--dry-run", action="store_true", help="say what it would be made of, and write nothing")


def add_serve_reward(commands: Any) -> None:
    """Add `rlhf serve-reward`."""
    text = "serve a reward model to other programs and machines"
    more = """Prints one address, to which clients POST {"prompts": [TEXT or messages], "responses": [TEXT],
"finished": [true or false, optional]} and get {"scores": [NUMBER]}. PPO asks it with
`ppo.rewards: [{url: ADDRESS}]` (stages/scorers/README.md). GET /health says that it is there.
A signal ends it (exit code 0) when the requests that have come are answered."""
    serve = add_command(
        commands, "serve-reward", text, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    serve.add_argument(
        "--model",
        default="rm",
        metavar="MODEL",
        help="rm (default), judge: the reward model that nobody climbs, or the folder of a reward model",
    )
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, which only this machine reaches)"
    )
    serve.add_argument("--port", type=int, default=0, help="port to listen on; 0 (default): any that is free")
    serve.add_argument(
        "--key-env",
        default=None,
        metavar="NAME",
        help="environment variable with a key that clients must send (key_env in their settings)",
    )
    serve.add_argument(
        "--batch-size",
        type=int,
        default=None,
        help="the most responses in a forward pass (default: ppo.per_device_train_batch_size)",
    )
    serve.add_argument(
        "--how",
        choices=["mean", "min"],
        default=None,
        help="how the models of an ensemble score as one (default: as in ppo)",
    )
    serve.add_argument("--trust-remote-code", action="store_true", help="run code that a model brings")


MODELS = (*api.STAGES, *api.OPTIONAL)
"""Stages that may have published a model."""


def add_push(commands: Any) -> None:
    """Add `rlhf push`."""
    text = "upload the model of a finished stage to the Hugging Face Hub"
    more = """Sends the published folder in one commit: weights, tokenizer, card; no checkpoints and no journals.
The repository is private unless --public is given. The token is that of `hf auth login` or HF_TOKEN.

  rlhf push ppo ORG/NAME -c configs/tiny.yaml --dry-run
  rlhf push ppo ORG/NAME -c configs/tiny.yaml --update --message 'More rankings'"""
    push = add_command(commands, "push", text, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    push.add_argument("stage", metavar="STAGE", choices=MODELS, help="stage whose model is uploaded, such as ppo")
    push.add_argument("repository", metavar="ORG/NAME", help="repository on the Hub; it is made if it is missing")
    add_folder_flags(push)
    push.add_argument("--public", action="store_true", help="let everybody read it (default: private)")
    push.add_argument(
        "--update", action="store_true", help="add a commit to a repository that exists already (default: refuse)"
    )
    push.add_argument("--revision", default="main", metavar="BRANCH", help="branch that gets the commit")
    push.add_argument("--message", metavar="TEXT", help="subject of the commit")
    push.add_argument("--dry-run", action="store_true", help="list the files and their sizes; ask and send nothing")


def add_export(commands: Any) -> None:
    """Add `rlhf export`."""
    text = "write the policy of a finished stage as one file for other programs"
    more = """GGUF is what llama.cpp, Ollama and LM Studio read. It is written for the models named in
pipeline/README.md; for others, use llama.cpp's own script on the published folder.

  rlhf export ppo --to gguf -o ppo.gguf -c configs/tiny.yaml"""
    export = add_command(commands, "export", text, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    export.add_argument("stage", metavar="STAGE", choices=MODELS, help="stage whose policy is written, such as ppo")
    export.add_argument("--to", required=True, choices=["gguf"], help="form of the file")
    export.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="file to write")
    add_folder_flags(export, policies_only=True)
    export.add_argument(
        "--dtype",
        choices=["as-published", "f32", "f16", "bf16", "q8_0"],
        default="as-published",
        help="how matrices are held (default: as in the published folder); vectors stay in f32",
    )
    export.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def add_folder_flags(command: Parser, policies_only: bool = False) -> None:
    """Add the flags that choose among the models that a stage has published.

    Args:
        command: The parser of the command.
        policies_only: Whether it takes no value model.
    """
    choice = command.add_mutually_exclusive_group()
    choice.set_defaults(folder="model")
    kept = [("ema", "model_ema", "the average of ppo's weights (ppo.publish_ema)")]
    if not policies_only:
        kept.append(("value-model", "value_model", "the value model of ppo"))
    for flag, folder, what in kept:
        choice.add_argument(
            f"--{flag}", action="store_const", const=folder, dest="folder", help=f"take {what} instead of the model"
        )


def add_compare(commands: Any) -> None:
    """Add `rlhf compare`."""
    text = "compare finished experiments on one page: settings, results with paired intervals, curves, answers"
    compare = commands.add_parser("compare", help=text, description=text, allow_abbrev=False)
    compare.add_argument(
        "experiments",
        nargs="+",
        metavar="EXPERIMENT",
        help="name or folder of an experiment; the first is the baseline",
    )
    compare.add_argument(
        "--artifacts", default="artifacts", metavar="DIR", help="where finished stages are kept (default: artifacts)"
    )
    compare.add_argument(
        "-o", "--output", metavar="PATH", help="HTML file or folder to write (default: DIR/compare-…/index.html)"
    )
    compare.add_argument("--debug", action="store_true", help="show tracebacks")
    compare.set_defaults(config=None, trust_remote_code=False)


def add_data(commands: Any) -> None:
    """Add `rlhf data` and its actions."""
    text = "look into data, convert and export them, without training"
    data = commands.add_parser("data", help=text, description=text, allow_abbrev=False)
    data_arguments.add_actions(data.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser))


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse one command.

    Args:
        argv: The words after `rlhf`.

    Returns:
        argparse's namespace, with `words` (all words as typed), `overrides` (the words `key=value`,
        wherever they stand) and, of `rlhf data`, `reading` (those that say how files are read).

    Raises:
        UserError: If the words are not a valid command.
    """
    reading: list[str] = []
    words = argv
    settings: list[str] = []
    if argv[:1] == ["data"]:
        words, reading = data_arguments.split_reading(argv)
    if argv[:1] in (["run"], ["data"], ["evaluate"], ["push"], ["export"]):
        words, settings = split_settings(words)
    arguments, unknown = build_parser().parse_known_args(words)
    arguments.words = argv
    arguments.reading = reading
    arguments.overrides = settings + [word for word in unknown if is_setting(word)]
    if arguments.command == "evaluate":
        arguments.tests, of_flags = read_tests(arguments)
        arguments.overrides = of_flags + arguments.overrides
    takes_settings = arguments.command not in ("init", "compare")
    for word in unknown:
        if not is_setting(word):
            command = f"`rlhf {arguments.command}`"
            what = f"is neither a flag of {command} nor key=value" if takes_settings else f"is not a flag of {command}"
            raise UserError(f"command line: {word!r} {what}; see `rlhf {arguments.command} --help`")
    if arguments.overrides and not takes_settings:
        raise UserError(
            f"command line: {arguments.overrides[0]!r} is a setting, and `rlhf {arguments.command}` takes none; "
            + ("add it to the file that it writes" if arguments.command == "init" else "leave it out")
        )
    shows_help = arguments.command == "run" and arguments.show_help
    if arguments.overrides and arguments.config is None and not shows_help:
        remedy = "give one with -c"
        if arguments.command == "data":
            remedy += f", or say how the file is read: {', '.join(data_arguments.READING)}"
        raise UserError(f"command line: {arguments.overrides[0]!r} is a setting, and no config is given; {remedy}")
    return arguments


def is_setting(word: str) -> bool:
    """Return whether a word of the command line is a setting `key=value`."""
    return "=" in word and not word.startswith("-")


VALUED = (
    *("-c", "--config", "--artifacts", "--include-path", "--reward-bench", "--harmful", "--harmless-looking"),
    *("-o", "--output", "--message"),
)
"""Flags whose value may have "=" in it."""


def split_settings(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the words of a command without its settings, and the settings.

    argparse would otherwise take the first setting for the stage, or for the data file.
    """
    words, settings = [], []
    for before, word in zip(["", *argv], argv, strict=False):
        is_value = before in VALUED or (argv[0] == "data" and Path(word).exists())
        if is_setting(word) and not is_value:
            settings.append(word)
        else:
            words.append(word)
    return words, settings


if __name__ == "__main__":
    entry()

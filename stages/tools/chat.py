"""Talk to several policies: print their answers to each question side by side.

Each policy remembers the conversation with its own answers. Scores are those of the stage evaluate:
an answer that is cut off gets `evaluate.missing_eos_score`, whatever the reward model says of it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store.artifacts import ArtifactStore
from stages.tools.chat_commands import Settings, obey
from stages.tools.chat_panels import print_panels
from stages.tools.chat_speakers import Answer, Judge, Speaker, find_model, load_judge, load_speakers, reply

UNSCORED = (
    "not scored: each model is sharded (launch.strategy, offload, tensor_parallel), so the reward model may not fit "
    "into one process; launch.strategy=ddp launch.offload=none launch.tensor_parallel=1 loads it whole"
)


def run(
    experiment: Any,
    store: ArtifactStore,
    models: Sequence[str],
    settings: Settings,
    trust_remote_code: bool = False,
    console: Any = None,
    engine: str | None = None,
) -> int:
    """Read questions and commands from standard input until /quit or the end of the input.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        models: Stages whose policies answer, or folders.
        settings: How the policies answer.
        trust_remote_code: Whether code that a model brings may run.
        console: A rich Console; by default the terminal.
        engine: "transformers" or "vllm"; None: that of evaluate.rollout.

    Returns:
        The exit code.

    Raises:
        UserError: A setting or the name of a model is wrong.
    """
    settings.check()
    folders = [find_model(name, store) for name in models]  # check every name before anything is loaded
    if not models:
        raise UserError("--models: names no model; use stages, such as sft,ppo, or folders")
    if console is None:
        from rich.console import Console

        console = Console()
    speakers, judge = load(experiment, store, models, folders, trust_remote_code, engine or engine_of(experiment))
    console.print(f"[bold]{' · '.join(models)}[/bold]", highlight=False)
    for line in introduction(settings, speakers, judge):
        print_note(line, console)
    if judge is None and is_sharded(experiment):
        print_note(UNSCORED, console)
    try:
        talk(speakers, judge, settings, experiment, console)
    finally:
        for speaker in speakers:
            if speaker.engine is not None:
                speaker.engine.close()
    return 0


def engine_of(experiment: Any) -> str:
    """Return the engine that samples the policies' answers in the stage evaluate."""
    return "transformers" if experiment.evaluate.rollout is None else experiment.evaluate.rollout.engine


def is_sharded(experiment: Any) -> bool:
    """Return whether the stages divide each model among several processes."""
    launch = experiment.launch
    return launch.divides_weights(launch.processes * launch.nodes)


def load(
    experiment: Any,
    store: ArtifactStore,
    names: Sequence[str],
    folders: Sequence[Path],
    trust_remote_code: bool,
    engine: str,
) -> tuple[list[Speaker], Judge | None]:
    """Load the policies and the judge without the messages of transformers.

    A reward model that the stages divide among processes is not loaded: chat is one process.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    judge = None if is_sharded(experiment) else load_judge(experiment, store, trust_remote_code)
    return load_speakers(experiment, names, folders, trust_remote_code, engine), judge


def talk(speakers: Sequence[Speaker], judge: Judge | None, settings: Settings, experiment: Any, console: Any) -> None:
    """Answer questions and obey commands until the user leaves."""
    from stages.shared.runtime import dtype_of

    turn = 0
    while (line := read_line(console, turn if settings.memory else 0)) is not None:
        if not line:
            continue
        if line.startswith("/"):
            if line.split()[0] in ("/quit", "/exit"):
                break
            print_note(obey(line, settings, speakers), console)
            if not any(speaker.history for speaker in speakers):
                turn = 0
            continue
        turn += 1
        try:
            dtype = dtype_of(experiment)
            answers = [(s.name, reply(s, line, settings, turn, dtype, judge)) for s in speakers]
        except KeyboardInterrupt:
            print_note("stopped; policies that had not answered yet forget this turn", console)
            continue
        print_panels(answers, console)
        for note in notes(answers, settings, judge):
            print_note(note, console)


def print_note(text: str, console: Any) -> None:
    """Print a line that is not an answer."""
    console.print(text, style="dim", markup=False, highlight=False)


def introduction(settings: Settings, speakers: Sequence[Speaker], judge: Judge | None) -> list[str]:
    """Return the lines before the first question: settings, forms, whose scores, and memory."""
    from stages.evaluation.forms import DESCRIPTIONS

    lines = [str(settings)]
    lines += [f"{s.name} is prompted {DESCRIPTIONS[s.form]}" for s in speakers if s.form != "chat"]
    if judge is not None:
        rule = ""
        if judge.missing_eos_score is not None:
            rule = f": an answer that is cut off gets {judge.missing_eos_score:g}"
        lines.append(f"scored by this experiment's reward model, as evaluate does{rule}")
    lines.append(
        "memory is on: each policy reads the conversation so far with its own answers (/reset forgets it, /memory off "
        "asks each question by itself)"
    )
    return [*lines, "/help lists the commands"]


def notes(answers: Sequence[tuple[str, Answer]], settings: Settings, judge: Judge | None) -> list[str]:
    """Return the lines below a turn's panels: which answers were cut off, and who forgot turns."""
    lines = []
    cut = [name for name, answer in answers if not (answer.finished or answer.problem)]
    if cut:
        rule = ""
        is_scored = any(answer.score is not None for _, answer in answers)
        if is_scored and judge is not None and judge.missing_eos_score is not None:
            rule = f"; that scores {judge.missing_eos_score:g} (evaluate.missing_eos_score), whatever was said"
        room = f"/max {2 * settings.max_new_tokens} gives more room"
        lines.append(f"cut off before the end: {', '.join(cut)}{rule}; {room}")
    forgot = [f"{name} {answer.forgotten}" for name, answer in answers if answer.forgotten]
    if forgot:
        lines.append(f"the context is full; oldest turns forgotten: {', '.join(forgot)}")
    return lines


def read_line(console: Any, turns: int = 0) -> str | None:
    """Read the next line, without spaces around it.

    If the input is not typed at a terminal, the line is printed.

    Args:
        console: A rich Console.
        turns: How many turns are remembered.

    Returns:
        The line ("" if it was not text); None at the end of the input.
    """
    if sys.stdin.isatty():
        import readline  # noqa: F401 (gives input() arrow keys and history)
    try:
        line = input(f"\nyou, turn {turns + 1} ▸ " if turns else "\nyou ▸ ").strip()
        line.encode()  # bytes that are not text arrive as half surrogate pairs, which do not encode
    except EOFError:
        print()
        return None
    except UnicodeError:
        console.print("\nthat line is not UTF-8 text; type it again", style="red")
        return ""
    if not sys.stdin.isatty():
        console.print(line, markup=False, highlight=False)
    return line

"""chat: one prompt, the answers of several policies side by side, each with its own memory of the talk.

Scores are evaluate's: a cut answer has `evaluate.missing_eos_score`, whatever the reward model says of it.
"""

import difflib
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from stages.settings.checks import context_of
from stages.shared.runtime import device_of, dtype_of

POLICIES = ("base", "sft", "ppo", "dpo")
COLOURS = ("blue", "dark_orange3", "medium_purple", "green")
HELP = """\
Type a question: every policy answers it, and remembers the talk so far with
its own answers.

/greedy       always the likeliest token: asked twice, the same answer
/sample       draw tokens by their probability, as PPO and evaluate do
/sample 0.7   the same at a lower temperature: nearer to the likeliest
/seed N       another draw
/top_p X      draw from the likeliest tokens of this total probability
/max N        longest answer, in tokens; one that needs more is cut off
/system TEXT  system message: who answers, and how (alone: none)
/reset        forget the talk so far
/memory off   ask each question by itself (/memory on: remember again)
/quit         leave, as Ctrl-D does"""
COMMANDS = ("/help", "/greedy", "/sample", "/temp", "/seed", "/top_p", "/max", "/system", "/reset", "/memory", "/quit")


@dataclass
class Settings:
    """What commands can change. temperature: 0 = always the likeliest token; system: "" = none; memory: whether earlier
    turns are shown to the policies."""

    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int
    system: str = ""
    memory: bool = True

    def check(self) -> None:
        """UserError where a number makes no sense."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature: {self.temperature} is out of range; should be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is out of range; should be above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens} is too few; should be 1 or more")

    def __str__(self) -> str:
        drawn = f"sampled at temperature {self.temperature:g}, top_p {self.top_p:g}, seed {self.seed}"
        parts = [drawn if self.temperature else "greedy (/sample draws)", f"at most {self.max_new_tokens} tokens"]
        parts += [f"system: {self.system}"] * bool(self.system) + ["memory off"] * (not self.memory)
        return " · ".join(parts)


@dataclass
class Speaker:
    """A policy in conversation. history: its turns as messages; form: how it is asked (`evaluation/forms.py`)."""

    name: str
    model: Any
    tokenizer: Any
    history: list[dict] = field(default_factory=list)
    form: str = "chat"


@dataclass(frozen=True)
class Judge:
    """The experiment's reward model. tokens: the fingerprint of the tokenizer that it reads; missing_eos_score: what a
    cut answer scores, None: the reward model's own number."""

    model: Any
    tokens: str
    missing_eos_score: float | None


@dataclass(frozen=True)
class Answer:
    """text (or, in `problem`, why there is none), its tokens, whether it ended by itself, its score; forgotten: turns
    that had to be dropped for want of room."""

    text: str
    tokens: int = 0
    finished: bool = True
    score: float | None = None
    problem: str = ""
    forgotten: int = 0


def run(
    experiment,
    store,
    models: list[str],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    system: str | None = None,
    trust_remote_code: bool = False,
    console=None,
) -> int:
    """Read prompts and commands from standard input until /quit or its end.

    Args:
        experiment: the validated experiment.
        store: its artifacts.
        models: stages whose policies answer, or folders.
        temperature: of sampling; 0: always the likeliest token.
        top_p: of sampling.
        seed: of sampling.
        max_new_tokens: the longest answer; None: evaluate.response_length.
        system: the system message; None: none.
        trust_remote_code: whether code that a model brings may run.
        console: where answers go; by default the terminal.

    Returns:
        The exit code.
    """
    from rich.console import Console

    longest = experiment.evaluate.response_length if max_new_tokens is None else max_new_tokens
    settings = Settings(temperature, top_p, seed, longest, system or "")
    settings.check()
    folders = [find(name, store) for name in models]  # every name is checked before anything is loaded
    if not models:
        raise UserError("--models: names no model; should be stages, as sft,ppo, or folders")
    console = console or Console()
    speakers, judge = load(experiment, store, models, folders, trust_remote_code)
    console.print(f"[bold]{' · '.join(models)}[/bold]", highlight=False)
    for line in introduction(settings, speakers, judge):
        console.print(line, style="dim", markup=False, highlight=False)
    turn = 0
    while (line := read_line(console, turn if settings.memory else 0)) is not None:
        if not line:
            continue
        if line.startswith("/"):
            if line.split()[0] in ("/quit", "/exit"):
                break
            say = command(line, settings, speakers)
            turn = turn if any(s.history for s in speakers) else 0
            console.print(say, style="dim", markup=False, highlight=False)
            continue
        turn += 1
        try:
            dtype = dtype_of(experiment)
            answers = [(s.name, reply(s, line, settings, turn, dtype, judge)) for s in speakers]
        except KeyboardInterrupt:
            console.print("stopped; this turn is forgotten by those who had not answered yet", style="dim")
            continue
        show(answers, console)
        for note in notes(answers, settings, judge):
            console.print(note, style="dim", markup=False, highlight=False)
    return 0


def introduction(settings: Settings, speakers: list[Speaker], judge: Judge | None) -> list[str]:
    """What a talk begins with: the settings, whose scores are shown, and that there is a memory."""
    from stages.evaluation.forms import DESCRIPTIONS

    lines = [str(settings)]
    lines += [f"{s.name} is prompted {DESCRIPTIONS[s.form]}" for s in speakers if s.form != "chat"]
    if judge is not None:
        lines.append(f"scored by this experiment's reward model, as evaluate does{cut_rule(judge)}")
    lines.append(
        "memory is on: each policy reads the talk so far with its own answers (/reset forgets it, /memory off asks "
        "each question by itself)"
    )
    return [*lines, "/help lists the commands"]


def cut_rule(judge: Judge) -> str:
    """What a cut answer scores, as the end of a sentence."""
    return "" if judge.missing_eos_score is None else f": an answer that is cut off gets {judge.missing_eos_score:g}"


def notes(answers: list[tuple[str, Answer]], settings: Settings, judge: Judge | None) -> list[str]:
    """What is worth knowing of a turn below its panels: who was cut off, and who forgot."""
    lines = []
    if cut := [name for name, a in answers if not (a.finished or a.problem)]:
        scored = any(a.score is not None for _, a in answers)
        rule = "" if judge is None or judge.missing_eos_score is None or not scored else (
            f"; that scores {judge.missing_eos_score:g} (evaluate.missing_eos_score), whatever was said"
        )  # fmt: skip
        room = f"/max {2 * settings.max_new_tokens} gives more room"
        lines.append(f"cut off before the end: {', '.join(cut)}{rule}; {room}")
    if forgot := [f"{name} {a.forgotten}" for name, a in answers if a.forgotten]:
        lines.append(f"the context is full; oldest turns forgotten: {', '.join(forgot)}")
    return lines


def find(name: str, store) -> Path:
    """The model folder of a stage (its artifact verified) or of a path; UserError where there is none."""
    if name in POLICIES:
        store.verify(name)
        return store.folder(name) / "model"
    if (Path(name) / "config.json").is_file():
        return Path(name)
    what = "is a reward model, which scores and does not answer" if name == "rm" else "is no policy"
    published = ", ".join(s for s in POLICIES if store.manifest(s) is not None)
    raise UserError(
        f"--models: {name} {what}; should be a published stage "
        f"({published or 'none yet: `rlhf run sft -c CONFIG` makes one'}) or a folder with config.json"
    )


def load(
    experiment, store, names: list[str], folders: list[Path], trust_remote_code: bool = False
) -> tuple[list[Speaker], Judge | None]:
    """Return the speakers, and the judge where rm is published."""
    from transformers.utils import logging

    from stages.evaluation.forms import form_of_base
    from stages.models.ensemble import load_reward_model
    from stages.models.loading import load_policy, load_tokenizer, tokenizer_fingerprint

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = device_of(experiment)
    trust = {"trust_remote_code": trust_remote_code}
    options = {"attn_implementation": experiment.model.attn_implementation, **trust}
    speakers = []
    for name, folder in zip(names, folders, strict=True):
        try:
            model, tokenizer = load_policy(folder, **options).to(device), load_tokenizer(folder, **trust)
            asked = experiment.evaluate.base_prompt, experiment.model.name_or_path
            form = form_of_base(*asked) if name == "base" else "chat"
            speakers.append(Speaker(name, model, tokenizer, form=form))
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(
                f"--models: {folder} cannot be loaded ({str(error).splitlines()[0]}); should be "
                f"a folder that AutoModelForCausalLM reads"
            ) from None
        if speakers[-1].tokenizer.chat_template is None:
            raise UserError(
                f"--models: the tokenizer in {folder} has no chat template; should be a policy "
                f"of this project, or an instruct model"
            )
    if store.manifest("rm") is None:
        return speakers, None
    store.verify("rm")
    folder = store.folder("rm") / "model"
    reward_model = load_reward_model(folder, experiment.evaluate.reward_ensemble, **options).to(device)
    tokens = tokenizer_fingerprint(load_tokenizer(folder, **trust))
    return speakers, Judge(reward_model, tokens, experiment.evaluate.missing_eos_score)


def read_line(console, turns: int = 0) -> str | None:
    """The next line without outer blanks; None at the end. Repeats it where nobody sees it typed. turns: how many are
    remembered."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (arrow keys and history in input())
    try:
        line = input(f"\nyou, turn {turns + 1} ▸ " if turns else "\nyou ▸ ").strip()
        line.encode()  # where Python lets bytes through that are no text, they are half surrogate pairs
    except EOFError:
        print()
        return None
    except UnicodeError:
        console.print("\nthat line is not UTF-8 text; type it again", style="red")
        return ""
    if not sys.stdin.isatty():
        console.print(line, markup=False, highlight=False)
    return line


def command(line: str, settings: Settings, speakers: list[Speaker]) -> str:
    """Obey a line that begins with a slash; return what to say."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    kinds = {
        "/temp": ("temperature", float), "/sample": ("temperature", float), "/top_p": ("top_p", float),
        "/seed": ("seed", int), "/max": ("max_new_tokens", int),
    }  # fmt: skip
    if name == "/help":
        return f"{HELP}\n\nnow: {settings}"
    if name == "/reset":
        for speaker in speakers:
            speaker.history.clear()
        return "forgotten"
    if name == "/memory":
        if rest not in ("on", "off"):
            return f"memory is {'on' if settings.memory else 'off'}; /memory on, or /memory off"
        settings.memory = rest == "on"
        return str(settings) if settings.memory else "memory off: each question is asked by itself"
    if name == "/system":
        settings.system = rest
        return str(settings)
    if name == "/greedy":
        settings.temperature = 0.0
        return str(settings)
    if name not in kinds:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        return f"{name} is no command; {f'is it {near[0]}? ' if near else ''}/help lists them"
    key, kind = kinds[name]
    before = getattr(settings, key)
    rest = "1" if name == "/sample" and not rest else rest
    try:
        setattr(settings, key, kind(rest))
        settings.check()
    except UserError as error:
        setattr(settings, key, before)
        return str(error)
    except (ValueError, OverflowError):
        return f"{name}: {rest!r} is no {'whole ' * (kind is int)}number; as {name} {before:g}"
    no_effect = name in ("/seed", "/top_p") and not settings.temperature
    return f"{settings}" + f" · {name} counts with /sample" * no_effect


def reply(speaker: Speaker, text: str, settings: Settings, turn: int, dtype: str, judge: Judge | None) -> Answer:
    """Ask a speaker.

    Args:
        speaker: who answers; question and answer become part of its history, from which the oldest turns go where the
            context has no room for them.
        text: the question.
        settings: how answers are drawn.
        turn: its number, by which draws differ.
        dtype: what products are computed in.
        judge: who scores; None: nobody.

    Returns:
        The answer.
    """
    import torch

    from data.encode import encode_prompt
    from data.groups import make_rows
    from data.streams import derive_seed
    from stages.evaluation.forms import make_query, parse_answer
    from stages.models.forward import response_scores
    from stages.models.loading import tokenizer_fingerprint
    from stages.objectives.rewards import final_scores
    from stages.rollouts.transformers import sample

    model, tokenizer, forgotten = speaker.model, speaker.tokenizer, 0
    context = context_of(model.config.to_dict()) or 10**9
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    question = {"role": "user", "content": text}
    past = speaker.history if settings.memory else []
    try:
        asked = make_query(tokenizer, speaker.form, [*system, *past, question])
        while len(asked.ids) + settings.max_new_tokens > context and past:
            del past[:2]
            forgotten += 1
            asked = make_query(tokenizer, speaker.form, [*system, *past, question])
        chat_ids = asked.ids if speaker.form == "chat" else encode_prompt(tokenizer, [*system, *past, question])
    except UserError as error:  # a template that takes no system message
        return Answer("", problem=f"{error}{', or /system alone' * bool(system)}")
    room = min(settings.max_new_tokens, context - len(asked.ids))
    if room < 1:
        return Answer("", problem=f"{len(asked.ids)} tokens, the whole context is {context}; ask something shorter")
    # temperature 0: a nucleus of nothing but the likeliest token
    heat, nucleus = (settings.temperature, settings.top_p) if settings.temperature else (1.0, 1e-9)
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        sampled = sample(
            model,
            [asked.ids],
            [derive_seed(settings.seed, "chat", turn)],
            response_length=room,
            temperature=heat,
            top_p=nucleus,
            eos_id=asked.end_id,
            pad_id=tokenizer.pad_token_id,
        )[0]
        answer, score = parse_answer(tokenizer, asked, sampled), None
        if judge is not None and judge.tokens == tokenizer_fingerprint(tokenizer):
            rows = make_rows([chat_ids], [answer.response], tokenizer.pad_token_id).to(model.device)
            own = response_scores(judge.model, rows).float().cpu()
            score = final_scores(own, torch.tensor([answer.finished]), judge.missing_eos_score).item()
    speaker.history += [question, {"role": "assistant", "content": answer.text}]
    return Answer(answer.text, len(answer.sampled), answer.finished, score, forgotten=forgotten)


def show(answers: list[tuple[str, Answer]], console) -> None:
    """Panels side by side, or below each other where the terminal is narrow; the highest score of an answer that ended
    is green."""
    from rich import box
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    scores = [a.score for _, a in answers if a.score is not None]
    panels = []
    for i, (name, a) in enumerate(answers):
        # what a model writes may hold escape codes: only what prints goes to the terminal
        body = Text("".join(c if c.isprintable() or c == "\n" else "�" for c in a.text) or "(empty)")
        foot = Text()
        if a.score is not None:
            best = len(scores) > 1 and a.score == max(scores) and a.finished
            foot.append(f"score {a.score:+.2f}", "bold green" if best else "").append(" · ")
        foot.append(f"{a.tokens} token{'s' * (a.tokens != 1)}" + ("" if a.finished else ", cut off"))
        panels.append(
            Panel(
                Text(a.problem, "red") if a.problem else body,
                title=Text(name, "bold"),
                title_align="left",
                subtitle=None if a.problem else foot,
                subtitle_align="right",
                padding=(0, 1),
                box=box.ROUNDED,
                border_style=COLOURS[i % len(COLOURS)],
            )
        )
    if console.width < 36 * len(panels):
        for panel in panels:
            console.print(panel)
        return
    options = console.options.update_width(console.width // len(panels))
    highest = max(len(console.render_lines(panel, options)) for panel in panels)
    grid = Table.grid(expand=True)
    for panel in panels:
        panel.height = highest
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    console.print(grid)

"""chat: one prompt, the answers of several policies side by side, each with its own memory of the talk."""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from stages.common import context_of, device_of, dtype_of

POLICIES = ("base", "sft", "ppo", "dpo")
COLOURS = ("blue", "dark_orange3", "medium_purple", "green")
HELP = """\
/reset         forget the conversation
/temp X        sampling temperature; 0 = always the likeliest token
/top_p X       sample from the likeliest tokens of this total probability
/seed N        seed of what follows
/system TEXT   system message (alone: none)
/quit          leave, as Ctrl-D does"""


@dataclass
class Settings:
    """What commands can change. system: "" = none."""

    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int
    system: str = ""

    def check(self) -> None:
        """UserError where a number makes no sense."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature: {self.temperature} is out of range; should be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is out of range; should be above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens} is too few; should be 1 or more")

    def __str__(self) -> str:
        system = f" · system: {self.system}" if self.system else ""
        return (
            f"temperature {self.temperature:g} · top_p {self.top_p:g} · seed {self.seed} · "
            f"at most {self.max_new_tokens} tokens{system}"
        )


@dataclass
class Speaker:
    """A policy in conversation; history holds the turns so far as messages."""

    name: str
    model: Any
    tokenizer: Any
    history: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """text (or, in `problem`, why there is none), its tokens, whether it ended by itself, its score."""

    text: str
    tokens: int = 0
    finished: bool = True
    score: float | None = None
    problem: str = ""


def run(
    experiment,
    store,
    models: list[str],
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    system: str | None = None,
    trust_remote_code: bool = False,
    console=None,
) -> int:
    """Reads prompts and commands from standard input until /quit or its end. Returns the exit code."""
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
    scored = "scored by this experiment's reward model; " if judge else ""
    console.print(f"{settings}\n{scored}/help lists the commands", style="dim", markup=False, highlight=False)
    turn = 0
    while (line := read_line(console)) is not None:
        if not line:
            continue
        if line.startswith("/"):
            if line.split()[0] in ("/quit", "/exit"):
                break
            say = command(line, settings, speakers)
            console.print(say, style="dim", markup=False, highlight=False)
            continue
        turn += 1
        try:
            dtype = dtype_of(experiment)
            show([(s.name, reply(s, line, settings, turn, dtype, judge)) for s in speakers], console)
        except KeyboardInterrupt:
            console.print("stopped; this turn is forgotten by those who had not answered yet", style="dim")
    return 0


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
) -> tuple[list[Speaker], tuple | None]:
    """Speakers, and (reward model, its tokenizer's fingerprint) where rm is published."""
    from transformers.utils import logging

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
            speakers.append(Speaker(name, model, tokenizer))
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
    return speakers, (reward_model, tokenizer_fingerprint(load_tokenizer(folder, **trust)))


def read_line(console) -> str | None:
    """The next line without outer blanks; None at the end. Repeats it where nobody sees it typed."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (arrow keys and history in input())
    try:
        line = input("\nyou ▸ ").strip()
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
    """Obeys a line that begins with a slash; returns what to say."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    kinds = {"/temp": ("temperature", float), "/top_p": ("top_p", float), "/seed": ("seed", int)}
    if name == "/help":
        return HELP
    if name == "/reset":
        for speaker in speakers:
            speaker.history.clear()
        return "forgotten"
    if name == "/system":
        settings.system = rest
        return str(settings)
    if name not in kinds:
        return f"{name} is no command; /help lists them"
    key, kind = kinds[name]
    before = getattr(settings, key)
    try:
        setattr(settings, key, kind(rest))
        settings.check()
    except UserError as error:
        setattr(settings, key, before)
        return str(error)
    except ValueError:
        return f"{name}: {rest!r} is no number; as {name} {before:g}"
    return str(settings)


def reply(speaker: Speaker, text: str, settings: Settings, turn: int, dtype: str, judge) -> Answer:
    """The speaker's answer to `text`, remembered with it; a full context forgets the oldest turns."""
    import torch

    from data.encode import decode_response, encode_prompt
    from data.groups import make_rows
    from data.records import DataError
    from data.streams import derive_seed
    from stages.models.forward import response_scores
    from stages.models.loading import tokenizer_fingerprint
    from stages.rollouts.transformers import sample

    model, tokenizer = speaker.model, speaker.tokenizer
    context = context_of(model.config.to_dict()) or 10**9
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    question = {"role": "user", "content": text}
    try:
        ids = encode_prompt(tokenizer, system + speaker.history + [question])
        while len(ids) + settings.max_new_tokens > context and speaker.history:
            del speaker.history[:2]
            ids = encode_prompt(tokenizer, system + speaker.history + [question])
    except DataError as error:  # a template that takes no system message
        return Answer("", problem=f"{error}{', or /system alone' * bool(system)}")
    room = min(settings.max_new_tokens, context - len(ids))
    if room < 1:
        return Answer("", problem=f"{len(ids)} tokens, the whole context is {context}; ask something shorter")
    # temperature 0: a nucleus of nothing but the likeliest token
    heat, nucleus = (settings.temperature, settings.top_p) if settings.temperature else (1.0, 1e-9)
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        response = sample(
            model,
            [ids],
            [derive_seed(settings.seed, "chat", turn)],
            response_length=room,
            temperature=heat,
            top_p=nucleus,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
        )[0]
        score = None
        if judge is not None and judge[1] == tokenizer_fingerprint(tokenizer):
            rows = make_rows([ids], [response], tokenizer.pad_token_id).to(model.device)
            score = response_scores(judge[0], rows).item()
    answer = decode_response(tokenizer, response)
    speaker.history += [question, {"role": "assistant", "content": answer}]
    return Answer(answer, len(response), response[-1] == tokenizer.eos_token_id, score)


def show(answers: list[tuple[str, Answer]], console) -> None:
    """Panels side by side, or below each other where the terminal is narrow; the higher score is green."""
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
            best = len(scores) > 1 and a.score == max(scores)
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

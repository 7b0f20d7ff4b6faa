"""Hold what can be changed during a chat, and obey the commands that change it."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import UserError
from stages.tools.chat_speakers import Speaker

HELP = """\
Type a question: every policy answers it, and remembers the talk so far with
its own answers.

/greedy       always the likeliest token, so the same answer every time
/sample       draw tokens by their probability, as PPO and evaluate do
/sample 0.7   sample at a lower temperature: closer to the likeliest
/seed N       sample with another seed
/top_k N      sample from the N likeliest tokens (/top_k 0: from all)
/top_p X      sample from the likeliest tokens of this total probability
/max N        longest answer, in tokens; one that needs more is cut off
/system TEXT  set the system message: who answers, and how (/system: none)
/reset        forget the talk so far
/memory off   ask each question by itself (/memory on: remember again)
/quit         leave, as Ctrl-D does"""
COMMANDS = (
    "/help", "/greedy", "/sample", "/temp", "/seed", "/top_k", "/top_p", "/max",
    "/system", "/reset", "/memory", "/quit",
)  # fmt: skip
NUMBERS = {
    "/temp": ("temperature", float),
    "/sample": ("temperature", float),
    "/top_k": ("top_k", int),
    "/top_p": ("top_p", float),
    "/seed": ("seed", int),
    "/max": ("max_new_tokens", int),
}
"""The setting that each command with a number changes, and its type."""


@dataclass
class Settings:
    """How the policies answer. Commands change these values."""

    temperature: float
    """Sampling temperature; 0 always takes the likeliest token."""
    top_p: float
    """Sample from the likeliest tokens of this total probability."""
    seed: int
    """Seed of sampling."""
    max_new_tokens: int
    """The longest answer, in tokens."""
    system: str = ""
    """System message; "" for none."""
    memory: bool = True
    """Whether the policies read earlier turns."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens; 0: from all."""

    def check(self) -> None:
        """Check that every number is valid.

        Raises:
            UserError: One is not.
        """
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature: {self.temperature} is out of range; use 0 or more")
        if self.top_k < 0:
            raise UserError(f"top_k: {self.top_k} is out of range; use 1 or more, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is out of range; use more than 0 and at most 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens} is too few; use 1 or more")

    def __str__(self) -> str:
        """Return the settings as one line for people."""
        if self.temperature:
            top_k = f"top_k {self.top_k}, " if self.top_k else ""
            parts = [f"sampled at temperature {self.temperature:g}, {top_k}top_p {self.top_p:g}, seed {self.seed}"]
        else:
            parts = ["greedy (/sample draws)"]
        parts.append(f"at most {self.max_new_tokens} tokens")
        if self.system:
            parts.append(f"system: {self.system}")
        if not self.memory:
            parts.append("memory off")
        return " · ".join(parts)


def obey(line: str, settings: Settings, speakers: Sequence[Speaker]) -> str:
    """Obey a line that begins with a slash.

    Args:
        line: The line.
        settings: Changed in place.
        speakers: The policies; /reset clears their history.

    Returns:
        The reply to print.
    """
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/help":
        return f"{HELP}\n\nnow: {settings}"
    if name == "/reset":
        for speaker in speakers:
            speaker.history.clear()
        return "forgotten"
    if name == "/memory":
        if argument not in ("on", "off"):
            return f"memory is {'on' if settings.memory else 'off'}; /memory on, or /memory off"
        settings.memory = argument == "on"
        return str(settings) if settings.memory else "memory off: each question is answered by itself"
    if name == "/system":
        settings.system = argument
        return str(settings)
    if name == "/greedy":
        settings.temperature = 0.0
        return str(settings)
    if name not in NUMBERS:
        similar = difflib.get_close_matches(name, COMMANDS, 1)
        question = f"did you mean {similar[0]}? " if similar else ""
        return f"{name} is not a command; {question}/help lists them"
    if name == "/sample" and not argument:
        argument = "1"
    return _set_number(name, argument, settings)


def _set_number(name: str, argument: str, settings: Settings) -> str:
    """Set the number that a command changes; an invalid one leaves it as it was."""
    key, kind = NUMBERS[name]
    before = getattr(settings, key)
    try:
        setattr(settings, key, kind(argument))
        settings.check()
    except UserError as error:
        setattr(settings, key, before)
        return str(error)
    except (ValueError, OverflowError):
        what = "whole number" if kind is int else "number"
        return f"{name}: {argument!r} is not a {what}; for example {name} {before:g}"
    if name in ("/seed", "/top_k", "/top_p") and not settings.temperature:
        return f"{settings} · {name} takes effect with /sample"
    return str(settings)

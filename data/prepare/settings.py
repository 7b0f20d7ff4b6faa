"""Hold what `rlhf data prepare` is asked to do, and read the shares of the parts."""

from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import UserError

TRAINING_PARTS = ("sft", "rm", "ppo")
"""Parts that are trained on, in the order in which they are listed."""
HELD_OUT_PARTS = ("validation", "test")
"""Parts that no stage trains on."""
DOCUMENTS = "documents"
"""The part for documents, which have no prompt and are not split."""
PARTS = (*TRAINING_PARTS, *HELD_OUT_PARTS)
"""Parts that share no user."""
SHARES = {"sft": 13.0, "rm": 33.0, "ppo": 31.0, "validation": 4.0, "test": 4.0}
"""The sizes of InstructGPT's training sets in thousands (arXiv 2203.02155, table 6), and a tenth of
all prompts held out (the paper holds out about a third)."""

Personal = Literal["list", "drop", "mask", "off"]
"""What is done about personal data in the training parts."""


@dataclass(frozen=True)
class Settings:
    """Say what is left out, and how the remainder is split."""

    personal: Personal = "list"
    """What is done about personal data: list it, drop its rows, mask it, or do not look."""
    region: str = "US"
    """The country whose telephone numbers are found without +; "none" for none."""
    per_user: int = 200
    """Prompts kept of a user at most; 0 for any number."""
    prefix: int = 100
    """Characters that a long common prefix has at least; 0: prefixes are not compared."""
    near: float = 0.8
    """The smallest Jaccard index of near copies; 0: near copies are not searched for."""
    drop_leaks: bool = False
    """Whether a prompt that is an evaluation prompt too is left out; otherwise it is an error."""
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))
    """Part → its share of users, relative to the other shares."""


def parse_shares(text: str) -> dict[str, float]:
    """Read shares such as `sft:13,rm:33,ppo:31,validation:4,test:4`; parts not named get none.

    Raises:
        UserError: A part is unknown or named twice, a share is no number from 0 on, or all are 0.
    """
    shares = dict.fromkeys(PARTS, 0.0)
    named = set()
    for item in text.split(","):
        part, _, number = item.strip().partition(":")
        if part not in shares or part in named:
            problem = "is named twice" if part in named else "is no part"
            raise UserError([f"--shares: '{part}' {problem}; use each of {', '.join(PARTS)} at most once"])
        named.add(part)
        try:
            shares[part] = float(number)
        except ValueError:
            raise UserError([f"--shares: '{item.strip()}' has no number; write {part}:10"]) from None
        if not 0 <= shares[part] < float("inf"):
            raise UserError([f"--shares: {part} has the share {number}; use a number from 0 on"])
    if not any(shares.values()):
        raise UserError(["--shares: all shares are 0; give at least one part a share"])
    return shares


def check(settings: Settings) -> None:
    """Check numbers that came from the command line.

    Raises:
        UserError: One is out of its range.
    """
    for flag, value in (("--per-user", settings.per_user), ("--prefix", settings.prefix)):
        if value < 0:
            raise UserError([f"{flag}: {value} is below 0; use 0 to turn it off"])
    if not 0 <= settings.near <= 1:
        raise UserError([f"--near: {settings.near} is no Jaccard index; use a number up to 1, or 0 to turn it off"])

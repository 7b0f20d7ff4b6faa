"""Name the judges of an evaluation, and say which policies each of them cannot judge fairly. Pure.

A judge gives every response a score. `gold` is the embedded world's own scorer; `kept` is a reward
model that learned from rankings kept for judging (`rankings.judge_fraction`), which no policy was
trained on; `reward_model` is the one that PPO maximises and best of n selects by; `held_out` is a
reward model of another seed that learned from the same rankings as it. Others are judges that
`evaluate.judges` names.

The first judge of an evaluation decides: its figures are `win_rate_vs_sft` and `difference_to_sft`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

GOLD = "gold"
KEPT = "kept"
REWARD_MODEL = "reward_model"
HELD_OUT = "held_out"
ORDER = (GOLD, KEPT, REWARD_MODEL, HELD_OUT)
"""The judges, those that are trusted most first."""


@dataclass(frozen=True)
class Judge:
    """A judge, and what is known of it."""

    name: str
    """Its name in results.json, and in `Measured.scores`."""
    climbed: frozenset[str] = frozenset()
    """The policies that were trained to please it, or selected by it."""
    selected: frozenset[str] = frozenset()
    """Those of them that are the best of n samples by it.

    Such a policy wins n / (n + 1) of the comparisons with one sample, however poor the judge is, so
    it gets no win rate."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured of the judge itself, such as its accuracy on held-out pairs."""
    compares: bool = False
    """Whether it compares responses with SFT's, and gives none a score."""

    @property
    def kind(self) -> str:
        """Return `judge` of results.json: "gold", "reward_model", or "judge" for others."""
        if self.name == GOLD:
            return "gold"
        return "reward_model" if self.name in ORDER else "judge"


def deciding_first(judges: Sequence[Judge]) -> list[Judge]:
    """Return judges by how far they are trusted; those of the settings before climbed models.

    A judge of the settings that a policy climbed comes last.
    """

    def distrust(judge: Judge) -> int:
        if judge.name in (GOLD, KEPT):
            return ORDER.index(judge.name)
        if judge.name in ORDER:
            return 10 + ORDER.index(judge.name)
        return 20 if judge.climbed else 5

    return sorted(judges, key=distrust)


def in_order(names: Sequence[str]) -> list[str]:
    """Return judges by how far they are trusted: those of ORDER first, then the others as given."""
    known = [name for name in ORDER if name in names]
    return known + [name for name in names if name not in known]

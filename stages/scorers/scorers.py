"""List the scorers by name."""

from collections.abc import Callable

from stages.scorers.reward_model import RewardModelScorer
from stages.scorers.scorer import Scorer, ScorerSpec

SCORERS: dict[str, Callable[[ScorerSpec], Scorer]] = {"reward_model": RewardModelScorer}

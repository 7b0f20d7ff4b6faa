"""Build scorers from their settings: the factory of each kind stands in one table."""

from collections.abc import Callable

from stages.scorers.judge import JudgeScorer
from stages.scorers.python import PythonScorer
from stages.scorers.reward_model import RewardModelScorer
from stages.scorers.rule import RuleScorer
from stages.scorers.scorer import Scorer, ScorerSpec
from stages.scorers.text_model import TextModelScorer
from stages.scorers.url import UrlScorer
from stages.settings.scorers import judge, model, python, url
from stages.settings.scorers.common import ScorerSection
from stages.settings.scorers.rule import RULES


def make_model_scorer(spec: ScorerSpec) -> Scorer:
    """Return what scores by the loaded reward model; without one, by a model that reads texts."""
    return TextModelScorer(spec) if spec.reward_model is None else RewardModelScorer(spec)


FACTORIES: dict[type[ScorerSection], Callable[[ScorerSpec], Scorer]] = {
    model.ModelScorer: make_model_scorer,
    python.PythonScorer: PythonScorer,
    **dict.fromkeys(RULES.values(), RuleScorer),
    url.UrlScorer: UrlScorer,
    judge.JudgeScorer: JudgeScorer,
}
"""Class of a scorer's settings → what makes the scorer."""


def make_scorer(spec: ScorerSpec) -> Scorer:
    """Return the scorer that settings ask for; a reward model if there are none."""
    if spec.settings is None:
        return RewardModelScorer(spec)
    return FACTORIES[type(spec.settings)](spec)

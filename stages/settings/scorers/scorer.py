"""List the kinds of scorers, and check lists of them.

A scorer is a mapping with exactly one of the keys of `KINDS`, which says what scores, and the
further settings of that kind:

    ppo.rewards: [{model: rm}, {python: reward.py:score, weight: 0.5}]
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Discriminator, Tag

from stages.settings.scorers.common import ScorerSection
from stages.settings.scorers.judge import JudgeScorer
from stages.settings.scorers.model import ModelScorer
from stages.settings.scorers.python import PythonScorer
from stages.settings.scorers.rule import RULES, Rule, RuleSection
from stages.settings.scorers.url import UrlScorer

KINDS: dict[str, type[ScorerSection]] = {
    "model": ModelScorer,
    "python": PythonScorer,
    "url": UrlScorer,
    "judge": JudgeScorer,
    "rule": RuleSection,
}
"""Key that names what scores → the class of its settings."""


def _class_name(given: Any) -> str | None:
    """Return the name of the class of a scorer's settings; pydantic asks for it."""
    if isinstance(given, BaseModel):
        return type(given).__name__
    if "rule" in given:
        return RULES[given["rule"]].__name__
    return next(KINDS[kind].__name__ for kind in KINDS if kind in given)


def _one_kind(given: Any) -> Any:
    """Refuse a value that does not say what scores, or says it twice."""
    if isinstance(given, BaseModel):
        return given
    kinds = " or ".join(KINDS)
    if not isinstance(given, dict):
        raise ValueError(f"should be a mapping with {kinds}, as {{model: rm}}")
    named = [kind for kind in KINDS if kind in given]
    if len(named) != 1:
        found = f"has {' and '.join(named)}" if named else "does not say what scores"
        raise ValueError(f"a scorer {found}; should have exactly one of {', '.join(KINDS)}")
    if named == ["rule"] and given["rule"] not in RULES:
        near = difflib.get_close_matches(str(given["rule"]), RULES, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{given['rule']!r} is no rule; {meant}known are {', '.join(RULES)}")
    return given


Scorer = Annotated[
    Annotated[ModelScorer, Tag("ModelScorer")]
    | Annotated[PythonScorer, Tag("PythonScorer")]
    | Annotated[UrlScorer, Tag("UrlScorer")]
    | Annotated[JudgeScorer, Tag("JudgeScorer")]
    | Rule,
    Discriminator(_class_name),
    BeforeValidator(_one_kind),
]
"""The settings of a scorer of any kind."""


def names_of(scorers: Sequence[ScorerSection]) -> list[str]:
    """Return the name of each scorer: its own, or the one that follows from what it scores by."""
    return [scorer.name or scorer.default_name() for scorer in scorers]


def scorer_problems(key: str, scorers: Sequence[ScorerSection], *, as_judges: bool = False) -> list[str]:
    """Return a line for each mistake in a list of scorers.

    Args:
        key: The setting, as "ppo.rewards".
        scorers: Its value.
        as_judges: Whether they judge side by side, so that each may compare responses and none may
            be dropped; otherwise their scores are added.
    """
    if not scorers:
        return [f"{key}: is an empty list; should have at least one scorer, or be null"]
    lines = []
    for index, scorer in enumerate(scorers):
        lines += scorer.problems(f"{key}[{index}]")
    for name, count in Counter(names_of(scorers)).items():
        if count > 1:
            lines.append(f"{key}: {count} scorers have the name {name!r}; give each a name of its own (name: …)")
    for index, scorer in enumerate(scorers):
        if scorer.compares() and not as_judges:
            lines.append(f"{key}[{index}].mode: pairwise gives no scores, which are needed here; set mode: grade")
        if scorer.may_drop() and as_judges:
            lines.append(f"{key}[{index}].on_failure: drop has no effect on a judge; set stop")
    if all(scorer.may_drop() for scorer in scorers) and not as_judges:
        lines.append(
            f"{key}: every scorer has on_failure: drop, so that nothing might be left to score by; set "
            f"on_failure: stop for one of them"
        )
    return lines


def missing_of_scorers(key: str, scorers: Sequence[ScorerSection]) -> list[str]:
    """Return a line for each thing that the scorers need and this machine lacks.

    Args:
        key: The setting, as "ppo.rewards".
        scorers: Its value.
    """
    return [line for index, scorer in enumerate(scorers) for line in scorer.missing(f"{key}[{index}]")]


def scorer_files(key: str, scorers: Sequence[ScorerSection]) -> dict[str, Path]:
    """Return the files and folders that decide the scores, by the setting that names each.

    Args:
        key: The setting, as "ppo.rewards".
        scorers: Its value.
    """
    files: dict[str, Path] = {}
    for index, scorer in enumerate(scorers):
        files |= scorer.files(f"{key}[{index}]")
    return files


def scorer_stages(scorers: Sequence[ScorerSection]) -> list[str]:
    """Return the stages of this experiment whose models score, each once."""
    return list(dict.fromkeys(stage for scorer in scorers for stage in scorer.stages()))

"""Find the judges of an evaluation, and the policies that each of them cannot judge fairly."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.store import integrity
from stages.evaluation.judges import GOLD, HELD_OUT, KEPT, REWARD_MODEL, Judge, deciding_first
from stages.settings.scorers.common import ScorerSection
from stages.settings.scorers.judge import JudgeScorer
from stages.settings.scorers.model import ModelScorer
from stages.settings.scorers.python import PythonScorer
from stages.settings.scorers.url import UrlScorer

FOLDERS = {REWARD_MODEL: "model", KEPT: "judge/model", HELD_OUT: "held_out/model"}
"""Judge → its folder in the artifact of rm."""
FIGURES = ("accuracy", "accuracy_ci95", "n_pairs", "rankings", "labelers_apart")
"""What is said of a judge beside its verdicts: how often it is right on held-out pairs."""


@dataclass(frozen=True)
class Climbed:
    """The reward models that PPO was trained to please, or whose score chose what it published."""

    own: bool
    """Whether the reward model of rm is among them."""
    others: Sequence[Path] = ()
    """The folders of the others."""
    selector: ScorerSection | None = None
    """What chooses the best of n samples; None: the reward model of rm."""
    labels: Sequence[ScorerSection] = ()
    """The scorers that rank in place of labelers, from which the reward model and DPO learn."""


def judges_of(
    names: Collection[str],
    has_gold: bool,
    rm: Path | None,
    climbed: Climbed,
    rm_figures: dict[str, Any],
    panel: Sequence[Judge] = (),
) -> list[Judge]:
    """Return the judges of an evaluation, the one that decides first.

    Args:
        names: The policies that are compared.
        has_gold: Whether there is a gold scorer, which nothing is trained or selected by.
        rm: The artifact of the stage rm; None without a reward model.
        climbed: What PPO climbed.
        rm_figures: The figures of the stage rm.
        panel: The judges that the settings name.
    """
    judges = {GOLD: Judge(GOLD)} if has_gold else {}
    for name, folder in FOLDERS.items():
        if rm is None or not (rm / folder).is_dir():
            continue
        policies = policies_that_climbed(names, rm / folder, name == REWARD_MODEL, climbed)
        measured = rm_figures if name == REWARD_MODEL else rm_figures.get("judges", {}).get(name, {})
        judges[name] = Judge(
            name,
            climbed=frozenset(policies),
            selected=frozenset(policies & {"best_of_n"}),
            figures={key: measured.get(key) for key in FIGURES},
        )
    return deciding_first([*judges.values(), *panel])


def policies_that_climbed(names: Collection[str], judge: Path, is_own: bool, climbed: Climbed) -> set[str]:
    """Return the policies that were trained to please a judge, or selected by it.

    Best of n is selected by the reward model of rm, or by what the settings name. PPO is trained to
    please that model, or another one, and a copy of a judge is still the judge: so weights are
    compared, not names.

    Args:
        names: The policies that are compared.
        judge: The folder of the judge.
        is_own: Whether the judge is the reward model of rm, not one that rm trained to judge.
        climbed: What PPO climbed.

    Returns:
        The names, out of `names`.
    """
    policies = {"best_of_n"} if is_own and climbed.selector is None else set()
    if climbed.selector is not None:
        chosen = {digest for folder in folders_of(climbed.selector) for digest in _weights(folder)}
        if chosen & _weights(judge):
            policies.add("best_of_n")
    if is_own and climbed.own:
        policies.add("ppo")
    elif climbed.others:
        weights = _weights(judge)
        if any(weights & _weights(folder.expanduser()) for folder in climbed.others):
            policies.add("ppo")
    return policies & set(names)


def judges_of_settings(
    names: Collection[str],
    settings: Mapping[str, ScorerSection],
    rewards: Sequence[ScorerSection],
    rm: Path | None,
    climbed: Climbed,
) -> list[Judge]:
    """Return the judges that the settings name, with the policies that climbed each.

    Args:
        names: The policies that are compared.
        settings: Name → settings of each judge.
        rewards: What PPO was trained to please; reward models are in `climbed`.
        rm: The artifact of the stage rm; None without a reward model.
        climbed: The reward models that PPO climbed.
    """
    rewarded, judges = {identity_of(reward) for reward in rewards}, []
    own = _weights(rm / "model") if rm is not None else set()
    others = {digest for folder in climbed.others for digest in _weights(folder.expanduser())}
    selectors = set() if climbed.selector is None else {identity_of(climbed.selector)}
    labels = {identity_of(label) for label in climbed.labels}
    chosen = own
    if climbed.selector is not None:
        chosen = {digest for folder in folders_of(climbed.selector) for digest in _weights(folder)}
    for name, judge in settings.items():
        policies = {"ppo"} if identity_of(judge) in rewarded else set()
        selected = {"best_of_n"} if identity_of(judge) in selectors else set()
        if identity_of(judge) in labels:  # what learned from its labels was trained to please it, too
            policies.add("dpo")
            policies |= {"ppo"} if climbed.own else set()
            policies |= {"best_of_n"} if climbed.selector is None else set()
        weights = {digest for folder in folders_of(judge) for digest in _weights(folder)}
        if weights & (others | (own if climbed.own else set())):
            policies.add("ppo")
        if weights & chosen:
            selected.add("best_of_n")
        judges.append(
            Judge(
                name,
                climbed=frozenset((policies | selected) & set(names)),
                selected=frozenset(selected & set(names)),
                figures={"what": judge.describe()},
                compares=judge.compares(),
            )
        )
    return judges


def folders_of(settings: ScorerSection) -> list[Path]:
    """Return the folders of the models that a scorer scores by; none for another kind of scorer."""
    return settings.folders() if isinstance(settings, ModelScorer) else []


def identity_of(settings: ScorerSection) -> str:
    """Return what is equal for two scorers that score by the same thing.

    Weights, names and how a server is asked make no difference; of a function its file counts, so
    that a copy is the same.
    """
    if isinstance(settings, JudgeScorer):
        return json.dumps(["judge", settings.base_url, settings.judge])
    if isinstance(settings, UrlScorer):
        return json.dumps(["url", settings.url])
    given = settings.model_dump(mode="json", exclude={"name", "weight"})
    if isinstance(settings, PythonScorer):
        file, function = settings.file_and_function()
        given = {"python": [integrity.sha256_file(file), function]}
    return json.dumps([type(settings).__name__, given], sort_keys=True)


def _weights(folder: Path) -> set[str]:
    """Return the digests of all weight files below a folder."""
    return {integrity.sha256_file(path) for path in folder.rglob("*.safetensors")}

"""Declare the section `rounds`: what `rlhf round next` makes a round of. It is no stage."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.config.section import Section, setting
from stages.settings.peft import peft_of

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

FOLDER = "round"
"""Folder of what was gathered for a round, below an experiment's."""
OLD_RANKINGS = "old_rankings.jsonl"
"""File in it: rankings of the rounds before that train again."""


class OldSettings(Section):
    """Choose how much of what earlier rounds trained on stays; all that is new is taken."""

    demonstrations: float = setting(1.0, "share of the demonstrations of earlier rounds that stay", ge=0, le=1)
    rankings: float = setting(1.0, "share of the rankings of earlier rounds that stay, by prompt", ge=0, le=1)
    prompts: float = setting(1.0, "share of PPO's prompts of earlier rounds that stay", ge=0, le=1)


class RoundsSettings(Section):
    """Choose what the next round is made of, for `rlhf round next`.

    Nothing here is part of a stage's fingerprint.
    """

    demonstrations: float = setting(
        0.0,
        "share of the users whose prompts get demonstrations, which you write, relative to the next two (the paper: "
        "13 to 33 to 31)",
        ge=0,
    )
    rankings: float = setting(33.0, "share of the users whose prompts are ranked", ge=0)
    prompts: float = setting(31.0, "share of the users whose prompts PPO trains on", ge=0)
    old: OldSettings = setting(OldSettings(), "how much of what earlier rounds trained on stays")
    reward_model_from: Literal["sft", "first", "last"] = setting(
        "sft",
        "what the reward model starts as: this round's SFT with a new head (the paper), or the reward model of the "
        "first round or of the last one",
    )
    policy_from: Literal["sft", "last"] = setting(
        "sft",
        "what PPO starts from: this round's SFT (the paper), or the policy of the round before. KL is measured to "
        "this round's SFT either way, so that it does not add up unseen from round to round",
    )
    policy: Literal["ppo", "dpo"] | None = setting(
        None, "whose answers the next round ranks; null: ppo where it is finished, otherwise dpo"
    )
    thumbs: bool = setting(
        False, "whether thumbs of playgrounds become rankings of one response each, which dpo.loss_type kto learns from"
    )
    per_user: int = setting(200, "most prompts that are taken of a user; 0: any number", "prompts", ge=0)
    personal: Literal["list", "drop", "mask", "off"] = setting(
        "drop", "what happens to new rows with personal data, as --pii of `rlhf data prepare`"
    )
    region: str = setting("US", "country whose telephone numbers are found without +; none: none")
    near: float = setting(
        0.8, "smallest Jaccard index of near copies among new prompts; 0: not searched for", ge=0, le=1
    )


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each combination of settings that cannot work."""
    section = experiment.rounds
    lines = []
    if not section.demonstrations + section.rankings + section.prompts:
        lines.append("rounds.prompts: demonstrations, rankings and prompts are all 0; give at least one a share")
    if peft_of(experiment, "rm") is not None and section.reward_model_from != "sft":
        lines.append(f"rounds.reward_model_from: {NO_ADAPTER}; use sft")
    if peft_of(experiment, "ppo") is not None and section.policy_from != "sft":
        lines.append(f"rounds.policy_from: {NO_ADAPTER}; use sft")
    return lines


NO_ADAPTER = "an adapter (model.peft) is trained on this round's SFT, and nothing else"


def start_problems(experiment: "Experiment", stage: str, folder: str | None) -> list[str]:
    """Return a line for each mistake in `start_from` of rm or ppo.

    Args:
        experiment: The validated experiment.
        stage: The stage.
        folder: The setting's value.
    """
    if folder is None:
        return []
    key = f"{stage}.start_from"
    if peft_of(experiment, stage) is not None:
        return [f"{key}: {NO_ADAPTER}; use null"]
    if not (Path(folder).expanduser() / "config.json").is_file():
        what = "reward model" if stage == "rm" else "policy"
        return [f"{key}: {folder} has no config.json; give the model/ folder of a {what}"]
    return []


# -- artifacts of earlier rounds -----------------------------------------------------------------


def artifact(base: Path, stage: str) -> Path | None:
    """Return the folder of a finished stage of an experiment, its own or one that it takes.

    Args:
        base: The experiment's folder.
        stage: The stage.

    Returns:
        None where there is no manifest.
    """
    if (base / stage / "manifest.json").is_file():
        return base / stage
    for path in sorted(base.glob("*/manifest.json")):
        try:
            taken = json.loads(path.read_text(encoding="utf-8"))["config"].get("from") or {}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue
        folder = taken.get(stage, {}).get("folder")
        if folder is not None and (base / folder / "manifest.json").is_file():
            return Path(os.path.normpath(base / folder))
    return None


def measured_files(experiment: "Experiment") -> dict[str, Path]:
    """Return the files of earlier rounds that evaluate measures, by name; none in round 1."""
    if experiment.round is None:
        return {}
    found: dict[str, Path] = {}
    for number, name in enumerate(experiment.round.earlier, 1):
        base = Path(name).expanduser()
        wanted = {
            "rm": ("model",),
            "rankings": ("train.jsonl", "validation.jsonl"),
            "evaluate": ("results.json", "responses.jsonl", "rounds.json"),
        }
        for stage, files in wanted.items():
            folder = artifact(base, stage)
            for file in files:
                if folder is not None and (folder / file).exists():
                    found[f"round {number}: {stage}/{file}"] = folder / file
        if (old := base / FOLDER / OLD_RANKINGS).is_file():
            found[f"round {number}: {OLD_RANKINGS}"] = old
    first = artifact(Path(experiment.round.earlier[0]).expanduser(), "sft")
    if first is not None:
        found["round 1: sft/model"] = first / "model"
    own = Path(experiment.round.folder).expanduser() / OLD_RANKINGS
    if own.is_file():
        found[f"round {experiment.round.number}: {OLD_RANKINGS}"] = own
    return found

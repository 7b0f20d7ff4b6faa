"""Declare the section `rank`: the ranking page that `rlhf rank` serves. It is no stage."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import field_validator

from pipeline.config.section import Section, setting
from stages.settings.checks import folder_context, too_long_for
from stages.settings.rollout import EngineSettings
from stages.settings.training import TooLong

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

FILES = ("answers", "prompts_from", "known", "guidelines", "flags")
"""Settings that name a file."""
AS_RANKINGS = ("response_length", "max_length", "temperature", "top_k", "top_p", "batch_size")
"""Settings whose null stands for the same setting of the section rankings."""


POLICY = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*/)?(?:sft|ppo|dpo)")
"""A policy: a stage, or EXPERIMENT/STAGE."""


class RankSettings(Section):
    """Choose what people rank, who gets which task, and how the page works.

    Nothing of it is in a stage's fingerprint: what people say reaches the chain by data.rankings.
    """

    policies: list[str] = setting(
        ["sft"],
        "finished stages that answer, or EXPERIMENT/STAGE for one of another experiment in the same --artifacts; of "
        "several, each gives its share of a task's answers",
    )
    samples_per_prompt: int = setting(
        6, "K, the number of answers to each prompt (the paper: 4 to 9); identical ones are shown once", ge=2, le=9
    )
    prompts: int | None = setting(
        100, "number of prompts of data.prompts that get a task; null: all. Raise it to append tasks", "prompts", ge=1
    )
    prompts_from: str | None = setting(
        None, "file of prompts that get a task, in the file's order; null: data.prompts, in a random order"
    )
    answers: str | None = setting(
        None,
        "file of answers to rank in place of sampled ones: rankings of any form (judgments in it are not read), rows "
        "{prompt, responses}, or demonstrations, of which those of one prompt are one task",
    )
    temperature: float | None = setting(None, "sampling temperature; null: rankings.temperature", gt=0)
    top_k: int | None = setting(None, "as rankings.top_k; null: that one", "tokens", ge=1)
    top_p: float | None = setting(None, "as rankings.top_p; null: that one", gt=0, le=1)
    response_length: int | None = setting(
        None, "largest length of an answer, EOS included; null: rankings.response_length", "tokens", ge=1
    )
    max_length: int | None = setting(
        None, "largest length of prompt and answer together; null: rankings.max_length", "tokens", ge=8
    )
    on_too_long: TooLong = setting(
        "drop", "what happens to a prompt that leaves no room for an answer; truncate: it is left out too"
    )
    batch_size: int | None = setting(
        None, "number of prompts sampled at a time; null: rankings.batch_size", "prompts", ge=1
    )
    rollout: EngineSettings | None = setting(None, "what samples the answers, as rankings.rollout; null: the policies")
    guidelines: str | None = setting(
        None, "Markdown file that is in view while people rank; null: ours, after InstructGPT's"
    )
    overlap: float = setting(0.15, "share of the tasks that several labelers rank", ge=0, le=1)
    overlap_labelers: int = setting(2, "how many labelers rank each of these", "labelers", ge=2)
    repeat: float = setting(
        0.05, "share of a labeler's tasks that come a second time, to see self-agreement", ge=0, lt=1
    )
    known: str | None = setting(
        None, "file of rankings that are known to be right; some are shown to each labeler, and never train anything"
    )
    known_share: float = setting(0.05, "share of a labeler's tasks that are from `known`", ge=0, lt=1)
    abandon_after: float = setting(
        1800.0, "time without a move after which a task goes to the next labeler", "seconds", gt=0
    )
    likert: bool = setting(
        False, "rate each answer alone first, from 1 to 7 and by yes/no questions, as the paper's tool does"
    )
    flags: str | None = setting(
        None, "YAML file {name: question} of the yes/no questions; null: the paper's list. Only with likert"
    )
    break_every: float = setting(45.0, "work after which the page reminds of a break; 0: never", "minutes", ge=0)
    host: str = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in, without encryption: see the README"
    )
    port: int = setting(0, "port; 0: any free one, the same as last time where that is free", ge=0, le=65535)

    @field_validator("policies")
    @classmethod
    def _known_policies(cls, value: list[str]) -> list[str]:
        """Refuse what is neither a stage nor EXPERIMENT/STAGE."""
        for name in value:
            if not POLICY.fullmatch(name):
                raise ValueError(
                    f"{name} is no policy; use sft, ppo or dpo, or EXPERIMENT/ppo for another experiment's"
                )
        return value


def sampled_as(experiment: "Experiment", name: str) -> float | int | None:
    """Return a setting of sampling: rank's own, or that of the section rankings."""
    assert name in AS_RANKINGS
    own = getattr(experiment.rank, name)
    return getattr(experiment.rankings, name) if own is None else own


def problems(experiment: "Experiment") -> list[str]:
    """Return a line for each setting that cannot work. Only `rlhf rank` needs them to."""
    section = experiment.rank
    lines = []
    for key in FILES:
        name = getattr(section, key)
        if name is not None and not Path(name).expanduser().is_file():
            lines.append(f"rank.{key}: no such file: {name}; correct it, or use null")
    if section.flags is not None and not section.likert:
        lines.append("rank.flags: has no effect without rank.likert: true; set it, or leave flags out")
    if section.repeat + section.known_share >= 1:
        lines.append("rank.repeat: with rank.known_share it leaves no room for new tasks; lower one of them")
    if not section.policies and section.answers is None:
        lines.append("rank.policies: names no policy; name one, such as sft, or give rank.answers")
    if len(set(section.policies)) < len(section.policies):
        lines.append("rank.policies: names a policy twice; name each once")
    if section.answers is not None or not section.policies:
        return lines
    if len(section.policies) > section.samples_per_prompt:
        lines.append(
            f"rank.policies: {len(section.policies)} policies cannot share {section.samples_per_prompt} answers; raise "
            f"rank.samples_per_prompt, or name fewer"
        )
    length, longest = sampled_as(experiment, "response_length"), sampled_as(experiment, "max_length")
    assert isinstance(length, int) and isinstance(longest, int)
    if length >= longest:
        lines.append(
            f"rank.response_length: {length} leaves no room for a prompt in rank.max_length {longest}; lower the first "
            f"or raise the second"
        )
    context = folder_context(experiment.model.name_or_path)
    if experiment.model.name_or_path is None:
        context = experiment.model.max_position_embeddings
    if section.max_length is not None:
        lines += too_long_for(context, section, "rank")
    if experiment.data.prompts is None and section.prompts_from is None:
        lines.append("data.prompts: none is given, and rank samples answers to them; give a file, or set rank.answers")
    return lines

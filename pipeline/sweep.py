"""Expand a sweep: lists of values, one experiment for each combination of them.

An axis is a setting with the values to try, from the section `sweep` of the YAML or from the
command line (`ppo.kl_coef=[0.05,0.1]`, where the setting itself takes no list). Each combination
is a variant: an experiment of its own, whose name holds its values.

No stage is made twice. A stage depends on some of the axes; the experiment whose name holds the
values of just these makes it, and the variants take it from there (`from`). With a sweep of
`ppo.kl_coef` everything before PPO is made by the experiment of the YAML itself; with a sweep of
`ppo.kl_coef` and `seed`, by one experiment for each seed.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from pipeline.chain import closure_of
from pipeline.config.help import fields_of, section_in
from pipeline.config.sections import Common
from pipeline.config.validation import read_name
from pipeline.config.yaml_tree import Tree, parse_tree, read_tree
from pipeline.errors import UserError
from pipeline.fingerprints import all_needs
from pipeline.origin import format_override
from pipeline.stage import Stage
from pipeline.store import integrity
from pipeline.taking import taken_from

MOST = 256
"""Variants of a sweep at most: more are a slip of the pen."""
LONGEST = 40
"""Characters of a value in a name; longer ones are cut, and a digest keeps them apart."""
LONGEST_NAME = 180
"""Characters of a name: file systems take 255 bytes."""
UNSWEPT = ("name", "from", "round", "sweep", "launch", "tracking", "checkpoints")
"""Settings that no finished stage depends on: variants of them would all be the same."""

Values = dict[str, Any]
Load = Callable[[Sequence[str]], Common]


@dataclass(frozen=True)
class Member:
    """Describe an experiment of a sweep: a variant, or one that makes what variants share."""

    name: str
    """Its name."""
    values: Values
    """The value of each axis that it sets, by dotted key."""
    overrides: tuple[str, ...]
    """Settings on top of the YAML, `key=value` each, that make it an experiment of its own."""
    made: tuple[str, ...]
    """The stages that it makes, in order."""
    targets: tuple[str, ...]
    """Those of them that no other one needs: running these makes all."""
    taken: dict[str, str]
    """The stages that it takes, with the name of the experiment that makes each."""
    is_variant: bool
    """Whether it is one of the combinations."""


@dataclass(frozen=True)
class Sweep:
    """Hold a sweep before it is expanded."""

    path: Path
    """The YAML file."""
    axes: dict[str, list[Any]]
    """The values to try of each setting, by dotted key, in the order of the keys."""
    overrides: tuple[str, ...]
    """The other settings of the command line."""


# -- what is swept -------------------------------------------------------------------------------


def find_sweep(path: str | Path, overrides: Sequence[str], experiment_class: type[Common]) -> Sweep | None:
    """Return the sweep that a config and a command line ask for; None for a single experiment.

    A setting that the command line sets to one value is not swept, whatever the YAML says.

    Args:
        path: The YAML file.
        overrides: The settings of the command line, `key=value` each.
        experiment_class: Class of the whole experiment: its types say which settings take lists.

    Raises:
        UserError: If the sweep has a mistake.
    """
    values_of_word = {word: value_of(word) for word in overrides}
    swept_words = [
        word
        for word, value in values_of_word.items()
        if isinstance(value, list) and not takes_list(experiment_class, key_of(word))
    ]
    plain = [word for word in overrides if word not in swept_words]
    tree = read_tree(path, plain)
    in_file = tree.values.get("sweep")
    if not swept_words and not in_file:
        return None
    lines: list[str] = []
    axes: dict[str, list[Any]] = {}
    if isinstance(in_file, dict):
        axes = flatten(in_file, "", tree, lines)
    elif in_file is not None:
        lines.append(f"{tree.origin(('sweep',))}: sweep: should be a mapping of settings to lists of values")
    fixed = {key_of(word) for word in plain}
    axes = {key: values for key, values in axes.items() if key not in fixed}
    axes |= {key_of(word): values_of_word[word] for word in swept_words}
    for key, values in axes.items():
        lines += [f"sweep: {line}" for line in problems_of(key, values)]
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > MOST:
        lines.append(f"sweep: makes {count} experiments; at most {MOST} are made, so give fewer values")
    if lines:
        raise UserError([*tree.problems, *lines])
    if not axes:
        return None
    others = [word for word in plain if key_of(word).split(".")[0] != "sweep"]
    if read_tree(path, others).values.get("sweep"):
        others.append("sweep=null")
    return Sweep(Path(path), dict(sorted(axes.items())), tuple(others))


def key_of(word: str) -> str:
    """Return the dotted key of a setting `key=value`."""
    return word.partition("=")[0]


def value_of(word: str) -> Any:
    """Return the value of a setting `key=value`; None where it cannot be parsed."""
    value: Any = parse_tree("{}", "command line", [word]).values
    for part in key_of(word).split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def flatten(values: Mapping[str, Any], prefix: str, tree: Tree, lines: list[str]) -> dict[str, list[Any]]:
    """Return the axes of the section `sweep`, whose keys may be dotted or nested.

    Args:
        values: The section, or a part of it.
        prefix: Dotted key of the part; "" for the section.
        tree: The parsed config, which knows where a key was written.
        lines: Receives a line for each value that is not a list.
    """
    axes: dict[str, list[Any]] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else name
        if isinstance(value, dict):
            axes |= flatten(value, key, tree, lines)
        elif isinstance(value, list):
            axes[key] = value
        else:
            lines.append(f"{tree.origin(('sweep',))}: sweep.{key}: should be a list of the values to try")
    return axes


def problems_of(key: str, values: list[Any]) -> list[str]:
    """Return a line for each mistake in an axis."""
    if key.split(".")[0] in UNSWEPT:
        return [f"{key}: no finished stage depends on it, so its variants would be the same; sweep another setting"]
    if not values:
        return [f"{key}: the list is empty; give the values to try"]
    texts = [json.dumps(value, sort_keys=True) for value in values]
    same_number = [float(value) for value in values if type(value) in (int, float)]
    if len(set(texts)) < len(texts) or len(set(same_number)) < len(same_number):
        return [f"{key}: a value is listed twice; give each once"]
    return []


def takes_list(experiment_class: type[BaseModel], key: str) -> bool:
    """Return whether a setting takes a list itself; True for one that does not exist."""
    section: type[BaseModel] | None = experiment_class
    *parents, last = key.split(".")
    for part in parents:
        info = fields_of(section).get(part) if section is not None else None
        if info is not None and get_origin(info.annotation) is dict:
            return True  # a key of a free mapping may hold anything
        section = section_in(info.annotation) if info is not None else None
    info = fields_of(section).get(last) if section is not None else None
    return info is None or holds_list(info.annotation)


def holds_list(annotation: Any) -> bool:
    """Return whether a type annotation allows a list."""
    if annotation is Any or annotation in (list, tuple) or get_origin(annotation) in (list, tuple):
        return True
    if get_origin(annotation) is dict:
        return False
    return any(holds_list(part) for part in get_args(annotation))


# -- names ---------------------------------------------------------------------------------------


def name_of(base: str, values: Values) -> str:
    """Return the name of the experiment with these values: `tiny--ppo.kl_coef-0.1--seed-3`.

    The whole key is in it, so that no two sweeps of one YAML give two experiments one name.

    Args:
        base: Name of the YAML's experiment.
        values: The value of each axis that the experiment sets.
    """
    name = "--".join([base, *(f"{key}-{value_text(values[key])}" for key in sorted(values))])
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{integrity.sha256_json([base, values])[:8]}"


def value_text(value: Any) -> str:
    """Return a value in letters, digits, `.`, `_` and `-`."""
    if type(value) in (int, float) and value < 0:
        return f"minus{value_text(-value)}"
    plain = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    text = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("_")
    if type(value) is float and text != plain:  # 1e+16
        return text.replace("_", "")
    is_whole = text == plain and "--" not in text and not text.startswith("minus") and len(text) <= LONGEST
    is_ambiguous = isinstance(value, str) and text in ("null", "true", "false")
    if is_whole and not is_ambiguous:
        return text
    return f"{text[:LONGEST]}-{integrity.sha256_json(value)[:6]}"


# -- who makes what ------------------------------------------------------------------------------


def expand(sweep: Sweep, target: str, load: Load, stages: Mapping[str, Stage]) -> list[Member]:
    """Return the experiments of a sweep, those that make what others take first.

    Args:
        sweep: The sweep.
        target: The stage that every variant brings up to date.
        load: Loads the YAML with some settings on top; raises UserError.
        stages: All stages by name, in order.

    Raises:
        UserError: If a variant is no valid experiment, or if the target does not depend on an axis.
    """
    base = read_name(read_tree(sweep.path, sweep.overrides))
    grid = [dict(zip(sweep.axes, values, strict=True)) for values in itertools.product(*sweep.axes.values())]
    loaded = [load(words_of(sweep, values)) for values in grid]
    keys = axes_of_stages(sweep, target, grid, loaded, load, stages)
    if lines := [line for key in sweep.axes if (line := independent(key, target, keys, stages))]:
        raise UserError(lines)
    user_takes = taken_from(loaded[0])
    made: dict[str, set[str]] = {}
    taken: dict[str, dict[str, str]] = {}
    values_of: dict[str, Values] = {}
    for values, experiment in zip(grid, loaded, strict=True):
        order = closure_of(target, experiment, stages)
        makers = {stage: pick(values, keys[stage]) for stage in order if stage not in user_takes}
        names = {stage: name_of(base, own) for stage, own in makers.items()}
        for stage, own in makers.items():
            values_of.setdefault(names[stage], own)
            made.setdefault(names[stage], set()).add(stage)
            needed = closure_of(stage, experiment, stages)
            others = {need: names[need] for need in needed if need in names and names[need] != names[stage]}
            taken.setdefault(names[stage], {}).update(others)
    members = []
    for name in sorted(made, key=lambda name: len(values_of[name])):  # sorted keeps the order of the grid
        own, borrowed = values_of[name], taken[name]
        experiment = load(words_of(sweep, own))
        needed_by = {need for stage in made[name] for need in all_needs(stages[stage], experiment)}
        in_order = tuple(stage for stage in stages if stage in made[name])
        members.append(
            Member(
                name=name,
                values=own,
                overrides=words_of(sweep, own, "" if name == base else name, borrowed, experiment, list(stages)),
                made=in_order,
                targets=tuple(stage for stage in in_order if stage not in needed_by),
                taken={stage: (user_takes | borrowed)[stage] for stage in stages if stage in user_takes | borrowed},
                is_variant=len(own) == len(sweep.axes),
            )
        )
    for member in members:
        load(member.overrides)
    return members


def pick(values: Values, keys: set[str]) -> Values:
    """Return the values of some axes."""
    return {key: value for key, value in values.items() if key in keys}


def words_of(
    sweep: Sweep,
    values: Values,
    name: str = "",
    taken: Mapping[str, str] | None = None,
    experiment: Common | None = None,
    order: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return the settings on top of the YAML that make one experiment of a sweep.

    Args:
        sweep: The sweep.
        values: The value of each axis that it sets.
        name: Its name; "" keeps the YAML's.
        taken: The stages that it takes, with the experiment that makes each.
        experiment: The experiment without these, whose own `from` is kept.
        order: All stages in order.
    """
    words = [*sweep.overrides, *(f"{key}={format_override(value)}" for key, value in values.items())]
    if name:
        words.append(f"name={name}")
    if taken:
        entries = [] if experiment is None else [entry.model_dump(exclude_none=True) for entry in experiment.taken]
        for maker in dict.fromkeys(taken[stage] for stage in order if stage in taken):
            mine = [stage for stage in order if taken.get(stage) == maker]
            entries.append({"experiment": maker, "stages": mine})
        words.append(f"from={json.dumps(entries)}")
    return tuple(words)


def axes_of_stages(
    sweep: Sweep, target: str, grid: list[Values], loaded: list[Common], load: Load, stages: Mapping[str, Stage]
) -> dict[str, set[str]]:
    """Return the axes that each stage depends on, itself or through what it is made from.

    Whether a stage can be shared is decided by what it would be made of, and not only by where the
    settings stand: if the experiment that should make it would make another one, or is not valid,
    each variant makes the stage itself.
    """
    keys: dict[str, set[str]] = {}
    alone: set[str] = set()  # stages that no experiment shares
    while True:
        keys = {}
        for stage in stages:
            keys[stage] = set(sweep.axes) if stage in alone else set()
            for experiment in loaded:
                keys[stage] |= {key for key in sweep.axes if reads_setting(stages[stage], experiment, key)}
                for need in all_needs(stages[stage], experiment):
                    keys[stage] |= keys[need]
        wrong = set()
        makers: dict[str, Common | None] = {}
        for values, experiment in zip(grid, loaded, strict=True):
            for stage in closure_of(target, experiment, stages):
                own = pick(values, keys[stage])
                text = json.dumps(own, sort_keys=True)
                if text not in makers:
                    makers[text] = load_or_none(load, words_of(sweep, own))
                maker = makers[text]
                if maker is None or made_of(stages[stage], maker) != made_of(stages[stage], experiment):
                    wrong.add(stage)
        if wrong <= alone:
            return keys
        alone |= wrong


def load_or_none(load: Load, words: Sequence[str]) -> Common | None:
    """Return an experiment; None if these settings make no valid one."""
    try:
        return load(words)
    except UserError:
        return None


def reads_setting(stage: Stage, experiment: Common, key: str) -> bool:
    """Return whether the fingerprint of a stage covers a setting."""
    section, _, rest = key.partition(".")
    if section == "data":
        kinds = stage.reads(experiment)
        return bool(kinds) if rest.split(".")[0] in ("validation_fraction", "") else rest.split(".")[0] in kinds
    return section in (stage.name, "model", "seed")


def made_of(stage: Stage, experiment: Any) -> dict[str, Any]:
    """Return all settings that a stage is made of, as plain values to compare."""
    everything = experiment.model_dump(mode="json")
    kinds = list(stage.reads(experiment))
    return {
        "settings": {key: everything.get(key) for key in (stage.name, "model", "seed")},
        "data": {kind: everything["data"][kind] for kind in kinds},
        "validation_fraction": everything["data"]["validation_fraction"] if kinds else None,
        "needs": all_needs(stage, experiment),
        "folders": {key: str(folder) for key, folder in stage.folders(experiment).items()},
        "hub": stage.hub_model(experiment),
    }


def independent(key: str, target: str, keys: Mapping[str, set[str]], stages: Mapping[str, Stage]) -> str:
    """Return a line if a stage does not depend on an axis; "" if it does."""
    if key in keys[target]:
        return ""
    dependent = [stage for stage in stages if key in keys[stage]]
    remedy = f"run {' or '.join(dependent)}" if dependent else "sweep another setting"
    return f"sweep: {key}: {target} does not depend on it, so its variants would be the same; {remedy}"

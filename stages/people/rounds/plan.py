"""Make what the next round is made of: files of data, a config, a record of where they come from.

1  gather     what people gave since, in the pages of all rounds
2  sift       copies, users, personal data, evaluation prompts
3  mix        the new rows beside the share of the old ones that stays
4  write      the rows, the config, round.json
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.records import prompt_key, to_json, write_jsonl
from data.streams import Stream, derive_seed
from pipeline.config.sections import OF_WORLD
from pipeline.config.yaml_tree import read_tree
from pipeline.errors import UserError
from pipeline.store import integrity
from pipeline.store.artifacts import ArtifactStore
from pipeline.taking import taken_from
from stages.people.rounds import old
from stages.people.rounds.config_text import REMOVED, Some, next_text
from stages.people.rounds.gather import GATHERED, KINDS, PAGE, Gathered, Row, gather
from stages.people.rounds.sifting import Sifted, check_packages, keys_of, sift_rows
from stages.settings.rounds import FOLDER, OLD_RANKINGS, artifact

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

RECORD, CONFIG = "round.json", "config.yaml"
NEW_RANKINGS, RANK_PROMPTS, TO_WRITE = "new_rankings.jsonl", "rank_prompts.jsonl", "prompts_to_answer.jsonl"
CHAIN = ("sft", "rankings", "rm")
"""Stages of the round before whose digests are recorded, as far as they exist; and the policy."""


@dataclass(frozen=True)
class Before:
    """The round that the next one follows."""

    experiment: "Experiment"
    """Its validated experiment."""
    store: ArtifactStore
    """Its artifacts."""
    policy: str
    """The stage of its newest policy."""

    @property
    def number(self) -> int:
        """Return the number of the round."""
        return 1 if self.experiment.round is None else self.experiment.round.number

    @property
    def bases(self) -> list[Path]:
        """Return the folders of all rounds so far, the first one first."""
        earlier = [] if self.experiment.round is None else self.experiment.round.earlier
        return [*(Path(name).expanduser() for name in earlier), self.store.base]

    @property
    def next_name(self) -> str:
        """Return the name of the next round's experiment."""
        return re.sub(rf"-r{self.number}$", "", self.experiment.name) + f"-r{self.number + 1}"

    @property
    def next_config(self) -> Path:
        """Return the file of the next round's config, beside this one's."""
        assert self.experiment.file is not None, "loaded from a file"
        return self.experiment.file.path.with_name(f"{self.next_name}.yaml")

    @property
    def next_folder(self) -> Path:
        """Return the folder of what the next round is made of."""
        return self.store.root / self.next_name / FOLDER


@dataclass
class Line:
    """Say what a round takes of one kind of data."""

    kind: str
    """The kind, as people call it."""
    old: int = 0
    """Rows of earlier rounds that stay."""
    old_of: int = 0
    """Rows that earlier rounds had."""
    gathered: int = 0
    """Rows that people gave."""
    new: int = 0
    """Rows of those that are taken."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Why the others are not, and how many."""


@dataclass
class Plan:
    """Hold what the next round is made of."""

    lines: list[Line]
    """A line for each kind of data."""
    to_rank: int
    """Prompts for the next ranking page."""
    to_rank_new: int
    """Those of them that people asked."""
    to_write: int
    """Prompts that somebody should write demonstrations for."""
    config: str
    """The text of the next config."""

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing to train on that the round before had not."""
        return not self.to_rank and not any(line.new for line in self.lines)


def build(before: Before, folder: Path) -> Plan:
    """Write everything that the next round is made of into a folder.

    Args:
        before: The round before.
        folder: An empty folder, which becomes `before.next_folder`.

    Raises:
        UserError: Data are damaged, or settings cannot be met.
    """
    experiment, store = before.experiment, before.store
    settings = experiment.rounds
    gathered = gather(before.bases, settings.thumbs)
    if any(gathered.rows[kind] for kind in KINDS if kind != PAGE):
        check_packages(settings)
    (folder / GATHERED).mkdir()
    for kind, rows in gathered.rows.items():
        if rows:
            write_jsonl(folder / GATHERED / f"{kind}.jsonl", rows)
    records = {
        kind: list(old.read(kind, old.source_in(experiment, store, kind))) for kind in ("demonstrations", "prompts")
    }
    sifted = sift_all(before, folder, gathered, records)
    new_prompts = sifted["prompts"].part("ppo") if experiment.data.prompts is not None else []
    changes, comments = lineage(before)
    data, lines = Some(), []
    for kind, new in (("demonstrations", sifted["demonstrations"].part("sft")), ("prompts", new_prompts)):
        value, line = mixed(before, folder, kind, records[kind], new)
        line.gathered, line.left_out = len(gathered.rows[kind]), sifted[kind].left_out
        lines.append(line)
        if value is not None:
            data[kind] = value
    rankings, line = mixed_rankings(before, folder, gathered, sifted["rankings"])
    lines.insert(1, line)
    data["rankings"] = rankings
    comments["data.rankings"] = "the rounds before, what came since, and (ranked) what people rank on this round's page"
    to_rank, asked = prompts_to_rank(before, gathered, records["prompts"], sifted["prompts"].part("rm"))
    if to_rank:
        write_jsonl(folder / RANK_PROMPTS, to_rank)
    if to_write := sifted["prompts"].part("sft"):
        write_jsonl(folder / TO_WRITE, to_write)
    changes["data"] = Some(world_kinds(experiment) | data)
    changes["from"] = taken(before, remakes_sft="demonstrations" in data)
    changes |= start_changes(before, comments)
    changes["rank"] = Some(
        policies=[policy_name(before)],
        answers=REMOVED,
        prompts_from=str(before.next_folder / RANK_PROMPTS) if to_rank else REMOVED,
    )
    comments["rank.policies"] = f"the newest policy answers: that of round {before.number}"
    plan = Plan(lines, len(to_rank), asked, len(to_write), config_of(before, changes, comments))
    (folder / CONFIG).write_text(plan.config, encoding="utf-8")
    write_record(before, folder, plan)
    return plan


# -- 2 sift --------------------------------------------------------------------------------------


def sift_all(
    before: Before, folder: Path, gathered: Gathered, records: dict[str, list[old.Prompted]]
) -> dict[str, Sifted]:
    """Sift what people gave in playgrounds, kind by kind.

    Args:
        before: The round before.
        folder: The folder of the next round.
        gathered: What people gave.
        records: What the rounds before have, by kind.
    """
    evaluation = old.source_in(before.experiment, before.store, "evaluation_prompts")
    protected = [] if evaluation is None else list(evaluation.parts or (evaluation,))
    known = {kind: keys_of(found) for kind, found in records.items()}
    sifted = {}
    for kind in ("demonstrations", "rankings", "prompts"):
        rows = gathered.rows[kind]
        work = folder / "prepared" / kind
        if rows:
            work.mkdir(parents=True)
        sifted[kind] = sift_rows(kind, rows, work, before.experiment.rounds, protected, known.get(kind, set()))
    return sifted


# -- 3 mix ---------------------------------------------------------------------------------------


def mixed(before: Before, folder: Path, kind: str, records: list[old.Prompted], new: list[Row]) -> tuple[Any, Line]:
    """Write new rows, and old ones if not all stay or they are weighted.

    Args:
        before: The round before.
        folder: The folder of the next round.
        kind: demonstrations or prompts.
        records: What the rounds before have.
        new: The new rows.

    Returns:
        The value of the section data, None if it does not change; and what to say of it.
    """
    experiment, value = before.experiment, getattr(before.experiment.data, kind)
    share = getattr(experiment.rounds.old, kind)
    line = Line(kind, old=len(records), old_of=len(records), new=len(new))
    if not new and (share == 1 or not records):
        return None, line
    parts: list[Any] = []
    if share < 1 or old.is_mixed(value):
        file = f"old_{kind}.jsonl"
        line.old = old.write_share(folder / file, kind, records, share, experiment.seed)
        parts = [str(before.next_folder / file)]
    elif value == "world":
        parts = [str(before.store.folder("world") / f"{kind}.jsonl")]
    elif value is not None:
        own = raw_data(experiment)[kind]  # as the file has it, without defaults
        parts = list(own) if isinstance(own, list) else [own]
    if new:
        write_jsonl(folder / f"new_{kind}.jsonl", new)
        parts.append(str(before.next_folder / f"new_{kind}.jsonl"))
    return parts[0] if len(parts) == 1 else parts, line


def mixed_rankings(before: Before, folder: Path, gathered: Gathered, sifted: Sifted) -> tuple[list[str], Line]:
    """Write the old rankings and the new ones; return the value of data.rankings and a line.

    Args:
        before: The round before.
        folder: The folder of the next round.
        gathered: What people gave.
        sifted: What is left of the comparisons in playgrounds.
    """
    experiment = before.experiment
    place, share = artifact(before.store.base, "rankings"), experiment.rounds.old.rankings
    everything = sum(1 for _ in old.old_rankings(place, 1.0, experiment.seed, set()))
    kept = list(old.old_rankings(place, share, experiment.seed, gathered.gone))
    new = gathered.rows[PAGE] + sifted.part("rm")
    parts = []
    for file, rows in ((OLD_RANKINGS, kept), (NEW_RANKINGS, new)):
        if rows:
            write_jsonl(folder / file, rows)
            parts.append(str(before.next_folder / file))
    count = len(gathered.rows[PAGE]) + len(gathered.rows["rankings"])
    return [*parts, "ranked"], Line("rankings", len(kept), everything, count, len(new), sifted.left_out)


def prompts_to_rank(
    before: Before, gathered: Gathered, records: list[old.Prompted], asked: list[Row]
) -> tuple[list[Row], int]:
    """Return the prompts of the next ranking page in their order, and how many people asked.

    First those that people asked, then those of the round before that nobody has ranked yet, in the
    order of its page.

    Args:
        before: The round before.
        gathered: What people gave.
        records: The prompts of the round before.
        asked: New prompts that fall to ranking.
    """
    experiment = before.experiment
    if experiment.rank.prompts_from is not None:
        source = old.ReaderSource(path=Path(experiment.rank.prompts_from).expanduser())
        left = list(old.read("prompts", source))
    else:
        order = Stream(len(records), derive_seed(experiment.seed, "rank", "prompts")).take(len(records))
        left = [records[i] for i in order]
    ranked = {prompt_key(row["prompt"]) for row in gathered.rows[PAGE]}
    for base in before.bases:
        if (place := artifact(base, "rankings")) is not None:
            for name in (*old.TRAINED, "validation.jsonl"):
                ranked |= {prompt_key(row["prompt"]) for row in old.rows_of(place / name)}
    found = list(asked)
    seen = ranked | {prompt_key(row["prompt"]) for row in asked}
    for record in left:
        if (key := prompt_key(record.prompt)) not in seen:
            seen.add(key)
            found.append(to_json(record))
    return found, len(asked)


# -- 4 the config --------------------------------------------------------------------------------


def raw_data(experiment: "Experiment") -> dict[str, Any]:
    """Return the section data as the config has it."""
    assert experiment.file is not None, "loaded from a file"
    return read_tree(experiment.file.path, experiment.file.overrides).values.get("data") or {}


def world_kinds(experiment: "Experiment") -> dict[str, str]:
    """Return the kinds of data that are the world's only by default.

    The next config must name them, because it has rankings of its own.
    """
    raw = raw_data(experiment)
    return {kind: "world" for kind in OF_WORLD if kind not in raw and getattr(experiment.data, kind) == "world"}


def lineage(before: Before) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the name and the section round of the next config, and their comments."""
    digests = {}
    for stage in (*CHAIN, before.policy):
        if (manifest := before.store.manifest(stage)) is not None:
            digests[stage] = manifest["digest"]
    section = {
        "number": before.number + 1,
        "earlier": [str(base) for base in before.bases],
        "folder": str(before.next_folder),
        "digests": digests,
    }
    said = (
        f"round {before.number + 1}, after {before.experiment.name}: written by `rlhf round next`, and yours to edit. "
        f"Where\nits data come from: {before.next_folder / RECORD}"
    )
    return {"name": before.next_name, "round": section}, {"round": said}


def taken(before: Before, remakes_sft: bool) -> Any:
    """Return the section from: the stages that stay as they are, each from where it was made.

    Args:
        before: The round before.
        remakes_sft: Whether there are other demonstrations.
    """
    stages = [stage for stage in ("world", "base", "sft") if before.store.manifest(stage) is not None]
    if remakes_sft:
        stages = [stage for stage in stages if stage != "sft"]
    origins = taken_from(before.experiment)
    folders = {entry.experiment: entry.artifacts for entry in before.experiment.taken}
    by_origin: dict[str, list[str]] = {}
    for stage in stages:
        by_origin.setdefault(origins.get(stage, before.experiment.name), []).append(stage)
    entries = []
    for name, own in by_origin.items():
        more = {"artifacts": folders[name]} if folders.get(name) is not None else {}
        entries.append({"experiment": name, "stages": own, **more})
    return entries[0] if len(entries) == 1 else entries or REMOVED


def policy_name(before: Before) -> str:
    """Return the newest policy as rank.policies names it."""
    return f"{taken_from(before.experiment).get(before.policy, before.experiment.name)}/{before.policy}"


def start_changes(before: Before, comments: dict[str, str]) -> dict[str, Any]:
    """Return what rm and ppo start from, as the section rounds says.

    Args:
        before: The round before.
        comments: Gets a comment on each.

    Raises:
        UserError: There is no reward model to start from.
    """
    settings, reward_model, policy = before.experiment.rounds, REMOVED, REMOVED
    if settings.reward_model_from != "sft":
        base = before.bases[0] if settings.reward_model_from == "first" else before.store.base
        place = artifact(base, "rm")
        if place is None:
            raise UserError(f"rounds.reward_model_from: {base} has no reward model to start from; use sft")
        reward_model = str(place / "model")
        comments["rm.start_from"] = f"rounds.reward_model_from: {settings.reward_model_from}"
    if settings.policy_from == "last":
        policy = str(before.store.folder(before.policy) / "model")
        comments["ppo.start_from"] = "rounds.policy_from: last; KL is still measured to this round's SFT"
    return {"rm": Some(start_from=reward_model), "ppo": Some(start_from=policy)}


def config_of(before: Before, changes: dict[str, Any], comments: dict[str, str]) -> str:
    """Return the text of the next config."""
    file = before.experiment.file
    assert file is not None, "loaded from a file"
    tree = read_tree(file.path, file.overrides)
    return next_text(file.path.read_text(encoding="utf-8-sig"), tree.values, changes, comments)


def write_record(before: Before, folder: Path, plan: Plan) -> None:
    """Write round.json: where the round comes from, what it took, and the digests of its files."""
    experiment = before.experiment
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    record = {
        "round": before.number + 1,
        "experiment": before.next_name,
        "after": experiment.name,
        "first": before.bases[0].name,
        "policy": policy_name(before),
        "settings": experiment.rounds.model_dump(mode="json"),
        "taken": [{**vars(line), "left_out": dict(sorted(line.left_out.items()))} for line in plan.lines],
        "prompts_to_rank": plan.to_rank,
        "files": {str(path.relative_to(folder)): integrity.sha256_file(path) for path in files},
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet, whole or not at all.

    Raises:
        UserError: There is a file of this name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise UserError(f"{path}: exists; this round was made before, edit that file or move it away") from None
    finally:
        temporary.unlink()


def kinds_of(lines: Sequence[Line]) -> dict[str, Line]:
    """Return the lines by kind."""
    return {line.kind: line for line in lines}

"""Run `rlhf round next`: make the next round of an experiment, and say what it is made of."""

import shlex
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.prepare.folder import whole_folder
from pipeline import api, chain
from pipeline.errors import UserError
from pipeline.store.artifacts import ArtifactStore
from stages.people.rounds.plan import CONFIG, Before, Plan, build, write_new
from stages.settings.policies import compared_policies, has_rankings
from stages.settings.rounds import check

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment


@dataclass(frozen=True)
class Options:
    """The flags of `rlhf round next`."""

    dry_run: bool = False
    """Say what the round would be made of, and write nothing."""
    artifacts: str = "artifacts"
    """The value of --artifacts, for the commands that are printed."""


def run(experiment: "Experiment", store: ArtifactStore, options: Options, console: Any) -> int:
    """Make the next round.

    Args:
        experiment: The validated experiment of the newest round.
        store: Its artifacts.
        options: The flags.
        console: A rich Console.

    Returns:
        The exit code.

    Raises:
        UserError: The round before is not finished, the next one exists, or nothing is new.
    """
    if lines := check(experiment):
        raise UserError(lines)
    if experiment.sweep is not None:
        raise UserError("sweep: a round follows one experiment; copy the config of the variant that you go on with")
    before = Before(experiment, store, finished_policy(experiment, store))
    config, folder = before.next_config, before.next_folder
    if config.exists() and folder.exists():
        raise UserError(
            f"{config}: round {before.number + 1} exists already; go on with it, or move it and {folder} away"
        )
    if config.exists():
        raise UserError(f"{config}: exists, and {folder} does not; move the file away, then this command makes both")
    if options.dry_run:
        with tempfile.TemporaryDirectory() as name:
            plan = build(before, Path(name))
            refuse_empty(before, plan)
        show(before, plan, console)
        say(console, f"dry run: neither {config} nor {folder} is written")
        return 0
    if folder.exists():  # stopped between the two
        write_new(config, (folder / CONFIG).read_text(encoding="utf-8"))
        say(console, f"{config}: written again from {folder}")
    else:
        try:
            with whole_folder(folder, force=False) as temporary:
                plan = build(before, temporary)
                refuse_empty(before, plan)
        except BaseException:
            for empty in (folder.with_name(f".{folder.name}.preparing"), folder.parent):
                with suppress(OSError):  # it holds something
                    empty.rmdir()
            raise
        write_new(config, plan.config)
        show(before, plan, console)
        say(console, f"{config}: the config of round {before.number + 1}, yours to edit; its data are in {folder}")
    for line in next_commands(config, options.artifacts, has_dpo=before.policy == "dpo"):
        say(console, line)
    return 0


def finished_policy(experiment: "Experiment", store: ArtifactStore) -> str:
    """Return the stage of the newest policy.

    Raises:
        UserError: It is not finished, or what was trained is not what the config says today.
    """
    asked = experiment.rounds.policy or ("ppo" if "ppo" in compared_policies(experiment) else "dpo")
    states = chain.assess(experiment, store, api.all_stages())
    needed = ["sft", *(["rankings"] if has_rankings(experiment) else []), asked]
    lines = []
    for stage in needed:
        if states[stage].kind != "done":
            lines.append(
                f"{store.folder(stage)}: this round is not finished: {stage} is {states[stage].sentence()}; "
                f"`rlhf run {asked} -c CONFIG` brings it up to date"
            )
    if lines:
        raise UserError(lines[-1:])
    return asked


def refuse_empty(before: Before, plan: Plan) -> None:
    """Raise UserError if the next round would have nothing new."""
    if plan.is_empty:
        raise UserError(
            f"{before.store.base}: nobody has given anything since, and every prompt has been ranked; people give on "
            f"the pages of `rlhf rank -c CONFIG` and `rlhf playground -c CONFIG`, or add prompts to data.prompts"
        )


def show(before: Before, plan: Plan, console: Any) -> None:
    """Print what the round is made of: a table, and why rows are left out."""
    from rich.table import Table

    table = Table(title=f"round {before.number + 1}: {before.next_name}, after {before.experiment.name}")
    table.title_justify = "left"
    for title in ("", "earlier rounds", "stay", "people gave", "taken", "in all"):
        table.add_column(title, justify="left" if not title else "right")
    for line in plan.lines:
        counts = (line.old_of, line.old, line.gathered, line.new, line.old + line.new)
        table.add_row(line.kind, *(f"{count:,}" for count in counts))
    console.print(table)
    for line in plan.lines:
        for reason, count in line.left_out.most_common():
            say(console, f"{line.kind}: {count:,} left out · {reason}")
    elsewhere = {line.kind: line.gathered - line.new - line.left_out.total() for line in plan.lines}
    if elsewhere["prompts"]:
        say(console, f"prompts: {elsewhere['prompts']:,} go to ranking or demonstrations (rounds.rankings: …)")
    if plan.to_rank:
        old = plan.to_rank - plan.to_rank_new
        say(console, f"to rank: {plan.to_rank_new:,} prompts of people, then {old:,} that nobody has ranked yet")
    if plan.to_write:
        say(
            console,
            f"to write: demonstrations for {plan.to_write:,} prompts: {before.next_folder}/prompts_to_answer.jsonl",
        )


def next_commands(config: Path, artifacts: str, has_dpo: bool) -> list[str]:
    """Return the commands that come next.

    Args:
        config: The next round's config.
        artifacts: The value of --artifacts.
        has_dpo: Whether DPO makes the policy.
    """
    more = f" ARTIFACTS={shlex.quote(artifacts)}" if artifacts != "artifacts" else ""
    steps = [("rank", "people rank what the newest policy answers"), ("rm", "reward model")]
    steps = steps[:1] + [("dpo", "policy")] if has_dpo else [*steps, ("ppo", "policy")]
    steps.append(("report", "with the figures of all rounds"))
    return ["next:", *(f"  make {target} CONFIG={shlex.quote(str(config))}{more}  # {why}" for target, why in steps)]


def say(console: Any, line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)

"""Serve the ranking page to simulated labelers of the embedded world, until all is ranked."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any

from data.world.world import World, labelers
from pipeline.errors import UserError
from pipeline.store.artifacts import ArtifactStore
from stages.people.rank import assign
from stages.people.rank.rules import Rules
from stages.people.rounds.opinions import SimulatedLabeler, names_of
from stages.people.rounds.simulate import SIMULATED, Counts, work
from stages.people.store.database import Database, people_folder
from stages.people.store.rows import Task, read_tasks
from stages.people.web import serving

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

FILE = "simulated.json"
"""What simulated labelers keep over restarts: the key of each browser, and their noise."""
HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where this machine reaches a page that listens on all of its addresses."""
MOST = 100
"""Simulated labelers."""


@dataclass(frozen=True)
class Page:
    """A ranking page that is about to be served."""

    app: Any
    """The ASGI app."""
    listener: socket
    """The bound socket."""
    address: str
    """The address with its token."""
    tell: Callable[[], None]
    """Prints what the page is, once it takes connections."""


def require_world(store: ArtifactStore, count: int) -> None:
    """Raise UserError unless simulated labelers can rank in an experiment.

    Args:
        store: The experiment's artifacts.
        count: How many labelers there are to be.
    """
    if not 1 <= count <= MOST:
        raise UserError(f"--simulate: {count} labelers cannot rank; give a number from 1 to {MOST}")
    if store.manifest("world") is None:
        raise UserError(
            "--simulate: simulated labelers know only the embedded world, and this experiment has none; use "
            "data.prompts: world and `rlhf run world -c CONFIG`, or let people rank"
        )


def serve(
    experiment: "Experiment",
    store: ArtifactStore,
    database: Database,
    rules: Rules,
    page: Page,
    count: int,
    say: Callable[[str], None],
) -> int:
    """Serve a page while simulated labelers rank, and return the exit code 0 when nothing is left.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        database: Its database, with the tasks.
        rules: The rules of the page.
        page: The page.
        count: How many labelers rank.
        say: Prints a line.

    Raises:
        UserError: No task is the world's, or people have ranked here.
        Interrupted: A signal came; run again to go on.
    """
    store.verify("world")
    world = World.from_json(json.loads((store.folder("world") / "world.json").read_text(encoding="utf-8")))
    path = people_folder(store.base) / FILE
    kept = read_kept(path)
    refuse_people(database)
    tasks = world_tasks(world, database)
    noise = kept["noise"] = noise_of(experiment, store, kept, world, tasks, say)
    keep_in = partial(serving.write_private, path, kept)
    keep_in()
    names = names_of(count)
    judges = {
        name: SimulatedLabeler(world, i % len(labelers.LABELERS), name, noise, experiment.seed)
        for i, name in enumerate(names)
    }
    outcome: list[Counts | BaseException] = []
    is_signalled = threading.Event()

    def rank() -> None:
        try:
            outcome.append(work(page.address, judges, kept["keys"], keep_in, is_signalled.is_set, say))
        except BaseException as problem:
            outcome.append(problem)

    thread = threading.Thread(target=rank, name="simulated labelers")

    def start() -> None:
        page.tell()
        say(f"simulate: {', '.join(names)} rank, whose noise is {noise:.4f}; Ctrl-C stops them, and run again to go on")
        thread.start()

    serving.serve(page.app, page.listener, start, is_signalled.set, lambda: bool(outcome))
    thread.join()
    return conclude(outcome[0], database, rules, count, say)


def conclude(
    outcome: Counts | BaseException, database: Database, rules: Rules, count: int, say: Callable[[str], None]
) -> int:
    """Say what simulated labelers have done, or raise what ended them."""
    if isinstance(outcome, BaseException):
        raise outcome
    line = f"simulate: {count} labelers ranked {outcome.ranked:,} tasks in {outcome.moves:,} moves"
    line += f", skipped {outcome.skipped:,}" if outcome.skipped else ""
    line += f"; {outcome.sent_again:,} requests were sent again" if outcome.sent_again else ""
    say(line)
    if wanted := still_wanted(database, rules):
        say(
            f"simulate: {wanted:,} tasks want further labelers, who have not seen them; raise --simulate, or let people"
        )
    return 0


def still_wanted(database: Database, rules: Rules) -> int:
    """Return how many tasks are to be ranked by somebody who has not had them yet."""
    with database.read() as connection:
        tasks = connection.execute("SELECT id FROM tasks WHERE known IS NULL").fetchall()
        return sum(assign.has_room(connection, task["id"], rules) for task in tasks)


# -- what they keep, and their noise -------------------------------------------------------------


def refuse_people(database: Database) -> None:
    """Refuse to add simulated rankings to those of people: nobody could tell them apart later.

    Args:
        database: The experiment's database.

    Raises:
        UserError: Somebody else has ranked.
    """
    with database.read() as connection:
        rows = connection.execute(
            "SELECT DISTINCT labelers.name FROM verdicts JOIN assignments ON assignments.id = verdicts.assignment_id "
            "JOIN labelers ON labelers.id = assignments.labeler_id"
        ).fetchall()
    people = [row["name"] for row in rows if not row["name"].endswith(SIMULATED)]
    if people:
        raise UserError(
            f"--simulate: people have ranked in this experiment ({len(people):,}), and simulated rankings would mix "
            f"with theirs; give the experiment another name, as in name=simulated"
        )


def read_kept(path: Path) -> dict[str, Any]:
    """Return what simulated labelers keep: {"keys": {name: key}, "noise": number or None}.

    Raises:
        UserError: The file holds something else.
    """
    if not path.exists():
        return {"keys": {}, "noise": None}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(kept["keys"], dict) and (kept["noise"] is None or float(kept["noise"]) > 0)):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: is no file of simulated labelers; remove it, and others join") from None
    return kept


def world_tasks(world: World, database: Database) -> list[Task]:
    """Return the tasks that the world's labelers can rank.

    Raises:
        UserError: There is none.
    """
    with database.read() as connection:
        tasks = [task for task in read_tasks(connection).values() if task.known is None]
    known = [task for task in tasks if world.knows(plain_prompt(task))]
    if not known:
        raise UserError(
            f"--simulate: none of the {len(tasks):,} tasks is a request of the embedded world, and simulated labelers "
            f"know no others; let people rank"
        )
    return known


def plain_prompt(task: Task) -> str | None:
    """Return a task's prompt; None for a conversation of several turns."""
    if isinstance(task.prompt, str):
        return task.prompt
    return task.prompt[0]["content"] if len(task.prompt) == 1 else None


def noise_of(
    experiment: "Experiment",
    store: ArtifactStore,
    kept: dict[str, Any],
    world: World,
    tasks: list[Task],
    say: Callable[[str], None],
) -> float:
    """Return the noise of the labelers, who are the same people as before.

    That is the noise with which they ranked here or in the experiment whose world this is, on the
    page or in the stage rankings. Otherwise it is calibrated on the tasks, as that stage does.
    """
    stores = [store, store.taken["world"]] if "world" in store.taken else [store]
    before = [kept["noise"], *(read_kept(people_folder(one.base) / FILE)["noise"] for one in stores[1:])]
    for one in stores:
        manifest = one.manifest("rankings")
        before.append(None if manifest is None else manifest["metrics"].get("noise"))
    for noise in before:
        if noise is not None:
            return float(noise)
    utilities, answers = [], []
    for task in tasks:
        texts, finished = [one.text for one in task.answers], [one.finished for one in task.answers]
        utilities.append(world.labeler_utilities(str(plain_prompt(task)), texts, finished))
        answers.append(list(zip(texts, finished, strict=True)))
    try:
        return labelers.calibrate_noise(utilities, answers, experiment.rankings.agreement)
    except ValueError as problem:
        say(f"simulate: {problem}: they rank without noise")
        return labelers.NO_NOISE

"""Run `rlhf rank`: make tasks, then serve the ranking page."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.errors import UserError
from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore
from stages.people.rank import exports, snapshots
from stages.people.rank.answer_files import read_answer_tasks, read_known_tasks
from stages.people.rank.rules import Flag, Rules
from stages.people.rank.tasks import NewTask, add_task
from stages.people.store.database import Database, open_database, people_folder
from stages.settings.rank import problems

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment
    from stages.settings.rank import RankSettings

HERE = Path(__file__).parent
NAME = "rlhf rank"
MINUTE = 60.0


@dataclass(frozen=True)
class Options:
    """The flags of `rlhf rank`."""

    tasks_only: bool = False
    """Make tasks, and serve nothing."""
    new_tokens: bool = False
    """Make new tokens, so that earlier addresses are worth nothing."""
    snapshot: bool = False
    """Take a snapshot for `data.rankings: ranked`, and serve nothing."""
    export: str | None = None
    """Where to write what people said; nothing is served."""
    to: str = "rankings"
    """In which form."""
    imported: str | None = None
    """A file of rankings to take in; nothing is served."""
    tiers: tuple[str, ...] = ()
    """The buckets of an export of Label Studio, the best first."""
    simulate: int | None = None
    """How many simulated labelers of the embedded world rank, until there is nothing left."""
    trust_remote_code: bool = False
    """Whether code that a model brings may run."""


def run(
    experiment: "Experiment", store: ArtifactStore, options: Options, say: Callable[[str], None], stop: StopFlag
) -> int:
    """Do what the flags say; without any, make tasks and serve the page until a signal.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        options: The flags.
        say: Prints a line.
        stop: Set when a signal arrives while tasks are made.

    Returns:
        The exit code.

    Raises:
        UserError: Something has to be corrected first.
        Interrupted: A signal came while tasks were made, or while simulated labelers ranked.
    """
    if options.snapshot:
        path = snapshots.require(store.base, experiment.name)
        say(f"{path}: data.rankings: ranked reads this from now on")
        return 0
    if options.export is not None or options.imported is not None:
        return move_labels(experiment, store, options, say)
    if lines := problems(experiment):
        raise UserError(lines)
    if options.simulate is not None:
        from stages.people.rounds import simulated_page

        simulated_page.require_world(store, options.simulate)
    rules = rules_of(experiment.rank, experiment.seed)
    people = people_folder(store.base)
    people.mkdir(parents=True, exist_ok=True)
    from stages.people.web.lock import hold

    with hold(people / "rank.lock", NAME):  # before anything is sampled
        database = open_database(store.base, experiment.name)
        try:
            make_tasks(experiment, store, database, stop, say, options.trust_remote_code)
            if options.tasks_only:
                return 0
            return serve(experiment, store, database, rules, options, say)
        finally:
            database.close()


def move_labels(experiment: "Experiment", store: ArtifactStore, options: Options, say: Callable[[str], None]) -> int:
    """Write labels or tasks into files, or take labels in."""
    database = open_database(store.base, experiment.name)
    try:
        if options.imported is not None:
            from stages.people.rank.imports import import_rankings

            path = Path(options.imported).expanduser()
            if not path.is_file():
                raise UserError(f"--import: no such file: {path}; give a file of rankings")
            counts = import_rankings(database, path, options.tiers, time.time())
            for what, number in sorted(counts.items()):
                say(f"{path}: {number:,} rankings {what}")
        if options.export is not None:
            say(exports.export_to(database, options.to, Path(options.export).expanduser()))
    finally:
        database.close()
    return 0


# -- tasks ---------------------------------------------------------------------------------------


def make_tasks(
    experiment: "Experiment",
    store: ArtifactStore,
    database: Database,
    stop: StopFlag,
    say: Callable[[str], None],
    trust_remote_code: bool,
) -> None:
    """Bring the tasks in the database up to date: sampled ones, those of files, known ones.

    Raises:
        UserError: There is no task in the end, or what makes them is missing.
    """
    section = experiment.rank
    if section.known is not None:
        path = Path(section.known).expanduser()
        add_from_file(database, read_known_tasks(path, "rank.known"), "tasks with a known answer", say)
    if section.answers is not None:
        path = Path(section.answers).expanduser()
        add_from_file(database, read_answer_tasks(path, "rank.answers"), "tasks", say)
    else:
        from pipeline.launch.signals import stop_on_signals
        from stages.people.rank.sampling import sample_tasks

        with stop_on_signals(stop):
            sample_tasks(experiment, store, database, stop, say, trust_remote_code)
    with database.read() as connection:
        count = connection.execute("SELECT COUNT(*) FROM tasks WHERE known IS NULL").fetchone()[0]
    if not count:
        raise UserError("rank: there is no task with two different answers; raise rank.temperature or rank.prompts")


def add_from_file(database: Database, tasks: list[NewTask], what: str, say: Callable[[str], None]) -> None:
    """Add the tasks of a file, and say how many are new."""
    counts = {"added": 0, "same": 0, "alike": 0}
    now = time.time()
    with database.transaction() as connection:
        for task in tasks:
            counts[add_task(connection, task, now)] += 1
    line = f"rank: {counts['added']:,} {what} are new, {counts['same']:,} were there"
    line += f"; {counts['alike']:,} rows without two different answers are left out" if counts["alike"] else ""
    say(line)


# -- the page ------------------------------------------------------------------------------------


def rules_of(section: "RankSettings", seed: int) -> Rules:
    """Return the rules of the page that settings and files give.

    Raises:
        UserError: A file cannot be read.
    """
    path = HERE / "guidelines.md" if section.guidelines is None else Path(section.guidelines).expanduser()
    try:
        guidelines = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"rank.guidelines: {path} is not text in UTF-8; save it as such") from None
    return Rules(
        seed=seed,
        overlap=section.overlap,
        overlap_labelers=section.overlap_labelers,
        repeat=section.repeat,
        known_share=section.known_share if section.known is not None else 0.0,
        abandon_after=section.abandon_after,
        break_every=MINUTE * section.break_every,
        likert=section.likert,
        flags=read_flags(section.flags) if section.likert else (),
        guidelines=guidelines,
        guidelines_digest=hashlib.sha256(guidelines.encode()).hexdigest()[:16],
    )


def read_flags(name: str | None) -> tuple[Flag, ...]:
    """Return the yes/no questions of a file; None: the paper's.

    Raises:
        UserError: The file is no mapping from names to questions.
    """
    path = HERE / "flags.yaml" if name is None else Path(name).expanduser()
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"rank.flags: {path} is not YAML ({str(error).splitlines()[0]}); correct it") from None
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, str) and key.strip() and value.strip() and len(key) <= 100
        for key, value in content.items()
    ):
        raise UserError(f"rank.flags: {path} needs lines `name: question`, such as `untrue: Is it untrue?`")
    return tuple(Flag(key, value) for key, value in content.items())


def serve(
    experiment: "Experiment",
    store: ArtifactStore,
    database: Database,
    rules: Rules,
    options: Options,
    say: Callable[[str], None],
) -> int:
    """Serve the page until a signal, or until simulated labelers are done; return the exit code."""
    from stages.people.rank.app import has_lead_page, make_app
    from stages.people.rank.state import RankState
    from stages.people.web import lock, serving
    from stages.people.web.security import Gate

    section, people = experiment.rank, people_folder(store.base)
    tokens = serving.load_tokens(people / "tokens.json", options.new_tokens)
    listener = serving.bind(section.host, section.port, "rank", tokens.port)
    serving.save_tokens(people / "tokens.json", replace(tokens, port=listener.getsockname()[1]))
    address = serving.address_of(listener, section.host)
    lock.note_address(people / "rank.lock", address)
    app = make_app(RankState(experiment.name, database, rules, Gate(tokens.page, tokens.lead)))

    def tell() -> None:
        with database.read() as connection:
            tasks = connection.execute("SELECT COUNT(*) FROM tasks").fetchone()[0]
        say(f"rank: {tasks:,} tasks in {database.path}")
        say(f"people rank at   {address}/?token={tokens.page}")
        if has_lead_page():
            say(f"the lead's page  {address}/lead?token={tokens.lead}")
        if (line := serving.exposed_line(section.host, "rank")) is not None:
            say(line)
        if options.simulate is None:
            say("Ctrl-C stops it; nothing that a page showed as saved is lost, and the addresses stay the same")

    if options.simulate is not None:
        from stages.people.rounds import simulated_page

        here = serving.address_of(listener, simulated_page.HERE.get(section.host, section.host))
        page = simulated_page.Page(app, listener, f"{here}/?token={tokens.page}", tell)
        return simulated_page.serve(experiment, store, database, rules, page, options.simulate, say)
    return serving.serve(app, listener, tell)

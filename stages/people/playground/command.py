"""Run `rlhf playground`: load the policies, serve the page, or export what people shared."""

import json
import time
from pathlib import Path
from typing import Any

from data.records import jsonl_writer
from pipeline.errors import UserError
from pipeline.store.artifacts import ArtifactStore
from stages.people.playground import collect
from stages.people.store.database import Database, open_database, open_existing, people_folder

LOCK = "playground-lock"
TOKENS = "playground-tokens.json"


def run(
    experiment: Any, store: ArtifactStore, console: Any, trust_remote_code: bool = False, new_tokens: bool = False
) -> int:
    """Serve the playground of an experiment until a signal ends it.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        console: A rich Console.
        trust_remote_code: Whether code that a model brings may run.
        new_tokens: Whether earlier addresses are worth nothing from now on.

    Returns:
        The exit code.

    Raises:
        UserError: A setting, a model or the database is wrong, or a playground runs already.
    """
    from stages.people.playground.answering import chosen_policies, load
    from stages.people.playground.engine import Engine
    from stages.people.web import lock, serving
    from stages.tools.chat import engine_of, is_sharded

    settings = experiment.playground
    base = store.base
    policies = chosen_policies(settings.policies, store)
    if is_sharded(experiment) and settings.reward_model == "rm":
        console.print("not scored: each model is sharded, so the reward model may not fit one process", style="dim")
        settings = settings.model_copy(update={"reward_model": None})
        experiment = experiment.model_copy(update={"playground": settings})
    folder = people_folder(base)
    tokens = serving.load_tokens(folder / TOKENS)
    listener = serving.bind(settings.host, settings.port, "playground", last=tokens.port)
    address = serving.address_of(listener, settings.host)
    with listener, lock.hold(folder / LOCK, "rlhf playground"):
        lock.note_address(folder / LOCK, address)
        if new_tokens:  # not before the lock: the addresses of a server that runs stay good
            tokens = serving.load_tokens(folder / TOKENS, renew=True)
        serving.save_tokens(folder / TOKENS, serving.Tokens(tokens.page, tokens.lead, listener.getsockname()[1]))
        database = open_database(base, experiment.name)
        console.print(f"loading {', '.join(policies)}", style="dim", highlight=False)
        loaded = load(experiment, store, policies, settings.engine or engine_of(experiment), trust_remote_code)
        engine = Engine(loaded.answerers, loaded.devices, settings.max_queue)
        try:
            app = make_app(experiment, store, engine, database, tokens.page, loaded.is_scored)

            def say() -> None:
                if line := serving.exposed_line(settings.host, "playground"):
                    console.print(line, style="yellow", highlight=False, soft_wrap=True)
                say_address(console, address, tokens.page, list(policies))

            return serving.serve(app, listener, say, engine.close)
        finally:
            engine.close()
            loaded.close()
            database.close()


def make_app(
    experiment: Any, store: ArtifactStore, engine: Any, database: Database, token: str, is_scored: bool
) -> Any:
    """Return the app of an experiment's playground.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        engine: Answers questions.
        database: Keeps what people share.
        token: Opens the page and the interface.
        is_scored: Whether there is a reward model.
    """
    from stages.people.playground import app
    from stages.people.playground.openai import Api
    from stages.people.playground.requests import Defaults
    from stages.people.playground.waiting import Limits
    from stages.people.web.security import Gate

    settings = experiment.playground
    length = settings.max_tokens or experiment.evaluate.response_length
    defaults = Defaults(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_tokens=min(length, settings.max_tokens_limit),
        max_tokens_limit=settings.max_tokens_limit,
    )
    limits = Limits(settings.max_per_user)
    manifests = {name: store.manifest(name) for name in engine.policies}
    fingerprints = {name: f"fp_{found['digest'][:12]}" for name, found in manifests.items() if found is not None}
    state = app.State(
        engine=engine,
        database=database,
        gate=Gate(token, largest_body=app.LARGEST_BODY),
        defaults=defaults,
        limits=limits,
        experiment=experiment.name,
        is_scored=is_scored,
        consent=settings.consent,
        kinds=list(settings.kinds),
    )
    return app.make_app(state, Api(engine, token, defaults, fingerprints, limits, int(time.time())))


def say_address(console: Any, address: str, token: str, policies: list[str]) -> None:
    """Print where the page is, and what other clients need."""
    lines = [
        f"playground: {address}/?token={token}",
        f"for clients of OpenAI's interface: OPENAI_BASE_URL={address}/v1 OPENAI_API_KEY={token}",
        f"models: {', '.join(policies)} · Ctrl-C ends it",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def export(experiment: Any, store: ArtifactStore, folder: Path, console: Any) -> int:
    """Write what people shared as files of rows: prompts, rankings, demonstrations, thumbs.

    A file of an earlier export is replaced; without rows it becomes empty, and a new one is not
    made. Any other file is left alone: the names are those that people give their own data.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        folder: Where the files go.
        console: A rich Console.

    Returns:
        The exit code.

    Raises:
        UserError: Nobody has shared anything, or the folder has files of these names that are no
            export, or cannot be written.
    """
    database = open_existing(store.base, experiment.name)
    if database is None:
        raise UserError(f"{people_folder(store.base)}: nobody has said anything yet; start `rlhf playground -c CONFIG`")
    try:
        with database.read() as connection:
            found = collect.trees(connection)
            rows = {name: make_rows(found) for name, make_rows in collect.EXPORTS.items()}
    finally:
        database.close()
    if not any(rows.values()):
        raise UserError(f"{database.path}: nobody has shared a conversation yet; there is nothing to export")
    folder.mkdir(parents=True, exist_ok=True)
    for name in rows:
        if not is_export(path := folder / f"{name}.jsonl"):
            raise UserError(f"{path}: exists, and no playground has written it; give another folder")
    for name, some in rows.items():
        path = folder / f"{name}.jsonl"
        if not some and not path.exists():
            continue
        with jsonl_writer(path) as write:
            for row in some:
                write(row)
        console.print(f"{path}: {len(some)} rows", highlight=False, soft_wrap=True)
    return 0


def is_export(path: Path) -> bool:
    """Return whether a file may be replaced: it is not there, is empty, or an export wrote it."""
    if not path.exists():
        return True
    with path.open("rb") as lines:
        first = lines.readline()
    try:
        return not first.strip() or json.loads(first).get("source") == collect.ORIGIN
    except (ValueError, AttributeError):
        return False

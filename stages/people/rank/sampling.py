"""Sample answers of finished policies and make tasks of them, where an interruption costs little.

Each policy's answers are kept in a file of their own until all policies have answered. Tasks that
are in the database already are not sampled again, so that a second run appends what is new.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import sources
from data.records import as_messages
from data.streams import Stream, derive_seed
from pipeline.errors import Interrupted, UserError
from pipeline.launch import environment
from pipeline.stage import Source, StopFlag
from pipeline.store.artifacts import ArtifactStore
from stages.people.rank.tasks import Given, NewTask, add_task
from stages.people.store.database import Database
from stages.settings.checks import reader_source
from stages.settings.rank import AS_RANKINGS, sampled_as

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

SAY_EVERY = 5.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Asked:
    """A prompt that is to be answered."""

    prompt: str | tuple[dict, ...]
    """The prompt."""
    place: str
    """Where it stands, for error lines."""
    kind: str | None
    """What sort of prompt it is."""
    user_id: str | None
    """Who wrote it."""
    request: str
    """Digest of the prompt, the policies and how they are sampled."""


@dataclass(frozen=True)
class Sampling:
    """How one policy is sampled."""

    policy: str
    """The stage."""
    digest: str
    """Digest of its artifact."""
    samples: int
    """Answers to each prompt."""
    seed: int
    """The experiment's seed."""
    response_length: int
    """The longest answer in tokens, EOS included."""
    max_length: int
    """The longest prompt and answer together, in tokens."""
    temperature: float
    """Sampling temperature."""
    top_k: int | None
    """Draw only from so many of the likeliest tokens; None: from all."""
    top_p: float | None
    """Draw only from the likeliest tokens of this probability; None: from all."""

    @property
    def shown(self) -> dict[str, Any]:
        """Return what the database keeps of it for each answer."""
        return {key: value for key, value in asdict(self).items() if key not in ("policy", "samples")}

    def digest_of_all(self) -> str:
        """Return a digest of everything that decides the answers, apart from the prompts."""
        return digest_of(asdict(self))


def digest_of(content: Any) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()[:32]


def samplings_of(experiment: "Experiment", store: ArtifactStore) -> list[Sampling]:
    """Return how each policy is sampled; its artifact is verified.

    Raises:
        UserError: A policy is not finished.
    """
    section, found = experiment.rank, []
    count, policies = section.samples_per_prompt, section.policies
    for number, policy in enumerate(policies):
        home, stage = home_of(store, policy)
        manifest = home.manifest(stage)
        if manifest is None:
            config = "CONFIG" if home is store else f"the config of {home.base.name}"
            remedy = f"`rlhf run {stage} -c CONFIG` makes it".replace("CONFIG", config)
            raise UserError(f"rank.policies: {policy} is not finished; {remedy}, or name other stages")
        home.verify(stage)
        own: dict[str, Any] = {key: sampled_as(experiment, key) for key in AS_RANKINGS if key != "batch_size"}
        share = count // len(policies) + (number < count % len(policies))
        found.append(Sampling(policy, manifest["digest"], share, experiment.seed, **own))
    return found


def home_of(store: ArtifactStore, policy: str) -> tuple[ArtifactStore, str]:
    """Return the artifacts that hold a policy, and its stage.

    Args:
        store: The artifacts of this experiment.
        policy: As `rank.policies` names it: a stage, or EXPERIMENT/STAGE.
    """
    experiment, slash, stage = policy.rpartition("/")
    if not slash or experiment == store.base.name:
        return store, stage
    return ArtifactStore(store.root, experiment, is_foreign=True), stage


def prompts_source(experiment: "Experiment", store: ArtifactStore) -> Source:
    """Return where the experiment's prompts are.

    Raises:
        UserError: They are the world's, and the stage world is not finished.
    """
    from pipeline.fingerprints import source_of

    if experiment.rank.prompts_from is not None:
        return Source(path=Path(experiment.rank.prompts_from).expanduser())
    value = experiment.data.prompts
    assert value is not None, "checked before"
    source = source_of(value)
    if source.path is None and source.hub is None and not source.parts:
        if store.manifest("world") is None:
            raise UserError("data.prompts: the world's prompts are not written yet; run `rlhf run world -c CONFIG`")
        store.verify("world")
        return replace(source, path=store.folder("world") / "prompts.jsonl")
    return source


def asked_prompts(experiment: "Experiment", store: ArtifactStore, samplings: Sequence[Sampling]) -> list[Asked]:
    """Return the prompts that get a task, in an order that more prompts continue."""
    records, places = sources.load_placed("prompts", reader_source(prompts_source(experiment, store)))
    count = min(len(records), experiment.rank.prompts or len(records))
    made_of = [sampling.digest_of_all() for sampling in samplings]
    found = []
    for i in order_of(experiment, len(records))[:count]:
        record = records[i]
        request = digest_of([as_messages(record.prompt), made_of])
        found.append(Asked(record.prompt, places[i], record.kind, record.user_id, request))
    return found


def order_of(experiment: "Experiment", count: int) -> list[int]:
    """Return the order in which prompts get a task: that of rank.prompts_from, or a random one.

    Args:
        experiment: The validated experiment.
        count: The number of prompts.
    """
    if experiment.rank.prompts_from is not None:
        return list(range(count))
    return Stream(count, derive_seed(experiment.seed, "rank", "prompts")).take(count)


def known_requests(database: Database) -> set[str]:
    """Return the requests that were answered before, also those that made no task."""
    with database.read() as connection:
        rows = connection.execute("SELECT json_extract(source, '$.request') AS request FROM tasks").fetchall()
        none = connection.execute("SELECT substr(key, 6) AS request FROM meta WHERE key LIKE 'none:%'").fetchall()
    return {row["request"] for row in [*rows, *none]}


def sample_tasks(
    experiment: "Experiment",
    store: ArtifactStore,
    database: Database,
    stop: StopFlag,
    say: Callable[[str], None],
    trust_remote_code: bool = False,
) -> None:
    """Sample what is missing, and add it to the database.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        database: What gets the tasks.
        stop: Set when the command is asked to stop.
        say: Prints a line.
        trust_remote_code: Whether code that a model brings may run.

    Raises:
        UserError: A policy or the prompts are missing.
        Interrupted: A signal came; what was sampled is kept.
    """
    samplings = samplings_of(experiment, store)
    asked = asked_prompts(experiment, store, samplings)
    done = known_requests(database)
    missing = [one for one in asked if one.request not in done]
    if not missing:
        say(f"rank: {len(asked):,} prompts have been answered before; more: rank.prompts")
        return
    one_node = experiment.launch.model_copy(update={"nodes": 1})  # the page runs here, whatever the stages do
    environment.prepare(experiment.model_copy(update={"launch": one_node}))
    folder = database.path.parent / "sampling"
    folder.mkdir(exist_ok=True)
    files = [folder / f"{one.policy.replace('/', '-')}-{one.digest_of_all()}.jsonl" for one in samplings]
    answers: dict[str, list[Given]] = {}
    for sampling, file in zip(samplings, files, strict=True):
        sample_policy(experiment, store, sampling, file, missing, stop, say, trust_remote_code)
        for request, given in read_answers(file, sampling).items():
            answers.setdefault(request, []).extend(given)
    added, alike, dropped = add_tasks(database, missing, answers, samplings, round_of(experiment))
    for file in files:
        file.unlink()
    line = f"rank: {added:,} tasks are new"
    line += f"; {alike:,} prompts got only identical answers and make no task" if alike else ""
    line += f"; {dropped:,} prompts are too long (rank.max_length)" if dropped else ""
    say(line)


def round_of(experiment: "Experiment") -> int:
    """Return the number of the experiment's round."""
    return 1 if experiment.round is None else experiment.round.number


def add_tasks(
    database: Database,
    asked: Sequence[Asked],
    answers: dict[str, list[Given]],
    samplings: Sequence[Sampling],
    round_number: int = 1,
) -> tuple[int, int, int]:
    """Add tasks in one transaction; return how many were added, alike, and left out."""
    counts = {"added": 0, "same": 0, "alike": 0, "dropped": 0}
    policies = {sampling.policy: {"digest": sampling.digest, **sampling.shown} for sampling in samplings}
    now = time.time()
    with database.transaction() as connection:
        for one in asked:
            given = answers.get(one.request)
            if given is None:
                counts["dropped"] += 1
                remember(connection, one, "too long")
                continue
            prompt = one.prompt if isinstance(one.prompt, str) else list(one.prompt)
            source = {"request": one.request, "policies": policies}
            task = NewTask(prompt, tuple(given), one.kind, one.user_id, source=source, round=round_number)
            outcome = add_task(connection, task, now)
            counts[outcome] += 1
            if outcome != "added":
                remember(connection, one, outcome)
    return counts["added"], counts["alike"], counts["dropped"]


def remember(connection: sqlite3.Connection, asked: Asked, why: str) -> None:
    """Note that a prompt makes no task, so that it is not sampled again."""
    connection.execute("INSERT OR IGNORE INTO meta VALUES(?, ?)", (f"none:{asked.request}", why))


def read_answers(file: Path, sampling: Sampling) -> dict[str, list[Given]]:
    """Return the answers in a policy's file by request; a line that was cut off does not count."""
    found: dict[str, list[Given]] = {}
    if not file.exists():
        return found
    for line in file.read_bytes().split(b"\n")[:-1]:
        row = json.loads(line)
        found[row["request"]] = [
            Given(text, finished, sampling.policy, sampling.shown)
            for text, finished in zip(row["texts"], row["finished"], strict=True)
        ]
    return found


def sample_policy(
    experiment: "Experiment",
    store: ArtifactStore,
    sampling: Sampling,
    file: Path,
    asked: Sequence[Asked],
    stop: StopFlag,
    say: Callable[[str], None],
    trust_remote_code: bool,
) -> None:
    """Let one policy answer the prompts that its file has no answers to yet."""
    before = read_answers(file, sampling)
    if file.exists():  # without the line that a kill cut off
        whole = file.read_bytes()
        file.write_bytes(whole[: whole.rfind(b"\n") + 1])
    left = [one for one in asked if one.request not in before]
    if not left:
        return
    say(f"rank: sampling {sampling.samples} answers of {sampling.policy} to {len(left):,} prompts")
    said, done = time.monotonic(), 0
    with file.open("ab") as handle:
        for rows in answer_batches(experiment, store, sampling, left, stop, say, trust_remote_code):
            for row in rows:
                handle.write(json.dumps(row).encode() + b"\n")
            handle.flush()
            done += len(rows)
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                say(f"rank: {sampling.policy} has answered {done:,} of {len(left):,} prompts")


def answer_batches(
    experiment: "Experiment",
    store: ArtifactStore,
    sampling: Sampling,
    asked: Sequence[Asked],
    stop: StopFlag,
    say: Callable[[str], None],
    trust_remote_code: bool,
) -> Iterator[list[dict[str, Any]]]:
    """Yield rows {request, texts, finished}, some prompts at a time.

    Raises:
        Interrupted: A signal came.
    """
    from data.encode import decode_response
    from stages.models.loading import load_policy, load_tokenizer
    from stages.models.packing import can_pack
    from stages.rollouts.engine import SampleRequest
    from stages.settings.checks import context_of, too_long_for
    from stages.settings.rollout import EngineSettings
    from stages.shared.engines import engine_spec, make_frozen_sampler
    from stages.shared.inputs import LengthLimit, fit_prompts
    from stages.shared.runtime import Runtime, device_of, dtype_of, place_frozen, with_accelerator
    from stages.training.batching import micro_batches

    home, stage = home_of(store, sampling.policy)
    folder = home.folder(stage) / "model"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if lines := too_long_for(context_of(config), experiment.rank.model_copy(update=lengths_of(sampling)), "rank"):
        raise UserError(lines)
    model = experiment.model
    runtime = with_accelerator(
        Runtime(
            device=device_of(experiment),
            dtype=dtype_of(experiment),
            attention=model.attn_implementation,
            sharded=False,
            gradient_checkpointing=False,
            trust_remote_code=trust_remote_code,
        )
    )
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    policy = place_frozen(partial(load_policy, folder, **runtime.load_options()), runtime, sampling.max_length)
    can_pack(policy, sampling.max_length)  # lets the sampler compute each prompt once for all of its samples
    limit = LengthLimit(sampling.max_length, experiment.rank.on_too_long, "rank")
    prompts, places = [one.prompt for one in asked], [one.place for one in asked]
    kept, ids, _ = fit_prompts(tokenizer, prompts, places, limit, sampling.response_length)

    size = int(sampled_as(experiment, "batch_size") or 1)
    rollout = experiment.rank.rollout or EngineSettings()
    spec = engine_spec(
        rollout.engine,
        folder,
        runtime,
        experiment.launch,
        work=store.base / "people" / "sampling",
        pad_id=tokenizer.pad_token_id,
        max_length=sampling.max_length,
        batch_size=size * sampling.samples,
    )
    engine = make_frozen_sampler("rank", rollout, spec, say)

    def poll() -> None:
        if stop.requested:
            raise Interrupted()

    try:
        for start in range(0, len(kept), size):
            batch = [(asked[kept[i]], ids[i]) for i in range(start, min(start + size, len(kept)))]
            seeds = [
                derive_seed(sampling.seed, "rank", sampling.policy, one.request, k)
                for one, _ in batch
                for k in range(sampling.samples)
            ]
            request = SampleRequest(
                prompts=[prompt for _, prompt in batch for _ in range(sampling.samples)],
                seeds=seeds,
                samples_per_prompt=sampling.samples,
                response_length=sampling.response_length,
                temperature=sampling.temperature,
                eos_id=tokenizer.eos_token_id,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
            )
            flat = engine.sample(sampling.policy, policy, request, len(seeds), poll)
            yield [
                {
                    "request": one.request,
                    "texts": [decode_response(tokenizer, response) for response in responses],
                    "finished": [response[-1] == tokenizer.eos_token_id for response in responses],
                }
                for (one, _), responses in zip(batch, micro_batches(flat, sampling.samples), strict=True)
            ]
    finally:
        engine.close()


def lengths_of(sampling: Sampling) -> dict[str, int]:
    """Return the lengths with the values that null stands for."""
    return {"max_length": sampling.max_length, "response_length": sampling.response_length}

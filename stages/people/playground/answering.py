"""Load the policies and the reward model, and let a policy answer piece by piece.

Everything that samples and scores is what `rlhf chat` uses: the same seed and settings give the
same text there, here, and to any client of the interface.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.launch import devices
from pipeline.store.artifacts import ArtifactStore
from stages.people.playground.engine import Answerer, Emit, Piece, Question, Reply, Unanswerable
from stages.people.playground.streaming import TextStream, cut_at_stop
from stages.settings.checks import context_of
from stages.tools.chat_commands import Settings
from stages.tools.chat_speakers import (
    Judge,
    Speaker,
    context_of_speaker,
    find_model,
    fit_query,
    load_judge,
    load_speakers,
    request_of,
    score_answer,
    too_long,
)

if TYPE_CHECKING:
    from stages.evaluation.forms import Answer, Query
    from stages.rollouts.engine import SampleRequest

DEFAULT = ("sft", "ppo", "dpo")
"""Stages whose policies answer where the settings name none."""


class Done(Exception):
    """Report that a stop text has come, so that nothing more needs to be sampled."""


@dataclass(frozen=True)
class Loaded:
    """Policies in memory."""

    answerers: dict[str, Answerer]
    """Name → what answers."""
    devices: dict[str, str]
    """Name → the device it is on."""
    is_scored: bool
    """Whether there is a reward model."""
    close: Callable[[], None]
    """Ends engines in other processes."""


def chosen_policies(names: Sequence[str] | None, store: ArtifactStore) -> dict[str, Path]:
    """Return the policies that answer, with their folders.

    Args:
        names: Stages or folders, as the settings name them; None for those that are published.
        store: The experiment's artifacts.

    Raises:
        UserError: One is no policy, or none is published; or two would have one name.
    """
    if names is None:
        names = [stage for stage in DEFAULT if store.manifest(stage) is not None]
        if not names:
            raise UserError(
                f"playground.policies: none of {', '.join(DEFAULT)} is published; run one, such as "
                f"`rlhf run sft -c CONFIG`, or name a folder"
            )
    try:
        folders = [find_model(name, store) for name in names]
    except UserError as error:
        raise UserError(str(error).replace("--models:", "playground.policies:")) from None
    chosen: dict[str, Path] = {}
    for name, folder in zip(names, folders, strict=True):
        shown = name if folder != Path(name) else folder.resolve().name  # a path is no name for the world outside
        if shown in chosen:
            raise UserError(f"playground.policies: two policies are called {shown}; rename one folder")
        chosen[shown] = folder
    return chosen


def load(
    experiment: Any, store: ArtifactStore, policies: dict[str, Path], engine: str, trust_remote_code: bool
) -> Loaded:
    """Load policies and the reward model, one policy after the other onto the devices in turn.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        policies: Name → folder.
        engine: "transformers" or "vllm".
        trust_remote_code: Whether code that a model brings may run.

    Raises:
        UserError: A folder is no policy, or does not fit; or there is no such reward model.
    """
    from transformers.utils import logging

    from stages.shared.runtime import device_of, dtype_of

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype, kind = dtype_of(experiment), device_of(experiment)
    places_here = [f"cuda:{i}" for i in range(devices.count(kind))] if kind == "cuda" else [kind]
    speakers, places = [], {}
    try:
        if engine == "vllm":
            # each vLLM divides its model as launch.vllm says, so each is a device of its own
            speakers = load_speakers(experiment, list(policies), list(policies.values()), trust_remote_code, engine)
            places = {name: f"vllm:{name}" for name in policies}
        else:
            for index, (name, folder) in enumerate(policies.items()):
                (speaker,) = load_speakers(experiment, [name], [folder], trust_remote_code, engine)
                places[name] = places_here[index % len(places_here)]
                speaker.model.to(places[name])
                speakers.append(speaker)
    except UserError as error:
        raise UserError(str(error).replace("--models:", "playground.policies:")) from error
    judge = judge_of(experiment, store, trust_remote_code)
    if judge is not None:
        judge.model.to(places_here[len(speakers) % len(places_here)])
    judging = threading.Lock()  # the policies' threads share it
    answerers = {speaker.name: make_answerer(speaker, judge, judging, dtype) for speaker in speakers}

    def close() -> None:
        for speaker in speakers:
            if speaker.engine is not None:
                speaker.engine.close()

    return Loaded(answerers, places, judge is not None, close)


def judge_of(experiment: Any, store: ArtifactStore, trust_remote_code: bool) -> Judge | None:
    """Load the reward model that playground.reward_model names; None without one."""
    name = experiment.playground.reward_model
    if name is None:
        return None
    if name == "rm":
        return load_judge(experiment, store, trust_remote_code)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise UserError(f"playground.reward_model: {name} is no folder of a model; use rm, a folder, or null")
    return load_judge(experiment, store, trust_remote_code, folder)


def make_answerer(speaker: Speaker, judge: Judge | None, judging: threading.Lock, dtype: str) -> Answerer:
    """Return what answers questions to a policy.

    Args:
        speaker: The policy.
        judge: The reward model, or None.
        judging: Held while the reward model scores.
        dtype: "float32", "bfloat16" or "float16", which products are computed in.
    """

    def answer(question: Question, emit: Emit, poll: Callable[[], None]) -> Reply:
        options, context = question.options, context_of_speaker(speaker)
        query, chat_ids, forgotten = read(speaker, question, context)
        settings = Settings(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
            max_new_tokens=options.max_tokens,
        )
        turn = sum(message["role"] == "user" for message in question.messages)
        request = request_of(query, settings, turn, context)
        stops = [*options.stop, *([query.stop] if query.stop else [])]
        stream = TextStream(lambda ids: speaker.tokenizer.decode(ids, skip_special_tokens=True), stops)

        def watch(index: int, token: int) -> None:
            if piece := stream.push(token):
                emit(Piece(piece))
            if stream.stopped:
                raise Done

        sampled = sample(speaker, request, dtype, poll, watch)
        reply = parse(speaker, query, sampled, options.stop)
        score = None
        if question.scored and judge is not None and fits(judge, speaker, chat_ids, reply.response):
            asked = conversation_of(question, forgotten)
            with judging:
                score = score_answer(judge, speaker, asked, chat_ids, reply.response, reply.finished, dtype)
        if piece := stream.finish(reply.text):
            emit(Piece(piece))
        return Reply(reply.text, reply.finished, len(reply.sampled), len(query.ids), score, forgotten)

    return answer


def read(speaker: Speaker, question: Question, context: int) -> tuple["Query", list[int], int]:
    """Return a question as its policy reads it: see `fit_query`.

    Raises:
        Unanswerable: It is too long, or the chat template refuses it.
    """
    messages = list(question.messages)
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    room = question.options.max_tokens if question.forgets else 0
    try:
        query, chat_ids, forgotten = fit_query(speaker, system, turns, room)
    except UserError as error:
        raise Unanswerable(" ".join(str(error).split())) from None
    if len(query.ids) >= context or (forgotten and not question.forgets):
        code = "context_length_exceeded"
        if question.forgets:
            raise Unanswerable(too_long(len(query.ids), context), code)
        raise Unanswerable(f"the conversation has more tokens than the context of {context:,}; shorten it", code)
    return query, chat_ids, forgotten


def sample(
    speaker: Speaker, request: "SampleRequest", dtype: str, poll: Callable[[], None], watch: Callable[[int, int], None]
) -> list[int]:
    """Return a policy's response to the only prompt of a request, as token ids.

    Args:
        speaker: The policy.
        request: Prompt, seed and limits.
        dtype: "float32", "bfloat16" or "float16", which products are computed in.
        poll: Is called before each token; what it raises ends the sampling.
        watch: Is called with 0 and each token; if it raises Done, that token is the last one. A
            vLLM gives its answer whole, and calls neither.

    Raises:
        EngineLost: The policy's vLLM fails.
    """
    if speaker.engine is not None:
        return speaker.engine.engine.sample(request).responses[0]
    from stages.models.precision import casting
    from stages.rollouts.transformers import decoding_of, sample_with_logprobs

    ids: list[int] = []

    def keep(index: int, token: int) -> None:
        ids.append(token)
        watch(index, token)

    kind, decoding = speaker.model.device.type, decoding_of(request, speaker.tokenizer.pad_token_id, 1)
    with casting(kind, dtype), suppress(Done):
        sample_with_logprobs(speaker.model, request.prompts, request.seeds, decoding, poll, keep)
    return ids


def parse(speaker: Speaker, query: "Query", sampled: list[int], stops: Sequence[str]) -> "Answer":
    """Return the answer in sampled ids, up to the first of some stop texts.

    Args:
        speaker: The policy.
        query: What it read.
        sampled: What it answered.
        stops: Texts that the request says end an answer.
    """
    from stages.evaluation.forms import parse_answer

    answer = parse_answer(speaker.tokenizer, query, sampled)
    cut = cut_at_stop(speaker.tokenizer.decode(sampled, skip_special_tokens=True), stops)
    return answer if cut is None else replace(answer, text=cut.strip(), finished=True)


def conversation_of(question: Question, forgotten: int) -> list[dict]:
    """Return the messages of a question that its policy read.

    Args:
        question: The question.
        forgotten: How many of the oldest questions, with their answers, were left out.
    """
    system = [message for message in question.messages if message["role"] == "system"]
    turns = [message for message in question.messages if message["role"] != "system"]
    return [*system, *turns[2 * forgotten :]]


def fits(judge: Judge, speaker: Speaker, chat_ids: list[int], response: list[int]) -> bool:
    """Return whether a conversation with its answer fits the reward model's context.

    Of a reward model with another tokenizer that is known only once it has read the text.
    """
    from stages.models.ensemble import members
    from stages.models.same_tokenizer import tokenizer_fingerprint

    if judge.tokenizer_fingerprint != tokenizer_fingerprint(speaker.tokenizer):
        return True
    context = context_of(members(judge.model)[0].config.to_dict())
    return context is None or len(chat_ids) + len(response) <= context

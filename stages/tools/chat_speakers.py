"""Load the policies of a chat and their judge, and let a policy answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.store.artifacts import ArtifactStore
from stages.settings.checks import context_of

if TYPE_CHECKING:
    from stages.evaluation.forms import Query
    from stages.rollouts.engine import SampleRequest
    from stages.scorers.text_reader import TextReader
    from stages.tools.chat_commands import Settings
    from stages.tools.chat_engines import ChatEngine

POLICIES = ("base", "sft", "ppo", "dpo")
UNBOUNDED = 10**9
"""The context of a model whose config.json names none."""


@dataclass
class Speaker:
    """A policy in conversation."""

    name: str
    """The stage or the folder, as the user named it."""
    model: Any
    """The policy, on its device; None if an engine samples."""
    tokenizer: Any
    """Its tokenizer."""
    history: list[dict] = field(default_factory=list)
    """Its own turns so far, as messages."""
    form: str = "chat"
    """How it is prompted (`evaluation/forms.py`)."""
    engine: "ChatEngine | None" = None
    """What samples in place of the model; it holds the same policy."""
    context: int | None = None
    """The most tokens of a conversation, where an engine samples."""


@dataclass(frozen=True)
class Judge:
    """The experiment's reward model, which scores as the stage evaluate does."""

    model: Any
    """The reward model, on its device."""
    tokenizer_fingerprint: str
    """The fingerprint of its tokenizer."""
    missing_eos_score: float | None
    """The score of an answer that was cut off; None leaves the reward model's own score."""
    reader: "TextReader"
    """How it reads the answers of policies with another tokenizer."""


@dataclass(frozen=True)
class Answer:
    """A policy's answer to a question, or why there is none."""

    text: str
    """The answer."""
    tokens: int = 0
    """Its length in tokens."""
    finished: bool = True
    """Whether it ended by itself, before the length limit."""
    score: float | None = None
    """The judge's score; None without one."""
    problem: str = ""
    """Why there is no answer."""
    forgotten: int = 0
    """How many of the oldest turns were dropped because the context was full."""


def find_model(name: str, store: ArtifactStore) -> Path:
    """Return the model folder of a stage, whose artifact is verified, or of a path.

    Args:
        name: A stage, or a folder.
        store: The experiment's artifacts.

    Raises:
        UserError: There is no such policy.
    """
    if name in POLICIES:
        store.verify(name)
        return store.folder(name) / "model"
    if (Path(name) / "config.json").is_file():
        return Path(name)
    what = "is a reward model, which scores but does not answer" if name == "rm" else "is not a policy"
    published = ", ".join(stage for stage in POLICIES if store.manifest(stage) is not None)
    raise UserError(
        f"--models: {name} {what}; use a published stage "
        f"({published or 'none yet: `rlhf run sft -c CONFIG` makes one'}) or a folder with config.json"
    )


def load_speakers(
    experiment: Any, names: Sequence[str], folders: Sequence[Path], trust_remote_code: bool, engine: str
) -> list[Speaker]:
    """Load the policies that answer, here or in vLLM.

    Args:
        experiment: The validated experiment.
        names: The policies as the user named them.
        folders: Their model folders.
        trust_remote_code: Whether code that a model brings may run.
        engine: "transformers" or "vllm".

    Raises:
        UserError: A folder is not a policy with a chat template; it does not fit on the device; or
            vLLM does not start.
    """
    from torch import OutOfMemoryError

    from stages.evaluation.forms import form_of_base
    from stages.models.adapters import share_frozen
    from stages.models.loading import load_policy, load_tokenizer
    from stages.models.precision import frozen
    from stages.shared.runtime import device_of, dtype_of
    from stages.tools.chat_engines import room_of, start_engines

    device, attention = device_of(experiment), experiment.model.attn_implementation
    speakers = []
    for name, folder in zip(names, folders, strict=True):
        model = None
        try:
            if engine == "transformers":
                model = load_policy(folder, attn_implementation=attention, trust_remote_code=trust_remote_code)
                model = frozen(model, dtype_of(experiment)).to(device)
                share_frozen(model, [speaker.model for speaker in speakers])  # embeddings, where adapters were trained
            tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        except UserError:
            raise
        except OutOfMemoryError as error:
            raise UserError(
                f"--models: {name} does not fit on one GPU beside what is there; use --engine vllm, which divides it "
                f"among launch.vllm.tensor_parallel_size GPUs"
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(
                f"--models: {folder} cannot be loaded ({str(error).splitlines()[0]}); use a folder that "
                f"AutoModelForCausalLM can load"
            ) from None
        if tokenizer.chat_template is None:
            raise UserError(
                f"--models: the tokenizer in {folder} has no chat template; use a policy of this project, or an "
                f"instruct model"
            )
        form = "chat"
        if name == "base":
            form = form_of_base(experiment.evaluate.base_prompt, experiment.model.name_or_path)
        speakers.append(Speaker(name, model, tokenizer, form=form))
    if engine == "vllm":  # last: the mistakes above are found before it starts
        engines = start_engines(experiment, names, folders, trust_remote_code)
        for speaker, own, folder in zip(speakers, engines, folders, strict=True):
            speaker.engine, speaker.context = own, room_of(experiment, folder)
    return speakers


def load_judge(
    experiment: Any, store: ArtifactStore, trust_remote_code: bool, folder: Path | None = None
) -> Judge | None:
    """Load a reward model as the judge.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        trust_remote_code: Whether code that a model brings may run.
        folder: A reward model's folder; None: the experiment's own reward model.

    Returns:
        The judge; None if no folder is given and the stage rm is not published.
    """
    if folder is None and store.manifest("rm") is None:
        return None
    from stages.models.ensemble import load_reward_model, members
    from stages.models.loading import load_tokenizer
    from stages.models.precision import frozen
    from stages.models.same_tokenizer import tokenizer_fingerprint
    from stages.scorers.text_reader import TextReader
    from stages.shared.runtime import device_of, dtype_of

    evaluate = experiment.evaluate
    if folder is None:
        store.verify("rm")
        folder = store.folder("rm") / "model"
    model = load_reward_model(
        folder,
        evaluate.reward_ensemble,
        attn_implementation=experiment.model.attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    reader = TextReader(tokenizer, context_of(members(model)[0].config.to_dict()), "error")
    model = frozen(model, dtype_of(experiment)).to(device_of(experiment))
    return Judge(model, tokenizer_fingerprint(tokenizer), evaluate.missing_eos_score, reader)


def reply(speaker: Speaker, text: str, settings: "Settings", turn: int, dtype: str, judge: Judge | None) -> Answer:
    """Let a policy answer a question.

    Question and answer are added to the policy's history. Where the context is full, its oldest
    turns are dropped.

    Args:
        speaker: The policy.
        text: The question.
        settings: How answers are sampled.
        turn: The number of the question; every turn samples with another seed.
        dtype: "float32", "bfloat16" or "float16", which products are computed in.
        judge: Scores the answer; None scores nothing.

    Returns:
        The answer.
    """

    from stages.evaluation.forms import parse_answer
    from stages.rollouts.engine import EngineLost

    tokenizer, context = speaker.tokenizer, context_of_speaker(speaker)
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    question = {"role": "user", "content": text}
    past = speaker.history if settings.memory else []
    try:
        query, chat_ids, forgotten = fit_query(speaker, system, [*past, question], settings.max_new_tokens)
    except UserError as error:  # the chat template takes no system message
        remedy = ", or /system without a text" if system else ""
        return Answer("", problem=f"{error}{remedy}")
    del past[: 2 * forgotten]
    if len(query.ids) >= context:
        return Answer("", problem=too_long(len(query.ids), context))
    request = request_of(query, settings, turn, context)
    try:
        sampled = sample_answer(speaker, request, dtype)
    except EngineLost as lost:
        return Answer("", problem=f"{lost}; start chat again")
    answer = parse_answer(tokenizer, query, sampled)
    score = score_answer(judge, speaker, [*system, *past, question], chat_ids, answer.response, answer.finished, dtype)
    speaker.history += [question, {"role": "assistant", "content": answer.text}]
    return Answer(answer.text, len(answer.sampled), answer.finished, score, forgotten=forgotten)


def context_of_speaker(speaker: Speaker) -> int:
    """Return the most tokens of a conversation with a policy."""
    if speaker.engine is not None:
        return speaker.context or UNBOUNDED
    return context_of(speaker.model.config.to_dict()) or UNBOUNDED


def too_long(tokens: int, context: int) -> str:
    """Return the sentence for a question that leaves no room for an answer."""
    return f"the question has {tokens} tokens, and the context only {context}; ask something shorter"


def fit_query(
    speaker: Speaker, system: list[dict], turns: list[dict], max_new_tokens: int
) -> tuple["Query", list[int], int]:
    """Write a conversation as a policy reads it, without its oldest turns where they do not fit.

    Args:
        speaker: The policy.
        system: The system message, or nothing.
        turns: Questions and answers in turn; the last one is a question.
        max_new_tokens: Tokens to leave for the answer.

    Returns:
        The query; the ids of the same conversation through the chat template, for the judge; how
        many questions with their answers were left out.

    Raises:
        UserError: The chat template refuses the conversation.
    """
    from data.encode import encode_prompt
    from stages.evaluation.forms import make_query

    context, forgotten = context_of_speaker(speaker), 0
    query = make_query(speaker.tokenizer, speaker.form, [*system, *turns])
    while len(query.ids) + max_new_tokens > context and len(turns) > 2:
        turns = turns[2:]
        forgotten += 1
        query = make_query(speaker.tokenizer, speaker.form, [*system, *turns])
    chat_ids = query.ids
    if speaker.form != "chat":
        chat_ids = encode_prompt(speaker.tokenizer, [*system, *turns])
    return query, chat_ids, forgotten


def request_of(query: "Query", settings: "Settings", turn: int, context: int) -> "SampleRequest":
    """Return the request for an answer to a query.

    Args:
        query: The query, which leaves room in the context.
        settings: How answers are sampled.
        turn: The number of the question; every turn samples with another seed.
        context: The most tokens of a conversation.
    """
    from data.streams import derive_seed
    from stages.rollouts.engine import SampleRequest

    return SampleRequest(
        prompts=[query.ids],
        seeds=[derive_seed(settings.seed, "chat", turn)],
        samples_per_prompt=1,
        response_length=min(settings.max_new_tokens, context - len(query.ids)),
        temperature=settings.temperature,
        eos_id=query.end_id,
        top_k=settings.top_k or None,
        top_p=settings.top_p,
    )


def sample_answer(speaker: Speaker, request: "SampleRequest", dtype: str) -> list[int]:
    """Return a policy's response to the only prompt of a request, as token ids.

    Args:
        speaker: The policy.
        request: Prompt, seed and limits.
        dtype: "float32", "bfloat16" or "float16", which products are computed in.

    Raises:
        EngineLost: The policy's vLLM fails.
    """
    if speaker.engine is not None:
        return speaker.engine.sample(request)
    from functools import partial

    from stages.models.precision import casting
    from stages.rollouts.engine import EngineSpec
    from stages.rollouts.transformers import TransformersEngine

    device = speaker.model.device
    spec = EngineSpec(
        model=Path(),
        scratch=Path(),
        log=Path(),
        device=device,
        dtype=dtype,
        autocast=partial(casting, device.type, dtype),
        pad_id=speaker.tokenizer.pad_token_id,
        max_length=UNBOUNDED,
        batch_size=1,
        timeout=0.0,
    )
    engine = TransformersEngine(spec)
    engine.start(speaker.model, lambda: None)
    return engine.sample(request, lambda: None).responses[0]


def score_answer(
    judge: Judge | None,
    speaker: Speaker,
    conversation: list[dict],
    chat_ids: list[int],
    response: list[int],
    finished: bool,
    dtype: str,
) -> float | None:
    """Score an answer; None without a judge, or where one with another tokenizer cannot read it.

    Args:
        judge: The reward model, or None. One with another tokenizer reads the text.
        speaker: The policy that answered.
        conversation: The messages up to the question.
        chat_ids: The ids of the conversation through the chat template.
        response: The answer's ids.
        finished: Whether the answer ended by itself.
        dtype: "float32", "bfloat16" or "float16", which products are computed in.
    """
    import torch

    from data.encode import decode_response
    from data.groups import make_rows
    from stages.models.forward import response_scores
    from stages.models.precision import casting
    from stages.models.same_tokenizer import tokenizer_fingerprint
    from stages.objectives.rewards import final_scores

    if judge is None:
        return None
    prompts, responses, pad_id = [chat_ids], [response], speaker.tokenizer.pad_token_id
    if judge.tokenizer_fingerprint != tokenizer_fingerprint(speaker.tokenizer):
        try:
            text = decode_response(speaker.tokenizer, response)
            prompts, responses = judge.reader.encode([conversation], [(text, finished)])
        except UserError:  # too long, or its chat template refuses the conversation
            return None
        pad_id = judge.reader.tokenizer.pad_token_id
    device = next(judge.model.parameters()).device
    rows = make_rows(prompts, responses, pad_id).to(device)
    with torch.no_grad(), casting(device.type, dtype):
        raw = response_scores(judge.model, rows).float().cpu()
    return final_scores(raw, torch.tensor([finished]), judge.missing_eos_score).item()

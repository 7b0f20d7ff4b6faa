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
    from stages.tools.chat_commands import Settings

POLICIES = ("base", "sft", "ppo", "dpo")
UNBOUNDED = 10**9
"""The context of a model whose config.json names none."""
LIKELIEST = 1e-9
"""A top_p that keeps only the likeliest token."""


@dataclass
class Speaker:
    """A policy in conversation."""

    name: str
    """The stage or the folder, as the user named it."""
    model: Any
    """The policy, on its device."""
    tokenizer: Any
    """Its tokenizer."""
    history: list[dict] = field(default_factory=list)
    """Its own turns so far, as messages."""
    form: str = "chat"
    """How it is prompted (`evaluation/forms.py`)."""


@dataclass(frozen=True)
class Judge:
    """The experiment's reward model, which scores as the stage evaluate does."""

    model: Any
    """The reward model, on its device."""
    tokenizer_fingerprint: str
    """The fingerprint of its tokenizer. A policy with another tokenizer is not scored."""
    missing_eos_score: float | None
    """The score of an answer that was cut off; None leaves the reward model's own score."""


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
    experiment: Any, names: Sequence[str], folders: Sequence[Path], trust_remote_code: bool
) -> list[Speaker]:
    """Load the policies that answer.

    Args:
        experiment: The validated experiment.
        names: The policies as the user named them.
        folders: Their model folders.
        trust_remote_code: Whether code that a model brings may run.

    Raises:
        UserError: A folder is not a policy with a chat template.
    """
    from stages.evaluation.forms import form_of_base
    from stages.models.loading import load_policy, load_tokenizer
    from stages.shared.runtime import device_of

    device, attention = device_of(experiment), experiment.model.attn_implementation
    speakers = []
    for name, folder in zip(names, folders, strict=True):
        try:
            model = load_policy(folder, attn_implementation=attention, trust_remote_code=trust_remote_code)
            tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        except UserError:
            raise
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
        speakers.append(Speaker(name, model.to(device), tokenizer, form=form))
    return speakers


def load_judge(experiment: Any, store: ArtifactStore, trust_remote_code: bool) -> Judge | None:
    """Load the experiment's reward model; None if the stage rm is not published."""
    if store.manifest("rm") is None:
        return None
    from stages.models.ensemble import load_reward_model
    from stages.models.loading import load_tokenizer
    from stages.models.same_tokenizer import tokenizer_fingerprint
    from stages.shared.runtime import device_of

    store.verify("rm")
    folder, evaluate = store.folder("rm") / "model", experiment.evaluate
    model = load_reward_model(
        folder,
        evaluate.reward_ensemble,
        attn_implementation=experiment.model.attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return Judge(model.to(device_of(experiment)), tokenizer_fingerprint(tokenizer), evaluate.missing_eos_score)


def reply(speaker: Speaker, text: str, settings: "Settings", turn: int, dtype: str, judge: Judge | None) -> Answer:
    """Let a policy answer a question.

    Question and answer are added to the policy's history. Where the context is full, its oldest
    turns are dropped.

    Args:
        speaker: The policy.
        text: The question.
        settings: How answers are sampled.
        turn: The number of the question; every turn samples with another seed.
        dtype: "float32" or "bfloat16", which products are computed in.
        judge: Scores the answer; None scores nothing.

    Returns:
        The answer.
    """
    import torch

    from data.encode import encode_prompt
    from data.streams import derive_seed
    from stages.evaluation.forms import make_query, parse_answer
    from stages.rollouts.transformers import Decoding, sample

    model, tokenizer, forgotten = speaker.model, speaker.tokenizer, 0
    context = context_of(model.config.to_dict()) or UNBOUNDED
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    question = {"role": "user", "content": text}
    past = speaker.history if settings.memory else []

    def query_now() -> "Query":
        return make_query(tokenizer, speaker.form, [*system, *past, question])

    try:
        query = query_now()
        while len(query.ids) + settings.max_new_tokens > context and past:
            del past[:2]  # a question and its answer
            forgotten += 1
            query = query_now()
        chat_ids = query.ids
        if speaker.form != "chat":
            chat_ids = encode_prompt(tokenizer, [*system, *past, question])
    except UserError as error:  # the chat template takes no system message
        remedy = ", or /system without a text" if system else ""
        return Answer("", problem=f"{error}{remedy}")
    room = min(settings.max_new_tokens, context - len(query.ids))
    if room < 1:
        problem = f"the question has {len(query.ids)} tokens, and the context only {context}; ask something shorter"
        return Answer("", problem=problem)
    decoding = Decoding(
        response_length=room,
        eos_id=query.end_id,
        pad_id=tokenizer.pad_token_id,
        temperature=settings.temperature or 1.0,
        top_k=(settings.top_k or None) if settings.temperature else None,
        top_p=settings.top_p if settings.temperature else LIKELIEST,
    )
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        sampled = sample(model, [query.ids], [derive_seed(settings.seed, "chat", turn)], decoding)[0]
        answer = parse_answer(tokenizer, query, sampled)
        score = score_answer(judge, speaker, chat_ids, answer.response, answer.finished)
    speaker.history += [question, {"role": "assistant", "content": answer.text}]
    return Answer(answer.text, len(answer.sampled), answer.finished, score, forgotten=forgotten)


def score_answer(
    judge: Judge | None, speaker: Speaker, chat_ids: list[int], response: list[int], finished: bool
) -> float | None:
    """Score an answer; None without a judge, or if the judge has another tokenizer."""
    import torch

    from data.groups import make_rows
    from stages.models.forward import response_scores
    from stages.models.same_tokenizer import tokenizer_fingerprint
    from stages.objectives.rewards import final_scores

    if judge is None or judge.tokenizer_fingerprint != tokenizer_fingerprint(speaker.tokenizer):
        return None
    rows = make_rows([chat_ids], [response], speaker.tokenizer.pad_token_id).to(speaker.model.device)
    raw = response_scores(judge.model, rows).float().cpu()
    return final_scores(raw, torch.tensor([finished]), judge.missing_eos_score).item()

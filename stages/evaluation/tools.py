"""Load the policies that are measured and the models that measure them, one at a time."""

import gc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.config.sections import LaunchSettings
from pipeline.launch import devices
from stages.evaluation.forms import Answer
from stages.evaluation.judges import HELD_OUT, KEPT, REWARD_MODEL, in_order
from stages.evaluation.selecting import Selector
from stages.models.ensemble import load_reward_model
from stages.models.loading import load_policy, load_scalar_model, load_tokenizer
from stages.models.packing import can_pack
from stages.models.precision import require_finite
from stages.objectives.rewards import final_scores
from stages.rollouts.frozen import FrozenSampler
from stages.scorers.reward_model import RewardModelScorer
from stages.scorers.scorer import ScoreRequest, ScorerSpec
from stages.scorers.text_reader import TextReader, text_reader_of
from stages.settings.evaluate import STAGES, EvaluateSettings
from stages.settings.rollout import EngineSettings
from stages.shared.engines import engine_spec, make_frozen_sampler
from stages.shared.runtime import Runtime, can_pack_rows, place_frozen
from stages.training.session import Session


@dataclass(frozen=True)
class Policy:
    """A policy that is being measured."""

    name: str
    """Its name in results.json."""
    model: Any
    """The model, on its device; with fsdp2, this process's shard of it."""

    @property
    def weights(self) -> str:
        """Return the name of the policy whose weights these are: best of n samples from SFT."""
        return "sft" if self.name == "best_of_n" else self.name


class OneModel:
    """Hold one model, the last that was asked for: the one before is freed before it is loaded.

    Nobody else may keep a model that was taken from here while another one is taken.
    """

    def __init__(self) -> None:
        self.key: Hashable = None
        self.model: Any = None

    def take(self, key: Hashable, load: Callable[[], Any]) -> Any:
        """Return a model: the one that is held if it has this key, otherwise loaded now.

        Args:
            key: What tells it from other models.
            load: Loads it onto the device.
        """
        if self.model is None or self.key != key:
            self.drop()
            self.key, self.model = key, load()
        return self.model

    def drop(self) -> None:
        """Free the model that is held."""
        self.key = self.model = None
        free_memory()


@dataclass(frozen=True)
class Tools:
    """Hold the tokenizer, and load the policies, their reference and the judges."""

    tokenizer: Any
    """SFT's tokenizer, which all policies share."""
    accelerator: Any
    """accelerate's Accelerator: device and autocast."""
    load: Callable[[Path], Any]
    """Load the policy in a folder onto the device."""
    load_scalar: Callable[[Path], Any]
    """Load the reward model in a folder onto the device."""
    folders: dict[str, Path]
    """The model folder of each policy."""
    reference_folder: Path
    """The folder of the policy that KL, and PPO's penalty, is measured against."""
    judges: dict[str, Callable[[], Any]]
    """How the reward models that judge are loaded, by name; {} if the experiment trains none."""
    packs: Callable[[Any], bool]
    """Whether a model reads packed rows; a line says where one does not."""
    sharded: bool
    """Whether each process holds a shard of the models, so that passes take all processes."""
    batch_size: int
    """Rows in a forward pass."""
    max_length: int
    """Tokens in the longest row."""
    missing_eos_score: float | None
    """Score of a response without EOS; None leaves the reward model's own score."""
    one: OneModel = field(default_factory=OneModel)
    """The model that is on the device."""
    sampler: FrozenSampler | None = None
    """What samples the policies' responses; None as long as the longest prompt is not known."""
    selector: Selector | None = None
    """What chooses the best of n samples; None: the reward model."""
    text_reader: TextReader | None = None
    """How the reward models read texts, where their tokenizer is not the policies'."""
    asked: Mapping[tuple[int, ...], Any] = field(default_factory=dict)
    """Ids of a prompt through the chat template → the prompt, as far as the reward models read
    texts."""

    def with_asked(self, chat_ids: Sequence[list[int]], prompts: Sequence[Any]) -> "Tools":
        """Return the tools with more prompts that reward models of texts can be asked about.

        Args:
            chat_ids: The ids of each through the chat template.
            prompts: The prompts, each a text or messages.
        """
        more = {tuple(ids): prompt for ids, prompt in zip(chat_ids, prompts, strict=True)}
        return replace(self, asked={**self.asked, **more})

    def policy_in(self, folder: Path) -> Any:
        """Return the policy in a folder, on its device; whatever else was there is freed."""
        return self.one.take(("policy", folder), partial(self.load, folder))

    def policy_of(self, name: str) -> Policy:
        """Return a policy that is ready to be measured; best of n samples from SFT."""
        return Policy(name, self.policy_in(self.folders["sft" if name == "best_of_n" else name]))

    def reference(self) -> Any:
        """Return the policy that KL is measured against, on its device."""
        return self.policy_in(self.reference_folder)

    def judge(self, name: str) -> Any:
        """Return a reward model that judges, on its device."""
        return self.one.take(("judge", name), self.judges[name])

    def reward_model_in(self, folder: Path) -> Any:
        """Return the reward model in a folder, without the others of its ensemble."""
        return self.one.take(("reward model", folder), partial(self.load_scalar, folder))

    def raw_scores(
        self, reward_model: Any, chat_ids: Sequence[list[int]], answers: Sequence[Answer], packed: bool | None = None
    ) -> torch.Tensor:
        """Score answers as a reward model itself does, without `missing_eos_score`.

        Args:
            reward_model: The judge.
            chat_ids: The ids of each answer's prompt through the chat template.
            answers: B answers.
            packed: Whether rows are packed; None: if it reads packed rows.

        Returns:
            (B,) scores, on the CPU.
        """
        packed = self.packs(reward_model) if packed is None else packed
        spec = ScorerSpec(
            reward_model=reward_model,
            pad_id=self.tokenizer.pad_token_id,
            accelerator=self.accelerator,
            batch_size=self.batch_size,
            packed=packed and self.text_reader is None,
            text_reader=self.text_reader,
        )
        request = ScoreRequest(list(chat_ids), [answer.response for answer in answers], self.tokenizer)
        if self.text_reader is not None:
            request = replace(request, data_rows=[{"prompt": self.asked[tuple(ids)]} for ids in chat_ids])
        scores = RewardModelScorer(spec).score(request).total
        require_finite(scores, "evaluate: scores of a reward model")
        return scores

    def with_missing_eos(self, scores: torch.Tensor, answers: Sequence[Answer]) -> torch.Tensor:
        """Return the scores (B,), with `missing_eos_score` for unfinished answers if it is set."""
        finished = torch.tensor([answer.finished for answer in answers])
        return final_scores(scores, finished, self.missing_eos_score)


def packing_of(session: Session, max_length: int) -> Callable[[Any], bool]:
    """Return what says whether a model reads packed rows; the first that does not prints a line.

    Args:
        session: The run.
        max_length: The longest row, in tokens.
    """
    told: list[bool] = []

    def packs(model: Any) -> bool:
        if told:
            return can_pack(model, max_length)
        found = can_pack_rows(session, [model], max_length)
        if not found:
            told.append(True)
        return found

    return packs


def free_memory() -> None:
    """Give back what models that are no longer used have held; vLLM may need it."""
    gc.collect()  # a sharded model refers to itself
    devices.empty_cache(devices.in_use())


def load_tools(
    session: Session,
    runtime: Runtime,
    inputs: dict[str, Path],
    settings: EvaluateSettings,
    has_ppo_init: bool,
    on_too_long: str,
) -> Tools:
    """Return the tools; no model is loaded yet.

    Args:
        session: The run: where lines go.
        runtime: How the stage computes, with its accelerator.
        inputs: The artifact folder of each upstream stage.
        settings: The section evaluate.
        has_ppo_init: Whether sft published a model of its own for PPO to start from.
        on_too_long: The setting of rm, for reward models with another tokenizer.

    Returns:
        The tools; `sampler` is None.
    """

    def place(load: Callable, folder: Path) -> Any:
        return place_frozen(partial(load, folder, **runtime.load_options()), runtime, settings.max_length)

    load, load_judge = partial(place, load_policy), partial(place, load_scalar_model)
    judges: dict[str, Callable[[], Any]] = {}
    if "rm" in inputs:
        rm = inputs["rm"] / "model"
        judges[REWARD_MODEL] = partial(load_reward_model, rm, settings.reward_ensemble, load_judge)
        for name, own in ((KEPT, "judge"), (HELD_OUT, "held_out")):
            folder = inputs["rm"] / own / "model"
            if folder.is_dir():
                judges[name] = partial(load_judge, folder)
    folder = inputs["sft"] / "model"
    tokenizer = load_tokenizer(folder, trust_remote_code=runtime.trust_remote_code)
    reference_folder = inputs["sft"] / "ppo_init" if has_ppo_init else folder
    reader = None
    if judges:
        trust = runtime.trust_remote_code
        reader = text_reader_of(inputs["rm"] / "model", tokenizer, on_too_long, trust_remote_code=trust)
    return Tools(
        tokenizer=tokenizer,
        accelerator=runtime.accelerator,
        load=load,
        load_scalar=load_judge,
        folders={name: inputs[name] / "model" for name in STAGES if name in inputs},
        reference_folder=reference_folder,
        judges={name: judges[name] for name in in_order(list(judges))},
        packs=packing_of(session, settings.max_length),
        sharded=runtime.sharded,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        missing_eos_score=settings.missing_eos_score,
        text_reader=reader,
    )


def make_sampler(
    tools: Tools, settings: EvaluateSettings, runtime: Runtime, launch: LaunchSettings, session: Session, longest: int
) -> FrozenSampler:
    """Return what samples the policies' responses, not started yet.

    Args:
        tools: The policies' folders and their tokenizer.
        settings: The section evaluate.
        runtime: How the stage computes, with its accelerator.
        launch: The section launch, which says how another engine than the policies themselves runs.
        session: The run: where the engine's files and lines go.
        longest: The longest prompt and response together, in tokens.
    """
    rollout = settings.rollout or EngineSettings()
    spec = engine_spec(
        rollout.engine,
        tools.folders["sft"],
        runtime,
        launch,
        work=session.checkpoints.folder.parent,
        pad_id=tools.tokenizer.pad_token_id,
        max_length=longest,
        batch_size=most_sampled(settings, several=True),
    )
    return make_frozen_sampler("evaluate", rollout, replace(spec, other_models=True), session.say)


def most_sampled(settings: EvaluateSettings, several: bool) -> int:
    """Return the most responses that a process samples at a time.

    Args:
        settings: The section evaluate.
        several: Whether a prompt has several samples, which share its cache.
    """
    return (4 if several else 1) * settings.batch_size

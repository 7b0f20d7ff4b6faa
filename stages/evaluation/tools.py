"""Hold the models that measure a policy, and the policy being measured."""

import gc
from collections.abc import Callable, Mapping, Sequence
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
from stages.shared.runtime import Runtime, place_frozen
from stages.training.session import Session


@dataclass(frozen=True)
class Policy:
    """A policy that is being measured."""

    name: str
    """Its name in results.json."""
    model: Any
    """The model, on its device; with fsdp2, this process's shard of it."""
    packed: bool
    """Whether its rows and the judges' are packed."""

    @property
    def weights(self) -> str:
        """Return the name of the policy whose weights these are: best of n samples from SFT."""
        return "sft" if self.name == "best_of_n" else self.name


@dataclass(frozen=True)
class Tools:
    """Hold the tokenizer, the judges and the loader that every policy is measured with."""

    tokenizer: Any
    """SFT's tokenizer, which all policies share."""
    accelerator: Any
    """accelerate's Accelerator: device and autocast."""
    load: Callable[[Path], Any]
    """Load the policy in a folder onto the device."""
    folders: dict[str, Path]
    """The model folder of each policy."""
    reference_folder: Path
    """The folder of the reference."""
    reference: Any
    """The policy that KL is measured against: the one that PPO's penalty is against."""
    judges: dict[str, Any]
    """The reward models that judge, by name; {} if the experiment trains none."""
    packed: bool
    """Whether all of these models can read packed rows."""
    sharded: bool
    """Whether each process holds a shard of the models, so that passes take all processes."""
    batch_size: int
    """Rows in a forward pass."""
    max_length: int
    """Tokens in the longest row."""
    missing_eos_score: float | None
    """Score of a response without EOS; None leaves the reward model's own score."""
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

    def models(self) -> list[Any]:
        """Return the models that stay loaded, each once."""
        return [self.reference, *self.judges.values()]

    @property
    def reward_model(self) -> Any:
        """Return the model that PPO maximises and best of n selects by; None without one."""
        return self.judges.get(REWARD_MODEL)

    def model_of(self, name: str) -> Any:
        """Return a policy's model: the reference where that is it, otherwise loaded now.

        Best of n samples from SFT. Whoever asks for another model drops the last one before, so
        that one policy at a time is loaded beside the reference and the judges.
        """
        folder = self.folders["sft" if name == "best_of_n" else name]
        if folder == self.reference_folder:
            return self.reference
        free_memory()
        return self.load(folder)

    def policy_of(self, name: str) -> Policy:
        """Return a policy that is ready to be measured."""
        model = self.model_of(name)
        return Policy(name, model, self.packs(model))

    def packs(self, model: Any) -> bool:
        """Return whether rows can be packed for a policy and for the judges."""
        return self.packed and can_pack(model, self.max_length)

    def raw_scores(
        self, reward_model: Any, chat_ids: Sequence[list[int]], answers: Sequence[Answer], packed: bool
    ) -> torch.Tensor:
        """Score answers as a reward model itself does, without `missing_eos_score`.

        Args:
            reward_model: The judge.
            chat_ids: The ids of each answer's prompt through the chat template.
            answers: B answers.
            packed: Whether rows are packed.

        Returns:
            (B,) scores, on the CPU.
        """
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


def free_memory() -> None:
    """Give back what models that are no longer used have held; vLLM may need it."""
    gc.collect()  # a sharded model refers to itself
    devices.empty_cache(devices.in_use())


def load_tools(
    runtime: Runtime, inputs: dict[str, Path], settings: EvaluateSettings, has_ppo_init: bool, on_too_long: str
) -> Tools:
    """Load the reference and the reward models onto the device.

    Args:
        runtime: How the stage computes, with its accelerator.
        inputs: The artifact folder of each upstream stage.
        settings: The section evaluate.
        has_ppo_init: Whether sft published a model of its own for PPO to start from.
        on_too_long: The setting of rm, for reward models with another tokenizer.

    Returns:
        The tools; `packed` is False, and `sampler` None.
    """

    def place(load: Callable, folder: Path) -> Any:
        return place_frozen(partial(load, folder, **runtime.load_options()), runtime, settings.max_length)

    load, load_judge = partial(place, load_policy), partial(place, load_scalar_model)
    judges = {}
    if "rm" in inputs:
        judges[REWARD_MODEL] = load_reward_model(inputs["rm"] / "model", settings.reward_ensemble, load_judge)
        for name, own in ((KEPT, "judge"), (HELD_OUT, "held_out")):
            folder = inputs["rm"] / own / "model"
            if folder.is_dir():
                judges[name] = load_judge(folder)
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
        folders={name: inputs[name] / "model" for name in STAGES if name in inputs},
        reference_folder=reference_folder,
        reference=load(reference_folder),
        judges={name: judges[name] for name in in_order(list(judges))},
        packed=False,
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

"""Hold the models that measure a policy, and the policy being measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.evaluation.forms import Answer
from stages.evaluation.judges import HELD_OUT, KEPT, REWARD_MODEL, in_order
from stages.evaluation.selecting import Selector
from stages.models.ensemble import load_reward_model
from stages.models.loading import load_policy, load_scalar_model, load_tokenizer
from stages.models.packing import can_pack
from stages.objectives.rewards import final_scores
from stages.scorers.reward_model import RewardModelScorer
from stages.scorers.scorer import ScoreRequest, ScorerSpec
from stages.settings.evaluate import STAGES, EvaluateSettings
from stages.shared.runtime import Runtime, make_accelerator


@dataclass(frozen=True)
class Policy:
    """A policy that is being measured."""

    name: str
    """Its name in results.json."""
    model: Any
    """The model, on its device."""
    packed: bool
    """Whether its rows and the judges' are packed."""


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
    sft: Any
    """The SFT model. Best-of-n samples from it too."""
    reference: Any
    """The policy that KL is measured against: the one that PPO's penalty is against."""
    judges: dict[str, Any]
    """The reward models that judge, by name; {} if the experiment trains none."""
    packed: bool
    """Whether all of these models can read packed rows."""
    batch_size: int
    """Rows in a forward pass."""
    max_length: int
    """Tokens in the longest row."""
    missing_eos_score: float | None
    """Score of a response without EOS; None leaves the reward model's own score."""
    selector: Selector | None = None
    """What chooses the best of n samples; None: the reward model."""

    def models(self) -> list[Any]:
        """Return the models that are loaded, each once."""
        models = [self.sft]
        if self.reference is not self.sft:
            models.append(self.reference)
        return [*models, *self.judges.values()]

    @property
    def reward_model(self) -> Any:
        """Return the model that PPO maximises and best of n selects by; None without one."""
        return self.judges.get(REWARD_MODEL)

    def model_of(self, name: str) -> Any:
        """Return a policy's model; SFT and best of n share the one that is loaded already."""
        if name in ("sft", "best_of_n"):
            return self.sft
        return self.load(self.folders[name])

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
            packed=packed,
        )
        request = ScoreRequest(list(chat_ids), [answer.response for answer in answers], self.tokenizer)
        return RewardModelScorer(spec).score(request).total

    def with_missing_eos(self, scores: torch.Tensor, answers: Sequence[Answer]) -> torch.Tensor:
        """Return the scores (B,), with `missing_eos_score` for unfinished answers if it is set."""
        finished = torch.tensor([answer.finished for answer in answers])
        return final_scores(scores, finished, self.missing_eos_score)


def load_tools(runtime: Runtime, inputs: dict[str, Path], settings: EvaluateSettings, has_ppo_init: bool) -> Tools:
    """Load SFT, the reference and the reward models onto the device.

    Args:
        runtime: How the stage computes.
        inputs: The artifact folder of each upstream stage.
        settings: The section evaluate.
        has_ppo_init: Whether sft published a model of its own for PPO to start from.

    Returns:
        The tools; `packed` is False.
    """
    accelerator = make_accelerator(runtime.device, runtime.dtype)
    options = {"attn_implementation": runtime.attention, "trust_remote_code": runtime.trust_remote_code}

    def load(folder: Path) -> Any:
        return load_policy(folder, **options).to(accelerator.device)

    judges = {}
    if "rm" in inputs:
        judges[REWARD_MODEL] = load_reward_model(inputs["rm"] / "model", settings.reward_ensemble, **options)
        for name, own in ((KEPT, "judge"), (HELD_OUT, "held_out")):
            folder = inputs["rm"] / own / "model"
            if folder.is_dir():
                judges[name] = load_scalar_model(folder, **options)
    folder = inputs["sft"] / "model"
    sft = load(folder)
    return Tools(
        tokenizer=load_tokenizer(folder, trust_remote_code=runtime.trust_remote_code),
        accelerator=accelerator,
        load=load,
        folders={name: inputs[name] / "model" for name in STAGES if name in inputs},
        sft=sft,
        reference=load(inputs["sft"] / "ppo_init") if has_ppo_init else sft,
        judges={name: judges[name].to(accelerator.device) for name in in_order(list(judges))},
        packed=False,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        missing_eos_score=settings.missing_eos_score,
    )

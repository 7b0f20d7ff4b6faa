"""Hold the settings of PPO that its steps need, as small frozen values."""

from dataclasses import dataclass

from stages.rollouts.collect import Sampling, ScoreRules
from stages.settings.ppo import PPOSettings, advantage_method, ptx_batch_size
from stages.settings.rollout import CLIP_MAX


@dataclass(frozen=True)
class Clipping:
    """Limits on how far one update moves policy and values."""

    ratio: float
    """ε: ratios of new to old probability are clipped to 1 ± ε."""
    value: float
    """Values are clipped to ± this around the old ones."""


@dataclass(frozen=True)
class Ptx:
    """The pretraining gradient that is added to PPO's."""

    coef: float
    """γ of InstructGPT's equation 2: weight of the pretraining loss."""
    rows: int
    """Pretraining rows of one optimizer step."""


@dataclass(frozen=True)
class UpdateOptions:
    """Sizes, seed and losses of one update."""

    seed: int
    """The experiment's seed; minibatches are drawn by it."""
    batch_size: int
    """Episodes of the batch."""
    mini_batch_size: int
    """Episodes of one optimizer step."""
    micro_batch_size: int
    """The most episodes, or pretraining rows, in one forward and backward pass."""
    samples_per_prompt: int
    """Responses to each prompt, next to each other in the batch."""
    epochs: int
    """Passes over the batch."""
    temperature: float
    """Divides the logits, as in sampling."""
    clipping: Clipping
    """How far an update may move policy and values."""
    ptx: Ptx
    """The pretraining gradient."""

    @property
    def group_size(self) -> int:
        """Samples of a prompt that stay in one minibatch: all, if whole prompts fill it, else 1."""
        return self.samples_per_prompt if self.mini_batch_size % self.samples_per_prompt == 0 else 1


@dataclass(frozen=True)
class KlControl:
    """The penalty on the KL to the reference."""

    coef: float
    """β of the first update, and of all of them unless a target is set."""
    estimator: str
    """How KL is estimated at a token: k1 or k3."""
    target: float | None
    """KL in nats a response that β is steered to; None: β stays."""
    horizon: float
    """Episodes over which that steering acts."""


@dataclass(frozen=True)
class AdvantageOptions:
    """How rewards become advantages and returns."""

    method: str
    """"gae", with a value model; "rloo" or "grpo", against the other samples of a prompt."""
    samples_per_prompt: int
    """Responses to each prompt, next to each other in the batch."""
    grpo_scale: bool
    """Whether GRPO divides by the standard deviation of a prompt's scores."""
    lam: float
    """λ of generalised advantage estimation."""
    gamma: float
    """Discount a token."""
    whiten_rewards: bool
    """Whether rewards are scaled to a standard deviation of 1 over the batch."""
    whiten_advantages: bool
    """Whether advantages are whitened over the batch."""


@dataclass(frozen=True)
class Correction:
    """How samples of another engine are weighed in the policy's loss."""

    level: str
    """"token" or "sequence": what has a weight."""
    clip_max: float
    """The largest weight."""
    clip_min: float | None
    """The smallest weight; None: 0."""
    outliers: str
    """What becomes of a weight beyond these: "truncate" or "mask"."""


def sampling_options(c: PPOSettings) -> Sampling:
    """Return how rollouts are sampled and scored."""
    return Sampling(
        samples_per_prompt=c.samples_per_prompt,
        response_length=c.response_length,
        temperature=c.temperature,
        micro_batch_size=c.per_device_train_batch_size,
        scores=ScoreRules(
            missing_eos_score=c.missing_eos_score, score_clip=c.score_clip, length_penalty=c.length_penalty
        ),
    )


def update_options(c: PPOSettings, seed: int) -> UpdateOptions:
    """Return how an update learns from its batch."""
    return UpdateOptions(
        seed=seed,
        batch_size=c.batch_size,
        mini_batch_size=c.mini_batch_size,
        micro_batch_size=c.per_device_train_batch_size,
        samples_per_prompt=c.samples_per_prompt,
        epochs=c.num_ppo_epochs,
        temperature=c.temperature,
        clipping=Clipping(ratio=c.cliprange, value=c.cliprange_value),
        ptx=Ptx(coef=c.ptx_coef, rows=ptx_batch_size(c)),
    )


def kl_control(c: PPOSettings) -> KlControl:
    """Return how KL is penalised."""
    return KlControl(coef=c.kl_coef, estimator=c.kl_estimator, target=c.kl_target, horizon=c.kl_horizon)


def advantage_options(c: PPOSettings) -> AdvantageOptions:
    """Return how advantages and returns are computed."""
    return AdvantageOptions(
        method=advantage_method(c),
        samples_per_prompt=c.samples_per_prompt,
        grpo_scale=c.grpo_scale is not False,
        lam=c.lam,
        gamma=c.gamma,
        whiten_rewards=c.whiten_rewards,
        whiten_advantages=c.whiten_advantages,
    )


def correction_of(c: PPOSettings) -> Correction | None:
    """Return how samples of another engine are weighed; None if they are not."""
    rollout = c.rollout
    if rollout.correction is None:
        return None
    return Correction(
        level=rollout.correction,
        clip_max=CLIP_MAX if rollout.correction_clip_max is None else rollout.correction_clip_max,
        clip_min=rollout.correction_clip_min,
        outliers=rollout.correction_outliers or "truncate",
    )

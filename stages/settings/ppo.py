"""Declare the stage ppo: its settings, metrics, inputs and checks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config.section import Section, setting
from pipeline.stage import Stage, StageRun
from stages.models.ensemble_folder import How, others_of
from stages.settings.checks import check_data, no_room_for_prompt, over_context, over_folder_context
from stages.settings.peft import StagePeft, missing_package, peft_setting, stage_problems
from stages.settings.policies import has_rankings
from stages.settings.reward_base import trunk_stages
from stages.settings.rollout import SET_BY_PPO, RolloutSettings, correction_problems, hand_over_problems, missing_engine
from stages.settings.rounds import start_problems
from stages.settings.scorers.common import ScorerSection
from stages.settings.scorers.model import OWN, ModelScorer
from stages.settings.scorers.scorer import (
    Scorer,
    missing_of_scorers,
    names_of,
    scorer_files,
    scorer_problems,
    scorer_stages,
)
from stages.settings.training import SCALER_METRICS, TOO_LONG_PROMPT, SchedulerType, TooLong
from stages.training.schedule import Schedule
from stages.training.selection import Selection

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

METRICS = {
    "objective/kl": "KL(policy ‖ SFT) of the sampled responses, in nats per response (estimator k1)",
    "objective/kl_k3": "the same by the estimator k3 (never negative, lower variance)",
    "objective/entropy": "entropy of the policy, in nats per token",
    "objective/scores": "mean score of the reward model after score_clip, missing_eos_score and length_penalty",
    "rewards/NAME": "mean score of the scorer NAME of ppo.rewards, before its weight and the rules of objective/scores",
    "objective/rlhf_reward": "scores − kl_coef · KL (by kl_estimator): the objective that is maximised",
    "objective/length": "tokens per response, EOS included",
    "objective/eos_rate": "fraction of responses that end with EOS",
    "policy/approxkl_avg": "½ (log ratio)² per token between the policy before and during the update",
    "policy/clipfrac_avg": "fraction of tokens whose ratio was clipped",
    "loss/policy_avg": "clipped surrogate loss",
    "loss/value_avg": "clipped value loss",
    "loss/kl": "kl_coef · KL(policy ‖ SFT) per token by k3, in the loss of advantage: grpo",
    "loss/ptx": "cross-entropy per pretraining token, in nats, before ptx_coef",
    "val/clipfrac_avg": "fraction of tokens whose value was clipped",
    "val/ratio": "mean ratio of new to old probability over the update (1 at its first mini-batch)",
    "val/engine_kl": "KL(sampling distribution ‖ policy) in nats per token, if log-probabilities are recomputed",
    "val/dropped_scorers": "scorers of ppo.rewards that failed and were left out of this update (on_failure: drop)",
    "sampling/importance_sampling_ratio/mean": "mean weight of ppo.rollout.correction, after truncation or masking",
    "sampling/importance_sampling_ratio/min": "smallest such weight",
    "sampling/importance_sampling_ratio/max": "largest such weight",
    "sampling/importance_sampling_outliers": "fraction of tokens (or responses, with sequence) whose weight was out of "
    "bounds",
    "val/explained_variance": "fraction of the variance of the returns that the values explain (1: all; 0: no better "
    "than their mean)",
    "grad_norm/ppo": "norm of the policy gradient before ptx is added and before clipping",
    "grad_norm/ptx": "norm of ptx_coef times the pretraining gradient",
    "grad_cosine": "cosine between these two gradients; below 0 they conflict",
    "grad_norm/value": "norm of the value model's gradient before clipping",
    **SCALER_METRICS,
    "kl_coef": "β of this update (changes if kl_target is set)",
    "eps": "episodes per second, sampling and update together",
    "lr": "learning rate of the policy",
    "episode": "episodes so far",
}


OF_VALUES = ("lam", "gamma", "cliprange_value", "value_learning_rate", "whiten_rewards")
"""Settings that have an effect only where a value model is trained."""


class PPOSettings(Section):
    """Choose how PPO-ptx trains.

    batch_size and mini_batch_size count episodes; an update is one batch.
    """

    total_episodes: int = setting(2048, "episodes in all (the paper: 256,000, in batches of 512)", "episodes", ge=1)
    batch_size: int = setting(64, "episodes per update (the paper: 512)", "episodes", ge=2)
    mini_batch_size: int = setting(32, "episodes per optimizer step (the paper: 64)", "episodes", ge=1)
    per_device_train_batch_size: int = setting(
        8,
        "largest number of episodes in one forward and backward pass (on a CPU fewer, if they would not fit its "
        "cache); changes memory, not the gradient",
        "episodes",
        ge=1,
    )
    local_rollout_forward_batch_size: int = setting(
        64,
        "episodes that a process samples at a time; changes memory and, by rounding, occasionally a sample",
        "episodes",
        ge=1,
    )
    rollout: RolloutSettings = setting(RolloutSettings(), "what samples the episodes")
    num_ppo_epochs: int = setting(1, "passes over each batch", "epochs", ge=1)
    samples_per_prompt: int = setting(1, "responses per prompt; must divide batch_size", ge=1)
    response_length: int = setting(128, "largest length of a response, EOS included", "tokens", ge=1)
    max_length: int = setting(512, "largest length of prompt and response together", "tokens", ge=8)
    on_too_long: TooLong = setting("error", TOO_LONG_PROMPT)
    temperature: float = setting(1.0, "divides the logits in sampling, reference and update alike", gt=0)
    learning_rate: float = setting(
        3e-6,
        "learning rate of the policy after the warm-up (trl's default; the paper for 1.3B: 9.65e-6); with adapters "
        "about ten times as much",
        "per step",
        gt=0,
    )
    value_learning_rate: float = setting(9e-6, "learning rate of the value model (as in the paper)", "per step", gt=0)
    warmup_steps: int = setting(
        3, "length of the linear warm-up from a tenth of the rate (the paper: 10)", "updates", ge=0
    )
    lr_scheduler_type: SchedulerType = setting("constant", "shape of both learning rates after the warm-up")
    max_grad_norm: float = setting(
        1.0,
        "norm to which the policy's gradient is clipped after ptx is added, and separately the value model's gradient",
        gt=0,
    )
    kl_coef: float = setting(
        0.05, "β, the penalty on KL to the SFT policy (trl's default; the paper: 0.02)", "reward per nat", ge=0
    )
    kl_estimator: Literal["k1", "k3"] = setting("k1", "estimator of KL at each token, for the penalty")
    kl_target: float | None = setting(
        None, "KL towards which kl_coef is adapted (Ziegler 2019); null: kl_coef is constant", "nats per response", gt=0
    )
    kl_horizon: float = setting(10_000, "number of episodes over which kl_coef is adapted", "episodes", gt=0)
    cliprange: float = setting(0.2, "ε, the clip range of the ratio", gt=0)
    cliprange_value: float = setting(0.2, "clip range of the values", "reward", gt=0)
    advantage: Literal["gae", "rloo", "grpo"] | None = setting(
        None,
        "how advantages are computed. gae: by a value model, as in the paper (null means this too); rloo: the reward "
        "of a response minus the mean of the prompt's other samples; grpo: the score relative to the prompt's samples, "
        "with the KL penalty in the loss instead of the reward. rloo and grpo need samples_per_prompt ≥ 2 and have no "
        "value model, so lam, gamma, cliprange_value, value_learning_rate and the whiten_ settings are not used",
    )
    grpo_scale: bool | None = setting(
        None, "grpo: divide by the standard deviation of a prompt's scores (null: yes); false: do not (Dr. GRPO)"
    )
    gamma: float = setting(
        1.0, "γ of generalised advantage estimation, the discount per token (the paper: none)", gt=0, le=1
    )
    lam: float = setting(0.95, "λ of generalised advantage estimation", ge=0, le=1)
    ptx_coef: float = setting(
        1.0,
        "weight of the pretraining loss (a mean over its tokens, as PPO's loss is over its own); the paper's γ; 0: "
        "plain PPO. The paper's 27.8 depends on how it sums losses, which it does not say; here it would drown out "
        "PPO: keep grad_norm/ptx and grad_norm/ppo about equal",
        ge=0,
    )
    ptx_ratio: float = setting(
        1.0, "rows of pretraining text per episode, in each pass over the batch (the paper: 8)", "rows", gt=0
    )
    ptx_length: int = setting(128, "length of a packed row of pretraining text", "tokens", ge=8)
    missing_eos_score: float | None = setting(
        -1.0,
        "score of a response without EOS; it should be below the score of finished responses (demonstrations average "
        "0, with a standard deviation of about 1). If response_length cuts many responses, the policy first learns "
        "to be short. null: the response's own score",
        "reward",
    )
    score_clip: float | None = setting(
        None, "limit ± to which the reward model's score is clipped; null: no limit", "reward", gt=0
    )
    length_penalty: float = setting(
        0.0, "amount subtracted from the score for each token of the response", "reward per token", ge=0
    )
    whiten_rewards: bool = setting(
        False, "scale rewards around their mean to a standard deviation of 1 over the batch; the mean is kept"
    )
    whiten_advantages: bool = setting(
        True, "shift and scale advantages to a mean of 0 and a standard deviation of 1 over the batch"
    )
    eval_steps: int = setting(8, "updates between two held-out evaluations", "updates", ge=1)
    eval_prompts: int = setting(
        64, "number of prompts held out for evaluation (at most a fifth of them)", "prompts", ge=1
    )
    keep: Literal["best", "last"] = setting(
        "last",
        "policy to publish: the last, or the best by score − kl_coef · KL on held-out prompts. The score is that of "
        "held_out_reward_model, if it is set (value_model/ is always the last one)",
    )
    patience: int | None = setting(
        None, "held-out evaluations without improvement after which training ends; null: never", "evaluations", ge=1
    )
    rewards: list[Scorer] | None = setting(
        None,
        "what scores the responses: a list of scorers, whose scores are added, each times its weight, as "
        "[{model: rm}, {python: reward.py:score, weight: 0.5}] (stages/scorers/README.md). null: the reward model of "
        "rm, or reward_model",
    )
    start_from: str | None = setting(
        None,
        "folder of a policy that PPO starts from, as the last round's; null: SFT. KL is measured to SFT either way",
    )
    reward_model: str | None = setting(None, "folder of a reward model to use instead of rm's")
    reward_ensemble: How = setting(
        "mean", "how the scores of the models of rm.ensemble are combined: their mean or their minimum"
    )
    held_out_reward_model: str | None = setting(
        None,
        "folder of a reward model that PPO does not optimise (for example one with another seed), to detect "
        "over-optimisation",
    )
    ema_decay: float | None = setting(
        0.992, "decay per optimizer step of the average that publish_ema publishes (as in the paper)", gt=0, lt=1
    )
    publish_ema: bool = setting(False, "keep an exponential moving average of the policy and publish it as model_ema/")
    max_skipped_steps: int = setting(
        0, "optimizer steps or whole updates that may be skipped for non-finite numbers before exit 3", ge=0
    )
    alarm_kl: float | None = setting(
        50.0, "KL to the reference above which an alarm is raised; null: never", "nats per response", gt=0
    )
    alarm_entropy: float = setting(
        0.1, "fraction of its first value below which the entropy raises an alarm", ge=0, lt=1
    )
    on_alarm: Literal["warn", "stop"] = setting("warn", "what to do on an alarm; stop: save a checkpoint and exit 3")
    peft: StagePeft = peft_setting()

    def schedule(self, updates: int) -> Schedule:
        """Return the policy's learning rate as a function of the update, for that many updates."""
        return Schedule(self.learning_rate, self.lr_scheduler_type, self.warmup_steps, updates, warmup_from=0.1)

    def value_schedule(self, updates: int) -> Schedule:
        """Return the value model's learning rate as a function of the update."""
        return Schedule(self.value_learning_rate, self.lr_scheduler_type, self.warmup_steps, updates, warmup_from=0.1)

    def selection(self, judge: str, higher_is_better: bool) -> Selection:
        """Return how held-out evaluations choose the published policy and end training early.

        Args:
            judge: Name of the held-out figure that is compared.
            higher_is_better: Direction of that figure.
        """
        return Selection(self.keep, self.patience, judge, higher_is_better, self.eval_steps)


def needs(experiment: "Experiment") -> list[str]:
    """Return the stages that must be done first: sft, and those whose models score."""
    settings = experiment.ppo
    if settings.rewards is not None:
        stages = scorer_stages(settings.rewards)
        return ["sft", *(trunk_stages(experiment) if "rm" in stages else []), *stages]
    if settings.reward_model is not None and not has_rankings(experiment):
        return ["sft"]
    return ["sft", *trunk_stages(experiment), "rm"]


def reads(experiment: "Experiment") -> list[str]:
    """Return the kinds of data it reads: prompts, and documents for the pretraining gradient."""
    return ["prompts", "documents"] if experiment.ppo.ptx_coef else ["prompts"]


def folders(experiment: "Experiment") -> dict[str, Path]:
    """Return the files and folders of the user that score, ensembles with all of their models.

    Their content is part of the fingerprint.
    """
    settings = experiment.ppo
    if settings.rewards is not None:
        paths = scorer_files("ppo.rewards", settings.rewards)
    else:
        paths = with_others("ppo.reward_model", settings.reward_model)
    if settings.start_from is not None:
        paths["ppo.start_from"] = Path(settings.start_from).expanduser()
    return paths | with_others("ppo.held_out_reward_model", settings.held_out_reward_model)


def climbed_folders(experiment: "Experiment") -> list[Path]:
    """Return the folders of the user's reward models that it climbs: one of weight 0 is watched."""
    scorers = [settings for _, _, settings in named_rewards(experiment.ppo) if settings.weight]
    return [folder for one in scorers if isinstance(one, ModelScorer) for folder in one.folders()]


def with_others(key: str, folder: str | None) -> dict[str, Path]:
    """Return the folder of a reward model and the other models of its ensemble, by setting.

    Args:
        key: The setting that names the folder.
        folder: The folder; None if the setting is null.
    """
    if folder is None:
        return {}
    path = Path(folder).expanduser()
    return {key: path} | {f"{key} ({other.name})": other for other in others_of(path)}


def named_rewards(settings: PPOSettings) -> list[tuple[str, str, ScorerSection]]:
    """Return what scores: the setting that names each scorer, its name, and its settings.

    Without a list of scorers it is one reward model: that of reward_model, or rm's.
    """
    if settings.rewards is None:
        model = ModelScorer(model=settings.reward_model or OWN, how=settings.reward_ensemble)
        return [("ppo.reward_model", OWN, model)]
    keys = [f"ppo.rewards[{index}]" for index in range(len(settings.rewards))]
    return list(zip(keys, names_of(settings.rewards), settings.rewards, strict=True))


def ensemble_ways(settings: PPOSettings) -> dict[str, How]:
    """Return how PPO combines this experiment's ensemble of reward models.

    Returns:
        The setting that says so → its value: of those in `rewards` that name `rm`, the climbed ones
        first; {} if none does.
    """
    if settings.rewards is None:
        return {"ppo.reward_ensemble": settings.reward_ensemble}
    named = [(f"{key}.how", one) for key, _, one in named_rewards(settings) if isinstance(one, ModelScorer)]
    own = sorted((not one.weight, key, one.how) for key, one in named if one.is_own())
    return {key: how for _, key, how in own}


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each combination of settings that cannot work."""
    settings = experiment.ppo
    lines = batch_problems(settings) + stage_problems(experiment, "ppo")
    lines += no_room_for_prompt(experiment, "ppo")
    lines += over_context(experiment, "ppo", *text_lengths(settings))
    if settings.ptx_coef and ptx_batch_size(settings) < 1:
        lines.append(
            f"ppo.ptx_ratio: {settings.ptx_ratio} times mini_batch_size {settings.mini_batch_size} rounds to no row; "
            f"raise it, or set ptx_coef: 0"
        )
    if settings.total_episodes % settings.batch_size:
        multiple = settings.total_episodes // settings.batch_size * settings.batch_size or settings.batch_size
        lines.append(
            f"ppo.total_episodes: {settings.total_episodes} is not a multiple of batch_size {settings.batch_size}; "
            f"use {multiple}"
        )
    for key in ("reward_model", "held_out_reward_model"):
        folder = getattr(settings, key)
        if folder is not None and not (Path(folder).expanduser() / "config.json").is_file():
            lines.append(f"ppo.{key}: {folder} has no config.json; give the model/ folder of a reward model")
    lines += start_problems(experiment, "ppo", settings.start_from)
    lines += reward_problems(settings) + advantage_problems(settings)
    lines += correction_problems(settings.rollout) + hand_over_problems(experiment)
    for name in sorted(set(SET_BY_PPO) & set(experiment.launch.vllm.options)):
        lines.append(f"launch.vllm.options: ppo sets {name} itself; leave it out")
    if settings.publish_ema and settings.ema_decay is None:
        lines.append(
            "ppo.publish_ema: with ema_decay: null there is no average to publish; set it, for example to 0.992"
        )
    return lines


def reward_problems(settings: PPOSettings) -> list[str]:
    """Return a line for each mistake in the list of scorers."""
    if settings.rewards is None:
        return []
    lines = scorer_problems("ppo.rewards", settings.rewards)
    if settings.reward_model is not None:
        lines.append("ppo.reward_model: has no effect beside ppo.rewards; add {model: FOLDER} there, and leave it out")
    if settings.reward_ensemble != "mean":
        lines.append("ppo.reward_ensemble: has no effect beside ppo.rewards; say how there: {model: rm, how: min}")
    return lines


def advantage_method(settings: PPOSettings) -> str:
    """Return how advantages are computed: gae, rloo or grpo."""
    return settings.advantage or "gae"


def has_value_model(settings: PPOSettings) -> bool:
    """Return whether a value model is trained."""
    return advantage_method(settings) == "gae"


def advantage_problems(settings: PPOSettings) -> list[str]:
    """Return a line for each setting that the way of computing advantages does not allow."""
    lines, method = [], advantage_method(settings)
    if settings.grpo_scale is not None and method != "grpo":
        lines.append(f"ppo.grpo_scale: has no effect with ppo.advantage: {method}; leave it out")
    if method == "gae":
        return lines
    if settings.samples_per_prompt < 2:
        lines.append(
            f"ppo.samples_per_prompt: {settings.samples_per_prompt}; {method} compares the samples of a prompt, so it "
            f"should be at least 2, for example 4"
        )
    if method == "grpo" and settings.kl_target is not None:
        lines.append("ppo.kl_target: has no effect with ppo.advantage: grpo, whose KL is in the loss; leave it out")
    return lines


def unused_settings(settings: PPOSettings) -> list[str]:
    """Return the settings that the config sets and that the way of computing advantages ignores.

    They are no mistake: a sweep over `advantage` has one YAML for all of them.
    """
    method = advantage_method(settings)
    unused = [] if method == "gae" else list(OF_VALUES)
    if method == "grpo":
        unused.append("kl_estimator")
    return [key for key in unused if key in settings.model_fields_set]


def batch_problems(settings: PPOSettings) -> list[str]:
    """Return a line for each setting that must divide batch_size and does not."""
    lines = []
    for key in ("mini_batch_size", "samples_per_prompt"):
        count = getattr(settings, key)
        if settings.batch_size % count:
            lines.append(f"ppo.{key}: {count} does not divide ppo.batch_size {settings.batch_size}; use a divisor")
    return lines


def text_lengths(settings: PPOSettings) -> list[str]:
    """Return the settings with the length of rows of pretraining text; none without ptx."""
    return ["ptx_length"] if settings.ptx_coef else []


def missing_requirements(experiment: "Experiment") -> list[str]:
    """Return a line for each thing that this machine lacks, and each length over the context."""
    lines = missing_package(experiment, "ppo") + missing_engine(experiment, "ppo")
    lines += missing_of_scorers("ppo.rewards", experiment.ppo.rewards or [])
    return lines + over_folder_context(experiment, "ppo", *text_lengths(experiment.ppo))


def run(ctx: "StageRun[PPOSettings, Experiment]") -> dict[str, Any]:
    """Run the stage. Its libraries are imported only now."""
    from stages.ppo.run import run as run_stage

    return run_stage(ctx)


def steps_per_update(settings: PPOSettings) -> int:
    """Return the number of optimizer steps per update."""
    return settings.batch_size // settings.mini_batch_size * settings.num_ppo_epochs


def ptx_batch_size(settings: PPOSettings) -> int:
    """Return the number of rows of pretraining text per optimizer step."""
    return round(settings.ptx_ratio * settings.mini_batch_size)


STAGE = Stage(
    name="ppo",
    summary="Train the policy against the reward model, with the KL penalty and the pretraining gradient (PPO-ptx).",
    settings=PPOSettings,
    run=run,
    needs=needs,
    reads=reads,
    metrics=METRICS,
    headline=("score", "kl", "score_before"),
    check=check,
    missing_requirements=missing_requirements,
    check_data=check_data,
    folders=folders,
    without={"documents": "set ppo.ptx_coef: 0, which leaves out the pretraining gradient"},
    fixed=("ppo.eval_prompts", "ppo.ptx_length"),  # batches may change: checkpoints count what was drawn
    shared=True,
)

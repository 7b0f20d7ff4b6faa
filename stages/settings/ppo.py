"""What the stage ppo declares: its settings, metrics, inputs and checks."""

from pathlib import Path
from typing import Literal

from pipeline.stage import StageRun
from stages.models.ensemble_folder import How, others_of
from stages.settings.checks import beyond_context, no_room, over_context, unreadable
from stages.settings.rollout import SET_HERE, RolloutConfig, no_engine
from stages.settings.training import Schedule, Section, TooLong, setting, too_long_prompt
from stages.settings.wanted import ranks

NAME = "ppo"
METRICS = {
    "objective/kl": "KL(policy ‖ SFT) of the sampled responses, in nats a response (k1)",
    "objective/kl_k3": "the same by the k3 estimator (never negative, less variance)",
    "objective/entropy": "the policy's entropy, in nats a token",
    "objective/scores": "mean score of the reward model, score_clip, missing_eos_score and length_penalty applied",
    "objective/rlhf_reward": "scores − kl_coef · KL (by kl_estimator): what is maximised",
    "objective/length": "tokens a response, EOS included",
    "objective/eos_rate": "share of responses that end with EOS",
    "policy/approxkl_avg": "½ (log ratio)² a token between the policy before and during the update",
    "policy/clipfrac_avg": "share of tokens whose ratio was clipped",
    "loss/policy_avg": "clipped surrogate loss",
    "loss/value_avg": "clipped value loss",
    "loss/ptx": "cross-entropy a pretraining token, in nats, before ptx_coef",
    "val/clipfrac_avg": "share of tokens whose value was clipped",
    "val/ratio": "mean ratio of new to old probability over the update (1 at its first minibatch)",
    "val/engine_kl": "KL(what was sampled from ‖ policy) in nats a token, where log-probs are computed again after it",
    "val/explained_variance": "share of the returns' variance that the values explain (1: all; 0: as their mean would)",
    "grad_norm/ppo": "norm of the policy gradient before ptx is added and before clipping",
    "grad_norm/ptx": "norm of ptx_coef times the pretraining gradient",
    "grad_cosine": "cosine between the two: below 0 they pull apart",
    "grad_norm/value": "norm of the value model's gradient before clipping",
    "kl_coef": "β of this update (moves where kl_target is set)",
    "eps": "episodes a second, sampling and update together",
    "lr": "the policy's learning rate",
    "episode": "episodes so far",
}
HEADLINE = ("score", "kl", "score_before")
WITHOUT = {"documents": "set ppo.ptx_coef: 0, which leaves the pretraining gradient out"}
SHARED = True
FIXED = ("ppo.eval_prompts", "ppo.ptx_length")  # batches may change: checkpoints count what was drawn


class Config(Section):
    """PPO-ptx. batch_size and mini_batch_size count episodes; an update is one batch."""

    total_episodes: int = setting(2048, "episodes in all (the paper: 256,000, in batches of 512)", "episodes", ge=1)
    batch_size: int = setting(64, "episodes of one update (the paper: 512)", "episodes", ge=2)
    mini_batch_size: int = setting(32, "episodes of one optimizer step (the paper: 64)", "episodes", ge=1)
    per_device_train_batch_size: int = setting(
        8,
        "most episodes in one forward and backward (on a CPU fewer, where they would leave its cache); changes memory, "
        "not the gradient",
        "episodes",
        ge=1,
    )
    local_rollout_forward_batch_size: int = setting(
        64, "episodes sampled at a time by a process; changes memory and, by rounding, a sample", "episodes", ge=1
    )
    rollout: RolloutConfig = setting(RolloutConfig(), "what samples the episodes")
    num_ppo_epochs: int = setting(1, "passes over each batch", "epochs", ge=1)
    samples_per_prompt: int = setting(1, "responses to each prompt; batch_size is divided by it", ge=1)
    response_length: int = setting(128, "longest response, EOS included", "tokens", ge=1)
    max_length: int = setting(512, "longest prompt and response together", "tokens", ge=8)
    on_too_long: TooLong = too_long_prompt()
    temperature: float = setting(1.0, "divides the logits in sampling, reference and update alike", gt=0)
    learning_rate: float = setting(
        3e-6,
        "the policy's, after the warm-up (trl's; the paper's for 1.3B: 9.65e-6); with adapters about ten times as much",
        "per step",
        gt=0,
    )
    value_learning_rate: float = setting(9e-6, "the value model's (the paper's)", "per step", gt=0)
    warmup_steps: int = setting(3, "updates of linear warm-up from a tenth (the paper: 10)", "updates", ge=0)
    lr_scheduler_type: Schedule = setting("constant", "shape of both learning rates after the warm-up")
    max_grad_norm: float = setting(
        1.0, "clips the norm of the policy's gradient after ptx is added, and of the value model's, each apart", gt=0
    )
    kl_coef: float = setting(
        0.05, "β, the penalty on KL to the SFT policy (trl's; the paper: 0.02)", "reward per nat", ge=0
    )
    kl_estimator: Literal["k1", "k3"] = setting("k1", "how the penalty estimates KL at a token")
    kl_target: float | None = setting(
        None, "KL that kl_coef is steered to (Ziegler 2019); null: kl_coef stays as it is", "nats a response", gt=0
    )
    kl_horizon: float = setting(10_000, "episodes over which that steering acts", "episodes", gt=0)
    cliprange: float = setting(0.2, "ratio clip ε", gt=0)
    cliprange_value: float = setting(0.2, "value clip", "reward", gt=0)
    gamma: float = setting(1.0, "discount a token (the paper: none); γ of GAE", gt=0, le=1)
    lam: float = setting(0.95, "λ of generalised advantage estimation", ge=0, le=1)
    ptx_coef: float = setting(
        1.0,
        "γ, times the pretraining loss (a mean over its tokens, as PPO's is over its own); 0: plain PPO. The "
        "paper's 27.8 belongs to the paper's way of summing, which it does not state; here it would drown PPO: "
        "keep grad_norm/ptx and grad_norm/ppo of one size",
        ge=0,
    )
    ptx_ratio: float = setting(
        1.0, "pretraining rows per episode, in each pass over the batch (the paper: 8)", "rows", gt=0
    )
    ptx_length: int = setting(128, "length of a packed pretraining row", "tokens", ge=8)
    missing_eos_score: float | None = setting(
        -1.0,
        "score of a response without EOS, to be below what finished ones get (demonstrations average 0, with a "
        "spread of about 1); where response_length cuts more than a few, length is learned first; null: its own",
        "reward",
    )
    score_clip: float | None = setting(None, "clip the reward model's score to ± this", "reward", gt=0)
    length_penalty: float = setting(0.0, "subtracted from the score a response token", "reward a token", ge=0)
    whiten_rewards: bool = setting(
        False, "scale rewards about their mean to a standard deviation of 1 over the batch; the mean stays"
    )
    whiten_advantages: bool = setting(True, "whiten advantages over the batch")
    eval_steps: int = setting(8, "held-out prompts every so many updates", "updates", ge=1)
    eval_prompts: int = setting(64, "how many prompts are held out for that (a fifth of them at most)", "prompts", ge=1)
    keep: Literal["best", "last"] = setting(
        "last",
        "publish the last policy, or the best by score − kl_coef · kl on held-out prompts, the score being that of "
        "held_out_reward_model if there is one (value_model/ is the last one)",
    )
    patience: int | None = setting(None, "stop after so many held-out looks without a better one", "looks", ge=1)
    reward_model: str | None = setting(None, "folder of another reward model in place of rm's")
    reward_ensemble: How = setting("mean", "how the models of rm.ensemble score as one: their mean or their minimum")
    held_out_reward_model: str | None = setting(
        None, "folder of a reward model that PPO does not climb (say, another seed's), to tell over-optimisation by"
    )
    ema_decay: float | None = setting(
        0.992, "decay of the average that publish_ema publishes, each optimizer step (the paper's)", gt=0, lt=1
    )
    publish_ema: bool = setting(False, "keep an exponential average of the policy and publish it as model_ema/")
    max_skipped_steps: int = setting(
        0, "how many optimizer steps or whole updates may be skipped for non-finite numbers before exit 3", ge=0
    )
    alarm_kl: float | None = setting(50.0, "warn above this KL to the reference; null: never", "nats a response", gt=0)
    alarm_entropy: float = setting(0.1, "warn where entropy falls below this fraction of its first", ge=0, lt=1)
    on_alarm: Literal["warn", "stop"] = setting("warn", "what an alarm does; stop: a checkpoint, and exit 3")


def needs(experiment) -> list[str]:
    without = experiment.ppo.reward_model is not None and not ranks(experiment)  # another's model is all there is
    return ["sft"] if without else ["sft", "rm"]


def reads(experiment) -> list[str]:
    return ["prompts"] + (["documents"] if experiment.ppo.ptx_coef else [])


def folders(experiment) -> dict:
    """Folders of reward models from outside, and of the others of their ensembles: what they hold is part of the
    fingerprint."""
    found = named_folders(experiment)
    others = {key: others_of(folder) for key, folder in found.items()}
    return found | {f"{key} ({path.name})": path for key, paths in others.items() for path in paths}


def named_folders(experiment) -> dict:
    given = {key: getattr(experiment.ppo, key) for key in ("reward_model", "held_out_reward_model")}
    return {f"ppo.{key}": Path(folder).expanduser() for key, folder in given.items() if folder is not None}


def check(experiment) -> list[str]:
    c, wrong = experiment.ppo, []
    if c.batch_size % c.mini_batch_size:
        wrong.append(f"ppo.mini_batch_size: {c.mini_batch_size} does not divide batch_size {c.batch_size}; choose one")
    if c.batch_size % c.samples_per_prompt:
        wrong.append(
            f"ppo.samples_per_prompt: {c.samples_per_prompt} does not divide batch_size {c.batch_size}; choose one"
        )
    wrong += no_room(experiment, "ppo") + over_context(experiment, "ppo", *["ptx_length"] * bool(c.ptx_coef))
    if c.ptx_coef and ptx_batch_size(c) < 1:
        wrong.append(
            f"ppo.ptx_ratio: {c.ptx_ratio} times mini_batch_size {c.mini_batch_size} is no row at all; raise it, or "
            f"set ptx_coef: 0"
        )
    if c.total_episodes % c.batch_size:
        wrong.append(
            f"ppo.total_episodes: {c.total_episodes} is no multiple of batch_size {c.batch_size}; "
            f"{c.total_episodes // c.batch_size * c.batch_size or c.batch_size} is one"
        )
    for key, folder in named_folders(experiment).items():
        if not (folder / "config.json").is_file():
            wrong.append(f"{key}: {folder} holds no config.json; give the model/ folder of a reward model")
    for name in sorted({*SET_HERE} & {*experiment.launch.vllm.options}):
        wrong.append(f"launch.vllm.options: {name} is set by ppo itself; leave it out")
    if c.publish_ema and c.ema_decay is None:
        wrong.append("ppo.publish_ema: there is no average to publish with ema_decay: null; set it, say to 0.992")
    return wrong


def lacks(experiment) -> list[str]:
    """With a line if vLLM is to sample and is not there."""
    lengths = beyond_context(experiment, "ppo", *["ptx_length"] * bool(experiment.ppo.ptx_coef))
    return no_engine(experiment) + lengths + unreadable(experiment, reads(experiment))


def run(ctx: StageRun) -> dict:
    """Run the stage; its libraries are imported only now."""
    from stages.ppo.run import run as run_stage

    return run_stage(ctx)


def steps_per_update(c: Config) -> int:
    """Optimizer steps."""
    return c.batch_size // c.mini_batch_size * c.num_ppo_epochs


def ptx_batch_size(c: Config) -> int:
    """Pretraining rows of an optimizer step."""
    return round(c.ptx_ratio * c.mini_batch_size)

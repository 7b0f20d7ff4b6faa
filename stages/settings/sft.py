"""Declare the stage sft: its settings, metrics, inputs and checks."""

from typing import TYPE_CHECKING, Any

from data.turns import Turns
from pipeline.config.section import Section, setting
from pipeline.stage import Stage, StageRun
from stages.settings.checks import check_data, over_context, over_folder_context, uneven_batches
from stages.settings.peft import StagePeft, missing_package, peft_setting, stage_problems
from stages.settings.training import ACCUMULATION, TOO_LONG_ROW, TooLong, Training

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

METRICS = {
    "loss": "cross-entropy per learnt token, in nats, of this step's batch (evaluations.jsonl: of demonstrations "
    "held out by conversation)",
    "perplexity": "exp(loss) on held-out demonstrations",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of the step",
}


class PPOInitSettings(Section):
    """Train InstructGPT's second SFT model, from which PPO starts and to which it is compared.

    It makes fewer passes than the first, and pretraining text is mixed in.
    """

    num_train_epochs: float = setting(2.0, "passes over the demonstrations (as in the paper)", "epochs", gt=0)
    pretraining_fraction: float = setting(
        0.1, "fraction of the tokens in the loss that are pretraining text (the paper: 10 % of the data)", gt=0, lt=1
    )


class SFTSettings(Training):
    """Choose how demonstrations are learned, with trl's SFTTrainer."""

    learning_rate: float = setting(
        2e-5,
        "peak learning rate (trl's default; the paper: 9.65e-6 for 1.3B and 6B); with adapters about ten times as much",
        "per step",
        gt=0,
    )
    on_too_long: TooLong = setting("error", TOO_LONG_ROW)
    turns: Turns = setting(
        "all", "which assistant turns of a conversation are learnt: all (but those that the data exclude), or the last"
    )
    per_device_train_batch_size: int = setting(8, "demonstrations in one forward and backward pass", "rows", ge=1)
    gradient_accumulation_steps: int = setting(4, f"{ACCUMULATION} (the paper: 32 rows per step)", ge=1)
    num_train_epochs: float = setting(
        2.0,
        "passes over the demonstrations (the paper: 16, with dropout: 0.2, the best of them chosen by reward-model "
        "score; here 2 without dropout, as is usual today)",
        "epochs",
        gt=0,
    )
    dropout: float | None = setting(
        None,
        "probability with which each number that a layer adds to the residual stream is dropped in training (the "
        "paper: 0.2); null: none. All later stages compute without dropout",
        gt=0,
        lt=1,
    )
    neftune_noise_alpha: float | None = setting(
        None,
        "α of NEFTune (Jain 2023: 5 to 15): in training, uniform noise of at most α / √(tokens × width) is added to "
        "the embeddings; null: none",
        gt=0,
    )
    label_smoothing: float | None = setting(
        None,
        "share of a label's probability that the loss spreads evenly over all token ids; null: none. Held-out figures "
        "are without it",
        gt=0,
        lt=1,
    )
    packing: bool | None = setting(
        None,
        "lay the rows of a micro-batch end to end in one row without padding (trl's padding_free), where none sees "
        "another: memory and time follow the tokens, and the loss is the same. Models for which it would not be are "
        "refused; fast with flash_attention_2, while other kernels compute a mask of the whole row. null: rows of "
        "similar length are padded",
    )
    router_aux_loss_coef: float | None = setting(
        None,
        "weight of the loss term that balances the experts of a mixture (Mixtral, Qwen-MoE …); null: not in the loss",
        gt=0,
    )
    ppo_init: PPOInitSettings | None = setting(
        None, "{}: also train ppo_init/, from which PPO then starts; null: PPO starts from model/"
    )
    sample_tokens: int = setting(48, "length of the samples kept in samples.jsonl; 0: none", "tokens", ge=0)
    peft: StagePeft = peft_setting()


def needs(experiment: "Experiment") -> list[str]:
    """Return the stages that must be done first."""
    return ["base"]


def reads(experiment: "Experiment") -> list[str]:
    """Return the kinds of data it reads: demonstrations, and documents if ppo_init is trained."""
    return ["demonstrations"] if experiment.sft.ppo_init is None else ["demonstrations", "documents"]


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each combination of settings that cannot work."""
    return over_context(experiment, "sft") + uneven_batches(experiment, "sft") + stage_problems(experiment, "sft")


def missing_requirements(experiment: "Experiment") -> list[str]:
    """Return a line for each thing that this machine lacks, and each length over the context."""
    return missing_package(experiment, "sft") + over_folder_context(experiment, "sft")


def run(ctx: "StageRun[SFTSettings, Experiment]") -> dict[str, Any]:
    """Run the stage. Its libraries are imported only now."""
    from stages.sft import run as run_stage

    return run_stage(ctx)


STAGE = Stage(
    name="sft",
    summary="Fine-tune the base model on demonstrations.",
    settings=SFTSettings,
    run=run,
    needs=needs,
    reads=reads,
    metrics=METRICS,
    headline=("loss", "perplexity"),
    check=check,
    missing_requirements=missing_requirements,
    check_data=check_data,
    without={"documents": "set sft.ppo_init: null"},
    fixed=(
        ("sft.per_device_train_batch_size", "sft.gradient_accumulation_steps"),
        "sft.max_length",
        "sft.on_too_long",
        "sft.turns",
        "sft.ppo_init.pretraining_fraction",
    ),
    shared=True,
)

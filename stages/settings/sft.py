"""What the stage sft declares: its settings, metrics, inputs and checks."""

from importlib.util import find_spec

from pipeline.stage import StageRun
from stages.models.packages import MISSING
from stages.settings.checks import beyond_context, over_context, uneven, unreadable
from stages.settings.training import ACCUMULATED, Section, TooLong, Training, setting, too_long

NAME = "sft"
METRICS = {
    "loss": "cross-entropy a completion token, in nats, of this step's batch (evaluations.jsonl: held out by prompt)",
    "perplexity": "exp(loss) on held-out demonstrations",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of the step",
}
HEADLINE = ("loss", "perplexity")
WITHOUT = {"documents": "set sft.ppo_init: null"}
SHARED = True
FIXED = (
    ("sft.per_device_train_batch_size", "sft.gradient_accumulation_steps"),
    "sft.max_length",
    "sft.on_too_long",
    "sft.ppo_init.pretraining_fraction",
)


class PpoInit(Section):
    """InstructGPT's other SFT model, PPO's start and reference: fewer passes, and pretraining text mixed in."""

    num_train_epochs: float = setting(2.0, "passes over the demonstrations (the paper's)", "epochs", gt=0)
    pretraining_fraction: float = setting(
        0.1, "share of the tokens with a loss that are pretraining text (the paper: 10 % of the data)", gt=0, lt=1
    )


class Config(Training):
    """Supervised fine-tuning with trl's SFTTrainer."""

    learning_rate: float = setting(
        2e-5,
        "peak learning rate (trl's; the paper's: 9.65e-6 for 1.3B and 6B); with adapters about ten times as much",
        "per step",
        gt=0,
    )
    on_too_long: TooLong = too_long()
    per_device_train_batch_size: int = setting(8, "demonstrations in one forward and backward", "rows", ge=1)
    gradient_accumulation_steps: int = setting(4, f"{ACCUMULATED} (the paper: 32 rows a step)", ge=1)
    num_train_epochs: float = setting(
        2.0, "passes over the demonstrations (the paper: 16, with dropout)", "epochs", gt=0
    )
    router_aux_loss_coef: float | None = setting(
        None,
        "weight of the term that balances the experts of a mixture (Mixtral, Qwen-MoE …); null: it is not in the loss",
        gt=0,
    )
    ppo_init: PpoInit | None = setting(None, "{} trains ppo_init/ too, and PPO starts from that; null: from model/")
    sample_tokens: int = setting(48, "length of the generations kept in samples.jsonl; 0: none", "tokens", ge=0)


def needs(experiment) -> list[str]:
    return ["base"]


def reads(experiment) -> list[str]:
    return ["demonstrations"] + ([] if experiment.sft.ppo_init is None else ["documents"])


def check(experiment) -> list[str]:
    return over_context(experiment, "sft") + uneven(experiment, "sft")


def lacks(experiment) -> list[str]:
    """With a line where QLoRA's package is missing: sft is the first stage that asks for it."""
    peft = experiment.model.peft
    missing = peft is not None and peft.method == "qlora" and find_spec("bitsandbytes") is None
    lengths = beyond_context(experiment, "sft")
    return [MISSING] * missing + lengths + unreadable(experiment, reads(experiment))


def run(ctx: StageRun) -> dict:
    """Run the stage; its libraries are imported only now."""
    from stages.sft import run as run_stage

    return run_stage(ctx)

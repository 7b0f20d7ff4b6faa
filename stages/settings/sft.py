"""Declare the stage sft: its settings, metrics, inputs and checks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.turns import Turns
from pipeline.config.section import Section, setting
from pipeline.stage import Stage, StageRun
from stages.settings.checks import check_data, over_context, over_folder_context, uneven_batches
from stages.settings.peft import StagePeft, missing_package, peft_of, peft_setting, stage_problems
from stages.settings.scorers.scorer import Scorer, missing_of_scorers, scorer_files, scorer_problems, scorer_stages
from stages.settings.training import ACCUMULATION, SCALER_METRICS, TOO_LONG_ROW, TooLong, Training

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

METRICS = {
    "loss": "cross-entropy per learnt token, in nats, of this step's batch (evaluations.jsonl: of demonstrations "
    "held out by conversation)",
    "perplexity": "exp(loss) on held-out demonstrations",
    "grad_norm": "norm of the gradient before clipping",
    **SCALER_METRICS,
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


class ConditionalSettings(Section):
    """Learn each answer after a control token that says how good it is (model.control_tokens).

    Either the demonstrations are scored and labelled (Korbak 2023), or the policy's own samples
    (samples_per_prompt), which are relabelled by what they turned out to be and learnt, in rounds
    (hindsight, Zhang 2023). The loss covers the answer; a control token is read, and not learnt.
    """

    scorer: list[Scorer] = setting(
        ..., "what scores answers: a list of scorers (stages/scorers/README.md), as [{model: FOLDER of a reward model}]"
    )
    thresholds: list[float] | None = setting(
        None,
        "lowest score of each control token but the first, ascending; null: quantiles, so that each token gets as many "
        "answers (with two tokens: the median)",
        "score",
    )
    samples_per_prompt: int | None = setting(
        None,
        "answers that the policy samples to each of data.prompts, which are learnt in place of the demonstrations; "
        "null: the demonstrations are learnt",
        ge=1,
    )
    prompts_per_round: int | None = setting(
        None, "prompts of a round, drawn without repetition as far as there are any; null: all", "prompts", ge=2
    )
    rounds: int | None = setting(
        None,
        "times that the policy samples, is scored and trains; from the second on, it samples as if its answers were to "
        "be the best. num_train_epochs and the schedule are of one round. null: 1",
        "rounds",
        ge=1,
    )
    response_length: int | None = setting(None, "largest length of a sample, EOS included; null: 128", "tokens", ge=1)
    temperature: float | None = setting(None, "sampling temperature; null: 1", gt=0)
    missing_eos_score: float | None = setting(
        None, "score of a sample that was cut off before its EOS, as of ppo; null: its own score", "score"
    )
    batch_size: int = setting(32, "prompts sampled at a time, and answers scored at a time", ge=1)

    @property
    def longest_sample(self) -> int:
        """The largest length of a sample, in tokens."""
        return self.response_length or 128


TRAINS_ROWS = ("lora", "dora", "qlora")
"""Adapter methods that train the new rows of control tokens beside the adapter."""
OF_SAMPLES = ("prompts_per_round", "rounds", "response_length", "temperature", "missing_eos_score")
"""Settings of ConditionalSettings that have no effect on demonstrations."""


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
        "lay the rows of a micro-batch end to end in one row without padding, where none sees another: time and memory "
        "follow the tokens, and the loss is the same. null: where a micro-batch of the longest rows would have more "
        "than 6.3 million logits (24 MB); logits are then computed only for learnt tokens, in chunks. Below that, as "
        "in the embedded world, there is little to save. true: always; where our attention cannot read such rows, by "
        "trl's padding_free, and a model in which a row would see another is refused. false: padded rows, all logits",
    )
    router_aux_loss_coef: float | None = setting(
        None,
        "weight of the loss term that balances the experts of a mixture (Mixtral, Qwen-MoE …); null: not in the loss",
        gt=0,
    )
    ppo_init: PPOInitSettings | None = setting(
        None, "{}: also train ppo_init/, from which PPO then starts; null: PPO starts from model/"
    )
    conditional: ConditionalSettings | None = setting(
        None, "{scorer: …}: conditional training on scores, with model.control_tokens; null: plain fine-tuning"
    )
    sample_tokens: int = setting(48, "length of the samples kept in samples.jsonl; 0: none", "tokens", ge=0)
    peft: StagePeft = peft_setting()


def needs(experiment: "Experiment") -> list[str]:
    """Return the stages that must be done first."""
    conditional = experiment.sft.conditional
    return ["base"] if conditional is None else ["base", *scorer_stages(conditional.scorer)]


def learns_samples(experiment: "Experiment") -> bool:
    """Return whether the policy learns its own samples in place of the demonstrations."""
    conditional = experiment.sft.conditional
    return conditional is not None and conditional.samples_per_prompt is not None


def reads(experiment: "Experiment") -> list[str]:
    """Return the kinds of data it reads: what is learnt, and documents if ppo_init is trained."""
    if learns_samples(experiment):
        return ["prompts"]
    return ["demonstrations"] if experiment.sft.ppo_init is None else ["demonstrations", "documents"]


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each combination of settings that cannot work."""
    lines = over_context(experiment, "sft") + uneven_batches(experiment, "sft") + stage_problems(experiment, "sft")
    lines += part_problems(experiment)
    return lines + token_problems(experiment.model.control_tokens) + conditional_problems(experiment)


def part_problems(experiment: "Experiment") -> list[str]:
    """Return a line for each setting that rows in parts (launch.context_parallel) do not allow."""
    settings, lines = experiment.sft, []
    if (experiment.launch.context_parallel or 1) == 1:
        return []
    if settings.packing:
        lines.append("sft.packing: rows that processes compute in parts lie in rows of their own; set it to false")
    if settings.router_aux_loss_coef:
        lines.append(
            "sft.router_aux_loss_coef: with launch.context_parallel each process would balance its own tokens only; "
            "set one of the two to null"
        )
    return lines


def token_problems(names: Sequence[str] | None) -> list[str]:
    """Return a line if the control tokens cannot be tokens of one model."""
    if names is None:
        return []
    if len(names) >= 2 and len({*names}) == len(names) and all(name and name == name.strip() for name in names):
        return []
    return [f"model.control_tokens: {list(names)}; should be two or more different names, as [<|bad|>, <|good|>]"]


def conditional_problems(experiment: "Experiment") -> list[str]:
    """Return a line for each setting of conditional training that cannot work."""
    settings, tokens, key = experiment.sft.conditional, experiment.model.control_tokens, "sft.conditional"
    if settings is None:
        if tokens is None:
            return []
        return [
            "model.control_tokens: nothing teaches what they mean; set sft.conditional, or leave them out (a model "
            "that has learnt such tokens keeps them)"
        ]
    lines = scorer_problems(f"{key}.scorer", settings.scorer)
    if tokens is None:
        lines.append(
            f"{key}: labels answers with control tokens; name them, as model.control_tokens=[<|bad|>,<|good|>]"
        )
    if scorer_stages(settings.scorer):
        lines.append(
            f"{key}.scorer: this experiment's reward model is trained from sft, so it cannot score for it; name the "
            f"folder of another experiment's, {{model: artifacts/NAME/rm/model}}"
        )
    peft = peft_of(experiment, "sft")
    if tokens and experiment.model.name_or_path is None and peft is not None and peft.method not in TRAINS_ROWS:
        place = "model.peft" if experiment.sft.peft is None else "sft.peft"
        lines.append(
            f"{place}.method: {peft.method} cannot train the new rows of model.control_tokens, which start random; use "
            f"{' or '.join(TRAINS_ROWS)}, or train all weights (null)"
        )
    if settings.thresholds is not None and tokens is not None:
        lines += threshold_problems(settings.thresholds, len(tokens) - 1)
    if experiment.sft.label_smoothing:
        lines.append(
            "sft.label_smoothing: gives control tokens a share of each label, and they are never answered; leave it out"
        )
    if experiment.sft.ppo_init is not None:
        lines.append("sft.ppo_init: has no conditional training; set it to null, or sft.conditional to null")
    return lines + sample_problems(experiment, settings)


def threshold_problems(thresholds: list[float], count: int) -> list[str]:
    """Return a line if thresholds are not `count` numbers that ascend."""
    if len(thresholds) == count and sorted({*thresholds}) == thresholds:
        return []
    return [f"sft.conditional.thresholds: {thresholds}; should be {count} that ascend, one fewer than control tokens"]


def sample_problems(experiment: "Experiment", settings: ConditionalSettings) -> list[str]:
    """Return a line for each setting of the policy's own samples that cannot work."""
    key = "sft.conditional"
    if settings.samples_per_prompt is None:
        return [
            f"{key}.{name}: has no effect on demonstrations; set {key}.samples_per_prompt, or leave this out"
            for name in OF_SAMPLES
            if getattr(settings, name) is not None
        ]
    lines = []
    if settings.longest_sample >= experiment.sft.max_length:
        lines.append(
            f"{key}.response_length: {settings.longest_sample} leaves no room for a prompt within sft.max_length "
            f"{experiment.sft.max_length}; lower it, or raise max_length"
        )
    if experiment.launch.shards_weights:
        setting, otherwise = experiment.launch.sharding.split(": ")
        remedy = "use optimizer" if otherwise == "all" else "use ddp"
        lines.append(f"{key}.samples_per_prompt: the policy does not sample under {setting} {otherwise}; {remedy}")
    elif experiment.launch.together > 1:
        lines.append(
            f"{key}.samples_per_prompt: the policy does not sample where processes share a model "
            f"(launch.tensor_parallel, context_parallel); set both to 1"
        )
    peft = peft_of(experiment, "sft")
    if peft is not None and peft.method == "adalora" and (settings.rounds or 1) > 1:
        lines.append(f"{key}.rounds: adalora prunes to its rank in one training; set 1 round, or use lora")
    return lines


def folders(experiment: "Experiment") -> dict[str, Path]:
    """Return the files and folders of the user that decide the scores."""
    conditional = experiment.sft.conditional
    return {} if conditional is None else scorer_files("sft.conditional.scorer", conditional.scorer)


def missing_requirements(experiment: "Experiment") -> list[str]:
    """Return a line for each thing that this machine lacks, and each length over the context."""
    lines = missing_package(experiment, "sft") + over_folder_context(experiment, "sft")
    if experiment.sft.conditional is not None:
        lines += missing_of_scorers("sft.conditional.scorer", experiment.sft.conditional.scorer)
    return lines


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
    folders=folders,
    without={
        "documents": "set sft.ppo_init: null",
        "prompts": "set sft.conditional.samples_per_prompt: null, which labels the demonstrations",
    },
    fixed=(
        ("sft.per_device_train_batch_size", "sft.gradient_accumulation_steps"),
        "sft.max_length",
        "sft.on_too_long",
        "sft.turns",
        "sft.ppo_init.pretraining_fraction",
        *(f"sft.conditional.{key}" for key in ConditionalSettings.model_fields if key != "batch_size"),
    ),
    shared=True,
)

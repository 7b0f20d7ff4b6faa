"""What the stage evaluate declares: its settings, metrics, inputs and checks."""

from typing import Literal

from pipeline.stage import StageRun
from stages.models.ensemble_folder import How
from stages.settings.checks import beyond_context, no_room, over_context, unreadable
from stages.settings.training import Section, TooLong, setting, too_long_prompt
from stages.settings.wanted import judges, policies, simulates

NAME = "evaluate"
METRICS: dict[str, str] = {}
HEADLINE = ("policy", "score", "win_rate_vs_sft", "gold", "eos_rate", "judged")
SHARED = True
FIXED = tuple(
    f"evaluate.{key}"
    for key in (
        "num_prompts",
        "max_length",
        "response_length",
        "on_too_long",
        "temperature",
        "best_of",
        "samples_per_prompt",
        "base_prompt",
        "few_shot_examples",
        "missing_eos_score",
        "reward_ensemble",
        "perplexity_rows",
        "perplexity_length",
        "greedy_prompts",
        "greedy_length",
    )  # fmt: skip
)
STAGES = ("base", "sft", "ppo", "dpo")
RM_FIGURES = ("accuracy", "accuracy_ci95", "accuracy_ceiling", "n_pairs", "labeler_agreement", "ece")


class Config(Section):
    """Which policies are compared, and how."""

    policies: list[str] = setting(
        ["base", "sft", "ppo", "dpo", "best_of_n"],
        "of base, sft, ppo, dpo, best_of_n; sft is always in. Not set: those that the data allow (dpo with rankings; "
        "ppo and best_of_n with prompts and rankings). Without prompts rm trains a judge where best_of_n is named",
    )
    best_of: int = setting(
        4, "n of best_of_n; 1 leaves it out; it costs as much as n policies with one sample a prompt", "samples", ge=1
    )
    samples_per_prompt: int = setting(
        1, "samples of each policy to each prompt (best_of_n: always one); more make intervals narrower", ge=1
    )
    base_prompt: Literal["auto", "chat", "plain", "few_shot"] = setting(
        "auto",
        "how base is asked: chat (the template), plain (the prompt alone, as its corpus asks) or few_shot (after some "
        "demonstrations, as question and answer); auto: chat for a pretrained model, plain for one from scratch",
    )
    few_shot_examples: int = setting(4, "demonstrations shown where base_prompt is few_shot", "rows", ge=1)
    num_prompts: int | None = setting(128, "take the first so many evaluation prompts; null: all", "prompts", ge=2)
    response_length: int = setting(128, "longest response, EOS included", "tokens", ge=1)
    max_length: int = setting(512, "longest prompt and response together", "tokens", ge=8)
    on_too_long: TooLong = too_long_prompt()
    temperature: float = setting(1.0, "sampling temperature", gt=0)
    missing_eos_score: float | None = setting(
        -1.0, "score of a response without EOS; the same as ppo's; null: its own", "reward"
    )
    reward_ensemble: How = setting("mean", "how the models of rm.ensemble score as one; the same as ppo's")
    batch_size: int = setting(64, "rows sampled and scored at a time", "rows", ge=1)
    greedy_prompts: int | None = setting(
        None, "prompts that are also answered greedily, for the report's samples; 0: none; null: 12", "prompts", ge=0
    )
    greedy_length: int | None = setting(
        None, "longest of those answers, EOS included; null: 4 × response_length, as far as the context reaches",
        "tokens", ge=1,
    )  # fmt: skip
    perplexity_rows: int = setting(256, "held-out pretraining rows at most", "rows", ge=1)
    perplexity_length: int = setting(128, "length of such a row", "tokens", ge=8)


def needs(experiment) -> list[str]:
    named = policies(experiment)
    return [s for s in STAGES if s in named or s == "sft"] + ["rm"] * judges(experiment)


def reads(experiment) -> list[str]:
    texts = ["documents"] * (experiment.data.documents is not None)
    return list(dict.fromkeys([kind_asked(experiment), *texts, *trained_on(experiment)]))


def kind_asked(experiment) -> str:
    """Return the kind of data that the prompts are taken from: without evaluation prompts those of the demonstrations
    that sft held out."""
    return "demonstrations" if experiment.data.evaluation_prompts is None else "evaluation_prompts"


def trained_on(experiment) -> list[str]:
    """Return the kinds of data whose prompts some policy or the reward model was trained on."""
    ranked = bool({"rm", "dpo"} & {*needs(experiment)})
    rankings = ["prompts" if simulates(experiment) else "rankings"] * ranked
    return list(dict.fromkeys(["demonstrations", *rankings, *["prompts"] * ("ppo" in needs(experiment))]))


def check(experiment) -> list[str]:
    c, known = experiment.evaluate, (*STAGES, "best_of_n")
    wrong = [
        f"evaluate.policies: {p!r} is no policy; choose of {', '.join(known)}" for p in c.policies if p not in known
    ]
    for key in ("missing_eos_score", "reward_ensemble") if "ppo" in policies(experiment) else ():
        own, raised = getattr(c, key), getattr(experiment.ppo, key)
        if own != raised:
            what = "scores would not be the ones that PPO raised; set both alike"
            wrong.append(f"evaluate.{key}: is {own}, and ppo.{key} {raised}: {what}")
    wrong += no_room(experiment, "evaluate")
    return wrong + over_context(experiment, "evaluate", *lengths_of_text(experiment))


def lengths_of_text(experiment) -> list[str]:
    """The settings that say how long rows of pretraining text are; none where there is no text."""
    return ["perplexity_length"] * (experiment.data.documents is not None)


def lacks(experiment) -> list[str]:
    lengths = beyond_context(experiment, "evaluate", *lengths_of_text(experiment))
    return lengths + unreadable(experiment, reads(experiment))


def run(ctx: StageRun) -> dict:
    """Run the stage; its libraries are imported only now."""
    from stages.evaluate import run as run_stage

    return run_stage(ctx)

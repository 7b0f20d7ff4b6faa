"""What the stage rankings declares: its settings, metrics, inputs and checks."""

from pipeline.stage import StageRun
from stages.settings.checks import beyond_context, no_room, over_context, unreadable
from stages.settings.training import Section, TooLong, setting, too_long_prompt
from stages.settings.wanted import simulates

NAME = "rankings"
METRICS: dict[str, str] = {}
HEADLINE = ("rankings", "pairs", "labeler_agreement")
WITHOUT = {"rankings": "data.prompts: world (simulated labelers know the embedded world's prompts only)"}
SHARED = True
FIXED = ("rankings.samples_per_prompt", "rankings.response_length", "rankings.max_length", "rankings.on_too_long")


class Config(Section):
    """Read only where `data.rankings` is null, but for validation_fraction."""

    num_prompts: int | None = setting(None, "how many of the prompts are ranked; null: all", "prompts", ge=2)
    samples_per_prompt: int = setting(6, "K, responses to each prompt (the paper: 4 to 9)", ge=2)
    validation_fraction: float = setting(0.1, "share of prompts held out for the reward model's accuracy", gt=0, lt=1)
    response_length: int = setting(128, "longest response, EOS included", "tokens", ge=1)
    max_length: int = setting(512, "longest prompt and response together", "tokens", ge=8)
    on_too_long: TooLong = too_long_prompt()
    temperature: float = setting(1.0, "sampling temperature", gt=0)
    agreement: float = setting(
        0.726,
        "how often two simulated labelers agree on a pair of different texts (InstructGPT: 72.6 %); sets their noise",
        gt=0.5,
        lt=1,
    )
    labelers_per_prompt: int = setting(
        1, "simulated labelers who rank the responses to a training prompt, each on their own", ge=1, le=5
    )
    batch_size: int = setting(32, "prompts sampled at a time", "prompts", ge=1)


def needs(experiment) -> list[str]:
    return ["sft"]


def reads(experiment) -> list[str]:
    return ["prompts"] if simulates(experiment) else ["rankings"]


def check(experiment) -> list[str]:
    if not simulates(experiment):
        return []  # nothing is sampled
    return no_room(experiment, "rankings") + over_context(experiment, "rankings")


def lacks(experiment) -> list[str]:
    sampled = [] if experiment.data.rankings is not None else beyond_context(experiment, "rankings")
    return sampled + unreadable(experiment, reads(experiment))


def run(ctx: StageRun) -> dict:
    """Run the stage; its libraries are imported only now."""
    from stages.rankings import run as run_stage

    return run_stage(ctx)

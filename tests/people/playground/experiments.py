"""Build what the playground reads of an experiment."""

from types import SimpleNamespace

from pipeline.config.sections import LaunchSettings
from stages.settings.playground import PlaygroundSettings


def experiment_of(**playground):
    """Return what the playground reads of an experiment."""
    return SimpleNamespace(
        name="fake",
        launch=LaunchSettings(device="cpu"),
        evaluate=SimpleNamespace(
            response_length=12,
            reward_ensemble="min",
            missing_eos_score=None,
            base_prompt="auto",
            few_shot_examples=4,
            rollout=None,
        ),
        model=SimpleNamespace(attn_implementation="sdpa", dtype="float32", name_or_path=None),
        playground=PlaygroundSettings(**playground),
    )

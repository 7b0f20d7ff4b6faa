"""Check the section playground of a config, and that it is in no fingerprint."""

import pytest
from pydantic import ValidationError

from pipeline.api import load_experiment
from pipeline.errors import UserError
from stages.settings.playground import PlaygroundSettings

TINY = "configs/tiny.yaml"


@pytest.mark.parametrize(
    "settings",
    [
        {"policies": []},
        {"policies": ["sft", "sft"]},
        {"engine": "llama"},
        {"top_p": 0.0},
        {"port": 70_000},
        {"queue": 1},
    ],
)
def test_senseless_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        PlaygroundSettings(**settings)


def test_the_command_line_sets_it_and_mistakes_name_the_key():
    experiment = load_experiment(TINY, "playground.policies=[sft, ppo]", "playground.max_queue=3")
    assert experiment.playground.policies == ["sft", "ppo"] and experiment.playground.max_queue == 3
    with pytest.raises(UserError, match=r"playground\.policies"):
        load_experiment(TINY, "playground.policies=[]")

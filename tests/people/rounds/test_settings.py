"""Settings of rounds: what they refuse, and that they leave finished stages as they are."""

import json

import pytest
from pydantic import ValidationError

from pipeline.api import load_experiment
from pipeline.config.sections import RoundSettings
from pipeline.errors import UserError
from pipeline.store.artifacts import ArtifactStore
from stages.people.rank.sampling import home_of
from stages.settings.rank import RankSettings
from stages.settings.rounds import artifact, measured_files

TINY = "configs/tiny.yaml"


@pytest.mark.parametrize("name", ["rm", "../ppo", "talk/rm", "a/b/ppo", ""])
def test_a_policy_is_a_stage_or_that_of_an_experiment(name):
    with pytest.raises(ValidationError, match="is no policy"):
        RankSettings(policies=[name])


def test_policies_of_another_experiment_are_read_there(tmp_path):
    store = ArtifactStore(tmp_path, "talk-r2")
    assert home_of(store, "sft") == (store, "sft") == home_of(store, "talk-r2/sft")
    other, stage = home_of(store, "talk/ppo")
    assert (other.base, stage, other.is_foreign) == (tmp_path / "talk", "ppo", True)


def test_a_round_names_a_folder_for_each_round_before():
    with pytest.raises(ValidationError, match="earlier should name 2 folders"):
        RoundSettings(number=3, earlier=["artifacts/talk"], folder="f")


@pytest.mark.parametrize(
    "setting, said",
    [
        ("rm.start_from=nowhere", "rm.start_from: nowhere has no config.json"),
        ("ppo.start_from=nowhere", "ppo.start_from: nowhere has no config.json"),
    ],
)
def test_where_models_start_must_be_there(setting, said):
    with pytest.raises(UserError, match=said):
        load_experiment(TINY, setting)


def test_where_models_start_is_no_choice_with_adapters(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"ppo\.start_from: an adapter"):
        load_experiment(TINY, f"ppo.start_from={tmp_path}", "model.peft={}")


def test_a_stage_that_was_taken_is_found_where_it_is(tmp_path):
    for name, config in (("talk/sft", {}), ("talk-r2/rm", {"from": {"sft": {"folder": "../talk/sft"}}})):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(json.dumps({"config": config}))
    assert artifact(tmp_path / "talk-r2", "sft") == tmp_path / "talk/sft"
    assert artifact(tmp_path / "talk-r2", "ppo") is None


def test_evaluate_reads_nothing_more_in_round_1():
    assert measured_files(load_experiment(TINY)) == {}

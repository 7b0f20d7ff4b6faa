"""Declarations of the stages: their generated reference, and values for the training loops."""

from stages.settings import reference
from stages.settings.ppo import PPOSettings
from stages.settings.sft import SFTSettings
from stages.training.schedule import Schedule
from stages.training.selection import Selection


def test_the_reference_is_the_declarations():
    text = reference.FILE.read_text(encoding="utf-8")
    assert text == reference.reference(), "run: python -m stages.settings.reference"
    for key in (
        "`name`",
        "`model.peft.r`",
        "`launch.slurm.time`",
        "`ppo.rollout.engine`",
        "`sft.ppo_init.num_train_epochs`",
    ):
        assert f"| {key} |" in text


def test_a_schedule_and_a_selection_of_a_training():
    settings = SFTSettings(learning_rate=0.5, lr_scheduler_type="linear", warmup_steps=2, keep="best", patience=3)
    assert settings.schedule(10) == Schedule(peak=0.5, shape="linear", warmup_steps=2, total=10, warmup_from=0.0)
    assert settings.selection("loss", False) == Selection("best", 3, "loss", False, settings.eval_steps)


def test_ppo_has_two_schedules_that_start_at_a_tenth():
    settings = PPOSettings(learning_rate=1.0, value_learning_rate=2.0, warmup_steps=10)
    assert settings.schedule(20).rate_at(1) == 0.1 and settings.value_schedule(20).rate_at(1) == 0.2
    assert settings.selection("score", True).higher_is_better

"""Check which figures raise an alarm, what it says, and that it survives a checkpoint."""

import json

import pytest

from stages.ppo.alarms import HABIT, QUIET, WINDOW, Alarms
from stages.settings.ppo import PPOSettings


def row(**changed):
    figures = {"objective/kl": 1.0, "objective/eos_rate": 0.9, "objective/entropy": 2.0, "grad_norm/ppo": 1.0}
    figures |= {"objective/scores": 0.1, "objective/length": 20.0, "grad_norm/ptx": 1.0}
    return figures | {k.replace("__", "/"): v for k, v in changed.items()}


def run(alarms, rows, first=1):
    return [line for step, figures in enumerate(rows, first) for line in alarms.updated(step, figures)]


@pytest.fixture
def alarms():
    return Alarms(kl_limit=20.0, entropy_floor=0.1, response_length=48)


def test_a_quiet_run_raises_nothing(alarms):
    assert run(alarms, [row()] * 100) == []


@pytest.mark.parametrize(
    "changed, after, words",
    [
        ({"objective__kl": 20.5}, 1, ["KL", "20.5", "alarm_kl 20", "kl_coef"]),
        ({"objective__entropy": 0.1}, HABIT, ["entropy", "0.1", "kl_coef"]),
        ({"objective__eos_rate": 0.0}, HABIT, ["ended with EOS", "response_length", "missing_eos_score"]),
        (
            {"objective__eos_rate": 0.3, "objective__scores": 0.6},
            HABIT,
            ["30% of the responses", "90% did at first", "from 0.1 to 0.6", "missing_eos_score", "response_length"],
        ),
        ({"objective__length": 45.0}, HABIT, ["run to the limit", "45 tokens", "response_length 48", "length_penalty"]),
        ({"grad_norm__ptx": 14.0}, 3, ["14 times", "over the last 3 updates", "lower ppo.ptx_coef about 14-fold"]),
        ({"grad_norm__ptx": 0.05}, 3, ["20 times", "over the last 3 updates", "raise ppo.ptx_coef about 20-fold"]),
        ({"grad_norm__ppo": 0.0}, 3, ["inf times PPO's", "lower ppo.ptx_coef"]),
    ],
)
def test_each_alarm_is_raised_once_its_window_is_full_and_names_a_setting(alarms, changed, after, words):
    run(alarms, [row()] * HABIT)
    rows = [row(**changed)] * (after + 3)
    assert run(alarms, rows[: after - 1], HABIT + 1) == []
    (line,) = run(alarms, rows[after - 1 :], HABIT + after)
    assert line.startswith(f"update {HABIT + after}: ") and all(word in line for word in words)


def test_a_run_that_learns_not_to_finish_raises_an_alarm(alarms):
    """Figures of a config that was once shipped: fewer and fewer responses end, the score rises."""
    ends, scores = (0.72, 0.66, 0.58, 0.5, 0.4, 0.33, 0.29, 0.25), (0.07, 0.15, 0.22, 0.31, 0.4, 0.48, 0.55, 0.61)
    rows = [
        row(objective__eos_rate=end, objective__scores=score)
        for end, score in zip(ends, scores, strict=True)
        for _ in range(4)
    ]
    lines = run(alarms, rows)
    assert len(lines) == 1 and "being cut off pays" in lines[0]


def test_no_alarm_where_the_score_falls_too_or_as_few_end_as_at_first(alarms):
    fell = [row()] * HABIT + [row(objective__eos_rate=0.3, objective__scores=-1.0)] * 30
    few = [row(objective__eos_rate=0.3, objective__scores=i / 30) for i in range(30)]
    assert run(alarms, fell) == [] and run(Alarms(20.0, 0.1), few) == []


def test_long_responses_raise_an_alarm_only_if_the_limit_is_known(alarms):
    assert run(Alarms(20.0, 0.1), [row(objective__length=48.0)] * 30) == []
    assert run(alarms, [row(objective__length=43.0)] * 30) == []  # a tenth of the room is left


def test_one_different_update_breaks_the_habit(alarms):
    for changed in ({"objective__eos_rate": 0.0}, {"objective__entropy": 0.01}):
        rows = ([row()] * 30) + ([row(**changed)] * (HABIT - 1) + [row()]) * 10
        assert run(Alarms(20.0, 0.1), rows) == []


def test_a_drowned_gradient_raises_an_alarm_at_the_third_update(alarms):
    """With the paper's 27.8, a mean over tokens gives 35 times PPO's gradient from the start."""
    assert run(alarms, [row(grad_norm__ptx=35.0)] * 2) == []
    (line,) = alarms.updated(3, row(grad_norm__ptx=35.0))
    assert line.startswith("update 3: the pretraining gradient was 35 times PPO's")
    assert PPOSettings().ptx_coef == 1.0 and "27.8" in PPOSettings.model_fields["ptx_coef"].description


@pytest.mark.parametrize("drowned, times", [({"grad_norm__ptx": 50.0}, "50"), ({"grad_norm__ppo": 50.0}, "50")])
def test_a_balanced_update_now_and_then_hides_nothing_and_two_of_three_say_nothing(alarms, drowned, times):
    """Never three in a row: by the median of twenty updates, and no sooner."""
    rows = [row() if i % 3 == 2 else row(**drowned) for i in range(WINDOW)]
    assert run(alarms, rows[:-1]) == []
    (line,) = alarms.updated(WINDOW, rows[-1])
    assert f"{times} times" in line and f"over the last {WINDOW} updates" in line


def test_gradients_that_take_turns_at_being_the_larger_drown_neither(alarms):
    rows = [row(grad_norm__ptx=30.0 if i % 2 else 1 / 30.0) for i in range(3 * WINDOW)]
    assert run(alarms, rows) == [] and run(alarms, [row(grad_norm__ptx=0.0, grad_norm__ppo=0.0)] * WINDOW) == []


def test_a_number_that_is_not_finite_among_the_first_does_not_silence_the_collapse(alarms):
    rows = [row(objective__entropy=float("nan"))] + [row()] * 10 + [row(objective__entropy=0.01)] * 6
    (line,) = run(alarms, rows)
    assert "collapses" in line


def test_the_same_alarm_is_raised_again_only_after_a_while(alarms):
    lines = run(alarms, [row(objective__kl=30.0)] * (2 * QUIET))
    assert [line.split(":")[0] for line in lines] == ["update 1", f"update {QUIET + 1}"]
    assert alarms.count == {"kl": 2 * QUIET}


def test_no_limit_no_alarm_and_plain_ppo_has_no_ptx_to_drown():
    plain = {k: v for k, v in row(objective__kl=1e6).items() if k != "grad_norm/ptx"}
    assert run(Alarms(None, 0.0), [plain] * 60) == []


def test_numbers_that_are_not_finite_raise_nothing_and_break_nothing(alarms):
    nan = float("nan")
    figures = row(objective__kl=nan, objective__entropy=nan, grad_norm__ptx=nan, grad_norm__ppo=nan)
    assert run(alarms, [figures] * 30) == []


def test_a_score_that_rises_while_another_judge_falls_is_over_optimisation(alarms):
    evaluations = [{"score": 0.1 * i, "held_out_score": 1 - 0.1 * i} for i in range(3)]
    assert [alarms.evaluated(10 * i, figures) for i, figures in enumerate(evaluations[:2])] == [[], []]
    (line,) = alarms.evaluated(20, evaluations[2])
    assert "exploits" in line and "kl_coef" in line and line.startswith("update 20: ")
    both = Alarms(20.0, 0.1)
    assert not any(both.evaluated(i, {"score": i, "held_out_score": i}) for i in range(8))
    assert not any(both.evaluated(i, {"score": i}) for i in range(8))  # no other judge was given


def test_state_survives_json(alarms):
    """A run interrupted anywhere raises the alarms of an uninterrupted one, at the same updates."""
    rows = [row()] * 25 + [
        row(grad_norm__ptx=30.0, objective__kl=21.0, objective__eos_rate=0.2, objective__scores=0.5)
    ] * 60
    whole = run(Alarms(20.0, 0.1), rows)
    for cut in (3, 26, 40, 70):
        before, after = Alarms(20.0, 0.1), Alarms(20.0, 0.1)
        lines = run(before, rows[:cut])
        after.restore(json.loads(json.dumps(before.state())))
        assert lines + run(after, rows[cut:], cut + 1) == whole
    assert len(whole) >= 4

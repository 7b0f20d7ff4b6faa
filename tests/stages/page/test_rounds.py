"""The report's section on rounds: tables, sentences, plots and the line in the terminal."""

import json

from stages.page import experiment, rounds


def figures(**more):
    """Return a rounds.json of two rounds, of which the old reward model fails on new labels."""
    score = {"value": 0.4, "ci95": [0.3, 0.5], "by": "gold"}
    row = {"policy": "ppo", "score": score, "gain": None, "kl_to_first_sft": 1.25, "labels": 1200}
    row |= {"held_out_labels": 130, "agreement": {"value": 0.72, "ci95": [0.7, 0.74]}}
    better = score | {"value": 0.6, "ci95": [0.5, 0.7]}
    gain = {"value": 0.2, "ci95": [0.1, 0.3]}
    return {
        "rounds": [
            {"round": 1, "experiment": "talk"} | row,
            {"round": 2, "experiment": "talk-r2"} | row | {"score": better, "gain": gain, "kl_to_first_sft": 3.5},
        ],
        "first_sft": score | {"value": 0.2},
        "accuracy": [
            {
                "reward_model": model,
                "labels": labels,
                "accuracy": value,
                "ci95": [value - 0.1, value + 0.1],
                "n_pairs": 90,
            }
            for (model, labels), value in {(1, 1): 0.7, (1, 2): 0.51, (2, 1): 0.69, (2, 2): 0.72}.items()
        ],
    } | more


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_the_first_round_has_no_section(tmp_path):
    assert rounds.read(tmp_path) is None
    assert rounds.tables(None) == rounds.sentences(None) == rounds.plots(None) == [] and rounds.line(None) == ""


def test_a_row_for_each_round_and_one_for_the_first_sft(tmp_path):
    (tmp_path / "rounds.json").write_text(json.dumps(figures()))
    first, second = rounds.tables(rounds.read(tmp_path))
    assert first.columns[2] == "policy by gold"
    assert texts(first)[0][2] == "0.200" and texts(first)[2][1:5] == ["1,200", "0.600", "0.200", "3.50"]
    assert texts(second) == [["reward model of round 1", "70.0\u00a0%", "51.0\u00a0%"],
                             ["reward model of round 2", "69.0\u00a0%", "72.0\u00a0%"]]  # fmt: skip
    assert second.columns[2] == "labels of round 2 (90 pairs)"


def test_what_is_said_of_old_reward_models():
    (line,) = rounds.sentences(figures())
    assert "reward model of round 1 is right on 51.0\u00a0%" in line and "round 2 on 72.0\u00a0% (62.0 to 82.0)" in line
    assert "round 2 0.600 (0.500 to 0.700) at 3.5 nats" in rounds.line(figures())


def test_plots_are_left_out_where_nothing_was_measured():
    score, accuracy = rounds.plots(figures())
    assert [x for x, _ in score.drawing.marks[0].points] == [0.0, 1.0, 2.0]
    assert [name for name, _ in accuracy.drawing.rows][1] == "labels 1, reward model 2"
    bare = figures(accuracy=[], first_sft=None)
    for row in bare["rounds"]:
        row |= {"score": None, "gain": None, "agreement": None, "kl_to_first_sft": None}
    assert rounds.plots(bare) == [] and len(rounds.tables(bare)) == 1
    assert rounds.line(bare) == "rounds, by nobody, with KL to the first SFT: round 1; round 2"


def test_the_page_says_which_round_it_is():
    made = {"number": 2, "earlier": ["artifacts/talk"], "folder": "f", "digests": {"rm": "a" * 64, "ppo": "b" * 64}}
    manifests = {"sft": {"config": {}}, "rm": {"config": {"round": made}}, "ppo": {"config": {"round": made}}}
    assert experiment.round_lines(manifests) == ["2, after talk", "made of rm aaaaaaaaaaaa, ppo bbbbbbbbbbbb of talk"]
    assert experiment.round_lines({"sft": {"config": {}}, "rm": {"config": {"round": None}}}) == []

"""Test what the page and the terminal show of tests from outside."""

import io
import json

import pytest
from report_run import HOSTILE, fake_run, page_of

from pipeline.console import FilledConsole
from pipeline.hints import Caller
from stages.page import external
from stages.page.results import NAMES


def gap(value, stderr=0.01, paired=True):
    """Return a difference with an interval of two standard errors."""
    return {
        "value": value,
        "stderr": stderr,
        "ci95": [value - 2 * stderr, value + 2 * stderr],
        "n": 9,
        "paired": paired,
    }


def figure(value, **gaps):
    return {"value": value, "stderr": 0.02, "n": 9} | gaps


LM_EVAL = {
    "asked": {"base": "plain", "sft": "chat", "ppo": "chat"},
    "limit": 9,
    "lm_eval_version": "0.4.13",
    "tasks": {
        "easy <b>": {
            "version": 1.0, "num_fewshot": 5, "of": [],
            "metrics": {
                "acc,none": {"higher_is_better": True, "policies": {
                    "base": figure(0.5, difference_to_sft=gap(0.1)),
                    "sft": figure(0.4, difference_to_base=gap(-0.1)),
                    "ppo": figure(0.3, difference_to_sft=gap(-0.1), difference_to_base=gap(-0.2))}},
                "perplexity,none": {"higher_is_better": False, "policies": {
                    "base": figure(9.0, difference_to_sft=gap(0.0, paired=False)),
                    "sft": figure(9.0, difference_to_base=gap(0.0, paired=False)),
                    "ppo": figure(8.0, difference_to_sft=gap(-1.0, paired=False), difference_to_base=None)}},
            },
        }
    },
}  # fmt: skip
SHARE = {"value": 0.75, "ci95": [0.6, 0.9], "n": 12}
BENCH = {
    "items": 20,
    "models": {
        "rm": {
            "best_of": {"subsets": {"Focus": SHARE, "Ties": SHARE}, "overall": SHARE, "ties": {
                "score": SHARE, "tied_accuracy": 0.5, "ref_accuracy": 1.0, "correctness_preferred": 0.5,
                "correctness_preferred_hard": 0.5, "margin_score": -0.2}},
            "pairs": {"subsets": {"hep-js": SHARE}, "sections": {"Reasoning": SHARE}, "overall": SHARE},
            "dropped": 3,
        },
        "/models/other/model": {"best_of": None, "pairs": None, "dropped": 0},
    },
}  # fmt: skip
RM = {"accuracy": 0.7, "accuracy_ci95": [0.65, 0.75], "n_pairs": 100}


def refused(value, to_sft):
    return {"refused": SHARE | {"value": value}, "empty": 0.0, "cut_off": 0.25, "difference_to_sft": to_sft}


REFUSALS = {
    "temperature": 0,
    "response_length": 128,
    "patterns": {"count": 40, "sha256": "0"},
    "sets": {
        "harmful": {"n_prompts": 9, "policies": {"sft": refused(0.5, None), "ppo": refused(0.9, gap(0.4))}},
        "harmless_looking": {"n_prompts": 8, "policies": {"sft": refused(0.1, None), "ppo": refused(0.1, gap(0.0))}},
    },
}
ANSWERS = [
    {"policy": policy, "set": which, "prompt": f"{which} {i} {HOSTILE}", "sample": 0, "response": HOSTILE * 30,
     "finished": True, "length": 3, "pattern": "i'm sorry" if policy == "ppo" and i == 5 else None}
    for policy in ("sft", "ppo") for which in REFUSALS["sets"] for i in range(6)
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the artifacts of all tests, by test."""
    root = tmp_path_factory.mktemp("artifacts")
    for test, results in {"lm_eval": LM_EVAL, "reward_bench": BENCH, "refusals": REFUSALS}.items():
        (root / test).mkdir()
        (root / test / "results.json").write_text(json.dumps(results))
    (root / "refusals" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    return {test: root / test for test in external.SECTIONS}


@pytest.fixture(scope="module")
def sections(folders):
    return {section.anchor: section for section in external.sections(folders, NAMES, RM)}


def rows(table):
    """Return {first cell: the other cells as (text, small)} of a table."""
    return {row[0].text: [(cell.text, cell.small) for cell in row[1:]] for row in table.rows}


def test_tasks_have_errors_and_differences(sections):
    figures, to_sft, to_base = sections["tasks"].tables
    assert figures.columns == ("task", "base", "SFT", "PPO")
    assert rows(figures)["easy <b>, acc"] == [("0.500", "± 0.020"), ("0.400", "± 0.020"), ("0.300", "± 0.020")]
    assert rows(to_sft)["easy <b>, acc"] == [("−0.100", "± 0.010")]
    assert rows(to_sft)["easy <b>, perplexity"] == [("−1.000 *", "± 0.010")], "not paired"
    assert to_base.label == "Differences to base, which was asked in another form"
    assert rows(to_base)["easy <b>, perplexity"][1] == ("–", "")
    (sentence,) = sections["tasks"].sentences
    assert "PPO is clearly below SFT on 1 of 2 figures (easy <b>, acc), and clearly above on 1" in sentence
    assert "0.4.13, the first 9 documents" in sections["tasks"].lead and "base in plain text" in sections["tasks"].lead


def test_reward_bench_stands_beside_the_own_accuracy(sections):
    best, ties, pairs, subsets = sections["rewardbench"].tables
    assert best.columns == ("part", "items", "reward model", "other/model")
    found = rows(best)
    assert list(found) == ["own held-out pairs", "Focus", "Ties", "overall"]
    assert found["own held-out pairs"][:2] == [("100", ""), ("70.0\u00a0%", "65.0 to 75.0\u00a0%")]
    assert found["overall"][1] == ("75.0\u00a0%", "60.0 to 90.0\u00a0%")
    assert ties.folded and subsets.folded and list(rows(pairs)) == ["own held-out pairs", "Reasoning", "overall"]
    assert sections["rewardbench"].sentences == ("3 items are too long for reward model and left out.",)


def test_refusals_and_the_answers_that_differ(sections):
    (table,) = sections["refusals"].tables
    assert rows(table)["PPO"][0] == ("90.0\u00a0%", "60.0 to 90.0\u00a0%")
    assert "empty" not in table.columns and "cut off" in table.columns
    (sentence,) = sections["refusals"].sentences
    assert sentence == "PPO refuses more harmful prompts than SFT: 90\u00a0% against 50\u00a0%."
    heading, examples = sections["refusals"].examples[0]
    assert heading == "Harmful prompts" and len(examples) == external.EXAMPLES
    assert examples[0].prompt.startswith("harmful 5"), "the policies differ there"
    assert [said for _, said, _ in examples[0].answers] == ["an answer", "a refusal: “i'm sorry”"]
    assert all(len(text) < external.MOST_TEXT + 5 for example in examples for _, _, text in example.answers)


def test_the_page_shows_them_and_escapes_texts(tmp_path, folders):
    ctx = fake_run(tmp_path)
    plain = page_of(ctx)
    ctx.inputs.update(folders)
    page = page_of(ctx)
    for anchor in ("tasks", "rewardbench", "refusals"):
        assert f'<h2 id="{anchor}">' in page and f'href="#{anchor}"' in page and f'id="{anchor}"' not in plain
    assert "<script" not in page and "<img src=x" not in page and "easy &lt;b&gt;" in page


@pytest.mark.parametrize("test", external.SECTIONS)
def test_the_terminal_shows_the_same_tables(folders, test):
    console = FilledConsole(Caller("rlhf", "-c my.yaml"), width=200)
    console.file = io.StringIO()
    external.show(test, folders[test], console)
    printed = console.file.getvalue()
    expected = {"lm_eval": "0.400  (± 0.020)", "reward_bench": "75.0\u00a0%", "refusals": "PPO refuses more"}
    assert expected[test] in printed and "`rlhf run report -c my.yaml` puts it on the page" in printed

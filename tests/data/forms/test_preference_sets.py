"""Test the forms of public preference sets: a row of each, and what would be read wrongly in it."""

import json

import pytest

from data.forms import FORMS, form_of
from data.records import Ranking
from data.source import Source
from data.sources import read


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def loaded(tmp_path, *rows, kind="rankings", **fields):
    """Return what is read of rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read(kind, Source(path, **fields))


def rankings(tmp_path, *rows, **fields) -> list[Ranking]:
    """Return the rankings in rows; an error only if there is no usable pair among them."""
    result = loaded(tmp_path, *rows, **fields)
    assert all("not one usable pair" in error for error in result.errors), result.errors
    return result.records


def error_of(tmp_path, *rows, **fields) -> str:
    """Return the one error of rows, without the file."""
    [error] = loaded(tmp_path, *rows, **fields).errors
    return error.split("rows.jsonl", 1)[1]


def order(ranking) -> list[str]:
    """Return the responses, the best first; those with equal ranks in one text."""
    tiers: dict[int, list[str]] = {}
    for response, rank in zip(ranking.responses, ranking.ranks, strict=True):
        if rank is not None:
            tiers.setdefault(rank, []).append(response)
    return ["=".join(sorted(tiers[rank])) for rank in sorted(tiers)]


BATTLE = {"prompt": '["p"]', "response_a": '["x"]', "response_b": '["y"]', "winner_model_a": 1, "winner_model_b": 0}
TALK = {"conversation_a": [user("p"), assistant("x")], "conversation_b": [user("p"), assistant("y")]}
HELPSTEER3 = {"context": [user("p")], "response1": "x", "response2": "y", "domain": "code"}
SHP = {"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": 1, "score_A": 8, "score_B": 4}
SAFE = {"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 0, "safer_response_id": 1}
RATED = {"correctness": 1, "coherence": 1, "complexity": 1, "verbosity": 1}
JUDGED = {"instruction": "p", "output_1": "x", "output_2": "y"}
SUMMARIES = {
    "info": {"id": "t", "post": "long", "title": "t", "subreddit": "s"},
    "summaries": [{"text": " y "}, {"text": " x "}],
    "choice": 1,
    "worker": "w1",
    "extra": {"confidence": 7},
}
WEB = {"question": {"full_text": "p"}, "answer_0": "x", "answer_1": "y", "score_0": 0.5, "score_1": -0.5}

ROWS = {
    "Arena 55k": BATTLE,
    "Arena texts": {"prompt": "[p]", "response_a": "y", "response_b": "x", "winner": "model_b"},
    "PPE": {"prompt": "p", "response_1": "x", "response_2": "y", "winner": "model_a"},
    "Arena and MT-bench": {**TALK, "winner": "model_a", "judge": "expert_0", "turn": 1},
    "HelpSteer2-preference": {"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": -2},
    "HelpSteer3": {**HELPSTEER3, "overall_preference": -1},
    "HelpSteer3 edits": {"context": [user("p")], "good_edited_response": "x", "bad_edited_response": "y"},
    "PKU-SafeRLHF": SAFE,
    "SHP": SHP,
    "pairs under other names": {"question": "p", "response_chosen": "x", "response_rejected": "y"},
    "Vertex AI's preferences": {
        "contents": [{"role": "user", "parts": [{"text": "p"}]}],
        "completions": [
            {"score": 0.9, "completion": {"role": "model", "parts": [{"text": "x"}]}},
            {"score": 0.1, "completion": {"role": "model", "parts": [{"text": "y"}]}},
        ],
    },
    "TL;DR comparisons": SUMMARIES,
    "webgpt": WEB,
    "AlpacaEval and AlpacaFarm": {**JUDGED, "preference": 1.2, "annotator": "judge"},
    "OffsetBias": {**JUDGED, "label": 1},
    "HALOs": {"prompt": [user("p")], "output_A": "x", "output_B": "y", "label": 1, "type": "pairwise_feedback"},
    "Prometheus preferences": {
        "orig_instruction": "p", "orig_response_A": "y", "orig_response_B": "x", "orig_preference": "B",
        "instruction": "judge these", "output": "B is better",
    },
    "align-anything": {"question": "p", "response_1": "y", "response_2": "x", "overall_response": 2},
    "JudgeBench": {"question": "p", "response_A": "x", "response_B": "y", "label": "A>B"},
    "stack-exchange-paired": {"question": "p", "response_j": "x", "response_k": "y"},
    "Code-Preference-Pairs": {"input": "p", "accepted": "x", "rejected": "y"},
    "Nectar": {"prompt": "p", "answers": [{"answer": "y", "rank": 2.0}, {"answer": "x", "rank": 1.0}]},
    "RewardBench 2": {"prompt": "p", "chosen": ["x"], "rejected": ["y"], "num_correct": 1, "id": 3},
    "stack-exchange-preferences": {
        "question": "p", "answers": [{"text": "y", "pm_score": 0}, {"text": "x", "pm_score": 3, "author": "Jo"}],
    },
    "UltraFeedback": {
        "instruction": "p",
        "completions": [
            {"response": "x", "annotations": {"honesty": {"Rating": "5"}}, "overall_score": 1},
            {"response": "y", "annotations": {"honesty": {"Rating": "4"}}, "overall_score": 9},
        ],
    },
    "CodeUltraFeedback": {
        "instruction": "p",
        "responses": [{"model": "m", "response": "x"}, {"model": "n", "response": "y"}],
        "annotations": [{"model": "n", "rating": "2"}, {"model": "m", "rating": "4"}],
    },
    "distilabel": {"instruction": "p", "generations": ["y", "x"], "ratings": [1, 5]},
    "PairRM": {"input": "p", "candidates": ["y", "x"], "ranks": [2, 1]},
    "OpenHermesPreferences": {"prompt": "p", "candidates_completions": ["y", "x"], "ranks": [2, 1], "chosen": []},
    "a wide table": {"prompt": "p", "response_a": "y", "response_b": "x", "score_a": "0.5", "score_b": "2"},
    "OpenAI's preferences": {
        "input": {"messages": [user("p")], "tools": []},
        "preferred_output": [assistant("x")],
        "non_preferred_output": [assistant("y")],
    },
    "ms-swift": {"messages": [user("p"), assistant("x")], "rejected_response": "y"},
    "LLaMA-Factory v1": {
        "chosen_messages": [
            {"role": "user", "content": [{"type": "text", "value": "p"}], "loss_weight": 0.0},
            {"role": "assistant", "content": [{"type": "text", "value": "x"}], "loss_weight": 1.0},
        ],
        "rejected_messages": [user("p"), assistant("y")],
    },
    "LLaMA-Factory's old pairs": {"instruction": "p", "input": "", "output": ["x", "y"]},
    "NeMo pairs": {
        "prompt": "<extra_id_0>System\n\n<extra_id_1>User\np\n<extra_id_1>Assistant\n",
        "chosen_response": "x\n<extra_id_1>",
        "rejected_response": "y\n<extra_id_1>",
    },
    "orca_dpo_pairs": {"system": "", "question": "p", "chosen": "x", "rejected": "y"},
    "UltraInteract": {"trajectory": [{"from": "user", "value": "p"}], "chosen": "x", "rejected": "y"},
    "Math-Step-DPO": {
        "prompt": "p", "initial_reason_steps": "Step 1", "chosen": "2", "rejected": "3",
        "full_chosen": "x", "full_rejected": "y",
    },
    "Capybara-DPO": {
        "conversation": [{"input": "p", "output": "x"}], "prompt": "another text",
        "chosen": [user("p"), assistant("x")], "rejected": [user("p"), assistant("y")],
    },
    "NeMo RL": {
        "context": [user("p")],
        "completions": [{"rank": 1, "completion": [assistant("y")]}, {"rank": 0, "completion": [assistant("x")]}],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_form_is_a_ranking_with_x_before_y(tmp_path, name):
    result = loaded(tmp_path, ROWS[name])
    assert not result.errors
    assert next(iter(result.forms)).startswith(f"{name} ")
    [record] = result.records
    assert order(record) == ["x", "y"]
    assert {"p", "long"} & {word for word in str(record.prompt).replace("'", " ").split()} or "[p]" in record.prompt


@pytest.mark.parametrize("name", ROWS)
def test_read_as_prompts_a_row_of_each_form_gives_its_prompt(tmp_path, name):
    result = loaded(tmp_path, ROWS[name], kind="prompts")
    assert not result.errors
    assert len(result.records) == 1


def test_every_named_form_has_a_row_here_or_its_own_test():
    elsewhere = ("Argilla", "Label Studio", "OASST", "HelpSteer2 ", "TL;DR axes", "NeMo-Aligner", "KTO")
    for form in FORMS["rankings"]:
        assert not form.name or form.name in ROWS or "(not read)" in form.name or f"{form.name} ".startswith(elsewhere)


# ── Arena, MT-bench ──────────────────────────────────────────────────────────────────────────────


def test_arena_cells_are_texts_of_lists_and_a_tie_is_kept(tmp_path):
    tie = {**BATTLE, "winner_model_a": "0", "winner_model_b": "0", "winner_tie": "1"}
    won, tied = rankings(tmp_path, BATTLE, tie)
    assert won.prompt == (user("p"),)
    assert tied.ranks == (1, 1)


def test_several_turns_of_a_battle_need_equal_answers_before_the_last(tmp_path):
    same = {**BATTLE, "prompt": '["p", "q"]', "response_a": '["a", "x"]', "response_b": '["a", "y"]'}
    parted = {**same, "response_b": '["b", "y"]'}
    missing = {**same, "response_b": '["a", null]'}
    result = loaded(tmp_path, same, parted, missing)
    [record] = result.records
    assert record.prompt == (user("p"), assistant("a"), user("q"))
    assert sum(result.left_out.values()) == 2 and not result.errors


def test_mtbench_judges_the_conversation_up_to_its_turn(tmp_path):
    first = [user("p"), assistant("x"), user("q"), assistant("later")]
    second = [user("p"), assistant("y"), user("q"), assistant("later too")]
    row = {"conversation_a": first, "conversation_b": second, "judge": "expert_1"}
    result = loaded(tmp_path, {**row, "winner": "model_b", "turn": 1}, {**row, "winner": "model_a", "turn": 2})
    [record] = result.records
    assert (record.prompt, order(record), record.labeler) == ((user("p"),), ["y", "x"], "expert_1")
    assert sum(result.left_out.values()) == 1


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad"])
def test_ties_of_battles_are_kept(tmp_path, winner):
    [record, _] = rankings(tmp_path, {**TALK, "winner": winner}, {**TALK, "winner": "model_a"})
    assert record.ranks == (1, 1)


def test_an_unknown_winner_is_an_error(tmp_path):
    assert "model_c" in error_of(tmp_path, {**TALK, "winner": "model_c"})


# ── HelpSteer ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("strength, ranks", [(-3, (1, 2)), (0, (1, 1)), (3, (2, 1))])
def test_a_negative_strength_is_for_the_first_answer(tmp_path, strength, ranks):
    two = {"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": strength}
    assert rankings(tmp_path, two)[0].ranks == ranks
    assert rankings(tmp_path, {**HELPSTEER3, "overall_preference": strength})[0].ranks == ranks


def test_helpsteer3_by_person(tmp_path):
    row = {**HELPSTEER3, "overall_preference": -1, "individual_preference": [{"score": 2}, {"score": -1}]}
    records = rankings(tmp_path, row, by="individual")
    assert [record.ranks for record in records] == [(2, 1), (1, 2)]
    assert [record.kind for record in records] == ["code", "code"]


def test_helpsteer2_gathers_the_answers_to_a_prompt(tmp_path):
    rows = [
        {"prompt": "p", "response": "y", "helpfulness": 1, **RATED},
        {"prompt": "q", "response": "alone", "helpfulness": 4, **RATED},
        {"prompt": "p", "response": "x", "helpfulness": 4, **{**RATED, "correctness": 0}},
    ]
    result = loaded(tmp_path, *rows)
    [record] = result.records
    assert order(record) == ["x", "y"] and record.scores == (1.0, 4.0)
    assert result.left_out == {"a prompt with a single answer": 1}
    assert order(rankings(tmp_path, *rows, by="correctness")[0]) == ["y", "x"]


def test_markers_of_turns_in_a_prompt_of_helpsteer_are_split(tmp_path):
    prompt = "first\n<extra_id_1>Assistant\nanswer\n<extra_id_1>User\nsecond"
    row = {"prompt": prompt, "response_1": "x", "response_2": "y", "preference_strength": 1}
    assert rankings(tmp_path, row)[0].prompt == (user("first"), assistant("answer"), user("second"))


# ── PKU, SHP, OpenAI ─────────────────────────────────────────────────────────────────────────────


def test_better_is_not_safer(tmp_path):
    assert order(rankings(tmp_path, SAFE)[0]) == ["x", "y"]
    assert order(rankings(tmp_path, SAFE, by="safer")[0]) == ["y", "x"]
    assert "better or safer" in error_of(tmp_path, SAFE, by="nicer")
    only_safer = {key: value for key, value in SAFE.items() if key != "better_response_id"}
    assert "say by: safer" in error_of(tmp_path, only_safer)


def test_a_form_with_one_judgment_takes_no_by(tmp_path):
    assert "take by out" in error_of(tmp_path, SHP, by="votes")


def test_shp_labels_1_for_the_first_and_leaves_out_close_votes(tmp_path):
    other = {**SHP, "labels": 0, "score_A": 4, "score_B": 5, "score_ratio": 1.25}
    assert [order(record)[0] for record in rankings(tmp_path, SHP, other)] == ["x", "y"]
    result = loaded(tmp_path, SHP, other, min_score_ratio=2.0)
    assert len(result.records) == 1 and sum(result.left_out.values()) == 1
    assert "contradict" in error_of(tmp_path, {**SHP, "labels": 0})


def test_a_summary_is_asked_for_as_in_the_paper(tmp_path):
    [record] = rankings(tmp_path, SUMMARIES)
    assert record.prompt == "SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: long\n\nTL;DR:"
    assert (record.labeler, record.meta, order(record)) == ("w1", {"confidence": 7}, ["x", "y"])
    axes = {"info": SUMMARIES["info"], "summary": {"text": "s", "axes": {"overall": 5}}, "worker": "w"}
    result = loaded(tmp_path, axes, SUMMARIES)
    assert len(result.records) == 1 and sum(result.left_out.values()) == 1


def test_webgpt_scores_of_0_are_a_tie(tmp_path):
    [won, tied] = rankings(tmp_path, WEB, {**WEB, "score_0": 0, "score_1": -0.0})
    assert won.scores == (0.5, -0.5) and tied.ranks == (1, 1)


# ── AlpacaEval, UltraFeedback and others ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("preference, ranks", [(1, (1, 2)), (1.4, (1, 2)), (1.5, (1, 1)), (0, (1, 1)), (2, (2, 1))])
def test_preferences_of_alpaca_eval(tmp_path, preference, ranks):
    rows = [{**JUDGED, "preference": preference}, {**JUDGED, "preference": None}]
    result = loaded(tmp_path, *rows)
    assert result.records[0].ranks == ranks
    assert sum(result.left_out.values()) == 1


def ultrafeedback(*ratings, overall=(1, 2, 3)):
    """Return a row of UltraFeedback with the helpfulness and honesty of three completions."""
    completions = []
    for index, (helpful, honest) in enumerate(ratings):
        annotations = {"helpfulness": {"Rating": helpful}, "honesty": {"Rating": honest, "Rationale": "r"}}
        completions.append({"response": "xyz"[index], "annotations": annotations, "overall_score": overall[index]})
    return {"instruction": "p", "completions": completions}


def test_ultrafeedback_by_mean_aspect_and_overall_score(tmp_path):
    row = ultrafeedback(("5", "1"), ("4", "4"), ("N/A", "3"))
    assert order(rankings(tmp_path, row)[0]) == ["y", "x=z"]
    [record] = rankings(tmp_path, row, by="helpfulness")
    assert record.scores == (5.0, 4.0, None) and record.ranks == (1, 2, None)
    assert order(rankings(tmp_path, row, by="overall_score")[0]) == ["z", "y", "x"]


def test_nectar_keeps_ties_and_splits_its_prompt(tmp_path):
    answers = [{"answer": text, "rank": rank} for text, rank in [("w", 1.0), ("x", 2.0), ("y", 2.0), ("z", 4.0)]]
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    [record] = rankings(tmp_path, {"prompt": prompt, "answers": answers})
    assert record.ranks == (1, 2, 2, 4)
    assert record.prompt == (user("a"), assistant("b"), user("c"))


def test_several_chosen_answers_are_tied_above_all_rejected_ones(tmp_path):
    row = {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c", "d"], "num_correct": 2}
    assert rankings(tmp_path, row)[0].ranks == (1, 1, 3, 3)
    assert "num_correct" in error_of(tmp_path, {**row, "num_correct": 1})


def test_a_failed_generation_is_no_response(tmp_path):
    row = {"instruction": "p", "generations": ["x", None, "y"], "ratings": [2, None, 1]}
    assert rankings(tmp_path, row)[0].responses == ("x", "y")


def test_ratings_within_tie_within_are_a_tie(tmp_path):
    row = {"instruction": "p", "generations": ["x", "y", "z"], "ratings": [5, 4.8, 1]}
    assert rankings(tmp_path, row, tie_within=0.5)[0].ranks == (1, 1, 3)


def test_a_wide_table_may_have_fewer_responses_in_a_row(tmp_path):
    row = {"prompt": "p", "response_1": "x", "rank_1": "1", "response_2": "y", "rank_2": "2.0", "labeler": "ada"}
    [three, two] = rankings(
        tmp_path, {**row, "response_3": "z", "rank_3": "2"}, {**row, "response_3": "", "rank_3": ""}
    )
    assert three.ranks == (1, 2, 2) and two.ranks == (1, 2)
    assert three.labeler == "ada"


# ── tools ────────────────────────────────────────────────────────────────────────────────────────


def test_tools_in_a_pair_of_openai_are_refused(tmp_path):
    row = ROWS["OpenAI's preferences"]
    with_tools = {**row, "input": {"messages": [user("p")], "tools": [{"type": "function"}]}}
    assert "tools" in error_of(tmp_path, with_tools)


def test_rejected_messages_that_part_early_are_left_out(tmp_path):
    chosen = [user("p"), assistant("a"), user("q"), assistant("x")]
    rejected = [user("p"), assistant("b"), user("q"), assistant("y")]
    rows = [{"messages": chosen, "rejected_messages": rejected}, {"messages": chosen, "rejected_response": "y"}]
    result = loaded(tmp_path, *rows)
    assert len(result.records) == 1 and sum(result.left_out.values()) == 1


NEMO = "<extra_id_0>System\ns\n<extra_id_1>User\np\n<extra_id_1>Assistant\n{}\n<extra_id_1>"


def test_texts_of_nemo_aligner_come_in_pairs(tmp_path):
    rows = [{"text": NEMO.format("x")}, {"text": NEMO.format("y")}]
    [record] = rankings(tmp_path, *rows)
    assert record.prompt == ({"role": "system", "content": "s"}, user("p")) and record.ranks == (1, 2)
    assert "odd number" in error_of(tmp_path, rows[0])


def test_labels_of_nemo_aligner_are_scores_of_the_answers_to_a_prompt(tmp_path):
    rows = [{"text": NEMO.format("y"), "label": [1, 9, -100]}, {"text": NEMO.format("x"), "label": [4, 2, 3]}]
    assert order(rankings(tmp_path, *rows)[0]) == ["x", "y"]
    assert order(rankings(tmp_path, *rows, by="1")[0]) == ["y", "x"]
    assert rankings(tmp_path, *rows, by="2")[0].ranks == (None, 1)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "row, name",
    [
        ({"question": {"problem": "p"}, "label": {"steps": []}}, "PRM800K"),
        ({"prompt": "p", "completions": ["s1", "s2"], "labels": [True, False]}, "stepwise"),
        ({"input": "p Step 1 ки", "label": "p\nStep 1 +", "task": "GSM8K"}, "Math-Shepherd"),
        ({"transcript": "\n\nHuman: p", "min_harmlessness_score_transcript": -1.0, "rating": 4}, "red-team"),
        ({"prompt": "p", "response": "r", "is_safe": True, "category": {}}, "BeaverTails"),
        ({"annotation_id": 1, "annotator": 2, "lead_time": 3.0, "prompt": "p"}, "JSON-MIN"),
    ],
)
def test_sets_without_comparisons_are_refused_by_name(tmp_path, row, name):
    assert name in error_of(tmp_path, row)


@pytest.mark.parametrize(
    "row, name",
    [
        ({"prompt": "p", "response": "r", "helpfulness": 0, **RATED}, "HelpSteer2"),
        ({"prompt": "p", "response": "r", "is_safe": False}, "BeaverTails"),
        ({"messages": [user("p"), assistant("x")], "rejected_response": "y"}, "ms-swift"),
    ],
)
def test_judged_answers_are_no_demonstrations(tmp_path, row, name):
    assert name in error_of(tmp_path, row, kind="demonstrations")


def test_demonstrations_of_a_judge_are_demonstrations(tmp_path):
    [record] = loaded(tmp_path, ROWS["Prometheus preferences"], kind="demonstrations").records
    assert record.completion == "B is better"


# ── relatives of these sets ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "row",
    [
        {"question": "p", "response_chosen": "x", "response_rejected": "y"},
        {"prompt": "p", "pos_resp": "x", "neg_resp": "y", "pos_type": "a"},
        {"prompt": "p", "preferred": "x", "dispreferred": "y"},
        {"query": "p", "accepted": "x", "rejected": "y"},
        {"messages": [user("p"), assistant("x")], "rejected_response": ["y"]},
        {"contents": [{"role": "user", "parts": [{"text": "p"}]}],
         "completions": [{"score": 0.1, "completion": {"role": "model", "parts": [{"text": "y"}]}},
                         {"score": 0.9, "completion": {"role": "model", "parts": [{"text": "x"}]}}]},
        {"context": [user("p")], "original_response": "y", "edited_response": "x", "feedback": ["f"]},
        {"history": "p", "human_ref_A": "y", "human_ref_B": "x", "labels": 0, "score_A": -3, "score_B": 9,
         "score_ratio": -3.0},
    ],
    ids=["DPO-zh", "CValues", "papers", "accepted", "ms-swift", "Vertex AI", "HelpSteer3 edits", "SHP below 0"],
)  # fmt: skip
def test_the_better_answer_of_relatives(tmp_path, row):
    [record] = loaded(tmp_path, row).records
    better = [text for text, rank in zip(record.responses, record.ranks, strict=True) if rank == 1]
    prompt = record.prompt if isinstance(record.prompt, str) else record.prompt[0]["content"]
    assert prompt == "p" and better == ["x"] and len(record.responses) == 2


def test_the_context_of_such_a_pair_is_not_lost(tmp_path):
    row = {"question": "p", "context": "c", "response_chosen": "x", "response_rejected": "y"}
    assert "'context' changes" in loaded(tmp_path, row).errors[0]


def test_passages_for_a_query_are_no_preference():
    assert form_of("rankings", {"query": "p", "positive": "x", "negative": "y"}) is None


def test_tie_within_compares_preferences_between_two_answers(tmp_path):
    row = {"instruction": "p", "output_1": "x", "output_2": "y", "preference": 1.4}
    far = {**row, "output_1": "z", "preference": 1}
    found = rankings(tmp_path, row, far, tie_within=0.5)
    assert [record.ranks for record in found] == [(1, 1), (1, 2)]


def test_a_ratio_of_votes_is_refused_where_there_are_none(tmp_path):
    row = {"prompt": "p", "chosen": "x", "rejected": "y"}
    assert "holds no votes" in loaded(tmp_path, row, min_score_ratio=2.0).errors[0]


def test_the_prompt_of_a_pair_may_have_another_name(tmp_path):
    row = {"system": "s", "input": "p", "chosen": "x", "rejected": "y", "chosen_score": 3, "rejected_score": 3}
    [record] = rankings(tmp_path, row)
    assert [message["content"] for message in record.prompt] == ["s", "p"] and record.ranks == (1, 1)


def test_a_cell_may_hold_the_text_of_a_list(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,responses,ranks\np,"[""y"",""x""]","[2,1]"\n', encoding="utf-8")
    [record] = read("rankings", Source(path)).records
    assert record.responses == ("y", "x") and record.ranks == (2, 1)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"response_1": "x", "response_2": "y", "chosen": "response_1", "rejected": "response_2"}, "names the answer"),
        ({"response_a": "x", "response_b": "y", "chosen": "a", "rejected": "b"}, "names the answer"),
        ({"model_a": "m", "model_b": "n", "chosen": "m", "rejected": "n"}, "names of models"),
    ],
)
def test_names_are_not_taken_for_answers(tmp_path, row, words):
    assert words in loaded(tmp_path, {"prompt": "p", **row}).errors[0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": '["p"]', "response_a": '["x"]', "response_b": '["y"]', "winner": "model_a"},
        {"prompt": ["p"], "response_a": ["x"], "response_b": ["y"], "winner": "model_a"},
        {"question": "{'full_text': 'p'}", "answer_0": "x", "answer_1": "y", "score_0": 1, "score_1": -1},
        {"chosen": str([user("p"), assistant("x")]), "rejected": str([user("p"), assistant("y")])},
    ],
    ids=["texts of lists", "lists", "webgpt as CSV", "pairs as CSV"],
)
def test_texts_of_lists_and_objects_are_read_as_what_they_hold(tmp_path, row):
    [record] = rankings(tmp_path, row)
    prompt = record.prompt if isinstance(record.prompt, str) else record.prompt[0]["content"]
    assert prompt == "p" and order(record) == ["x", "y"]


def test_a_preference_that_could_not_be_given_is_left_out(tmp_path):
    row = {"context": [user("p")], "response1": "x", "response2": "y"}
    result = loaded(tmp_path, {**row, "overall_preference": -100}, {**row, "overall_preference": 1})
    assert len(result.records) == 1 and sum(result.left_out.values()) == 1
    assert "expected -3" in error_of(tmp_path, {**row, "overall_preference": 7})

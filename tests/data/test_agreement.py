"""Compare rows with what the chat template writes, for templates of many shapes."""

import pytest
from chat_tokenizers import KINDS, make

from data.agreement import MOST_ROWS, Answered, compare, differences, probe, remedy
from data.conversations import end_of_turn
from data.encode import encode_prompt, encode_response
from data.template_text import with_variables

TURNS = ["one turn", "several turns"]
EARLIER, THOUGHT, BLANKS = "a thought in an earlier answer", "a thought in the answer", "blanks around the answer"
DIFFER = {  # what rows of each template are not as it writes them
    "chatml": [],
    "llama2": [*TURNS, EARLIER, THOUGHT, BLANKS],  # a blank before the answer
    "mistral": [],
    "llama3": [BLANKS],
    "gemma": [BLANKS],
    "phi": [],
    "zephyr": [*TURNS, EARLIER, THOUGHT, BLANKS],  # a newline that the generation prompt lacks
    "qwen3": [*TURNS, EARLIER, BLANKS],  # an empty thought before the answer
    "qwen3.5": [*TURNS, EARLIER, THOUGHT, BLANKS],
    "r1": [*TURNS, EARLIER, THOUGHT, BLANKS],
    "dated": [BLANKS],
}


def ready(kind, **variables):
    tokenizer = make(kind)
    tokenizer.chat_template = with_variables(tokenizer.chat_template, variables)
    tokenizer.eos_token = end_of_turn(tokenizer) or tokenizer.eos_token
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_each_template_differs_in_the_listed_probes(kind):
    """Check that rows that agree are the beginning of transformers' own ids."""
    tokenizer = ready(kind)
    assert list(probe(tokenizer)) == DIFFER[kind]
    asked, said = [{"role": "user", "content": "What is red?"}], {"role": "assistant", "content": "A fox."}
    row = encode_prompt(tokenizer, asked) + encode_response(tokenizer, "A fox.")
    whole = list(tokenizer.apply_chat_template([*asked, said], return_dict=False))
    assert (whole[: len(row)] == row) == ("one turn" not in DIFFER[kind])


@pytest.mark.parametrize("kind", ["qwen3", "qwen3.5"])
def test_a_variable_of_the_template_removes_the_difference(kind):
    """Check that only answers with a thought still differ, after the prompt's empty one."""
    given = make(kind)
    assert remedy(given).startswith(
        "set model.chat_template_kwargs: {enable_thinking: false}, which fixes that, or give "
    )
    assert given.chat_template == make(kind).chat_template
    tokenizer = ready(kind, enable_thinking=False)
    assert list(probe(tokenizer)) == [THOUGHT]
    assert "enable_thinking" not in remedy(tokenizer, ["enable_thinking"])


def test_a_variable_that_does_not_help_is_not_named():
    """Check that only the variable that helps is named, with the value that helps."""
    tokenizer = ready("zephyr")
    asks = "{% if enable_thinking is defined and effort is defined %}{% endif %}"
    tokenizer.chat_template = asks + tokenizer.chat_template
    assert remedy(tokenizer) == "give a template that fits the rows as model.chat_template: FILE"
    newline = "<|assistant|>{% if newline is defined and newline %}{{ '\\n' }}{% endif %}{% endif %}"
    tokenizer.chat_template = asks + ready("zephyr").chat_template.replace("<|assistant|>{% endif %}", newline)
    assert remedy(tokenizer).startswith("set model.chat_template_kwargs: {newline: true}, which fixes that, or ")


def test_an_opened_thought_is_named_unless_the_answer_closes_it():
    tokenizer = ready("qwen3.5")
    asked = "What is red?"
    rows = [Answered(asked, "A fox."), Answered(asked, "Hm.\n</think>\n\nA fox."), Answered(asked, "Hm.", False)]
    plain, closed, cut = differences(tokenizer, rows)
    assert plain.opens == "<think>" and closed is None and cut.opens == "<think>"
    assert plain.row == "…tart|>assistant\n<think>\nA fox.<|im_end|>"
    assert plain.template.startswith("…tart|>assistant\n<think>\n\n</think>\n\nA fox.")
    assert ready("zephyr").eos_token == "</s>" and probe(ready("zephyr"))["one turn"].opens is None


def test_a_response_that_was_cut_off_is_a_beginning():
    assert (
        list(differences(ready("chatml"), [Answered("What is red?", "A f", False), Answered("What is red?", "A f")]))
        == [None] * 2
    )


def test_special_tokens_in_words_are_no_difference():
    """Check that they stay plain text on both sides, also where a template trims beside them."""
    rows = [("say <|im_end|> twice", "the <|im_start|> fox"), ("<|im_end|>", "<|im_end|>")]
    assert list(differences(ready("chatml"), [Answered(*row) for row in rows])) == [None, None]
    rows = [("<|eot_id|> is red ?", "red <|eot_id|>"), ("say <|eot_id|> ", "<|eot_id|> fox ")]
    same, blank = differences(ready("llama3"), [Answered(*row) for row in rows])
    assert same is None and blank.row.endswith("<|eot_id|> fox <|eot_id|>")


def test_refusals_are_no_differences():
    system = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "What is red?"}]
    (refused,) = differences(ready("gemma"), [Answered(system, "A fox.")])
    assert "System role not supported" in str(refused)
    found = compare(ready("gemma"), [Answered(system, "A fox."), Answered("What is red?", "A fox. ")], ["f:1", "f:2"])
    assert [name for name, _ in found.differ] == ["f:2"]


def test_the_same_text_in_other_tokens_is_reported_as_such():
    tokenizer = ready("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif %}", "assistant{% endif %}")
    (found,) = differences(tokenizer, [Answered("What is red?", "\n\nA fox.")])
    assert found is not None
    tokenizer.chat_template = (
        "{% for m in messages %}Q {{ m['content'] }}{% endfor %}{% if add_generation_prompt %}Q {% endif %}"
    )
    (found,) = differences(tokenizer, [Answered("What is red?", "red", False)])
    assert "into other tokens" in found.line()


def test_the_agreement_of_a_file_is_summarised(monkeypatch):
    rows = [("What is red?", "A fox."), ("What is red?", "Hm.</think>\n\nA fox."), ("Hm.", "the fox is red .")]
    rows = [Answered(*row) for row in rows]
    text = compare(ready("qwen3.5"), rows, ["f:1", "f:2", "f:3"]).text("rows")
    assert text.startswith("3 of 3 rows are not what the chat template writes; the first, f:1: the row has '…")
    opened = "in 2 of them the generation prompt opens <think>, which the answer does not close: it is taught "
    assert text.endswith(opened + "as a thought")
    assert compare(ready("chatml"), rows, ["f:1", "f:2", "f:3"]).text("rows") == "3 rows, all as it writes them"
    monkeypatch.setattr("data.agreement.MOST_ROWS", 2)
    text = compare(ready("zephyr"), rows, ["f:1", "f:2", "f:3"]).text("rows")
    assert MOST_ROWS > 100 and text.startswith("2 of the first 2 rows ")

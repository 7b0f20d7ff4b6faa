"""Check how policies are prompted: the ids of a query, and the answer parsed from sampled ids."""

import pytest

from data.encode import encode_prompt, encode_response
from data.records import Demonstration
from data.tokenizer import train_tokenizer
from stages.evaluation.forms import Query, form_of_base, make_query, parse_answer

TEXTS = ["what colour is the fox ? the fox is red .", "Question: where ?\nAnswer: in the den .\n\nQuestion: who ?"] * 3
EXAMPLES = [Demonstration("where is the fox ?", "in the den ."), Demonstration("who ?", "the fox .")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


def test_a_model_from_scratch_is_prompted_in_plain_text_and_a_pretrained_one_through_its_template():
    assert form_of_base("auto", None) == "plain"
    assert form_of_base("auto", "some/model") == "chat"
    assert form_of_base("few_shot", "some/model") == "few_shot"


def test_plain_ids_begin_a_document_as_the_corpus_holds_it(tokenizer):
    """The prompt has the ids that it has in a document, and no token of the template."""
    query = make_query(tokenizer, "plain", "what colour is the fox ?")
    document = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert query.ids == document[: len(query.ids)]
    assert not set(query.ids) & set(tokenizer.all_special_ids)
    assert query.end_id == tokenizer.eos_token_id


def test_every_other_policy_is_prompted_through_its_chat_template(tokenizer):
    assert make_query(tokenizer, "chat", "who ?").ids == encode_prompt(tokenizer, "who ?")


def test_few_shot_shows_demonstrations_and_leaves_out_the_first_where_there_is_no_room(tokenizer):
    whole = make_query(tokenizer, "few_shot", "who ?", EXAMPLES)
    text = tokenizer.decode(whole.ids)
    assert text.strip() == (
        "Question: where is the fox ?\nAnswer: in the den .\n\nQuestion: who ?\nAnswer: the fox .\n\n"
        "Question: who ?\nAnswer:"
    )
    shorter = make_query(tokenizer, "few_shot", "who ?", EXAMPLES, room=len(whole.ids) - 1)
    assert "where is the fox" not in tokenizer.decode(shorter.ids)
    assert tokenizer.decode(shorter.ids).count("Question:") == 2
    assert tokenizer.decode(make_query(tokenizer, "few_shot", "who ?", EXAMPLES, room=1).ids).count("Question:") == 1


def test_a_plain_answer_is_read_by_the_judges_as_the_same_text_in_the_chat(tokenizer):
    query = make_query(tokenizer, "plain", "what colour is the fox ?")
    sampled = tokenizer(" the fox is red .", add_special_tokens=False)["input_ids"]
    ended = parse_answer(tokenizer, query, [*sampled, query.end_id])
    assert (ended.text, ended.finished) == ("the fox is red .", True)
    assert ended.response == encode_response(tokenizer, "the fox is red .")
    cut = parse_answer(tokenizer, query, sampled)
    assert not cut.finished
    assert cut.response == encode_response(tokenizer, "the fox is red .")[:-1]  # a cut answer has no EOS
    assert cut.sampled == sampled


def test_a_chat_answer_keeps_the_ids_that_were_sampled(tokenizer):
    query = make_query(tokenizer, "chat", "who ?")
    sampled = [*tokenizer("the fox .", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    answer = parse_answer(tokenizer, query, sampled)
    assert (answer.text, answer.finished, answer.response) == ("the fox .", True, sampled)


def test_a_few_shot_answer_ends_where_the_next_question_begins(tokenizer):
    query = make_query(tokenizer, "few_shot", "where ?", EXAMPLES)
    sampled = tokenizer(" in the den .\n\nQuestion: who ? the fox", add_special_tokens=False)["input_ids"]
    answer = parse_answer(tokenizer, query, sampled)
    assert (answer.text, answer.finished) == ("in the den .", True)
    assert answer.response == encode_response(tokenizer, "in the den .")
    # what counts towards its probability ends with the stop text, not before and not after it
    assert query.stop in tokenizer.decode(answer.sampled)
    assert query.stop not in tokenizer.decode(answer.sampled[:-1])
    running = parse_answer(tokenizer, query, tokenizer(" in the den", add_special_tokens=False)["input_ids"])
    assert (running.text, running.finished) == ("in the den", False)


def test_an_empty_answer_still_has_a_response(tokenizer):
    query = make_query(tokenizer, "plain", "who ?")
    assert parse_answer(tokenizer, query, [query.end_id]).response == [tokenizer.eos_token_id]
    blank = parse_answer(tokenizer, Query("plain", query.ids, query.end_id), [tokenizer.pad_token_id])
    assert blank.response == [tokenizer.eos_token_id] and not blank.finished

"""Test that texts that are tokenized together get the ids that each gets alone, in one call."""

import pytest
from chat_tokenizers import make
from hypothesis import given, settings
from hypothesis import strategies as st

from data.encode import encode_prompts, encode_response, encode_responses
from data.token_ids import token_ids
from data.tokenizer import EOS, PAD, ROLE_TOKENS, train_tokenizer

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True, database=None)
SPECIAL = [PAD, EOS, *ROLE_TOKENS]
pieces = st.sampled_from([*SPECIAL, "the fox", " ", "\n", "<|", "é", "日本", ""])
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.lists(pieces, max_size=5).map("".join)
    ),
    max_size=8,
)


@pytest.fixture(scope="module")
def tokenizers():
    return [train_tokenizer(["the fox is red", "what color is it ?"] * 4, 320), make("chatml")]


@SETTINGS
@given(texts, st.booleans())
def test_ids_are_those_of_each_text_alone(tokenizers, some, is_plain):
    options = {"split_special_tokens": True} if is_plain else {}
    for tokenizer in tokenizers:
        alone = [list(tokenizer(text, add_special_tokens=False, **options)["input_ids"]) for text in some]
        assert token_ids(tokenizer, some, is_plain=is_plain) == alone


@SETTINGS
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), st.booleans()), max_size=8))
def test_responses_are_those_of_each_response_alone(tokenizers, answers):
    for tokenizer in tokenizers:
        assert encode_responses(tokenizer, answers) == [encode_response(tokenizer, *answer) for answer in answers]


@SETTINGS
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9), max_size=8))
def test_prompts_are_what_the_template_makes_of_each_alone(tokenizers, prompts):
    """Compare with transformers' own method, which renders and tokenizes one conversation."""
    for tokenizer in tokenizers:
        usual = [prompt for prompt in prompts if not any(token in prompt for token in tokenizer.all_special_tokens)]
        alone = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            for prompt in usual
        ]
        assert encode_prompts(tokenizer, usual, usual) == alone


class Counting:
    """Count the calls of a tokenizer, and the texts that it got."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls, self.texts = tokenizer, 0, 0

    def __call__(self, texts, **options):
        self.calls, self.texts = self.calls + 1, self.texts + len(texts)
        return self.tokenizer(texts, **options)


def test_each_different_text_is_tokenized_once(tokenizers):
    counting = Counting(tokenizers[0])
    ids = token_ids(counting, ["red", "blue", "red", "red"], is_plain=True)
    assert (counting.calls, counting.texts) == (1, 2)
    ids[0].append(7)
    assert ids[2] == ids[3] and len(ids[2]) == len(ids[0]) - 1  # lists of their own
    assert token_ids(counting, [], is_plain=True) == [] and counting.calls == 1


def test_prompts_take_a_call_for_64(tokenizers, monkeypatch):
    tokenizer, calls = tokenizers[0], []
    whole = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *given, **o: calls.append(1) or whole(*given, **o))
    encode_prompts(tokenizer, [f"the fox {i}" for i in range(130)], range(130))
    assert len(calls) == 3

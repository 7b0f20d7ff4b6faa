"""Encode text and decode it again: template, EOS, hostile text, length limits, documents."""

import copy
from typing import ClassVar

import pytest
from chat_tokenizers import KINDS, make
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import DOCUMENT_END, document_end, wrap_documents
from data.encode import decode_response, encode_prompt, encode_prompts, encode_response
from data.length_limit import fit_lengths
from data.records import Demonstration, Document
from data.tokenizer import EOS, PAD, ROLE_TOKENS, train_tokenizer
from pipeline.errors import UserError
from tests.encoded import encode_demonstrations

TEXTS = ["what color is the fox ?", "the fox is red .", "say hello twice .", "hello hello", "you are kind ."]
SPECIAL = [PAD, EOS, *ROLE_TOKENS]
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
hostile_text = st.lists(st.sampled_from([*SPECIAL, "fox", " ", "<|", "|>", "é"]), min_size=1, max_size=6).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 4, vocab_size=320)


@pytest.fixture(scope="module")
def special_ids(tokenizer):
    return [tokenizer.convert_tokens_to_ids(t) for t in SPECIAL]


def conversation(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


class TestTokenizer:
    def test_knows_its_special_tokens_by_role(self, tokenizer, special_ids):
        """Check that special tokens are one id each and that the vocabulary is bounded."""
        assert len(set(special_ids)) == 5 and None not in special_ids
        assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, EOS)
        assert len(tokenizer) <= 320

    def test_learns_the_same_from_the_same_text(self):
        one, other = (train_tokenizer(iter(TEXTS * 4), vocab_size=300) for _ in range(2))
        assert one.get_vocab() == other.get_vocab()

    def test_survives_a_save_and_load(self, tokenizer, tmp_path):
        from transformers import AutoTokenizer

        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert encode_prompt(loaded, TEXTS[0]) == encode_prompt(tokenizer, TEXTS[0])
        assert encode_response(loaded, TEXTS[1]) == encode_response(tokenizer, TEXTS[1])


class TestPromptAndResponse:
    def test_any_response_comes_back_but_for_outer_blanks(self, tokenizer):
        @SETTINGS
        @given(any_text)
        def round_trip(text):
            assert decode_response(tokenizer, encode_response(tokenizer, text)) == text.strip()

        round_trip()

    def test_a_response_ends_with_eos_once(self, tokenizer):
        """Check that EOS is taught, also after an empty answer."""
        for text in [*TEXTS, ""]:
            ids = encode_response(tokenizer, text)
            assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
        assert encode_response(tokenizer, "") == [tokenizer.eos_token_id]

    def test_a_response_that_was_cut_off_has_no_eos(self, tokenizer):
        for text in [*TEXTS, ""]:
            assert encode_response(tokenizer, text, finished=False) == encode_response(tokenizer, text)[:-1]

    def test_half_a_character_at_a_cut_is_left_out_and_a_whole_one_stays(self, tokenizer):
        """Check that it does not come back as the bytes of U+FFFD, which nobody sampled."""
        ids = encode_response(tokenizer, "hello caf\u00e9", finished=False)
        assert decode_response(tokenizer, ids) == "hello caf\u00e9"
        assert decode_response(tokenizer, ids[:-1]) == "hello caf"
        assert decode_response(tokenizer, encode_response(tokenizer, "odd \ufffd")) == "odd \ufffd"

    def test_a_prompt_opens_the_assistants_turn(self, tokenizer):
        """Check that the assistant marker is last, without EOS after it."""
        ids = encode_prompt(tokenizer, TEXTS[0])
        user, assistant = (tokenizer.convert_tokens_to_ids(f"<|{r}|>") for r in ("user", "assistant"))
        assert ids[0] == user and ids[-1] == assistant and tokenizer.eos_token_id not in ids
        assert decode_response(tokenizer, ids) == TEXTS[0]

    def test_a_string_is_one_user_message(self, tokenizer):
        assert encode_prompt(tokenizer, TEXTS[0]) == encode_prompt(tokenizer, conversation(TEXTS[0]))

    def test_special_tokens_in_a_response_stay_plain_text(self, tokenizer, special_ids):
        """Check that a completion that spells <|end|> does not end there or speak for the user."""

        @SETTINGS
        @given(hostile_text)
        def stays_text(text):
            ids = encode_response(tokenizer, text)
            assert not set(ids[:-1]) & set(special_ids)
            assert decode_response(tokenizer, ids) == text.strip()

        stays_text()

    @pytest.mark.parametrize(
        "text", [f"hello {EOS}{ROLE_TOKENS[2]} yes", ROLE_TOKENS[0] + "obey", PAD, f"{ROLE_TOKENS[1]}{ROLE_TOKENS[1]}"]
    )
    def test_special_tokens_in_a_users_words_stay_plain_text(self, tokenizer, special_ids, text):
        """Check that a user cannot end the turn or answer for the assistant."""
        ids = encode_prompt(tokenizer, text)
        harmless = encode_prompt(tokenizer, "hello")
        count = lambda row: [row.count(i) for i in special_ids]  # noqa: E731
        assert count(ids) == count(harmless)
        assert tokenizer.decode(ids[1:-1]).strip() == text

    def test_special_tokens_in_earlier_turns_and_the_system_message_stay_plain_text(self, tokenizer, special_ids):
        plain = encode_prompt(tokenizer, conversation("hello", "yes", "fox", system="kind"))
        hostile = encode_prompt(
            tokenizer, conversation(f"hello{ROLE_TOKENS[2]}", f"yes{EOS}", f"fox{PAD}", system=f"kind{ROLE_TOKENS[1]}")
        )
        assert [hostile.count(i) for i in special_ids] == [plain.count(i) for i in special_ids]

    @pytest.mark.parametrize("kind", ["qwen3", "qwen3.5", "r1"])
    def test_added_tokens_that_are_not_special_are_what_the_tokenizer_makes_of_them(self, kind):
        """Check that <think> is the model's token, and that the template sees it."""
        own = make(kind)
        thought = conversation("hello", "<think>\nkind\n</think>\n\nyes", "the fox")
        expected = own.apply_chat_template(thought, add_generation_prompt=True, return_dict=False)
        assert encode_prompt(own, thought) == list(expected) and "kind" not in own.decode(expected)
        tags = [own.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>")]
        assert [i for i in encode_response(own, "<think>kind</think> yes") if i in tags] == tags

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_special_token_in_words_changes_nothing_else(self, kind):
        """Check that the template sees the message, and that other words keep their ids."""
        own = make(kind)
        for token in (own.eos_token, "<|im_start|>", "<|eot_id|>"):
            spelled = own(token, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            plain = conversation(" say X twice \n", "<think>X</think>yes X", "X")
            hostile = [{**m, "content": m["content"].replace("X", token)} for m in plain]
            ids = encode_prompt(own, hostile)
            inside = [{**m, "content": m["content"].replace("X", "\u2603")} for m in plain]
            text = own.apply_chat_template(inside, add_generation_prompt=True, tokenize=False)
            assert own.decode(ids) == text.replace("\u2603", token)
            special = [i for i, added in own.added_tokens_decoder.items() if added.special]
            neutral = own(text, add_special_tokens=False)["input_ids"]
            assert [i for i in ids if i in special] == [i for i in neutral if i in special]
            assert spelled == [i for i in spelled if i not in special]

    def test_a_hidden_token_leaves_its_characters_free(self):
        """Check that text that already has private-use characters comes back unchanged."""
        own = make("chatml")
        text = "\ue000 say \ue001<|im_end|>\ue002<|im_start|>"
        assert own.decode(encode_prompt(own, text)).startswith(f"<|im_start|>user\n{text}<|im_end|>\n")

    @pytest.mark.parametrize("system", [None, "you are kind ."])
    def test_a_chat_is_encoded_turn_by_turn(self, tokenizer, system):
        """Check that prompt + response + the next user turn is the prompt of the longer chat."""
        first = encode_prompt(tokenizer, conversation(TEXTS[0], system=system))
        whole = encode_prompt(tokenizer, conversation(TEXTS[0], TEXTS[1], TEXTS[2], system=system))
        told = first + encode_response(tokenizer, TEXTS[1]) + encode_prompt(tokenizer, TEXTS[2])
        assert told == whole

    def test_the_template_of_a_whole_chat_is_prompt_and_response(self, tokenizer):
        """Check that transformers' own rendering of a finished chat is the row of training."""
        whole = tokenizer.apply_chat_template(conversation(TEXTS[0], TEXTS[1]), return_dict=False)
        assert list(whole) == encode_prompt(tokenizer, TEXTS[0]) + encode_response(tokenizer, TEXTS[1])


def limit(prompts, responses, max_length=8, **options):
    names = options.pop("names", [f"rows.jsonl:{n}" for n in range(1, len(prompts) + 1)])
    options |= {"max_length": max_length, "what": "row", "names": names, "section": "sft"}
    return fit_lengths(prompts, responses, **options)


class TestLengths:
    fits = ([1] * 3, [[2] * 5, [2]])  # exactly 8
    long = ([1] * 3, [[2] * 2, [3] * 6 + [9]])  # 10, by its longest response
    no_room = ([1] * 8, [[2]])
    rows: ClassVar = [list(x) for x in zip(fits, long, no_room, strict=True)]

    def test_drop_leaves_long_rows_out_and_counts_them(self):
        kept, prompts, responses, report = limit(*self.rows, on_too_long="drop")
        assert (kept, prompts, responses) == ([0], [self.fits[0]], [self.fits[1]])
        assert (report.kept, report.truncated, report.dropped, report.longest) == (1, 0, 2, 10)

    def test_truncate_cuts_the_end_of_responses_and_drops_where_no_room_is_left(self):
        """Check that EOS goes with the end of a cut answer, and that shorter ones stay whole."""
        kept, prompts, responses, report = limit(*self.rows, on_too_long="truncate")
        assert kept == [0, 1] and responses[1] == [[2] * 2, [3] * 5]
        assert (report.kept, report.truncated, report.dropped) == (1, 1, 1)
        assert max(len(p) + len(r) for p, rs in zip(prompts, responses, strict=True) for r in rs) == 8

    def test_error_names_each_row_its_length_and_the_remedy(self):
        with pytest.raises(UserError) as error:
            limit(*self.rows, on_too_long="error", names=["a", "b", "c"])
        assert len(error.value.lines) == 2
        remedy = "shorten it, raise sft.max_length, or set sft.on_too_long: drop or truncate"
        assert error.value.lines[0] == f"b: row of 10 tokens, the limit is 8; {remedy}"
        assert error.value.lines[1].startswith("c: row of 9 tokens")

    def test_reports_add_up(self):
        drop, cut = (limit(*self.rows, on_too_long=policy)[-1] for policy in ("drop", "truncate"))
        both = drop + cut
        assert (both.kept, both.truncated, both.dropped, both.longest) == (2, 1, 3, 10)

    def test_prompts_can_only_be_dropped(self):
        with pytest.raises(UserError) as error:
            limit([[1] * 9], [[]], on_too_long="error")
        (line,) = error.value.lines
        assert line.startswith("rows.jsonl:1: row of 9 tokens, the limit is 8 (max_length minus response_length); ")
        assert line.endswith("or set sft.on_too_long: drop")

    def test_many_errors_are_cut_to_five_and_a_count(self):
        with pytest.raises(UserError) as error:
            limit([[1] * 9] * 12, [[[2]]] * 12, on_too_long="error")
        assert len(error.value.lines) == 6
        assert error.value.lines[-1].startswith("sft.max_length: 7 more rows are too long, the limit is 8; shorten")

    def test_rows_that_fit_pass_every_policy_untouched(self):
        for policy in ("error", "drop", "truncate"):
            kept, prompts, responses, report = limit([self.fits[0]], [self.fits[1]], on_too_long=policy)
            assert (kept, prompts, responses, report.kept) == ([0], [self.fits[0]], [self.fits[1]], 1)

    def test_nothing_left_is_an_error(self):
        with pytest.raises(UserError, match=r"sft\.max_length: no row is left, the limit is 8; raise it"):
            limit([[1] * 9], [[[2]]], on_too_long="drop")

    def test_prompts_without_responses_are_measured_on_their_own(self):
        assert limit([[1] * 8, [1] * 9], [[], []], on_too_long="drop")[0] == [0]


PLACE = {"names": ["my.jsonl:200"], "section": "sft"}


class TestRows:
    def test_a_too_long_demonstration_is_named_by_its_place(self, tokenizer):
        with pytest.raises(UserError, match=r"my\.jsonl:200: demonstration of \d+ tokens, the limit is 3; "):
            encode_demonstrations(
                tokenizer, [Demonstration(TEXTS[0], TEXTS[1])], max_length=3, on_too_long="error", **PLACE
            )

    def test_every_prompt_that_the_template_refuses_is_named_by_its_place(self, tokenizer, monkeypatch):
        refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        monkeypatch.setattr(tokenizer, "chat_template", refusing + tokenizer.chat_template)
        prompts = [conversation("a", system="b"), "plain", conversation("c", system="d")]
        with pytest.raises(UserError) as error:
            encode_prompts(tokenizer, prompts, ["x:1", "x:2", "x:3"])
        what = "the model's chat template refuses this prompt (no system); change its messages"
        assert error.value.lines == [f"x:1: {what} (the same in 1 more row, the last at line 3)"]

    def test_a_demonstrations_loss_is_on_its_completion_and_eos_only(self, tokenizer):
        encoded = encode_demonstrations(
            tokenizer, [Demonstration(TEXTS[0], TEXTS[1])], max_length=64, on_too_long="error", **PLACE
        )
        (row,), report = encoded.rows, encoded.report
        prompt, response = encode_prompt(tokenizer, TEXTS[0]), encode_response(tokenizer, TEXTS[1])
        assert row["input_ids"] == prompt + response
        assert row["labels"] == [-100] * len(prompt) + response
        assert report.kept == 1 and row["labels"][-1] == tokenizer.eos_token_id

    def test_a_truncated_demonstration_keeps_labels_and_ids_alike(self, tokenizer):
        size = len(encode_prompt(tokenizer, TEXTS[0])) + 2
        encoded = encode_demonstrations(
            tokenizer, [Demonstration(TEXTS[0], TEXTS[1])], max_length=size, on_too_long="truncate", **PLACE
        )
        (row,), report = encoded.rows, encoded.report
        assert len(row["input_ids"]) == len(row["labels"]) == size and report.truncated == 1
        assert row["labels"][-2:] == row["input_ids"][-2:] and tokenizer.eos_token_id not in row["input_ids"]

    def test_documents_begin_with_bos_where_the_tokenizer_adds_one(self, tokenizer):
        """Check that documents begin with BOS where pretraining had it (Gemma, Llama)."""
        from tokenizers.processors import TemplateProcessing

        own = copy.deepcopy(tokenizer)
        own.add_special_tokens({"bos_token": "<bos>"})
        own.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", own.bos_token_id)]
        )
        text = TEXTS[0]
        ids = own(text, add_special_tokens=False)["input_ids"]
        (row,) = wrap_documents(own, [Document(text)], length=len(ids) + 2)
        assert row == [own.bos_token_id, *ids, own.eos_token_id]
        assert row[:-1] == own(text)["input_ids"]  # as the tokenizer itself has it
        assert wrap_documents(tokenizer, [Document(text)], length=len(ids) + 1) == [[*ids, tokenizer.eos_token_id]]

    @pytest.mark.parametrize(
        "kind, end",
        [("chatml", "<|endoftext|>"), ("qwen3", "<|endoftext|>"), ("llama2", "</s>"), ("mistral", "</s>"),
         ("r1", "</s>"), ("llama3", "<|end_of_text|>"), ("gemma", "<eos>"), ("phi", "<|endoftext|>")],
    )  # fmt: skip
    def test_documents_end_with_what_ended_them_in_pretraining(self, kind, end):
        """Check that it is not the end of a turn, whatever EOS has become."""
        for eos in (None, {"gemma": "<end_of_turn>", "phi": "<|end|>"}.get(kind)):
            own = make(kind)
            own.eos_token = eos or own.eos_token
            (row,) = wrap_documents(own, [Document("hello")], length=len(own("hello")["input_ids"]) + 1)
            assert own.convert_ids_to_tokens(row[-1]) == end

    def test_what_base_has_recorded_ends_documents(self, tmp_path):
        """Check this also after saving and loading."""
        from transformers import AutoTokenizer

        own = make("chatml")
        own.init_kwargs[DOCUMENT_END] = "<|im_start|>"
        own.save_pretrained(tmp_path)
        assert document_end(AutoTokenizer.from_pretrained(tmp_path)) == own.convert_tokens_to_ids("<|im_start|>")

    def test_documents_are_joined_with_eos_between(self, tokenizer):
        """Check that rows are the documents in order, each with EOS, without the last short row."""
        documents = [Document(t) for t in TEXTS * 3]
        rows = wrap_documents(tokenizer, documents, length=7)
        stream = [i for d in documents for i in encode_response(tokenizer, d.text)]
        assert all(len(r) == 7 for r in rows)
        assert [i for r in rows for i in r] == stream[: len(rows) * 7] and len(stream) - len(rows) * 7 < 7

    def test_a_stream_of_whole_rows_loses_nothing(self, tokenizer):
        size = len(encode_response(tokenizer, TEXTS[1]))
        assert len(wrap_documents(tokenizer, [Document(TEXTS[1])] * 4, length=size)) == 4
        assert len(wrap_documents(tokenizer, [Document(TEXTS[1])] * 4, length=2 * size)) == 2

    def test_special_tokens_in_documents_stay_plain_text(self, tokenizer, special_ids):
        (row,) = wrap_documents(
            tokenizer,
            [Document(f"fox {EOS} {PAD} fox")],
            length=len(encode_response(tokenizer, f"fox {EOS} {PAD} fox")),
        )
        assert not set(row[:-1]) & set(special_ids) and row[-1] == tokenizer.eos_token_id

    def test_no_documents_give_no_rows(self, tokenizer):
        assert wrap_documents(tokenizer, [], length=8) == []

"""Teach several turns of a conversation: which, in which rows, after exactly which ids."""

import random

import pytest
import torch
from chat_tokenizers import KINDS, make

from data.conversations import encode_beginnings, end_of_turn
from data.encode import apart_text, encode_prompt, encode_response, teach
from data.forms.form import LeftOut, Options
from data.forms.instructions import INSTRUCTION_DEMONSTRATION
from data.forms.messages import MESSAGES_DEMONSTRATION
from data.parsing import parse_demonstration
from data.records import Demonstration, prompt_key
from data.tokenizer import train_tokenizer
from data.turns import conversation_key, count_turns, learnt_prompts, turns_of
from pipeline.errors import UserError
from tests.builders import tiny_causal
from tests.encoded import encode_demonstrations

THOUGHT = "<think>\nHm.\n</think>\n\nA fox."
SAID = ["what color is the fox ?", "the fox is red .", "A fox.", "a blue bird .", "say hello twice ."]
ODD = [THOUGHT, " A fox. \n", "\n\nhello", "say <|im_end|> twice", "</s>", "<think>", "é"]
LIMITS = {"max_length": 10_000, "on_too_long": "error", "section": "sft"}


def user(content: str, **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def talk(*contents: str) -> Demonstration:
    """Return a conversation, the user's words first, all of whose answers are learnt."""
    roles = (user, assistant) * len(contents)
    messages = [role(content) for role, content in zip(roles, contents, strict=False)]
    return Demonstration(tuple(messages[:-1]), contents[-1], tuple(range(1, len(messages) - 1, 2)))


def ready(kind: str):
    """Return a tokenizer as the stage base would publish it."""
    tokenizer = own() if kind == "own" else make(kind)
    tokenizer.eos_token = end_of_turn(tokenizer) or tokenizer.eos_token
    return tokenizer


def own():
    return train_tokenizer(SAID * 4, vocab_size=320)


def rows_of(tokenizer, *demonstrations: Demonstration, turns="all"):
    return list(teach(tokenizer, demonstrations, [f"my.jsonl:{i}" for i in range(len(demonstrations))], turns))


def independent(tokenizer, demonstration: Demonstration) -> list[tuple[list[int], list[int]]]:
    """Return (ids before, ids) of each learnt answer, every one encoded by itself."""
    messages = [*demonstration.prompt, assistant(demonstration.completion)]
    learnt = [*demonstration.learnt, len(messages) - 1]
    return [
        (encode_prompt(tokenizer, messages[:i]), encode_response(tokenizer, messages[i]["content"])) for i in learnt
    ]


class TestRows:
    @pytest.mark.parametrize("kind", ["own", *KINDS])
    def test_every_answer_follows_exactly_what_the_policy_sees(self, kind):
        """Check it for each template, with thoughts, special tokens and blanks in the words."""
        tokenizer, generator = ready(kind), random.Random(0)
        for trial in range(12):
            words = SAID + ODD * (trial % 2)
            demonstration = talk(*(generator.choice(words) for _ in range(2 * generator.randint(1, 4))))
            (rows,) = rows_of(tokenizer, demonstration)
            taught = [(row.ids[:begin], row.ids[begin:end]) for row in rows for begin, end in row.spans]
            assert sorted(taught) == sorted(independent(tokenizer, demonstration))
            assert all(row.spans == sorted(row.spans) and row.spans[-1][1] == len(row.ids) for row in rows)

    @pytest.mark.parametrize("kind", ["own", "chatml", "mistral", "llama3", "gemma", "qwen3"])
    def test_templates_that_only_append_teach_a_conversation_in_one_row(self, kind):
        ((row,),) = rows_of(ready(kind), talk(*SAID[:4], *SAID[:2]))
        assert len(row.spans) == 3

    @pytest.mark.parametrize("kind", ["llama2", "zephyr", "qwen3.5"])
    def test_templates_that_write_earlier_turns_otherwise_have_a_row_for_each(self, kind):
        """Check a blank before answers, a missing newline, and an opened thought."""
        (rows,) = rows_of(ready(kind), talk(*SAID[:4], *SAID[:2]))
        assert [len(row.spans) for row in rows] == [1, 1, 1] and [row.turn.number for row in rows] == [1, 2, 3]

    def test_only_turns_whose_thoughts_are_dropped_later_have_rows_of_their_own(self):
        tokenizer = ready("qwen3")
        (rows,) = rows_of(tokenizer, talk("What is red?", "A fox.", "Why?", THOUGHT, "And?", "A bird."))
        assert [(row.turn.number, len(row.spans)) for row in rows] == [(2, 1), (3, 2)]
        assert "Hm." in tokenizer.decode(rows[0].ids) and "Hm." not in tokenizer.decode(rows[1].ids)

    def test_a_template_that_writes_no_end_after_turns_has_rows_of_their_own(self):
        tokenizer = ready("own")
        tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "")
        (rows,) = rows_of(tokenizer, talk(*SAID[:4]))
        assert len(rows) == 2 and all(row.ids[-1] == tokenizer.eos_token_id for row in rows)

    def test_last_teaches_only_the_completion(self):
        tokenizer, demonstration = ready("chatml"), talk(*SAID[:4])
        ((row,),) = rows_of(tokenizer, demonstration, turns="last")
        assert [(row.ids[:b], row.ids[b:e]) for b, e in row.spans] == independent(tokenizer, demonstration)[-1:]

    def test_answers_that_are_not_learnt_are_context(self):
        tokenizer, whole = ready("chatml"), talk(*SAID[:4], *SAID[:2])
        some = Demonstration(whole.prompt, whole.completion, (3,))
        ((row,),) = rows_of(tokenizer, some)
        ((all_of_it,),) = rows_of(tokenizer, whole)
        assert row.ids == all_of_it.ids and row.spans == all_of_it.spans[1:]

    def test_shared_text_is_tokenized_once(self, monkeypatch):
        tokenizer = ready("chatml")
        sent: list[str] = []
        usual = type(tokenizer).__call__

        def counting(self, text, **options):
            sent.append(text)
            return usual(self, text, **options)

        monkeypatch.setattr(type(tokenizer), "__call__", counting)
        rows_of(tokenizer, *[talk(*SAID[:4], *SAID[:2])] * 10)
        long = [text for text in sent if "<|im_start|>user" in text]
        assert len(long) == 10 and len(sent) < 10 * (1 + 3) + 3

    def test_a_tokenizer_with_a_method_of_its_own_is_asked_for_every_beginning(self):
        class Letters:
            eos_token_id, added_tokens_decoder, chat_template = 0, {}, "{{ messages }}"

            def apply_chat_template(self, messages, **_):
                return [len(messages)] * sum(3 + len(message["content"]) for message in messages)

        messages = [user("ab"), assistant("c"), user("d")]
        assert list(encode_beginnings(Letters(), [messages], [[1, 3]])) == [[[1] * 5, [3] * 13]]

    def test_a_refused_beginning_is_named_with_its_turn(self):
        tokenizer = ready("chatml")
        asks = "{% if messages | length == 1 %}{{ raise_exception('too short') }}{% endif %}"
        tokenizer.chat_template = asks + tokenizer.chat_template
        with pytest.raises(UserError) as error:
            rows_of(tokenizer, talk(*SAID[:4]), talk(*SAID[:2]))
        problem = "the model's chat template refuses this prompt (too short); change its messages"
        assert error.value.lines == [f"my.jsonl:0, assistant turn 1: {problem}", f"my.jsonl:1: {problem}"]


class TestLimits:
    def encode(self, tokenizer, demonstration, **limits):
        return encode_demonstrations(tokenizer, [demonstration], names=["my.jsonl:7"], **{**LIMITS, **limits})

    def test_labels_are_the_ids_of_the_answers_and_nothing_else(self):
        tokenizer, demonstration = ready("chatml"), talk(*SAID[:4])
        encoded = self.encode(tokenizer, demonstration)
        (first, answer), (second, last) = independent(tokenizer, demonstration)
        (row,) = encoded.rows
        middle = len(second) - len(first) - len(answer)
        assert row["input_ids"] == second + last
        assert row["labels"] == [-100] * len(first) + answer + [-100] * middle + last
        assert encoded.answer_tokens == [len(answer), len(last)] and encoded.apart == (0, "")

    def test_truncation_ends_a_row_with_the_last_id_that_is_learnt(self):
        tokenizer, demonstration = ready("chatml"), talk(*SAID[:4])
        (first, answer), (second, last) = independent(tokenizer, demonstration)
        whole = self.encode(tokenizer, demonstration).rows[0]
        for length in range(len(first) + 1, len(second) + len(last)):
            encoded = self.encode(tokenizer, demonstration, max_length=length, on_too_long="truncate")
            (row,) = encoded.rows
            kept = min(length, len(first) + len(answer)) if length <= len(second) else length
            assert row["input_ids"] == whole["input_ids"][:kept] and row["labels"] == whole["labels"][:kept]
            assert encoded.report.truncated == 1 and row["labels"][-1] != -100
            assert sum(encoded.answer_tokens) == sum(label != -100 for label in row["labels"])
        with pytest.raises(UserError, match="no demonstration is left"):
            self.encode(tokenizer, demonstration, max_length=len(first), on_too_long="truncate")

    def test_drop_leaves_out_the_row_and_error_names_it(self):
        tokenizer = ready("chatml")
        long, short = talk(*SAID[:4]), talk(*SAID[:2])
        limits = LIMITS | {"max_length": len(rows_of(tokenizer, short)[0][0].ids), "on_too_long": "drop"}
        encoded = encode_demonstrations(tokenizer, [long, short], names=["a", "b"], **limits)
        assert encoded.origins == [1] and encoded.report.dropped == 1
        with pytest.raises(UserError, match=r"my\.jsonl:7: demonstration of \d+ tokens, the limit is 9; "):
            self.encode(tokenizer, long, max_length=9)

    def test_rows_of_their_own_are_named_and_counted(self):
        tokenizer, demonstration = ready("llama2"), talk(*SAID[:4], *SAID[:2])
        encoded = self.encode(tokenizer, demonstration)
        assert encoded.origins == [0, 0, 0] and len(encoded.answer_tokens) == 3
        assert encoded.apart == (2, "my.jsonl:7, assistant turn 1")
        assert "of llama-2 " in apart_text("llama-2", *encoded.apart)
        with pytest.raises(UserError, match=r"my\.jsonl:7, assistant turn 2: demonstration of "):
            self.encode(tokenizer, demonstration, max_length=len(encoded.rows[0]["input_ids"]))


MARKED = {  # templates that mark what transformers and trl (assistant_only_loss) take as the assistant's
    "own": "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>"
    "{% endif %}{{ '\n' }}{% endfor %}",
}


@pytest.mark.parametrize("kind", MARKED)
def test_labels_are_those_of_a_template_that_marks_the_assistants_tokens(kind):
    tokenizer, demonstration = ready(kind), talk(*SAID[:4], *SAID[:2])
    (row,) = encode_demonstrations(tokenizer, [demonstration], names=["x"], **LIMITS).rows
    marked = tokenizer.apply_chat_template(
        [*demonstration.prompt, assistant(demonstration.completion)],
        chat_template=MARKED[kind],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = marked["input_ids"], marked["assistant_masks"]
    length = len(row["labels"])  # a template may write a newline after the last turn
    labels = [index if is_said else -100 for index, is_said in zip(ids, mask, strict=True)]
    assert (ids[:length], labels[:length]) == (row["input_ids"], row["labels"]) and not any(mask[length:])


@pytest.mark.parametrize("kind", ["chatml", "qwen3"])
def test_the_gradient_is_that_of_one_row_a_turn(kind):
    """Check a row with several answers against the sum over a row for each."""
    tokenizer = ready(kind)
    demonstration = talk("What is red?", "A fox.", "Why?", "the fox is red .", "And?", THOUGHT)
    encoded = encode_demonstrations(tokenizer, [demonstration], names=["x"], **LIMITS)
    assert len(encoded.rows) == 1
    by_turn = []
    for before, answer in independent(tokenizer, demonstration):
        by_turn.append({"input_ids": before + answer, "labels": [-100] * len(before) + answer})
    model = tiny_causal("llama", 0, tokenizer, max_position_embeddings=256).eval().double()
    tokens = sum(encoded.answer_tokens)

    def gradients(rows: list[dict]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = 0.0
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            count = int((labels != -100).sum())
            loss = model(input_ids=ids, labels=labels).loss * count / tokens
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    one, several = gradients(encoded.rows), gradients(by_turn)
    assert one[0] == pytest.approx(several[0], abs=1e-6)
    assert several[1].norm() > 0.01 and torch.allclose(one[1], several[1], atol=1e-6)


class TestForms:
    def read(self, *messages: dict, ignore: tuple[str, ...] = ()) -> tuple[Demonstration, list[str]]:
        row, *parts = MESSAGES_DEMONSTRATION.convert({"messages": list(messages)}, Options(ignore=frozenset(ignore)))
        assert all(isinstance(part, LeftOut) for part in parts)
        return parse_demonstration(row), [str(part) for part in parts]

    def test_all_answers_of_a_conversation_are_learnt(self):
        demonstration, parts = self.read(system("Hm."), user("a"), assistant("b"), user("c"), assistant("d"))
        assert (demonstration.learnt, demonstration.completion, parts) == ((2,), "d", [])

    @pytest.mark.parametrize(
        "key, value", [("weight", 0), ("weight", 0.0), ("loss_weight", 0), ("loss", False), ("train", False)]
    )
    def test_excluded_answers_are_context(self, key, value):
        demonstration, parts = self.read(user("a"), assistant("b", **{key: value}), user("c"), assistant("d", weight=1))
        assert demonstration.learnt == () and len(demonstration.prompt) == 3
        assert parts == ["an earlier answer that the data exclude (weight 0): context, not learnt"]

    def test_the_completion_is_the_last_answer_that_is_learnt(self):
        demonstration, parts = self.read(
            user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f", weight=0), user("g")
        )
        assert demonstration.completion == "d" and demonstration.learnt == (1,)
        assert parts == ["the turns after a conversation's last answer that is learnt"]
        with pytest.raises(LeftOut, match="all of whose answers the data exclude"):
            self.read(user("a"), assistant("b", weight=0))

    def test_a_last_message_that_nobody_answers_is_counted(self):
        demonstration, parts = self.read(user("a"), assistant("b"), user("c"))
        assert demonstration.completion == "b" and parts == [
            "the user's message at the end of a conversation, which nobody answers"
        ]

    def test_marks_count_from_the_message_that_has_them(self):
        """Check that an empty system message, which is not read, moves no mark."""
        demonstration, _ = self.read(
            system(""), user("a"), assistant("b"), user("c"), assistant("d", weight=0), user("e"), assistant("f")
        )
        assert demonstration.learnt == (1,)
        row = {
            "system": "Hm.",
            "messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d"), user("e"), assistant("f")],
        }
        assert MESSAGES_DEMONSTRATION.convert(row, Options())[0]["learnt"] == [4]

    def test_other_weights_and_learnt_user_turns_are_refused_unless_ignored(self):
        for value in (0.5, "0", 2):
            with pytest.raises(ValueError, match=r"'weight' of message 2 is .*; expected 0"):
                self.read(user("a"), assistant("b", weight=value), user("c"), assistant("d"))
        with pytest.raises(ValueError, match=r"'train' of message 1 asks to learn .*; .* ignore: \[train\]"):
            self.read(user("a", train=True), assistant("b"))
        with_marks = [user("a", weight=1), assistant("b", weight=0.5), user("c"), assistant("d", weight=None)]
        assert self.read(*with_marks, ignore=("weight",))[0].learnt == (1,)

    def test_an_answer_after_an_answer_is_refused(self):
        for after in ([], [user("d"), assistant("e")]):
            with pytest.raises(ValueError, match="messages 2 and 3 are both the assistant's; join them"):
                self.read(user("a"), assistant("b"), assistant("c"), *after)

    def test_a_greeting_is_context(self):
        demonstration, parts = self.read(assistant("Hello."), user("a"), assistant("b"), user("c"), assistant("d"))
        assert demonstration.learnt == (2,) and len(parts) == 1 and "greeting" in parts[0]
        with pytest.raises(ValueError, match="no message of the assistant answers"):
            self.read(assistant("Hello."), user("a"))

    def test_the_answers_of_a_history_are_learnt(self):
        row = {"instruction": "a", "output": "b", "history": [["c", "d"], ["e", "f"]], "system": "Hm."}
        assert parse_demonstration(INSTRUCTION_DEMONSTRATION.convert(row, Options())).learnt == (2, 4)

    def test_learnt_indices_that_name_no_answer_are_refused(self):
        prompt = [user("a"), assistant("b"), user("c")]
        assert parse_demonstration({"prompt": prompt, "completion": "d", "learnt": [1]}).learnt == (1,)
        for other, learnt in (
            (prompt, [0]),
            (prompt, [3]),
            (prompt, 1),
            ("a", [0]),
            ([assistant("b"), user("c")], [0]),
        ):
            with pytest.raises(ValueError, match="'learnt' is"):
                parse_demonstration({"prompt": other, "completion": "d", "learnt": learnt})


class TestCounts:
    def test_turns_are_counted_and_listed(self):
        whole = talk(*SAID[:4], *SAID[:2])
        some = Demonstration(whole.prompt, whole.completion, (3,))
        assert [turn.number for turn in turns_of(some)] == [2, 3]
        count = count_turns([whole, some, Demonstration("a", "b")])
        assert (count.conversations, count.assistant, count.learnt) == (3, 7, 6)
        assert count.text() == "7 assistant turns, 6 learnt"
        assert (
            count_turns([whole], "last").learnt == 1 and count_turns([whole]).text() == "3 assistant turns, all learnt"
        )
        assert [len(prompt) for prompt in learnt_prompts([whole])] == [1, 3, 5]

    def test_conversations_that_open_alike_share_a_key(self):
        whole, first = talk(*SAID[:4]), talk(*SAID[:2])
        assert conversation_key(whole.prompt) == conversation_key(first.prompt) == prompt_key(SAID[0])
        with_system = (system("Hm."), *whole.prompt)
        assert conversation_key(with_system) == prompt_key(with_system[:2]) != prompt_key(SAID[0])
        assert conversation_key(SAID[0]) == prompt_key(SAID[0])

"""Test the forms of demonstrations: conversations, instructions, questions with answers."""

import json

import pytest

from data.forms import FORMS, recognise
from data.source import Source
from data.sources import read

HI, HELLO, MORE, END = "hi .", "hello .", "more ?", "no ."
DIALOGUE = [("user", HI), ("assistant", HELLO), ("user", MORE)]
TURNS = [{"role": role, "content": content} for role, content in [*DIALOGUE, ("assistant", END)]]

DIALOGUE_START, ANSWER = TURNS[:2]


def loaded(tmp_path, kind, *rows, **source):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read(kind, Source(path, **source))


def one(tmp_path, kind, row, **source):
    result = loaded(tmp_path, kind, row, row, **source)  # twice: one line alone may be a JSON file of its own
    assert result.errors == []
    return result.records[0]


def problem(tmp_path, kind, row, **source):
    result = loaded(tmp_path, kind, row, **source)
    assert result.records == []
    return result.errors[0].split(":1: ", 1)[1]


def messages(prompt):
    return prompt if isinstance(prompt, str) else [(message["role"], message["content"]) for message in prompt]


def named(role, content="role", text="content"):
    return [{content: role(turn["role"]), text: turn["content"]} for turn in TURNS]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"messages": json.dumps(TURNS)},
        {"messages": repr(TURNS)},
        {"messages": {"role": [turn["role"] for turn in TURNS], "content": [turn["content"] for turn in TURNS]}},
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]},
        {"messages": [{**turn, "content": [{"type": "text", "value": turn["content"]}]} for turn in TURNS]},
        {"messages": named(str.upper)},
        {"messages": named(lambda role: {"user": "Human", "assistant": "ChatGPT"}[role])},
        {"messages": [{**turn, "tool_calls": None, "weight": None, "name": None} for turn in TURNS]},
        {"messages": TURNS, "instruction": HI, "response": HELLO},
        {"messages": TURNS, "prompt": HI, "prompt_id": "x", "tools": [], "images": None},
        {"conversations": named(lambda role: {"user": "human", "assistant": "gpt"}[role], "from", "value")},
        {"conversations": named(lambda role: {"user": "user", "assistant": "bard"}[role], "from", "text")},
        {"conversations": [HI, HELLO, MORE, END]},
        {"items": named(lambda role: {"user": "human", "assistant": "gpt"}[role], "from", "value")},
        {
            "contents": [
                {"role": turn["role"].replace("assistant", "model"), "parts": [{"text": turn["content"]}]}
                for turn in TURNS
            ]
        },
        {"messages": [{**turn, "content": [{"text": turn["content"]}]} for turn in TURNS]},
        {"id": "1", "data": [HI, HELLO, MORE, END]},
        {"conversation": [{"input": HI, "output": HELLO}, {"input": MORE, "output": END}]},
        {"conversation": [{"human": HI, "assistant": HELLO}, {"human": MORE, "assistant": END}]},
        {"conversation": [{**turn, "toxic": False, "redacted": False} for turn in TURNS], "turn": 2},
        {"instruction": MORE, "output": END, "history": [[HI, HELLO]]},
        {"query": MORE, "response": END, "history": [[HI, HELLO]]},
        {"instruction": f"Human: {HI}\nAssistant: {HELLO}\nHuman: {MORE}\nAssistant:", "input": "", "output": END},
    ],
)
def test_a_conversation_under_any_of_its_names(tmp_path, row):
    record = one(tmp_path, "demonstrations", row)
    assert (messages(record.prompt), record.completion) == (DIALOGUE, END)
    assert messages(one(tmp_path, "prompts", row).prompt) == DIALOGUE


@pytest.mark.parametrize(
    "row, prompt, completion",
    [
        ({"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"}, "q\nc", "a"),
        ({"instruction": "q", "context": "", "response": "a"}, "q", "a"),
        ({"instruction": "q", "input": "i", "output": "a"}, "q\ni", "a"),
        ({"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"}, "q", "1+1=<<1+1=2>>2\n#### 2"),
        ({"query": "q", "response": "a"}, "q", "a"),
        ({"input": "q", "output": "a"}, "q", "a"),
        ({"kind": "NLI", "input": "q", "target": "a"}, "q", "a"),
        ({"inputs": "q", "targets": "a", "language": "x"}, "q", "a"),
        ({"definition": "d", "inputs": "q", "targets": "a"}, "d\nq", "a"),
        ({"definition": ["d"], "inputs": "q", "targets": ["a"]}, "d\nq", "a"),
        ({"question": "q", "generated_solution": "a", "is_correct": True}, "q", "a"),
        ({"input_text": "q", "output_text": "a"}, "q", "a"),
        ({"inputs": [5, 6], "inputs_pretokenized": "q", "targets": [7], "targets_pretokenized": "a"}, "q", "a"),
        ({"prompt": "q", "response": "a"}, "q", "a"),
        ({"problem": "q", "solution": "a"}, "q", "a"),
        ({"system_prompt": "", "question": "q", "response": "a"}, "q", "a"),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [("system", "s"), ("user", "q")], "a"),
        ({"system": [{"text": "s"}], "messages": [DIALOGUE_START, ANSWER]}, [("system", "s"), ("user", HI)], HELLO),
        (
            {"systemInstruction": {"parts": [{"text": "s"}]}, "contents": [DIALOGUE_START, ANSWER]},
            [("system", "s"), ("user", HI)],
            HELLO,
        ),
        ({"role_1": "x", "message_1": "q", "message_2": "a"}, "q", "a"),
        ({"system": "s", "instruction": "q", "output": "a"}, [("system", "s"), ("user", "q")], "a"),
        ({"messages": [{"role": "developer", "content": "s"}, *TURNS[:2]]}, [("system", "s"), DIALOGUE[0]], HELLO),
        ({"conversation": [{"system": "s", "input": "q", "output": "a"}]}, [("system", "s"), ("user", "q")], "a"),
        ({"prompt": TURNS[:3], "completion": TURNS[3:]}, DIALOGUE, END),
        ({"prompt": json.dumps(TURNS[:3]), "completion": json.dumps(TURNS[3:])}, DIALOGUE, END),
        ({"prompt": TURNS[:1], "output": TURNS[1:2]}, [DIALOGUE[0]], HELLO),
        (
            {
                "topic": "t",
                "input": "The conversation between human and AI assistant.\n[|Human|] q\n[|AI|] a\n[|Human|] ",
            },
            [("user", "q")],
            "a",
        ),
        ({"text": "\n\nHuman: q\n\nAssistant: a"}, [("user", "q")], "a"),
    ],
)
def test_a_prompt_and_its_answer_under_any_of_their_names(tmp_path, row, prompt, completion):
    record = one(tmp_path, "demonstrations", row)
    assert (messages(record.prompt), record.completion) == (prompt, completion)
    asked = one(tmp_path, "prompts", row).prompt
    assert messages(asked) == prompt if "text" not in row else asked


def test_every_instance_of_a_task_is_a_demonstration(tmp_path):
    instances = [{"input": "one", "output": "1"}, {"input": "", "output": "0"}]
    result = loaded(tmp_path, "demonstrations", {"instruction": "count", "instances": instances})
    assert [(record.prompt, record.completion) for record in result.records] == [("count\none", "1"), ("count", "0")]
    assert one(tmp_path, "prompts", {"instruction": "count", "instances": instances}).prompt == "count\none"


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": [*TURNS[:1], {"role": "Tool", "content": "x"}]}, "turns of tools are not read"),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "observation", "value": "y"}]}, "turns of tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "part of the type"),
        ({"messages": [{"role": "narrator", "content": "x"}, *TURNS]}, "role of message 1 is 'narrator'"),
        ({"messages": "[{'role': 'user', 'content': 'x'"}, "no JSON"),
        (
            {"messages": TURNS, "system": "s1", "id": 1} | {"messages": [{"role": "system", "content": "s2"}, *TURNS]},
            "own",
        ),
        ({"prompt": TURNS[:2], "completion": [TURNS[3]]}, "a prefill"),
        ({"instruction": "answer in rhymes", "messages": TURNS}, "'instruction' beside the conversation"),
        ({"messages": [*TURNS, TURNS[3]]}, "both the assistant's"),
        ({"question": "q", "choices": ["x", "y"], "answer": "A"}, "'choices' changes"),
        ({"question": "q", "context": "c", "answer": "a"}, "'context' changes"),
        ({"prompt": "p", "completion": "c", "system": "s", "input": "i"}, "'input' changes"),
        ({"instruction": "i", "instances": [{"in": 1}]}, "'instances' is a list"),
        ({"instruction": "i", "output": "o", "history": "old"}, "'history' is 'old'"),
    ],
)
def test_what_is_no_conversation_of_a_user_and_an_assistant_is_refused(tmp_path, row, words):
    assert words in problem(tmp_path, "demonstrations", row)


def test_numbers_and_lists_under_the_keys_of_a_question_are_another_form():
    for row in ({"data": [1, 2]}, {"items": ["a", "b"]}, {"input": {"messages": []}, "output": "x"}):
        with pytest.raises(ValueError, match="expected"):
            recognise("demonstrations", row)


def test_every_named_form_says_which_data_it_is_of():
    names = {form.name for form in FORMS["demonstrations"]}
    assert {"", "KTO", "self-instruct", "Baize", "UltraChat", "Firefly", "OpenOrca"} <= names


@pytest.mark.parametrize("key", ["response", "completion"])
def test_an_answer_beside_a_conversation_that_lacks_it_is_taught(tmp_path, key):
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    record = one(tmp_path, "demonstrations", {"messages": asked, key: "b"})
    assert record.completion == "b" and record.learnt == (1,)
    answered = [*asked, {"role": "assistant", "content": "b"}]
    assert one(tmp_path, "demonstrations", {"messages": answered, key: "other"}).completion == "b"


def test_an_input_that_says_there_is_none_is_none(tmp_path):
    assert one(tmp_path, "demonstrations", {"instruction": "i", "input": "<noinput>", "output": "o"}).prompt == "i"

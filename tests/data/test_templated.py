"""Test text that holds a chat template already: split, refused, stripped or kept."""

import json

import pytest

from data.source import Source
from data.sources import read
from data.templated import TemplatedText, without_templates

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
SYSTEM, HI = {"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}
TWO_TURNS = [HI, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "b"}]

TEMPLATED = [
    ("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>\n",
     [SYSTEM, HI]),
    ("<|im_start|>user\nhi<|im_end|>\n", "<|im_start|>assistant\na<|im_end|>", "hi"),
    ("[INST] hi [/INST]", "a </s>", "hi"),
    ("<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhi [/INST]", " a </s>", [SYSTEM, HI]),
    ("<s>[INST] hi [/INST] yo </s><s>[INST] b [/INST]", "a</s>", TWO_TURNS),
    (ALPACA + "\n\n### Instruction:\nhi\n\n### Input:\nthere\n\n### Response:\n", "a", "hi\nthere"),
    ("be kind\n\n### Instruction:\nhi\n\n### Response:", "a", [SYSTEM, HI]),
    ("### Human: hi### Assistant: yo### Human: b### Assistant:", " a", TWO_TURNS),
    ("<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", "a<end_of_turn>", "hi"),
    ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant"
     "<|end_header_id|>\n\n", "a<|eot_id|>", "hi"),
    ("<|system|>\nbe kind</s>\n<|user|>\nhi</s>\n<|assistant|>\n", "a</s>", [SYSTEM, HI]),
    ("<|user|>\nhi<|end|>\n<|assistant|>\n", "a<|end|>", "hi"),
    ("[gMASK]<sop><|user|>\nhi<|assistant|>\n", "a", "hi"),
    ("be kind USER: hi ASSISTANT: yo</s>USER: b ASSISTANT:", " a</s>", [SYSTEM, *TWO_TURNS]),
    ("<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>", "a<｜end▁of▁sentence｜>", "hi"),
    ("GPT4 Correct User: hi<|end_of_turn|>GPT4 Correct Assistant:", " a<|end_of_turn|>", "hi"),
    ("be kind\n\nHuman: hi\n\nAssistant:", " a", [SYSTEM, HI]),
    ("User: hi\nAssistant: yo\nUser: b\nAssistant:", " a", TWO_TURNS),
    ("be kind\n\nUser: hi\n\nAssistant:", " a", [SYSTEM, HI]),
    ("Human: hi\nAI: yo\nHuman: b\nAI:", " a", TWO_TURNS),
    ("User: hi\nBot:", " a", "hi"),
    ("hi", "a<|endoftext|>", "hi"),
    ("hi", "a <eos>", "hi"),
    ("<s>hi", "a", "hi"),
    ([HI], "a<|eot_id|>", [HI]),
    ([SYSTEM, {"role": "user", "content": "[INST] hi [/INST]"}], "a", [SYSTEM, HI]),
    ([HI, {"role": "assistant", "content": "yo</s>"}, {"role": "user", "content": "b"}], "a</s>", TWO_TURNS),
]  # fmt: skip


@pytest.mark.parametrize("prompt, completion, turns", TEMPLATED)
def test_a_template_is_an_error_until_the_source_says_what_to_do(prompt, completion, turns):
    row = {"prompt": prompt, "completion": completion}
    with pytest.raises(TemplatedText, match="templated: strip"):
        without_templates(row, None)
    assert without_templates(row, "keep") == row
    assert without_templates(row, "strip") == {"prompt": turns, "completion": "a"}
    ranking = {"prompt": prompt, "responses": [completion, "b", ""], "ranks": [1, 2, 3]}
    assert without_templates(ranking, "strip")["responses"] == ["a", "b", ""]


@pytest.mark.parametrize(
    "prompt, completion, turns",
    [
        ("\n\nHuman: hi\n\nAssistant: ", " a", "hi"),
        ("\n\nHuman: hi\n\nAssistant: yo\n\nHuman: b\n\nAssistant:", " a", TWO_TURNS),
        ("\n\nHuman: hi\n\nAssistant: yo\n\nHuman: b", "\n\nAssistant: a", TWO_TURNS),
        ("Human: hi\nAssistant: yo\nHuman: b\nAssistant:", "a", TWO_TURNS),
        ("Human: hi\n\nAssistant:", "a", "hi"),
        ([HI | {"content": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: b\n\nAssistant:"}], " a", TWO_TURNS),
    ],
)
def test_transcripts_of_a_human_and_an_assistant_are_split(prompt, completion, turns):
    row = {"prompt": prompt, "completion": completion}
    assert without_templates(row, None) == {"prompt": turns, "completion": "a"}
    assert without_templates(row, "keep") == row


@pytest.mark.parametrize(
    "prompt, completion",
    [
        ("Human: is a word", "yes"),
        ("What does Human: mean?", "In a transcript:\n\nHuman: hello"),
        ("Explain [INST] and [/INST] to me", "[INST] is a marker of a template."),
        ("strike this out", "the old price: <s>10</s>"),
        ("strike this out", "<s>10</s> 5 euros"),
        ("report", "# Title\n\n### Response: good\n\nIt went well."),
        ("show ChatML", "```\n<|im_start|>user\nhi<|im_end|>\n```"),
        ("USER: is a name", "ASSISTANT: is one too"),
        ("Is </s> a token?", "Yes, `</s>` ends a text."),
        ("<b>bold</b>", "<p>x</p>"),
        ("### Heading\nquestion:", "### Response to the question\nno"),
        ("[1, 2, 3]", "[4]"),
        ("USER: hi", "hello:"),
        ([HI, {"role": "assistant", "content": "use <|user|> here"}, HI], "<i>x</i>"),
    ],
)
def test_a_text_about_templates_stays(prompt, completion):
    row = {"prompt": prompt, "completion": completion}
    assert without_templates(row, None) == row
    assert without_templates(row, "strip") == row


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\nhi\n<|im_start|>assistant\n",  # a turn without its end
        "<|im_start|>tool\nhi<|im_end|>\n<|im_start|>assistant\n",  # a role that is none of ours
        "hello <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",  # words before the first turn
        "[INST] hi [INST] b [/INST]",  # two turns of the user in a row
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n",  # an empty turn
        "<start_of_turn>user\na</s>b<end_of_turn>\n<start_of_turn>model\n",  # another template inside
        [
            HI,
            {"role": "assistant", "content": "yo"},
            {"role": "user", "content": "[INST] hi [/INST] x [INST] y [/INST]"},
        ],
    ],
)
def test_what_a_template_does_not_write_is_not_stripped(prompt):
    with pytest.raises(ValueError, match=r"cannot be taken off exactly|turns of its own"):
        without_templates({"prompt": prompt, "completion": "a"}, "strip")


CALL = '<tool_call>\n{"name": "weather"}\n</tool_call>'


@pytest.mark.parametrize("templated", [None, "strip"])
@pytest.mark.parametrize(
    "prompt, completion",
    [
        ("hi", CALL),
        ("hi", f"I will look.\n{CALL}<|im_end|>"),
        ("hi", '[TOOL_CALLS] [{"name": "weather"}]'),
        ("hi", '<|python_tag|>{"name": "weather"}'),
        ("<tool_response>\nsun\n</tool_response>", "It is sunny."),
        ([HI, {"role": "assistant", "content": CALL}, {"role": "user", "content": "sun"}], "It is sunny."),
    ],
)
def test_tools_in_text_are_refused(prompt, completion, templated):
    row = {"prompt": prompt, "completion": completion}
    with pytest.raises(TemplatedText, match=r"calls a tool, or is a tool's result, .*templated: keep"):
        without_templates(row, templated)
    assert without_templates(row, "keep") == row


@pytest.mark.parametrize(
    "completion", ["Write <tool_call> and </tool_call>", "<tools>are useful", f"So:\n{CALL}\nDone"]
)
def test_a_text_about_tools_stays(completion):
    row = {"prompt": "what is <tool_call>?", "completion": completion}
    assert without_templates(row, None) == row


def test_an_answer_that_goes_on_with_the_human_is_refused():
    with pytest.raises(ValueError, match="goes on"):
        without_templates({"prompt": "\n\nHuman: hi\n\nAssistant:", "completion": "a\n\nHuman: b"}, None)


def test_in_a_file_the_rows_are_counted_in_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"[INST] {i} [/INST]", "chosen": "a </s>", "rejected": "b </s>"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert len({line.split(": ", 1)[1] for line in read("rankings", Source(path)).errors}) == 1
    [first, *_] = read("rankings", Source(path, templated="strip")).records
    assert (first.prompt, first.responses) == ("0", ("a", "b"))
    [kept, *_] = read("rankings", Source(path, templated="keep")).records
    assert kept.responses == ("a </s>", "b </s>")


def test_documents_are_not_searched(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "[INST] hi [/INST] a </s>"}) + "\n", encoding="utf-8")
    assert read("documents", Source(path)).records[0].text == "[INST] hi [/INST] a </s>"


def test_a_conversation_in_one_text_is_a_demonstration(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "### Human: hi### Assistant: yo### Human: b### Assistant: a"}) + "\n")
    assert "templated: strip" in read("demonstrations", Source(path)).errors[0]
    [record] = read("demonstrations", Source(path, templated="strip")).records
    assert (list(record.prompt), record.completion, record.learnt) == (TWO_TURNS, "a", (1,))

"""Test chat templates from outside: they render as in transformers, under limits."""

import importlib.resources

import pytest
from jinja2 import TemplateError

from data import templates
from data.conversations import render
from data.encode import encode_prompt, encode_prompts
from data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from pipeline.errors import UserError
from stages.models.tokens import end_turns_with_eos

CHATML = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ALTERNATING = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
NAMESPACED = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{{- {'last': ns.last, 'of': messages|length}|tojson -}}
{%- for m in messages -%}
{%- if loop.last or m.role == 'user' -%}
{% generation %}{{- '<|' ~ m.role ~ '|>' }}{{ m.content.split('</think>')[-1].lstrip() | upper }}{% endgeneration %}
{%- else -%}{%- continue -%}{%- endif -%}
{%- endfor -%}{{- eos_token -}}"""
CONVERSATIONS = [
    [{"role": "user", "content": "héllo ✓\n"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a < b & c"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "<think>x</think>\n two"},
     {"role": "user", "content": "'three'\u2028"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(["one two three hello"], 400)


@pytest.fixture
def tokenizer(trained, monkeypatch):
    """Return a tokenizer whose `chat_template` a test may set."""
    monkeypatch.setattr(trained, "chat_template", CHAT_TEMPLATE)
    return trained


@pytest.mark.parametrize("template", [CHATML, ALTERNATING, NAMESPACED, CHAT_TEMPLATE + "\n"])
def test_a_template_renders_as_in_transformers(tokenizer, template):
    """Check text, token ids and refusals, in one process for all."""
    tokenizer.chat_template = template
    every = [c for c in CONVERSATIONS for _ in range(2)]
    found = list(render(tokenizer, every, tokenize=[False, True] * 3, add_generation_prompt=True))
    for i, conversation in enumerate(every):
        options = {"add_generation_prompt": True, "tokenize": bool(i % 2)} | ({"return_dict": False} if i % 2 else {})
        try:
            assert found[i] == tokenizer.apply_chat_template(conversation, **options)
        except TemplateError as refusal:
            assert type(found[i]) is TemplateError and str(found[i]) == str(refusal)
    first = templates._worker.process.pid
    list(render(tokenizer, CONVERSATIONS, tokenize=[False] * 3))
    assert templates._worker.process.pid == first


def test_templates_of_known_models_render_as_in_transformers(tokenizer):
    """Check the templates that trl carries, whatever their version."""
    folder = importlib.resources.files("trl") / "chat_templates"
    known = sorted(path for path in folder.iterdir() if path.name in ("qwen3.jinja", "llama3_1.jinja", "gptoss.jinja"))
    assert known
    for path in known:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        found = list(render(tokenizer, CONVERSATIONS, tokenize=[False] * 3, add_generation_prompt=True))
        usual = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in CONVERSATIONS]
        assert found == usual and "three" in found[2], path.name


def test_our_own_template_needs_no_other_process(tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "_worker", None)
    assert encode_prompts(tokenizer, ["one", "two"], "ab")[0] == encode_prompt(tokenizer, "one")


def test_one_refusal_does_not_keep_our_own_template_from_the_others(tokenizer):
    """Check conversations that are rendered in one call."""
    tokenizer.chat_template = ALTERNATING
    bad = [{"role": "system", "content": "be brief"}, *CONVERSATIONS[0]]
    mixed = [CONVERSATIONS[0], bad, CONVERSATIONS[2]]
    options = {"trusted": ALTERNATING, "tokenize": [False] * 3}
    first, refused, last = templates.render(tokenizer, mixed, **options)
    assert isinstance(refused, TemplateError)
    alone = [tokenizer.apply_chat_template(mixed[i], tokenize=False) for i in (0, 2)]
    assert [first, last] == alone


@pytest.mark.parametrize(
    "template, what",
    [
        ('{{ "a" * 10**10 }}', "more than 512 MiB of memory"),
        ("{{ messages[0].content|center(10**9) }}", "more than 512 MiB of memory"),
        ('{{ "a" * 3000000 }}', "it gives 3,000,000 characters"),
        ("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}", "than 0.2 s of processor"),
    ],
)
def test_a_template_that_takes_too_much_is_ended(tokenizer, monkeypatch, template, what):
    """Check that a model with it is refused at loading, in one line."""
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    monkeypatch.setattr(templates, "_worker", templates.Worker())
    tokenizer.chat_template = template
    with pytest.raises(UserError) as caught:
        end_turns_with_eos(tokenizer)
    (line,) = caught.value.lines
    assert line.startswith("model.name_or_path: its chat template fails on one question and answer (") and what in line
    assert templates._worker.process is None


def test_an_endless_template_is_reported_with_its_prompt(tokenizer):
    """Check this after valid rows, more than are sent together; another template still works."""
    tokenizer.chat_template = CHATML + "{% if 'go' in messages[0].content %}{{ 'a' * 10**10 }}{% endif %}"
    prompts = ["one"] * 70 + ["go"] + ["one"] * 70
    with pytest.raises(UserError) as caught:
        encode_prompts(tokenizer, prompts, [f"p.jsonl:{n}" for n in range(1, len(prompts) + 1)])
    (line,) = caught.value.lines
    assert line.startswith("p.jsonl:71: the model's chat template fails on this prompt (it takes more than 512 MiB")
    tokenizer.chat_template = CHATML
    assert len(encode_prompts(tokenizer, prompts, prompts)) == 141


def test_any_exception_of_a_template_is_a_refusal(tokenizer):
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(UserError, match=r"a: the model's chat template refuses this prompt \(ZeroDivisionError: div"):
        encode_prompts(tokenizer, ["one"], "a")


def test_a_worker_that_was_ended_is_started_again(tokenizer):
    tokenizer.chat_template = CHATML
    before = encode_prompt(tokenizer, "one")
    templates._worker.process.kill()
    templates._worker.process.wait()
    assert encode_prompt(tokenizer, "one") == before


def test_unread_answers_are_not_taken_for_the_next_requests(tokenizer, monkeypatch):
    """Check Ctrl-C while it renders."""
    tokenizer.chat_template = CHATML
    encode_prompt(tokenizer, "one")

    def interrupted(text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(templates.json, "loads", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode_prompt(tokenizer, "two")
    assert encode_prompt(tokenizer, "three") != encode_prompt(tokenizer, "two")


SLOW = "{% for i in range(messages[0].content|length * 400) %}{% for j in range(400) %}{% endfor %}{% endfor %}a"


def test_a_template_that_is_slow_for_every_row_is_refused(tokenizer, monkeypatch):
    """Check rows that are each within the limit but slow as a file, one by one and at once."""
    monkeypatch.setattr(templates, "AT_FIRST", 0.3)
    monkeypatch.setattr(templates, "_worker", templates.Worker())
    tokenizer.chat_template = SLOW
    with pytest.raises(UserError) as caught:
        encode_prompts(tokenizer, ["a" * 10] * 500, [f"p.jsonl:{n}" for n in range(1, 501)])
    (line,) = caught.value.lines
    place = int(line.partition(":")[2].partition(":")[0])
    assert 2 < place < 400 and "s of processor time a conversation on average" in line
    assert line.endswith("; give another template as model.chat_template: FILE, or take another model")
    rows = templates._worker.spent[SLOW][0]
    with pytest.raises(UserError):
        encode_prompt(tokenizer, "one")
    assert templates._worker.spent[SLOW][0] == rows, "it was not tried again"
    tokenizer.chat_template = CHATML
    assert encode_prompt(tokenizer, "one")


def test_rows_that_were_ended_count_as_slow(tokenizer, monkeypatch):
    """Check that only the first few rows are tried if every row takes too long."""
    monkeypatch.setattr(templates, "SECONDS", 0.1)
    monkeypatch.setattr(templates, "AT_FIRST", 0.25)
    monkeypatch.setattr(templates, "_worker", templates.Worker())
    tokenizer.chat_template = SLOW
    for _ in range(20):
        with pytest.raises(UserError):
            encode_prompt(tokenizer, "a" * 200)
    assert templates._worker.spent[SLOW][0] == 3


def test_many_quick_rows_are_not_slow(tokenizer, monkeypatch):
    monkeypatch.setattr(templates, "AT_FIRST", 0.01)
    monkeypatch.setattr(templates, "_worker", templates.Worker())
    tokenizer.chat_template = CHATML
    assert len(encode_prompts(tokenizer, ["one"] * 300, ["p"] * 300)) == 300

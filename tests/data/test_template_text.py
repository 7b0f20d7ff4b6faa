"""Test what transformers renders of templates with set variables and a stopped clock."""

import json
from datetime import datetime

import pytest
from chat_tokenizers import DATED, KINDS, QWEN3
from transformers.utils import chat_template_utils

from data.template_text import (
    at_moment,
    literal,
    own_variables,
    stopped_clock,
    variable_problem,
    with_clock_of,
    with_variables,
)

NOW = datetime(2026, 11, 29, 4, 5, 6)


def rendered(template, **options):
    (text,), _ = chat_template_utils.render_jinja_template(
        [[{"role": "user", "content": "hi"}]], chat_template=template, **options
    )
    return text


def test_any_json_value_is_a_literal():
    values = [True, False, None, 0, -3, 2.5, -1e-9, 10**30, "", 'it\'s "so"', "%}{{ x }}{% raw %}{# \\n"]
    values += ["\n\té\u2028\ue000😀"]
    values += [[1, ["a"]], {"a b": {"c": [None]}}, []]
    text = rendered(with_variables("{{ value | tojson }}", {"value": values}))
    assert json.loads(text) == values
    assert literal({"a": [True, "b"]}) == '{"a": [true, "b"]}'
    with pytest.raises(ValueError):
        literal(float("inf"))


@pytest.mark.parametrize("template", ["\n\n  {{ a }}", "  {% if a %}\nb{% endif %}", "{# c #}\n{{ a }}\n"])
def test_setting_a_variable_changes_nothing_else(template):
    assert rendered(with_variables(template, {"a": "x"})) == rendered(template, a="x")
    assert with_variables(template, {}) == template


def test_macros_and_loops_see_it():
    template = "{% macro m() %}{{ a }}{% endmacro %}{% for x in messages %}{{ a }}{{ m() }}{% endfor %}"
    assert rendered(with_variables(template, {"a": 7})) == "77"


NAMES = ["messages", "tools", "eos_token", "strftime_now", "if", "a-b", "a b", "1a", "", "é", "None"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_cannot_be_set(name):
    assert variable_problem(name) and variable_problem("enable_thinking") is None


def test_the_variables_that_a_template_tests():
    assert own_variables(QWEN3) == ["enable_thinking"]
    assert own_variables(DATED) == ["date_string"]
    asks = "{% if tools is defined or m.x is not defined or not fast is defined and effort is not  defined %}"
    assert own_variables(asks) == ["fast", "effort"]
    assert own_variables(KINDS["chatml"][0]) == []


FORMATS = ["%d %b %Y", "%-d/%m/%y %H:%M:%S", "100%% on %A", "%%d", "%d%%%d", "%c|%x|%X|%p|%I|%j", "%F %T", "%e.", "no"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_stopped_clock_writes_its_moment(form, monkeypatch):
    """Check against what transformers writes at that moment."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return NOW

    macro = "{% macro m() %}{{ strftime_now(" + literal(form) + ") }}{% endmacro %}"
    template = "\n" + macro + "{{ m() }} {{ strftime_now is defined }}"
    stopped = rendered(at_moment(template, NOW))
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    expected = rendered(template + " ")[:-1]
    assert stopped == expected and NOW.strftime(form) in stopped


def test_two_hours_of_a_day_give_one_text_if_the_hour_is_not_written():
    """Check that two experiments of a day get the same template."""
    later = NOW.replace(hour=17, second=9)
    spaced = "{%if true%}{%set x = 1%}{%for m in messages%}" + DATED + "{%endfor%}{%endif%}"
    for template in (DATED, spaced):
        assert at_moment(template, NOW) == at_moment(template, later) != at_moment(template, datetime(2026, 11, 30))
    computed = "{% set d = '%' %}{{ strftime_now(d ~ 'd ' ~ d ~ 'B') }}"
    assert rendered(at_moment(computed, NOW)) == "29 November"


def test_a_clock_that_was_stopped_stays_so():
    """Check a published template as the start of another experiment."""
    once = at_moment(DATED, NOW)
    assert rendered(at_moment(once, datetime(1999, 1, 1)), bos_token="") == rendered(once, bos_token="")


def test_a_clock_is_stopped_at_the_moment_of_another_template():
    once = at_moment(DATED, NOW)
    assert with_clock_of(DATED, once) == once and stopped_clock(once) + DATED == once
    assert with_clock_of(DATED, DATED) == DATED and with_clock_of(once, at_moment(DATED, datetime(1999, 1, 1))) == once
    assert with_clock_of(QWEN3, once) == QWEN3

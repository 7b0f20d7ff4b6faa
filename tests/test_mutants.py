"""Test that each mutant changes one place of the code, into code that still parses."""

import ast
from collections import Counter

import pytest
from mutants import MUTANTS, ROOT, TESTS, holders


@pytest.mark.parametrize("stage", TESTS)
def test_a_mutant_changes_one_place(stage):
    for mutant in (mutant for mutant in MUTANTS if mutant.stage == stage):
        paths = holders(mutant.stage, mutant.old)
        assert mutant.file or len(paths) == 1, f"{mutant.old!r} is in {paths}"
        text = (ROOT / mutant.path).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{mutant.path} has {mutant.old!r} {text.count(mutant.old)} times"

        assert mutant.old != mutant.new
        ast.parse(text.replace(mutant.old, mutant.new), mutant.breaks)


def test_every_stage_has_at_least_ten_and_no_two_are_the_same():
    assert (
        len({(m.stage, m.path, m.old, m.new) for m in MUTANTS})
        == len({(m.stage, m.breaks) for m in MUTANTS})
        == len(MUTANTS)
    )
    own = Counter(m.stage for m in MUTANTS if not m.file)
    assert set(own) == set(TESTS) and min(own.values()) >= 10


def test_the_tests_that_notice_them_exist():
    for tests in TESTS.values():
        assert tests and all((ROOT / path).is_file() for path in tests)

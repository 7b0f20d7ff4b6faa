"""The page with assistive technology: axe-core finds nothing serious in any of its states."""

import importlib.util
from pathlib import Path

import pytest

from tests.people.browser.conftest import PHONE, QUESTIONS, is_saved, place

WIDE = {"viewport": {"width": 1280, "height": 800}}
TASKS = [(f"```\nf({n})\n```\nWhy?", [f"one {n}", "two " * 2_000, "three\u202e", "four"]) for n in range(3)]


@pytest.fixture(scope="module")
def axe():
    """The source of axe-core."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None:
        pytest.skip("axe-core is not installed (pip install -e .[dev])")
    return (Path(found.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")


def violations(window, axe):
    """Return what axe-core finds serious or critical: a line a place."""
    window.evaluate(axe)
    found = window.evaluate("axe.run().then((results) => results.violations)")
    lines = []
    for one in found:
        if one["impact"] in ("serious", "critical"):
            lines += [f"{one['id']}: {node['target']} {node.get('failureSummary', '')}" for node in one["nodes"]]
    return lines


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        pytest.param(WIDE, "dark", id="wide-dark"),
        pytest.param(PHONE, "light", id="phone-light"),
        pytest.param(WIDE, "light", id="wide-light", marks=pytest.mark.slow),
        pytest.param(PHONE, "dark", id="phone-dark", marks=pytest.mark.slow),
    ],
)
def test_every_state_of_the_page(serve, visit, axe, size, scheme):
    server = serve(TASKS[:1], break_every=0.01)
    window = visit(server, color_scheme=scheme, **size)
    name = window.get_by_label("Your name")
    name.wait_for()
    assert violations(window, axe) == [], "sign in"
    name.fill("Ada")
    window.get_by_role("button", name="Begin").click()
    start = window.get_by_role("button", name="Start ranking")
    start.wait_for()
    assert violations(window, axe) == [], "guidelines"
    start.click()
    window.locator(".card").first.wait_for()
    assert violations(window, axe) == [], "a fresh task"
    place(window, "one 0", 1)
    place(window, "four", 1)
    window.get_by_role("button", name="Cannot judge").nth(1).click()
    is_saved(window)
    assert violations(window, axe) == [], "a task half done"
    for button in ("Compare answer A", "Same as … answer A", "Skip …", "Last ten", "Guidelines", "Another browser"):
        window.get_by_role("button", name=button, exact=True).click()
        window.get_by_role("dialog").wait_for()
        assert violations(window, axe) == [], button
        window.keyboard.press("Escape")
        window.get_by_role("dialog").wait_for(state="detached")
    server.kill()
    window.locator(".card").last.locator(".place").nth(2).click()
    window.get_by_role("alert").wait_for()
    assert violations(window, axe) == [], "the server is silent"
    server.start()
    is_saved(window)


def test_the_first_step_and_the_empty_page(serve, join, axe):
    window = join(serve(QUESTIONS[:1], likert=True))
    window.locator(".scale").wait_for()
    assert violations(window, axe) == []
    window = join(serve([]))
    window.get_by_text("Nothing to rank at the moment").wait_for()
    assert violations(window, axe) == []


def test_what_changes_is_announced_and_the_focus_is_kept(serve, join):
    window = join(serve(QUESTIONS[:1]))
    text = window.locator(".card .text").first.inner_text()
    place(window, text, 2)
    live = window.locator("#live[aria-live=polite]")
    assert live.inner_text() == "Answer A: place 1." or "place" in live.text_content()
    window.get_by_role("button", name="Guidelines", exact=True).click()
    window.keyboard.press("Escape")
    assert window.evaluate("document.activeElement.textContent") == "Guidelines"
    radio = window.get_by_role("group", name="Place of answer A").get_by_role("radio").nth(1)
    assert radio.is_checked()


def test_it_works_at_twice_the_size_of_letters(serve, join):
    window = join(serve(QUESTIONS[:1]), viewport={"width": 640, "height": 400}, device_scale_factor=2)
    assert window.evaluate("document.documentElement.scrollWidth <= innerWidth")
    place(window, window.locator(".card .text").first.inner_text(), 1)
    is_saved(window)

"""The lead's page in a real browser: by mouse, by keyboard; empty, silent, with hostile texts."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from stages.people.rank.rules import Rules
from stages.people.store.database import open_database
from tests.people.browser.conftest import PHONE
from tests.people.simulated import at_random, careful, first_shown, simulate, tasks

WIDE = {"viewport": {"width": 1280, "height": 800}}
RULES = Rules(overlap=1.0, overlap_labelers=4, repeat=0.1, known_share=0.1)
PEOPLE = {"ada": (careful, 40), "cleo": (first_shown, 40), "dan": (at_random, 5), "gus": (None, 5)}


@pytest.fixture
def lead(serve, visit):
    """Return what opens the lead's page of a server with simulated labelers."""

    def enter(people=PEOPLE, count=14, **options):
        server = serve([])
        database = open_database(server.folder, "browser")
        simulate(database, RULES, people, tasks(count, known=2))
        database.close()
        window = visit(server, server.lead_address, **options)
        window.get_by_text("As of").wait_for(timeout=60_000)
        window.locator(".rows > li, .rows + .fine").locator("visible=true").first.wait_for()
        return server, window

    return enter


def row(window, code):
    """Return the first row of a labeler in the list."""
    return window.locator(".rows > li").filter(has_text=f"{code} · ").first


def decisions(server, code):
    """Return what the lead says of a labeler's verdicts."""
    query = """SELECT v.accepted, v.sent_back, v.message FROM verdicts v JOIN assignments a ON a.id = v.assignment_id
               JOIN labelers l ON l.id = a.labeler_id WHERE l.code = ? ORDER BY v.id DESC"""
    return [(one["accepted"], bool(one["sent_back"]), one["message"]) for one in server.rows(query, code)]


def test_by_mouse_exclude_one_send_back_one_and_download(lead, tmp_path):
    server, window = lead()
    assert "token" not in window.url
    assert window.get_by_role("listitem").filter(has_text="shown first best more often than chance").count() > 0
    one = row(window, "cleo")
    one.get_by_role("button", name="Exclude").click()
    row(window, "cleo").locator(".badge.excluded").wait_for()
    assert decisions(server, "cleo")[0] == ("excluded", False, "")
    row(window, "dan").get_by_role("button", name="Send back").click()
    window.get_by_label("Message (may stay empty)").fill("Please read <b>all</b> answers.")
    window.get_by_role("dialog").get_by_role("button", name="Send back").click()
    row(window, "dan").locator(".badge.sent_back").wait_for()
    assert decisions(server, "dan")[0] == ("excluded", True, "Please read <b>all</b> answers.")
    row(window, "ada").get_by_role("button", name="Accept").click()
    row(window, "ada").locator(".badge.accepted").wait_for()
    with window.expect_download() as caught:
        window.get_by_role("link", name="Download").click()
    assert re.fullmatch(r"browser-rankings-\d{4}-\d\d-\d\d\.jsonl", caught.value.suggested_filename)
    caught.value.save_as(tmp_path / "got.jsonl")
    got = [json.loads(line) for line in (tmp_path / "got.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = """SELECT COUNT(*) AS n FROM verdicts v JOIN assignments a ON a.id = v.assignment_id
                WHERE v.accepted <> 'excluded' AND a.reason IN ('first', 'overlap')"""
    assert len(got) == server.rows(wanted)[0]["n"] and {one["labeler"] for one in got} == set(PEOPLE)
    window.get_by_label("Form of the download").select_option("labelstudio")
    with window.expect_download() as caught:
        window.get_by_role("link", name="Download").click()
    assert caught.value.suggested_filename.endswith(".zip")


def test_by_keyboard_alone(lead):
    server, window = lead()
    press = window.keyboard.press

    def tab_to(name, most=200):
        for _ in range(most):
            press("Tab")
            if window.evaluate("document.activeElement.textContent").startswith(name):
                return window.evaluate("document.activeElement.textContent")
        raise AssertionError(f"{name} was not reached")

    tab_to("Exclude all …")
    press("Enter")
    window.get_by_role("dialog").wait_for()
    window.keyboard.type("the first is always best")
    press("Tab")
    press("Enter")
    window.locator(".badge.excluded").first.wait_for()
    found = decisions(server, "cleo")
    assert found and set(found) == {("excluded", False, "the first is always best")}
    window.wait_for_function("() => !document.querySelector('dialog')")
    window.locator("#rows-labeler").focus()
    window.locator("#rows-labeler").select_option("ada")
    name = tab_to("Send back …")
    assert "ada" in name
    press("Enter")
    window.keyboard.type("once more")
    press("Tab")
    press("Enter")
    window.locator(".badge.sent_back").wait_for()
    assert decisions(server, "ada")[0] == ("excluded", True, "once more")
    assert window.evaluate("document.activeElement.textContent").startswith("Send back"), "the focus is where it was"


def test_stop_a_labeler_and_the_figures_follow(lead):
    server, window = lead()
    line = window.get_by_role("row").filter(has_text="dan").filter(has=window.get_by_role("button", name="Stop"))
    line.get_by_role("button", name="Stop").click()
    window.get_by_role("button", name="Let go on").wait_for()
    assert server.rows("SELECT state FROM labelers WHERE code = 'dan'") == [{"state": "stopped"}]
    before = window.get_by_text("Pairs of answers ordered alike").locator("xpath=..").inner_text()
    for code in ("dan", "cleo"):
        window.get_by_label(f"All rows of {code}").select_option("excluded")
        window.get_by_role("dialog").get_by_role("button", name="Exclude all").click()
        window.wait_for_function("() => !document.querySelector('dialog')")
        window.get_by_text("Exclude all").first.wait_for()
    window.get_by_text("No task has been ranked by two labelers yet").wait_for()
    window.get_by_label("Figures with excluded rows").check()
    again = window.get_by_text("Pairs of answers ordered alike").locator("xpath=..")
    again.wait_for()
    assert again.inner_text() == before


def test_what_is_sent_back_reaches_the_labeler_with_the_message(lead, visit):
    from tests.people.browser.conftest import QUESTIONS, submit

    server, window = lead(people={})
    labeler = visit(server)
    labeler.get_by_label("Your name").fill("Ada")
    labeler.get_by_role("button", name="Begin").click()
    labeler.get_by_role("button", name="Start ranking").click()
    labeler.locator(".card").first.wait_for()
    for number in range(4):
        labeler.locator(".card").nth(number).locator(".place").nth(number).click()
    submit(labeler)
    window.get_by_role("button", name="Update").click()
    row(window, "L1").get_by_role("button", name="Send back").click()
    window.get_by_label("Message (may stay empty)").fill("<img src=x onerror=alert(1)> Read B again")
    window.get_by_role("dialog").get_by_role("button", name="Send back").click()
    window.locator(".badge.sent_back").wait_for()
    for number in range(4):
        labeler.locator(".card").nth(number).locator(".place").nth(number).click()
    labeler.get_by_role("button", name="Submit ranking").click()
    labeler.get_by_text("The lead sent this task back to you and writes").wait_for()
    assert labeler.get_by_text("<img src=x onerror=alert(1)> Read B again").count() == 1
    assert QUESTIONS and labeler.locator("img").count() == 0


def test_hostile_names_and_reasons_are_shown_as_text(lead):
    server, window = lead(people={})
    database = open_database(server.folder, "browser")
    with database.transaction() as connection:
        connection.execute(
            "INSERT INTO labelers(code, name, key_hash, created) VALUES('x', '<script>alert(1)</script>\u202e', 'h', 0)"
        )
    database.close()
    window.get_by_role("button", name="Update").click()
    window.get_by_text("<script>alert(1)</script>").first.wait_for()
    assert (
        window.locator("main script").count() == 0 and window.locator(".hidden-character").first.inner_text() == "RLO"
    )


def test_nothing_yet_and_a_server_that_is_gone(lead):
    server, window = lead(people={}, count=3)
    for sentence in (
        "Nobody has joined yet",
        "No task has been ranked by two labelers",
        "Nobody has handed in a task yet",
    ):
        window.get_by_text(sentence).wait_for()
    server.kill()
    window.get_by_role("button", name="Update").click()
    alert = window.get_by_role("alert")
    alert.get_by_text("The server does not answer").wait_for()
    server.start()
    alert.get_by_role("button", name="Try again").click()
    alert.wait_for(state="detached")
    window.context.clear_cookies()
    window.get_by_role("button", name="Update").click()
    alert.get_by_text("Open the lead's address").wait_for()


@pytest.fixture(scope="module")
def axe():
    """The source of axe-core."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None:
        pytest.skip("axe-core is not installed (pip install -e .[dev])")
    return (Path(found.submodule_search_locations[0]) / "axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        pytest.param(WIDE, "light", id="wide-light"),
        pytest.param(PHONE, "dark", id="phone-dark"),
        pytest.param(WIDE, "dark", id="wide-dark", marks=pytest.mark.slow),
        pytest.param(PHONE, "light", id="phone-light", marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_window(lead, axe, size, scheme):
    from tests.people.browser.test_access import violations

    _, window = lead(color_scheme=scheme, **size)
    assert violations(window, axe) == []
    assert window.evaluate("document.documentElement.scrollWidth <= innerWidth")
    row(window, "cleo").get_by_role("button", name="Exclude").click()
    row(window, "cleo").locator(".badge.excluded").wait_for()
    for button in ("Look", "Send back …"):
        window.locator(".rows button").filter(has_text=button).first.click()
        window.get_by_role("dialog").wait_for()
        assert violations(window, axe) == [], button
        window.keyboard.press("Escape")
        window.get_by_role("dialog").wait_for(state="detached")

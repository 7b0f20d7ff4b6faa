"""The playground in a real browser: talk, stop, choose, correct, keep, delete; keys and touch."""

import json
import sqlite3

import pytest

from tests.people.browser.conftest import PHONE
from tests.people.browser.test_access import axe, violations  # noqa: F401 (axe is a fixture)
from tests.people.playground.running import Server

WIDE = {"viewport": {"width": 1280, "height": 800}}


@pytest.fixture
def serve_playground(tmp_path):
    """Return what starts a playground whose policies need no model."""
    started = []

    def start(**options):
        folder = tmp_path / f"playground-{len(started)}"
        folder.mkdir()
        started.append(Server(folder, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def rows(server, query):
    with sqlite3.connect(server.folder / "people" / "people.sqlite") as connection:
        return connection.execute(query).fetchall()


def ask(window, text):
    """Send a message, and wait until all have answered."""
    before = window.locator(".exchange").count()
    window.get_by_label("Your message").fill(text)
    window.get_by_role("button", name="Send").click()
    window.locator(".exchange").nth(before).wait_for()
    window.locator(".exchange").nth(before).locator("article[aria-busy=false]").first.wait_for()
    window.locator("article[aria-busy=true]").first.wait_for(state="hidden")
    window.get_by_role("button", name="Stop").wait_for(state="hidden")


def test_talk_by_keyboard_and_stop(serve_playground, visit):
    server = serve_playground()
    window = visit(server)
    window.get_by_label("Your message").press_sequentially("hello there")
    window.keyboard.press("Enter")
    window.get_by_text("ppo says : hello there").wait_for()
    assert window.get_by_text("score 3.25").count() == 2
    window.get_by_role("button", name="Go on with answer B").click()
    window.get_by_label("Your message").fill("slow 400")
    window.keyboard.press("Enter")
    window.get_by_text("word3").first.wait_for()
    window.keyboard.press("Escape")
    window.get_by_text("not part of the conversation").first.wait_for()
    ask(window, "error")
    assert window.get_by_text("the model failed (ZeroDivisionError)").count() == 2
    assert rows(server, "SELECT count(*) FROM turns") == [(0,)]


def test_blind_comparison_correction_thumb_reload_and_delete(serve_playground, visit):
    server = serve_playground()
    window = visit(server)
    window.get_by_label("Keep my conversations").check()
    window.get_by_label("Blind").check()
    window.get_by_label("What is it for?").select_option("open_qa")
    ask(window, "which one ?")
    titles = window.locator("article h2")
    assert titles.all_inner_texts() == ["A", "B"] and window.locator(".score").count() == 0
    window.get_by_role("button", name="B is better").click()
    window.locator(".score").first.wait_for()
    named = titles.all_inner_texts()
    assert sorted(named) in (["A · ppo", "B · sft"], ["A · sft", "B · ppo"])
    best = window.get_by_role("article").nth(1)
    best.get_by_role("button", name="Correct").click()
    window.get_by_label("What answer B").fill("I know .")
    window.get_by_role("button", name="Save correction").click()
    best.get_by_text("your correction; the conversation goes on with it").wait_for()
    best.get_by_role("button", name="Good").click()
    window.locator("button[aria-pressed='true']").get_by_text("Good").wait_for()
    window.reload()
    window.get_by_text("I know .").wait_for()
    ask(window, "sure ?")
    assert rows(server, "SELECT count(*) FROM choices") == rows(server, "SELECT count(*) FROM thumbs") == [(1,)]
    (settings,) = rows(server, "SELECT settings FROM turns WHERE role = 'user' ORDER BY id DESC LIMIT 1")[0]
    ((answer,),) = rows(server, "SELECT turn_id FROM corrections")
    assert json.loads(settings) == {"after": answer, "blind": True, "corrected": True}
    assert rows(server, "SELECT kind, consent FROM conversations") == [("open_qa", 1)]
    window.get_by_role("button", name="Delete this conversation").click()
    window.get_by_text("Ask something.").wait_for()
    assert rows(server, "SELECT count(*) FROM turns") == [(0,)]


def test_what_was_shared_can_be_deleted_later_and_the_token_leaves_the_address(serve_playground, visit):
    server = serve_playground()
    window = visit(server)
    window.get_by_label("Keep my conversations").check()
    for text in ("one", "two"):
        window.get_by_role("button", name="New conversation").click()
        ask(window, text)
    assert "token" not in window.url
    later = window.context.new_page()  # a new window knows of no conversation
    later.on("dialog", lambda dialog: dialog.accept())
    later.goto(window.url)
    later.get_by_role("button", name="Delete all that I shared (2 conversations)").click()
    later.get_by_role("button", name="Delete all").wait_for(state="hidden")
    assert rows(server, "SELECT count(*) FROM turns") == [(0,)]


def test_whoever_turns_the_switch_begins_a_new_conversation(serve_playground, visit):
    server = serve_playground()
    window = visit(server)
    ask(window, "this is not kept")
    window.get_by_label("Keep my conversations").check()
    assert window.locator(".exchange").count() == 0
    ask(window, "this is kept")
    window.get_by_label("Keep my conversations").uncheck()
    ask(window, "nor is this")
    assert rows(server, "SELECT content FROM turns WHERE role = 'user'") == [("this is kept",)]


def test_an_order_of_three(serve_playground, visit):
    server = serve_playground(names=["sft", "ppo", "dpo"])
    window = visit(server)
    window.get_by_label("Keep my conversations").check()
    window.get_by_label("dpo").check()
    ask(window, "hello")
    for letter, place in ("A", "2."), ("B", "1."), ("C", "2."):
        window.get_by_label(f"Place of answer {letter}").select_option(label=place)
    window.get_by_role("button", name="Save the order").click()
    window.get_by_role("button", name="Save again").wait_for()
    ids = [turn for (turn,) in rows(server, "SELECT id FROM turns WHERE role = 'assistant' ORDER BY side")]
    assert json.loads(rows(server, "SELECT tiers FROM choices")[0][0]) == [[ids[1]], [ids[0], ids[2]]]


def test_hostile_texts_are_text(serve_playground, visit):
    window = visit(serve_playground())
    hostile = "<img src=x onerror=alert(1)><script>document.title='bad'</script> \u202efdp.exe \u200b [a](javascript:x)"
    ask(window, hostile)
    assert window.locator("article img, article script, article a, .question img").count() == 0
    assert window.title() == "Playground · fake"
    assert window.locator("article").first.get_by_text("RLO").count() == 1
    ask(window, "long " * 9_999)
    assert window.get_by_role("button", name="Show all of answer A").count() >= 1


def test_a_server_that_has_ended_is_said(serve_playground, visit):
    server = serve_playground()
    window = visit(server)
    ask(window, "hello")
    server.stop()
    window.get_by_label("Your message").fill("still there ?")
    window.get_by_role("button", name="Send").click()
    window.get_by_text("the server cannot be reached").wait_for()
    assert window.get_by_label("Your message").input_value() == "still there ?"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_assistive_technology_finds_its_way(serve_playground, visit, axe, scheme, size):  # noqa: F811
    window = visit(serve_playground(), color_scheme=scheme, **size)
    window.get_by_text("Ask something.").wait_for()
    assert violations(window, axe) == [], "empty"
    window.get_by_label("Keep my conversations").check()
    ask(window, "hello")
    window.get_by_role("button", name="Correct answer A").click()
    assert violations(window, axe) == [], "answers"
    if size is PHONE:
        window.locator("summary").tap()
    window.get_by_label("Temperature").fill("99")
    window.get_by_label("Your message").fill("x")
    window.get_by_role("button", name="Send").click()
    window.get_by_text("Temperature: ").wait_for()
    assert violations(window, axe) == [], "an error"
    assert window.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"

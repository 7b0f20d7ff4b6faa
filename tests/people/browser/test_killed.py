"""Kill the server while a person ranks: what was shown as saved is there, and nothing is lost."""

import json
import random
import threading

import pytest

from tests.people.browser.conftest import QUESTIONS, is_saved, place, submit

ONE = QUESTIONS[:1]


def placed(server):
    """Return the slots of all moves that place an answer, in order."""
    rows = server.rows("SELECT kind, body FROM moves ORDER BY seq")
    return [json.loads(row["body"])["tier"] for row in rows if row["kind"] == "place"]


def kill_and_go_on(server, window, kills, seed):
    """Make moves while the server is killed at random instants, and check after each kill.

    Before each further move the page says whether all earlier ones are saved; that many must be in
    the file of the killed server. In the end each move is there once, and in its order.
    """
    drawn, made, first = random.Random(seed), [], window.locator(".card .text").first.inner_text()
    for _ in range(kills):
        saved = 0
        timer = threading.Timer(drawn.uniform(0.05, 0.9), server.kill)
        timer.start()
        for _ in range(10):
            slot = drawn.choice([n for n in range(4) if not made or n != made[-1]])
            place(window, first, slot + 1)
            made.append(slot)
            if window.locator("#saved").inner_text() == "Saved":
                saved = len(made)
            window.wait_for_timeout(drawn.uniform(0, 120))
            if window.locator("#saved").inner_text() == "Saved":
                saved = len(made)
        timer.join()
        assert placed(server)[:saved] == made[:saved] and len(placed(server)) >= saved
        server.start()
        is_saved(window)
        assert placed(server) == made


def test_two_kills(serve, join):
    server = serve(ONE)
    window = join(server)
    kill_and_go_on(server, window, kills=2, seed=1)


@pytest.mark.slow
def test_twenty_kills(serve, join):
    server = serve(ONE)
    window = join(server)
    kill_and_go_on(server, window, kills=20, seed=2)


def test_a_dead_server_is_said_and_ranking_goes_on(serve, join):
    server = serve(ONE)
    window = join(server)
    texts = window.locator(".card .text").all_inner_texts()
    place(window, texts[0], 1)
    is_saved(window)
    server.kill()
    place(window, texts[1], 2)
    window.get_by_role("alert").get_by_text("The server does not answer. 1 move is not saved yet").wait_for()
    tick = window.evaluate("getComputedStyle(document.querySelector('#saved'), '::before').content")
    assert tick in ("none", "normal")
    place(window, texts[2], 3)
    place(window, texts[3], 3)
    window.evaluate("scrollTo(0, document.body.scrollHeight)")
    box = window.get_by_role("alert").bounding_box()  # in sight at the end of the page, too
    assert box["y"] >= 0 and box["y"] + box["height"] < 300
    window.get_by_role("alert").get_by_text("3 moves are not saved yet").wait_for()
    assert window.locator("#saved").inner_text() == "Not saved: 3"
    window.get_by_role("button", name="Submit ranking").click()  # waits, too
    server.start()
    window.get_by_text("Nothing to rank at the moment").wait_for()
    assert window.get_by_role("alert").count() == 0
    assert server.verdicts()[0]["tiers"] == [[texts[0]], [texts[1]], sorted(texts[2:])]


def test_moves_that_never_arrived_outlive_the_window(serve, join):
    server = serve(ONE)
    window = join(server)
    texts = window.locator(".card .text").all_inner_texts()
    place(window, texts[0], 2)
    is_saved(window)
    server.kill()
    place(window, texts[1], 1)
    place(window, texts[0], 3)
    window.get_by_role("alert").get_by_text("2 moves are not saved").wait_for()
    again = window.context.new_page()
    window.close()
    server.start()
    again.goto(server.address)
    is_saved(again)
    assert again.locator(".slot").nth(0).locator(".chip").count() == 1
    assert again.locator(".slot").nth(2).locator(".chip").count() == 1
    assert placed(server) == [1, 0, 2]


def lose_one_answer(window, pattern):
    """Let requests reach the server and lose one answer; return the list that holds it then."""
    lost = []

    def lose(route):
        if lost:
            route.continue_()
            return
        lost.append(route.fetch().json())
        route.abort()

    window.route(pattern, lose)
    return lost


def test_an_answer_that_got_lost_makes_no_second_move(serve, join):
    server = serve(ONE)
    window = join(server)
    texts = window.locator(".card .text").all_inner_texts()
    lost = lose_one_answer(window, "**/moves")
    place(window, texts[0], 2)
    is_saved(window)
    assert lost[0]["seq"] == 1 and placed(server) == [1]


def test_a_submit_whose_answer_got_lost_counts_once(serve, join):
    server = serve(QUESTIONS[:2])
    window = join(server)
    lost = lose_one_answer(window, "**/submit")
    for n, text in enumerate(window.locator(".card .text").all_inner_texts()):
        place(window, text, n + 1)
    submit(window)
    assert lost[0]["ok"] and len(server.verdicts()) == 1 and window.locator(".banner").count() == 0


def test_a_session_that_ended_says_what_to_do(serve, join):
    server = serve(ONE)
    window = join(server)
    window.context.clear_cookies()
    place(window, window.locator(".card .text").first.inner_text(), 1)
    window.get_by_role("alert").get_by_text("Open the address that the server printed once more").wait_for()
    window.goto(server.address)  # what could not be sent waits in the browser
    is_saved(window)
    assert placed(server) == [0]


def test_a_page_that_cannot_load_its_task_tries_again(serve, join):
    server = serve(ONE)
    window = join(server)
    window.route("**/api/next", lambda route: route.abort())
    window.reload()
    window.get_by_role("alert").get_by_text("The server does not answer. Trying again").wait_for()
    window.unroute("**/api/next")
    window.locator(".card").first.wait_for()
    assert window.get_by_role("alert").count() == 0

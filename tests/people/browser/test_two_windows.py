"""Several people, and several windows of one person, at the same time."""

import json

from tests.people.browser.conftest import PHONE, QUESTIONS, is_saved, place, question, submit


def test_two_labelers_never_get_the_same_task(serve, join):
    server = serve(QUESTIONS[:6])
    ada, bob = join(server, "Ada"), join(server, "Bob", **PHONE)
    seen = []
    for _ in range(3):
        seen += [question(ada), question(bob)]
        texts = ada.locator(".card .text").all_inner_texts(), bob.locator(".card .text").all_inner_texts()
        for n in range(4):  # in turns
            place(ada, texts[0][n], n + 1)
            place(bob, texts[1][n], 4 - n)
        submit(ada)
        submit(bob)
    assert len(set(seen)) == 6 and len(server.verdicts()) == 6
    ada.get_by_text("Nothing to rank at the moment").wait_for()
    codes = server.rows("SELECT code, name FROM labelers ORDER BY id")
    assert codes == [{"code": "L1", "name": "Ada"}, {"code": "L2", "name": "Bob"}]


def test_two_labelers_see_the_answers_in_their_own_order(serve, join):
    answers = [f"answer {n}" for n in range(9)]
    server = serve([("Which?", answers)], overlap=1.0)
    orders = [join(server, name).locator(".card .text").all_inner_texts() for name in ("Ada", "Bob")]
    assert sorted(orders[0]) == sorted(orders[1]) == answers and orders[0] != orders[1]


def test_two_windows_of_one_person_keep_both_moves(serve, join):
    server = serve(QUESTIONS[:1])
    first = join(server)
    second = first.context.new_page()
    second.goto(server.address)
    second.locator(".card").first.wait_for()
    texts = first.locator(".card .text").all_inner_texts()
    place(first, texts[0], 1)
    is_saved(first)
    place(second, texts[1], 2)  # this window does not know of the first move yet
    second.get_by_text("This task was changed in another window").wait_for()
    is_saved(second)
    assert second.locator(".slot").nth(0).locator(".chip").count() == 1
    assert second.locator(".slot").nth(1).locator(".chip").count() == 1
    for n in (2, 3):
        place(second, texts[n], n + 1)
    submit(second)
    assert server.verdicts()[0]["tiers"] == [[text] for text in texts]
    place(first, texts[0], 4)  # the task is closed: the page says so and goes on
    first.locator(".banner.refused").wait_for()
    first.get_by_text("Nothing to rank at the moment").wait_for()
    assert server.verdicts()[0]["tiers"] == [[text] for text in texts]


def test_a_person_goes_on_in_another_browser(serve, join, visit):
    server = serve(QUESTIONS[:2])
    first = join(server)
    place(first, first.locator(".card .text").first.inner_text(), 3)
    is_saved(first)
    first.get_by_role("button", name="Another browser").click()
    key = first.get_by_label("Your key").input_value()
    second = visit(server, **PHONE)
    second.get_by_text("I have been here before").click()
    second.get_by_label("Your key").fill("wrong")
    second.get_by_role("button", name="Go on").click()
    second.get_by_role("alert").get_by_text("nobody").wait_for()
    second.get_by_label("Your key").fill(key)
    second.get_by_role("button", name="Go on").click()
    second.get_by_role("button", name="Start ranking").click()
    second.locator(".slot").nth(2).locator(".chip").wait_for()
    assert len(server.rows("SELECT * FROM labelers")) == 1


def test_a_code_that_is_taken_or_an_address_is_refused_in_words(serve, join, visit):
    server = serve(QUESTIONS[:1])
    window = visit(server)
    window.get_by_label("Your name").fill("Ada")
    window.get_by_label("A code that stands for you").fill("owl")
    window.get_by_role("button", name="Begin").click()
    window.get_by_role("button", name="Start ranking").wait_for()
    other = visit(server)
    other.get_by_label("Your name").fill("Bob")
    code = other.get_by_label("A code that stands for you")
    code.fill("bob@example.org")
    other.get_by_role("button", name="Begin").click()
    assert not code.evaluate("code => code.checkValidity()")
    code.fill("OWL")
    other.get_by_role("button", name="Begin").click()
    other.get_by_role("alert").get_by_text("taken").wait_for()
    assert json.dumps(server.rows("SELECT code FROM labelers")) == '[{"code": "owl"}]'


def test_new_guidelines_are_shown_before_the_next_task(serve, join):
    server = serve(QUESTIONS[:2])
    window = join(server)
    server.kill()
    server.options.update(guidelines="# New\n\nShort is better.", digest="1" * 16)
    server.start()
    rank_all_but_wait(window)
    window.get_by_text("The guidelines have changed").wait_for()
    window.get_by_text("Short is better.").wait_for()
    window.get_by_role("button", name="Start ranking").click()
    window.locator(".card").first.wait_for()


def rank_all_but_wait(window):
    """Rank what is shown and send it, without waiting for a task."""
    for n, text in enumerate(window.locator(".card .text").all_inner_texts()):
        place(window, text, n + 1)
    window.get_by_role("button", name="Submit ranking").click()

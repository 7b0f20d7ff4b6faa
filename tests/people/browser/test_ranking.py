"""Rank in a real browser: by mouse, by keyboard, by touch; ties, set aside, skip, undo, reload."""

import json

import pytest

from tests.people.browser.conftest import PHONE, QUESTIONS, card, is_saved, place, question, submit

RIGHT, LONG, WRONG, NONE = "It is 2.", "1 and 1 make 2.", "It is 3.", "No idea."
ONE = QUESTIONS[:1]


def slot(window, number):
    return window.locator(".slot").nth(number - 1)


def chips(window, number):
    """Return the letters in a place of the board."""
    return slot(window, number).locator(".chip .letter").all_inner_texts()


def letter(window, text):
    return card(window, text).locator(".letter").inner_text()


def drag(window, grip, target, along=0.5):
    """Drag something by mouse to an element; `along` from its top to its bottom."""
    grip.scroll_into_view_if_needed()
    box, (x, y) = grip.bounding_box(), point(target, along)
    window.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    window.mouse.down()
    window.mouse.move(x - 30, y - 5, steps=4)
    window.mouse.move(x, y, steps=4)
    window.mouse.up()


def point(locator, along=0.5):
    """Return a point inside an element; `along` from its top to its bottom."""
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + along * box["height"]


def touch(window):
    """Return what puts a finger down, moves it and lifts it."""
    session = window.context.new_cdp_session(window)

    def finger(kind, *points):
        points = [{"x": x, "y": y} for x, y in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    return finger


def test_by_mouse_with_ties_and_a_note(serve, join):
    server = serve(ONE)
    window = join(server)
    assert window.get_by_role("button", name="Submit ranking").get_attribute("aria-disabled") == "true"
    for text, number in ((RIGHT, 1), (LONG, 1), (WRONG, 3), (NONE, 2)):
        place(window, text, number)
    assert f"same as {letter(window, LONG)}" in card(window, RIGHT).locator(".state").inner_text()
    window.locator(".sure .place").nth(3).click()
    window.get_by_label("A note (may stay empty)").fill("easy")
    submit(window)
    window.get_by_text("Nothing to rank at the moment").wait_for()
    (verdict,) = server.verdicts()
    assert verdict["tiers"] == [sorted([RIGHT, LONG]), [NONE], [WRONG]]
    assert (verdict["confidence"], verdict["note"], verdict["set_aside"]) == (4, "easy", [])


def test_dragging_into_places_between_places_and_aside(serve, join):
    server = serve(ONE)
    window = join(server)
    drag(window, card(window, RIGHT).locator(".card-head h3"), slot(window, 1))
    drag(window, card(window, WRONG).locator(".grip"), slot(window, 2))
    assert [chips(window, n) for n in (1, 2)] == [[letter(window, RIGHT)], [letter(window, WRONG)]]
    # at the edge of an occupied place: a place of its own in between
    drag(window, card(window, NONE).locator(".grip"), slot(window, 2), along=0.1)
    assert chips(window, 2) == [letter(window, NONE)] and chips(window, 3) == [letter(window, WRONG)]
    # into an occupied place: a tie; from place to place; out again; aside
    drag(window, card(window, LONG).locator(".grip"), slot(window, 1))
    assert sorted(chips(window, 1)) == sorted([letter(window, RIGHT), letter(window, LONG)])
    drag(window, slot(window, 3).locator(".chip"), window.locator("[data-tray=unjudged]"))
    assert chips(window, 3) == []
    drag(window, window.locator("[data-tray=unjudged] .chip"), window.locator("[data-tray=aside]"))
    submit(window)
    (verdict,) = server.verdicts()
    assert verdict["tiers"] == [sorted([RIGHT, LONG]), [NONE]] and verdict["set_aside"] == [WRONG]


def test_a_drag_that_ends_nowhere_or_by_escape_changes_nothing(serve, join):
    server = serve(ONE)
    window = join(server)
    drag(window, card(window, RIGHT).locator(".grip"), window.locator(".how"))
    box = card(window, RIGHT).locator(".grip").bounding_box()
    window.mouse.move(box["x"] + 5, box["y"] + 5)
    window.mouse.down()
    window.mouse.move(*point(slot(window, 1)), steps=5)
    window.keyboard.press("Escape")
    window.mouse.up()
    assert window.locator("[data-tray=unjudged] .chip").count() == 4
    assert server.rows("SELECT * FROM moves") == [] and window.locator(".ghost").count() == 0


def test_by_keyboard_alone(serve, visit):
    server = serve(ONE)
    window = visit(server)
    press = window.keyboard.press
    window.get_by_label("Your name").wait_for()
    window.keyboard.type("Ada")
    press("Enter")
    window.get_by_role("button", name="Start ranking").wait_for()
    press("Tab")
    press("Enter")
    window.locator(".card").first.wait_for()
    texts = window.locator(".card .text").all_inner_texts()
    press("2")  # the first answer; then the next one without a place is outlined
    press("1")
    press("x")  # the third cannot be judged; on to the fourth
    press("=")  # the fourth is as good as the second
    press("b")
    is_saved(window)
    assert server.verdicts() == []
    press("Control+Enter")
    window.get_by_text("Nothing to rank at the moment").wait_for()
    (verdict,) = server.verdicts()
    assert verdict["tiers"] == [sorted([texts[1], texts[3]]), [texts[0]]] and verdict["set_aside"] == [texts[2]]


def test_arrow_keys_move_a_chip_and_the_focus_stays_on_it(serve, join):
    window = join(serve(ONE))
    place(window, RIGHT, 2)
    assert card(window, RIGHT).locator(".state").inner_text() == "place 2"  # as the number pressed, also with gaps
    chip = slot(window, 2).locator(".chip")
    chip.focus()
    window.keyboard.press("ArrowDown")
    assert chips(window, 3) == [letter(window, RIGHT)]
    assert "place" in window.evaluate("document.activeElement.getAttribute('aria-label')")
    for _ in range(3):
        window.keyboard.press("ArrowUp")
    assert chips(window, 1) == [letter(window, RIGHT)]


def test_keys_can_be_switched_off(serve, join):
    window = join(serve(ONE))
    window.keyboard.press("?")
    window.get_by_label("Use single keys").uncheck()
    window.keyboard.press("Escape")
    window.keyboard.press("1")
    assert window.locator("[data-tray=unjudged] .chip").count() == 4


def test_a_note_may_hold_digits(serve, join):
    server = serve(ONE)
    window = join(server)
    window.get_by_label("A note (may stay empty)").click()
    window.keyboard.type("1x2u=0")
    is_saved(window)
    assert window.locator("[data-tray=unjudged] .chip").count() == 4
    assert [row["kind"] for row in server.rows("SELECT kind FROM moves")] == ["note"]


def test_by_touch_on_a_phone(serve, join):
    server = serve(ONE)
    window = join(server, **PHONE)
    assert window.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for text, number in ((RIGHT, 1), (LONG, 2), (NONE, 3)):
        card(window, text).locator(".place").nth(number - 1).tap()
    finger = touch(window)
    grip = card(window, WRONG).locator(".grip")
    grip.scroll_into_view_if_needed()
    start = point(grip)
    finger("touchStart", start)
    for step in range(1, 6):
        finger("touchMove", (start[0] + step * 4, start[1] + step * 4))
    target = point(slot(window, 4))  # the places have grown under the finger
    finger("touchMove", target)
    finger("touchEnd")
    assert chips(window, 4) == [letter(window, WRONG)]
    window.get_by_role("button", name="Submit ranking").tap()
    window.get_by_text("Nothing to rank at the moment").wait_for()
    assert server.verdicts()[0]["tiers"] == [[RIGHT], [LONG], [NONE], [WRONG]]


def test_a_finger_on_the_head_of_a_card_scrolls(serve, join):
    server = serve(ONE)
    window = join(server, **PHONE)
    head = window.locator(".card h3").first
    head.evaluate("head => head.scrollIntoView({ block: 'center' })")
    finger, (x, y), before = touch(window), point(head), window.evaluate("scrollY")
    finger("touchStart", (x, y))
    for step in range(1, 12):
        finger("touchMove", (x, y - 15 * step))
        window.wait_for_timeout(20)
    finger("touchEnd")
    window.wait_for_function("before => scrollY > before + 50", arg=before)
    assert server.rows("SELECT * FROM moves") == [] and window.locator("[data-tray=unjudged] .chip").count() == 4


def test_undo_takes_back_one_move_after_the_other(serve, join):
    server = serve(ONE)
    window = join(server)
    undo = window.get_by_role("button", name="Undo")
    assert undo.is_disabled()
    place(window, RIGHT, 1)
    card(window, WRONG).get_by_role("button", name="Cannot judge").click()
    place(window, WRONG, 4)
    is_saved(window)
    undo.click()
    card(window, WRONG).locator(".state").get_by_text("cannot judge").wait_for()
    window.keyboard.press("Control+z")
    card(window, WRONG).locator(".state").get_by_text("no place yet").wait_for()
    window.keyboard.press("u")
    card(window, RIGHT).locator(".state").get_by_text("no place yet").wait_for()
    is_saved(window)
    assert undo.is_disabled()


def test_same_as_and_take_out(serve, join):
    window = join(serve(ONE))
    same = card(window, LONG).get_by_role("button", name="Same as")
    assert same.is_disabled()
    place(window, RIGHT, 2)
    same.click()
    window.get_by_role("dialog").get_by_role("button", name=RIGHT).click()
    assert sorted(chips(window, 2)) == sorted([letter(window, RIGHT), letter(window, LONG)])
    card(window, LONG).get_by_role("button", name="Take out").click()
    assert chips(window, 2) == [letter(window, RIGHT)]


def test_submit_says_what_is_missing(serve, join):
    server = serve(ONE)
    window = join(server)
    place(window, RIGHT, 1)
    window.get_by_role("button", name="Submit ranking").click(force=True)
    assert "Without a place" in window.locator("#missing").inner_text()
    assert window.evaluate("document.activeElement.className").startswith("card")
    for text in (LONG, WRONG, NONE):
        card(window, text).get_by_role("button", name="Cannot judge").click()
    window.get_by_role("button", name="Submit ranking").click(force=True)
    assert "At least two" in window.locator("#missing").inner_text()
    assert server.verdicts() == []


def test_reload_in_the_middle_keeps_the_draft_and_the_order(serve, join):
    window = join(serve(ONE))
    texts = window.locator(".card .text").all_inner_texts()
    place(window, RIGHT, 1)
    place(window, LONG, 3)
    window.get_by_label("A note (may stay empty)").fill("half")
    is_saved(window)
    window.wait_for_function("!document.querySelector('#note').matches(':focus') || true")
    window.locator("#note").blur()
    is_saved(window)
    window.reload()
    window.locator(".card").first.wait_for()
    assert window.locator(".card .text").all_inner_texts() == texts
    assert chips(window, 1) == [letter(window, RIGHT)] and chips(window, 3) == [letter(window, LONG)]
    assert window.locator("#note").input_value() == "half"
    assert window.get_by_role("button", name="Undo").is_enabled()


def test_skip_with_a_reason(serve, join):
    server = serve(QUESTIONS[:2])
    window = join(server)
    before = question(window)
    window.get_by_role("button", name="Skip …").click()
    window.get_by_role("button", name="Skip this task").click()  # without a reason nothing happens
    assert server.verdicts() == []
    window.get_by_placeholder("in your own words").fill("too easy")
    window.get_by_role("button", name="Skip this task").click()
    window.wait_for_function("before => document.querySelector('.conversation .text').innerText !== before", arg=before)
    (verdict,) = server.verdicts()
    assert verdict["skipped"] == "too easy" and verdict["tiers"] == []


def test_back_to_the_last_ten(serve, join):
    server = serve(QUESTIONS[:2])
    window = join(server)
    first = question(window)
    texts = window.locator(".card .text").all_inner_texts()
    for n, text in enumerate(texts):
        place(window, text, n + 1)
    submit(window)
    window.get_by_role("button", name="Last ten").click()
    window.get_by_text(first).wait_for()
    window.get_by_role("button", name="Open again").click()
    window.wait_for_function("first => document.querySelector('.conversation .text').innerText === first", arg=first)
    assert [chips(window, n) for n in (1, 2, 3, 4)] == [["A"], ["B"], ["C"], ["D"]]
    place(window, texts[0], 4)
    place(window, texts[3], 1)
    submit(window)
    (verdict,) = server.verdicts()
    assert verdict["tiers"] == [[texts[3]], [texts[1]], [texts[2]], [texts[0]]]
    assert question(window) != first


def test_each_answer_alone_first(serve, join):
    server = serve(ONE, likert=True)
    window = join(server)
    texts = []
    for n in range(4):
        next_answer = window.locator(".next-answer")
        assert next_answer.is_disabled() and window.locator(".board").count() == 0
        texts.append(window.locator(".single .card .text").inner_text())
        window.locator(".scale .place").nth(n + 2).click()
        if n == 1:
            window.get_by_label("Is it rude?").check()
        next_answer.click()
    for n, text in enumerate(texts):
        place(window, text, 4 - n)
    submit(window)
    (verdict,) = server.verdicts()
    assert {text: said["overall"] for text, said in verdict["likert"].items()} == {
        t: n + 3 for n, t in enumerate(texts)
    }
    assert verdict["likert"][texts[1]]["flags"] == {"rude": True}


def test_compare_marks_what_differs_and_takes_places(serve, join):
    window = join(serve([("Why?", ["the blue light is scattered most", "the red light is scattered most", "no", "?"])]))
    card(window, "the blue light is scattered most").get_by_role("button", name="Compare").click()
    window.get_by_label("Left answer").select_option(
        label=f"Answer {letter(window, 'the blue light is scattered most')}"
    )
    right = f"Answer {letter(window, 'the red light is scattered most')}"
    side = "Right answer"
    if window.get_by_label("Left answer").input_value() == window.get_by_label(side).input_value():
        pytest.fail("the same answer on both sides")
    window.get_by_label(side).select_option(label=right)
    assert window.locator("dialog mark").all_inner_texts() == ["blue", "red"]
    window.locator("dialog .side").nth(1).locator(".place").nth(0).click()
    window.get_by_role("button", name="Close").click()
    assert chips(window, 1) == [letter(window, "the red light is scattered most")]


def test_seconds_without_a_sign_of_life_do_not_count(serve, visit):
    server = serve(ONE)
    window = visit(server)
    window.clock.install()
    window.reload()
    window.get_by_label("Your name").fill("Ada")
    window.get_by_role("button", name="Begin").click()
    window.get_by_role("button", name="Start ranking").click()
    window.locator(".card").first.wait_for()
    place(window, RIGHT, 1)
    for _ in range(40):  # twenty minutes pass, and nobody touches anything
        window.clock.run_for(30_000)
    place(window, RIGHT, 2)
    is_saved(window)
    spent = [json.loads(row["body"]) for row in server.rows("SELECT body FROM moves")]
    assert sum(move["active_ms"] for move in spent) < 90_000
    assert sum(move["idle_ms"] for move in spent) > 1_000_000
    window.clock.fast_forward(90 * 3600 * 1000)  # the page stays open over a weekend
    place(window, RIGHT, 3)
    is_saved(window)
    assert window.locator(".banner").count() == 0 and chips(window, 3) == [letter(window, RIGHT)]


def test_a_break_is_proposed(serve, join):
    window = join(serve(QUESTIONS[:3], break_every=0.5))
    for text in window.locator(".card .text").all_inner_texts():
        place(window, text, 1)
        window.wait_for_timeout(200)
    submit(window)
    window.get_by_text("A few minutes off").wait_for()
    window.get_by_role("button", name="Go on").click()
    assert window.get_by_text("A few minutes off").count() == 0

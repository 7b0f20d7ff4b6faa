"""Texts that try to do harm: shown as text, with what is invisible made visible, and rankable."""

from itertools import pairwise

from tests.people.browser.conftest import PHONE, place

SCRIPT = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"><b>bold</b>"
LINK = "[click](javascript:document.title='run') ![x](http://127.0.0.1:9/x.png) <a href='http://127.0.0.1:9/'>x</a>"
OVERRIDE = "user\u202etxt.exe\u2066 and \u202dmore\u2069"
HIDDEN = "a\u200bb\ufeff" + "\u200b" * 50_000 + "end" + "".join(chr(0xE0000 + ord(c)) for c in "ignore all")
LONG = "x" * 100_000
PILE = "Z" + "\u0301" * 3_000 + "algo"
CONTROL = "one\u0000two\u001b[31mthree\r\nfour\u2028five"
FINE = "می\u200cخواهم \U0001f469\u200d\U0001f467 naïve café"
ANSWERS = [SCRIPT, LINK, OVERRIDE, HIDDEN, LONG, PILE, CONTROL, FINE]
PROMPT = [
    {"role": "system", "content": "<script>document.title = 'run'</script>"},
    {"role": "user", "content": "\u202eWhat?" + "y" * 5_000},
]


def shown(window, start):
    """Return the text of the card that begins with something."""
    texts = window.locator(".card .text").all_inner_texts()
    return next(text for text in texts if text.startswith(start))


def test_hostile_answers_are_shown_harmless_and_can_be_ranked(serve, join):
    server = serve([(PROMPT, ANSWERS)])
    window = join(server)
    asked = []
    window.on("request", lambda request: asked.append(request.url))
    for more in window.get_by_role("button", name="Show all").all()[::-1]:
        more.click()
    assert window.title() == "Rank answers"
    assert window.locator("main script, main img, main b b, main .text a, main iframe").count() == 0
    assert shown(window, "<script>").strip() == SCRIPT and shown(window, "[click]").strip() == LINK
    assert shown(window, "user").replace("\n", "") == "userRLOtxt.exeLRI and LROmorePDI"
    assert shown(window, "xxx").count("x") == 100_000
    text = shown(window, "aZWSPb")
    assert "ZWSP ×50000" in text and "U+E0069" in text and "more invisible characters" in text
    assert "+2996 combining marks" in shown(window, "Z\u0301")
    assert "U+0000" in shown(window, "one") and "U+001B" in shown(window, "one") and "LS" in shown(window, "one")
    assert shown(window, "می").strip() == FINE  # joiners at their proper work stay
    # nothing is wider than the window, above another card, or from elsewhere
    assert window.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tops = [card.bounding_box() for card in window.locator(".card").all()]
    assert all(a["y"] + a["height"] <= b["y"] for a, b in pairwise(tops))
    for button in window.get_by_role("button", name="Compare").all()[:8]:
        button.click()
        window.locator("dialog .side").first.wait_for()
        window.get_by_role("button", name="Close").click()
    for n, card in enumerate(window.locator(".card").all()):
        card.locator(".place").nth(n).click()
    window.get_by_role("button", name="Submit ranking").click()
    window.get_by_text("Nothing to rank at the moment").wait_for()
    assert sorted(text for tier in server.verdicts()[0]["tiers"] for text in tier) == sorted(ANSWERS)
    assert window.title() == "Rank answers" and not [url for url in asked if str(server.port) not in url]


def test_hostile_answers_fit_a_phone(serve, join):
    window = join(serve([(PROMPT, ANSWERS)]), **PHONE)
    assert window.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_text_in_the_other_direction_reads_from_its_side(serve, join):
    window = join(serve([("اكتب جملة", ["القمر جميل في الليل.", "The moon."])]))
    box = (
        window.locator(".card .text")
        .filter(has_text="القمر")
        .evaluate(
            """text => {
            const range = document.createRange();
            range.selectNodeContents(text);
            const words = range.getClientRects(), own = text.getBoundingClientRect();
            return own.right - Math.max(...[...words].map((r) => r.right));
        }"""
        )
    )
    assert box < 40


def test_a_hostile_name_and_note(serve, join):
    server = serve([("Why?", ["yes", "no"])])
    window = join(server, name="<script>document.title='run'</script>")
    window.get_by_role("button", name="Another browser").click()
    window.get_by_role("dialog").get_by_text("<script>").wait_for()
    window.keyboard.press("Escape")
    window.get_by_label("A note (may stay empty)").fill("<img src=x onerror=alert(1)>\u202e" + "n" * 5_000)
    place(window, "yes", 1)
    place(window, "no", 2)
    window.get_by_role("button", name="Submit ranking").click()
    window.get_by_text("Nothing to rank at the moment").wait_for()
    assert len(server.verdicts()[0]["note"]) == 4_000 and window.title() == "Rank answers"


def test_guidelines_are_text_too(serve, join):
    markup = "<img src=x onerror=\"document.title='run'\">"
    markdown = f"# Rules\n\n{markup}\n\n**bold** [link](javascript:alert(1))\n\n1. one\n2. two"
    window = join(serve([("Why?", ["yes", "no"])], guidelines=markdown))
    guidelines = window.locator("details.guidelines")
    assert "<img src=x" in guidelines.inner_text() and "link (javascript:alert(1))" in guidelines.inner_text()
    assert guidelines.locator("strong").inner_text() == "bold" and guidelines.locator("ol li").count() == 2
    assert guidelines.locator("img, a").count() == 0 and window.title() == "Rank answers"

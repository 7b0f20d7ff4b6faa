"""Find personal data in texts by patterns whose hits a checksum or a numbering plan confirms.

A pattern alone takes versions, dates and ISBNs for telephone numbers, so every hit is asked:
card numbers by their issuer's range and Luhn's digit, IBANs and national numbers by python-stdnum,
telephone numbers by phonenumbers (Google's numbering plans). E-mail addresses have no checksum;
placeholders such as `user@example.com` are left alone. Names and postal addresses have no pattern
and are not found.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.errors import UserError

NO_REGION = "none"
"""The region with which only telephone numbers that begin with + are found."""


@dataclass(frozen=True, order=True)
class Find:
    """Name personal data in a text."""

    start: int
    """Its first character."""
    end: int
    """The character after its last one."""
    what: str
    """What it is: e-mail, phone, card, iban or the name of a national number."""


def find_personal(text: str, region: str = "US") -> list[Find]:
    """Return the personal data in a text, in order; finds do not overlap.

    Args:
        text: The text.
        region: The country, as two letters, whose telephone numbers are found as they are written
            within it; "none" for only those that begin with +.
    """
    finds: list[Find] = []
    # The surest first: the digits of a card would otherwise be a telephone number somewhere.
    for finder in (emails, ibans, cards, national_numbers):
        add_apart(finds, finder(text))
    add_apart(finds, phones(text, region))
    return sorted(finds)


def add_apart(finds: list[Find], more: Iterator[Find]) -> None:
    """Add those of `more` that overlap with none of `finds`."""
    for find in more:
        if all(find.end <= other.start or other.end <= find.start for other in finds):
            finds.append(find)


def mask(text: str, finds: list[Find]) -> str:
    """Return a text with each find replaced by its kind in brackets, such as [EMAIL]."""
    pieces, end = [], 0
    for find in finds:
        pieces += [text[end : find.start], f"[{find.what.upper().replace('-', '')}]"]
        end = find.end
    return "".join([*pieces, text[end:]])


def need_packages(region: str) -> None:
    """Check that the packages of the extra are installed, and that the region exists.

    Raises:
        UserError: One is missing, or phonenumbers knows no such region.
    """
    try:
        importlib.import_module("stdnum.luhn")
        phonenumbers = importlib.import_module("phonenumbers")
    except ImportError as error:
        problem = f"the package {error.name} is not installed"
        raise UserError([f"--pii: {problem}; install rlhf-pipeline[pii], or say --pii off"]) from None
    if region != NO_REGION and region not in phonenumbers.SUPPORTED_REGIONS:
        raise UserError([f"--region: '{region}' is no country; use two capital letters such as GB, or none"])


# ── e-mail ───────────────────────────────────────────────────────────────────────────────────────

EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+@/-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9@-])"
)
FILE_ENDINGS = frozenset(
    ("png", "jpg", "jpeg", "gif", "svg", "webp", "pdf", "css", "js", "json", "html", "xml", "yaml", "yml", "txt", "zip")
)
"""What follows the last dot in `icon@2x.png`."""
MACHINES = frozenset(
    ("git", "hg", "svn", "root", "noreply", "no-reply", "donotreply", "do-not-reply", "postmaster", "mailer-daemon")
)
"""Addresses that are nobody's, in any domain."""
RESERVED = re.compile(r"(?:^|\.)(?:example\.(?:com|net|org|edu)|example|test|invalid|localhost)$")
"""Domains that RFC 2606 reserves for examples."""
PLACEHOLDERS = frozenset(
    (
        *("user", "username", "name", "yourname", "your.name", "your-name", "your_name", "your.email", "your-email"),
        *("your_email", "youremail", "firstname.lastname", "first.last", "me", "you", "your", "someone", "somebody"),
        *("anyone", "nobody", "email", "mail", "address", "example", "sample", "test", "tester", "demo", "admin"),
        *("info", "contact", "support", "help", "hello", "sales", "office", "foo", "bar", "foo.bar", "recipient"),
        *("sender", "to", "from"),
    )
)
"""Addresses that name nobody, in a domain for examples."""


def emails(text: str) -> Iterator[Find]:
    """Yield e-mail addresses that may be a person's."""
    if "@" not in text:
        return
    for match in EMAIL.finditer(text):
        local, domain = match[0].lower().rsplit("@", 1)
        if local in MACHINES or domain.rsplit(".", 1)[1] in FILE_ENDINGS or ".." in local:
            continue
        if RESERVED.search(domain) and local.rstrip("0123456789") in PLACEHOLDERS:
            continue
        yield Find(match.start(), match.end(), "e-mail")


# ── bank accounts and cards ──────────────────────────────────────────────────────────────────────

IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![a-z0-9])")
CARD = re.compile(
    r"(?<![A-Za-z0-9_.+-])(?:[0-9]{14,19}|[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{3})?"
    r"|[0-9]{4}([ -])[0-9]{6}\2[0-9]{4,5})(?![A-Za-z0-9_-]|\.[0-9])"
)
ISSUERS = (
    (re.compile(r"4"), (16, 19)),  # Visa; those of 13 digits are no longer in use
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),  # Mastercard
    (re.compile(r"3[47]"), (15,)),  # American Express
    (re.compile(r"6011|64[4-9]|65"), (16, 19)),  # Discover
    (re.compile(r"35(?:2[89]|[3-8])"), (16,)),  # JCB
    (re.compile(r"30[0-5]|3[689]"), (14,)),  # Diners Club
    (re.compile(r"62"), (16, 17, 18, 19)),  # UnionPay
)
"""First digits of the issuers of cards, and how many digits their numbers have."""


def ibans(text: str) -> Iterator[Find]:
    """Yield numbers of bank accounts whose check digits and country's structure are right."""
    from stdnum import iban

    for match in IBAN.finditer(text):
        # A word in capitals after the number looks like one more group of it.
        candidate = match[0]
        while candidate:
            if iban.is_valid(candidate, check_country=False):
                yield Find(match.start(), match.start() + len(candidate), "iban")
                break
            candidate = candidate.rpartition(" ")[0]


def cards(text: str) -> Iterator[Find]:
    """Yield card numbers of a known issuer whose check digit is right."""
    from stdnum import luhn

    for match in CARD.finditer(text):
        digits = re.sub("[ -]", "", match[0])
        known = any(first.match(digits) and len(digits) in lengths for first, lengths in ISSUERS)
        if known and luhn.is_valid(digits):
            yield Find(match.start(), match.end(), "card")


# ── national numbers ─────────────────────────────────────────────────────────────────────────────

NATIONAL = (
    ("ssn", "stdnum.us.ssn", re.compile(r"[0-9]{3}-[0-9]{2}-[0-9]{4}")),
    ("resident-id", "stdnum.cn.ric", re.compile(r"[1-9][0-9]{16}[0-9X]")),
    ("cpf", "stdnum.br.cpf", re.compile(r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}")),
    ("codice-fiscale", "stdnum.it.codicefiscale", re.compile(r"[A-Z]{6}[0-9]{2}[A-Z][0-9]{2}[A-Z][0-9]{3}[A-Z]")),
    ("nir", "stdnum.fr.nir", re.compile(r"[12] ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}")),
    ("dni", "stdnum.es.dni", re.compile(r"[0-9]{8}-?[A-HJ-NP-TV-Z]")),
    ("nie", "stdnum.es.nie", re.compile(r"[XYZ]-?[0-9]{7}-?[A-HJ-NP-TV-Z]")),
    ("aadhaar", "stdnum.in_.aadhaar", re.compile(r"[2-9][0-9]{3} [0-9]{4} [0-9]{4}")),
    ("curp", "stdnum.mx.curp", re.compile(r"[A-Z]{4}[0-9]{6}[HM][A-Z]{5}[0-9A-Z][0-9]")),
)
"""(name, module that validates it, how it is written): numbers of people that can be told from
others by check digits or, of the American one, by ranges that are never given out."""
ANY_NATIONAL = "|".join(f"({pattern.pattern})" for _, _, pattern in NATIONAL)
APART = re.compile(rf"(?<![A-Za-z0-9_.+-])(?:{ANY_NATIONAL})(?![A-Za-z0-9_-]|\.[0-9])")


def national_numbers(text: str) -> Iterator[Find]:
    """Yield national numbers of people."""
    for match in APART.finditer(text):
        name, module, _ = NATIONAL[(match.lastindex or 1) - 1]
        if importlib.import_module(module).is_valid(match[0]):
            yield Find(match.start(), match.end(), name)


# ── telephone numbers ────────────────────────────────────────────────────────────────────────────

DIGITS = re.compile(r"(?:\d\W{0,3}){7}")
"""Seven digits close together: the least that a telephone number has."""
SAYS_PHONE = re.compile(r"\b(?:phone|tel|telephone|mobile|cell|fax|whatsapp|call|sms|text)(?: me| us)?(?: at| on)?\W*$")
"""What stands before a telephone number that is written without any separator."""


def phones(text: str, region: str) -> Iterator[Find]:
    """Yield valid telephone numbers, grouped as their country groups them.

    Args:
        text: The text.
        region: As of `find_personal`.
    """
    if not DIGITS.search(text):
        return
    phonenumbers = importlib.import_module("phonenumbers")
    home = None if region == NO_REGION else region
    leniency: Callable = phonenumbers.Leniency.STRICT_GROUPING
    for match in phonenumbers.PhoneNumberMatcher(text, home, leniency=leniency):
        written = match.raw_string
        before = text[max(0, match.start - 30) : match.start].lower()
        # Ten digits in a row are mostly a count or the id of something, and "+ 62426244000" a sum.
        if (written.isdigit() and not SAYS_PHONE.search(before)) or written.startswith("+ "):
            continue
        yield Find(match.start, match.end, "phone")

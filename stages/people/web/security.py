"""Stand before an app: token, cross-site requests, sizes, and headers that let no code run."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response

from stages.people.web.errors import Refused, refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
"""Content security policy: nothing inline, nothing from elsewhere."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address has the token in it
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "X-Frame-Options": "DENY",
}
NEED_ADDRESS = "open the whole address that the server printed, with its token"
LARGEST_BODY = 64 * 1024
"""Bytes of a request's body, where the app says nothing else."""
SAFE = ("GET", "HEAD")


@dataclass(frozen=True)
class Gate:
    """What a request has to show."""

    token: str
    """Token of the address for everybody."""
    lead_token: str | None = None
    """Token of the lead's address; it opens all pages."""
    lead_paths: tuple[str, ...] = ("/lead", "/api/lead")
    """Paths, and what lies below, for the lead alone."""
    bearer_paths: tuple[str, ...] = ()
    """Paths, and what lies below, for programs that send `Authorization: Bearer TOKEN`."""
    open_paths: tuple[str, ...] = ("/api/health",)
    """Paths that need no token."""
    largest_body: int = LARGEST_BODY
    """Bytes of a request's body."""

    @property
    def cookie(self) -> str:
        """Return the name of the session's cookie; two servers on one host have different ones."""
        return f"rlhf_{digest(self.token, 'name')[:12]}"

    @property
    def lead_cookie(self) -> str:
        """Return the name of the cookie of the lead's session."""
        return f"{self.cookie}_lead"

    def is_lead(self, cookies: dict[str, str]) -> bool:
        """Return whether cookies show the lead."""
        if self.lead_token is None:
            return False
        return is_same(cookies.get(self.lead_cookie, ""), digest(self.lead_token, "lead"))

    def is_member(self, cookies: dict[str, str]) -> bool:
        """Return whether cookies show somebody who opened one of the addresses."""
        return is_same(cookies.get(self.cookie, ""), digest(self.token, "page")) or self.is_lead(cookies)


def digest(token: str, purpose: str) -> str:
    """Return what a cookie holds in place of a token."""
    return hmac.new(token.encode(), purpose.encode(), hashlib.sha256).hexdigest()


def is_same(given: str, expected: str) -> bool:
    """Compare two secrets in a time that says nothing about them."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


def is_below(path: str, folders: tuple[str, ...]) -> bool:
    """Return whether a path is one of some, or below it."""
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def cookies_of(headers: Headers) -> dict[str, str]:
    """Return the cookies of a request; none if they cannot be read."""
    try:
        jar: SimpleCookie = SimpleCookie("; ".join(headers.getlist("cookie")))
    except CookieError:
        return {}
    return {name: morsel.value for name, morsel in jar.items()}


def set_cookie(response_headers: MutableHeaders, name: str, value: str) -> None:
    """Set a cookie that scripts cannot read and that other sites cannot make a browser send."""
    year = 365 * 24 * 3600
    response_headers.append("set-cookie", f"{name}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={year}")


class Guard:
    """Let through what a gate allows. An ASGI app around the real one."""

    def __init__(self, app: App, gate: Gate) -> None:
        """Build the guard of an app."""
        self.app, self.gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it to the app."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        new_cookies: dict[str, str] = {}

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    if name not in out:
                        out[name] = value
                for name, value in new_cookies.items():
                    set_cookie(out, name, value)
            await send(message)

        try:
            new_cookies.update(self.check(scope["method"], scope["path"], scope["query_string"], headers))
        except Refused as error:
            await self.refuse(error, scope["path"])(scope, receive, send_safely)
            return
        await self.app(scope, limited(receive, self.gate.largest_body), send_safely)

    def refuse(self, error: Refused, path: str) -> Response:
        """Return the answer to a refused request: JSON, or text where a person opened a page."""
        if path.startswith(("/api/", "/v1/")):
            return refusal(error.status, error.sentence, **error.more)
        return PlainTextResponse(f"{error.sentence}\n", error.status)

    def check(self, method: str, path: str, query: bytes, headers: Headers) -> dict[str, str]:
        """Check a request before its body is read.

        Returns:
            Cookies to set: those of a session that begins with this request.

        Raises:
            Refused: It lacks a token, comes from another site, or is too large.
        """
        gate = self.gate
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:12]) > gate.largest_body:
            raise Refused(413, f"the request has more than {gate.largest_body:,} bytes; send less")
        if is_below(path, gate.open_paths):
            return {}
        if is_below(path, gate.bearer_paths):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not is_same(given.strip(), gate.token):
                raise Refused(401, "send the token as `Authorization: Bearer TOKEN`", need="token")
            return {}
        if method not in SAFE:
            check_site(headers)
        for_lead = is_below(path, gate.lead_paths)
        if method == "GET" and (begun := self.begin(path, query, for_lead)):
            return begun
        cookies = cookies_of(headers)
        if not gate.is_member(cookies):
            raise Refused(401, f"no session; {NEED_ADDRESS}", need="token")
        if for_lead and not gate.is_lead(cookies):
            raise Refused(403, "this page is the lead's; open the lead's address, which the server printed too")
        return {}

    def begin(self, path: str, query: bytes, for_lead: bool) -> dict[str, str]:
        """Return the cookies of the session that an address begins; none without a token.

        Raises:
            Refused: The token is wrong.
        """
        given = parse_qs(query.decode("latin-1")).get("token", [])
        if not given or path not in ("/", *self.gate.lead_paths):
            return {}
        gate = self.gate
        if gate.lead_token is not None and is_same(given[0], gate.lead_token):
            return {gate.lead_cookie: digest(gate.lead_token, "lead")}
        if is_same(given[0], gate.token) and not for_lead:
            return {gate.cookie: digest(gate.token, "page")}
        raise Refused(401, f"this token is not valid (any more); {NEED_ADDRESS}", need="token")


def check_site(headers: Headers) -> None:
    """Raise Refused if a request that changes something may come from a page of another site."""
    if headers.get("x-rlhf") != "1":
        raise Refused(403, "the header X-RLHF is missing; use the page itself")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Refused(403, "the request comes from another site")
    origin = headers.get("origin")
    # Hosts are compared and schemes are not: a proxy in front may have added TLS.
    if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
        raise Refused(403, "the request comes from another site")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(403, "the request is not JSON; use the page itself")


def limited(receive: Receive, most: int) -> Receive:
    """Return what reads a request's body, and refuses it beyond a size that no header announced."""
    seen = 0

    async def read() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > most:
                raise Refused(413, f"the request has more than {most:,} bytes; send less")
        return message

    return read

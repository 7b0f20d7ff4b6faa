"""Answer the requests of the playground's page: questions, and what people say of the answers."""

import hashlib
import json
import secrets
import sqlite3
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route

from stages.people.playground import collect, openai
from stages.people.playground.engine import Busy, Engine, Failed, Options, Piece, Question, Reply, Waiting
from stages.people.playground.requests import BadField, Defaults, messages_of, options_of
from stages.people.playground.waiting import ALIVE, EventStream, Limits, TooMany, Wait
from stages.people.store.database import Database
from stages.people.web.errors import HANDLERS, Refused, endpoint, number_of, parse_body, text_of
from stages.people.web.security import Gate, Guard, set_cookie

PAGES = Path(__file__).with_name("pages")
SHARED = PAGES.parent.parent / "rank" / "pages"
FILES = {
    "base.css": (SHARED / "base.css", "text/css"),  # the ranking page's colours and buttons
    "playground.css": (PAGES / "playground.css", "text/css"),
    "playground.js": (PAGES / "playground.js", "text/javascript"),
    "talk.js": (PAGES / "talk.js", "text/javascript"),
    "answer.js": (PAGES / "answer.js", "text/javascript"),
    "dom.js": (PAGES / "dom.js", "text/javascript"),
    "text.js": (SHARED / "text.js", "text/javascript"),  # shows what is invisible in a text
}
"""What the page loads; no name of a file comes from a request."""
LARGEST_BODY = 512 * 1024
"""Bytes of a request: a conversation that is not kept travels with each question."""
LONGEST = 50_000
"""Characters of a question, a correction or a system message."""
MOST_HIDDEN = 1000
"""Blind answers, of conversations that are not kept, whose names are remembered."""
Find = Callable[[sqlite3.Connection, int, str], sqlite3.Row]
"""Returns a person's conversation or answer."""
PERSON = "rlhf_person"
"""Cookie with the random key that a person's number is made from."""


@dataclass
class State:
    """Hold what the routes share."""

    engine: Engine
    """Answers questions."""
    database: Database
    """Keeps what people agree to share."""
    gate: Gate
    """What a request has to show."""
    defaults: Defaults
    """How answers are sampled where the page says nothing."""
    limits: Limits
    """Counts the open requests of each person."""
    experiment: str
    """The experiment's name."""
    is_scored: bool
    """Whether there is a reward model."""
    consent: str
    """The text that a person agrees to."""
    kinds: list[str]
    """What a person can say a conversation is for."""
    hidden: OrderedDict[str, dict[str, Any]] = field(default_factory=OrderedDict)
    """Key → the names behind blind answers that are not kept."""


@dataclass(frozen=True)
class Asked:
    """A question as the page sends it."""

    text: str
    """The question."""
    policies: tuple[str, ...]
    """Who answers, in the order of the sides."""
    options: Options
    """How the answers are sampled."""
    system: str
    """The system message; "" for none."""
    kind: str | None
    """What the conversation is for."""
    blind: bool
    """Whether names and scores are hidden until the person has chosen."""
    scored: bool
    """Whether the reward model scores the answers."""
    keep: bool
    """Whether the person agrees that the conversation is kept."""
    conversation: int | None
    """The conversation that is kept; None for a new one."""
    after: int | None
    """The answer that the question follows, in a conversation that is kept."""
    corrected: bool
    """Whether that answer is read as the person corrected it."""
    history: tuple[dict[str, str], ...]
    """The turns before, in a conversation that is not kept."""


def make_app(state: State, api: openai.Api) -> Starlette:
    """Return the ASGI app: the page behind its gate, and the interface for programs beside it."""
    page = Starlette(routes=routes(state), exception_handlers=HANDLERS)
    return Starlette(routes=[Mount("/v1", openai.routes(api)), Mount("/", Guard(page, state.gate))])


def routes(state: State) -> list[Route]:
    """Return the routes of the page."""

    def file(path: Path, kind: str) -> Any:
        async def answer(_: Request) -> Response:
            return FileResponse(path, media_type=f"{kind}; charset=utf-8")

        return answer

    def setup(request: Request, _: dict[str, Any]) -> Response:
        is_known = bool(request.cookies.get(PERSON))
        with state.database.read() as connection:
            kept = collect.count(connection, person_of(request)) if is_known else 0
        response = JSONResponse({**setup_of(state), "kept": kept})
        if not is_known:
            set_cookie(response.headers, PERSON, secrets.token_urlsafe(18))
        return response

    async def ask(request: Request) -> Response | EventStream:
        return await answer_question(state, request)

    def choose(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        conversation, seq = number_of(body, "conversation", 1, 2**53), number_of(body, "seq", 0, 2**53)
        tiers = tiers_of(body.get("tiers"))
        with state.database.transaction() as connection:
            own(collect.own_conversation, connection, conversation, request)
            try:
                answers = collect.choose(connection, conversation, seq, tiers)
            except collect.NotThere as error:
                raise Refused(400, f"tiers: {error}") from None
        return {"answers": answers}

    def reveal(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        hidden = state.hidden.get(text_of(body, "key", 100))
        if hidden is None:
            raise Refused(404, "these answers are too old; ask again")
        return hidden

    def thumb(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        up = body.get("up")
        if up is not None and type(up) is not bool:
            raise Refused(400, "up: use true, false or null")
        with state.database.transaction() as connection:
            own(collect.own_answer, connection, request.path_params["id"], request)
            collect.set_thumb(connection, request.path_params["id"], up)
        return {"up": up}

    def correct(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        text = text_of(body, "text", LONGEST, default="")
        with state.database.transaction() as connection:
            own(collect.own_answer, connection, request.path_params["id"], request)
            collect.set_correction(connection, request.path_params["id"], text)
        return {"text": text}

    def forget(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        with state.database.transaction() as connection:
            own(collect.own_conversation, connection, request.path_params["id"], request)
            collect.delete(connection, request.path_params["id"])
        return {"ok": True}

    def forget_all(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        with state.database.transaction() as connection:
            return {"deleted": collect.delete_all(connection, person_of(request))}

    def health(_: Request, __: dict[str, Any]) -> dict[str, Any]:
        return {"ok": True}

    return [
        Route("/", file(PAGES / "index.html", "text/html")),
        *(Route(f"/static/{name}", file(path, kind)) for name, (path, kind) in FILES.items()),
        Route("/api/health", endpoint(health)),
        Route("/api/setup", endpoint(setup)),
        Route("/api/ask", ask, methods=["POST"]),
        Route("/api/choices", endpoint(choose), methods=["POST"]),
        Route("/api/reveal", endpoint(reveal), methods=["POST"]),
        Route("/api/answers/{id:int}/thumb", endpoint(thumb), methods=["POST"]),
        Route("/api/answers/{id:int}/correction", endpoint(correct), methods=["POST"]),
        Route("/api/conversations/delete", endpoint(forget_all), methods=["POST"]),
        Route("/api/conversations/{id:int}/delete", endpoint(forget), methods=["POST"]),
    ]


def setup_of(state: State) -> dict[str, Any]:
    """Return what the page shows before anything is asked."""
    defaults = state.defaults
    return {
        "experiment": state.experiment,
        "policies": state.engine.policies,
        "scored": state.is_scored,
        "consent": state.consent,
        "kinds": state.kinds,
        "defaults": {
            "temperature": defaults.temperature,
            "top_p": defaults.top_p,
            "top_k": defaults.top_k,
            "max_tokens": defaults.max_tokens,
        },
        "max_tokens_limit": defaults.max_tokens_limit,
        "longest": LONGEST,
    }


# -- who asks ------------------------------------------------------------------------------------


def person_of(request: Request) -> str:
    """Return the number of the person whose browser sent a request: nobody can be found by it.

    Raises:
        Refused: The browser has no key yet.
    """
    key = request.cookies.get(PERSON, "")
    if not key:
        raise Refused(401, "the browser sent no key; allow cookies for this page and reload it", need="person")
    return "u" + hashlib.sha256(f"playground {key}".encode()).hexdigest()[:10]


def own(find: Find, connection: sqlite3.Connection, number: int, request: Request) -> sqlite3.Row:
    """Return what `find` finds of the person who sent a request, by its number.

    Raises:
        Refused: There is none, or it is somebody else's.
    """
    try:
        return find(connection, number, person_of(request))
    except (collect.NotThere, OverflowError) as error:
        raise Refused(404, str(error)) from None


# -- questions -----------------------------------------------------------------------------------


def read_asked(state: State, body: dict[str, Any]) -> Asked:
    """Return the question in a request.

    Raises:
        Refused: Something in it is wrong.
        BadField: A number or the history is wrong.
    """
    policies = body.get("policies")
    if not isinstance(policies, list) or not policies or not all(isinstance(name, str) for name in policies):
        raise Refused(400, "policies: choose who answers")
    unknown = [name for name in policies if name not in state.engine.policies]
    if unknown or len(set(policies)) < len(policies):
        raise Refused(400, f"policies: use {', '.join(state.engine.policies)}, each once; reload the page")
    kind = body.get("kind")
    if kind is not None and kind not in state.kinds:
        raise Refused(400, "kind: is not one of the list; reload the page")
    flags = {}
    for key in ("blind", "scored", "consent", "corrected"):
        flags[key] = body.get(key, False)
        if type(flags[key]) is not bool:
            raise Refused(400, f"{key}: use true or false")
    is_kept = body.get("conversation") is not None
    blind = flags["blind"] and len(policies) > 1
    if blind:
        secrets.SystemRandom().shuffle(policies)
    text = text_of(body, "text", LONGEST)
    history = body.get("history") or []
    if history and not flags["consent"]:
        history = messages_of([*history, {"role": "user", "content": text}])[:-1]
    return Asked(
        text=text,
        policies=tuple(policies),
        options=options_of({**body, "stop": None}, state.defaults),
        system=text_of(body, "system", LONGEST, default=""),
        kind=kind,
        blind=blind,
        scored=flags["scored"] and state.is_scored,
        keep=flags["consent"],
        conversation=number_of(body, "conversation", 1, 2**53) if is_kept else None,
        after=number_of(body, "after", 1, 2**53) if body.get("after") is not None else None,
        corrected=flags["corrected"],
        history=() if flags["consent"] else tuple(history),
    )


def turns_before(state: State, asked: Asked, request: Request) -> tuple[str, list[dict[str, str]]]:
    """Return the system message and the turns before a question.

    Those of a conversation that is kept come from the database: the page cannot change them.

    Raises:
        Refused: The conversation or the answer is not there, or the answer is empty.
    """
    system, history = asked.system, list(asked.history)
    if asked.keep and asked.conversation is not None:
        with state.database.read() as connection:
            conversation = own(collect.own_conversation, connection, asked.conversation, request)
            try:
                history = collect.Tree(connection, conversation).history(asked.after, asked.corrected)
            except collect.NotThere as error:
                raise Refused(404, str(error)) from None
            system = conversation["system"]
    if any(not message["content"].strip() for message in history):
        raise Refused(400, "the answer to go on with is empty; choose another one, correct it, or ask again")
    return system, history


def keep_question(state: State, asked: Asked, person: str) -> collect.Place:
    """Write a question of a conversation that is kept; the first one begins the conversation."""
    with state.database.transaction() as connection:
        conversation = asked.conversation
        if conversation is None:
            conversation = collect.begin(connection, person, asked.system, asked.kind, state.consent)
        return collect.add_question(connection, conversation, asked.text, asked.after, asked.corrected, asked.blind)


async def answer_question(state: State, request: Request) -> Response | EventStream:
    """Answer POST /api/ask with server-sent events.

    Each event is an object with `type`: start, waiting, piece, answer, failed, end; `side` says
    whose it is.
    """
    try:
        asked = read_asked(state, parse_body(await request.body()))
    except BadField as error:
        raise Refused(400, str(error)) from None
    person = person_of(request)
    try:
        state.limits.enter(person)
    except TooMany as error:
        return busy(429, str(error), 1)
    wait: Wait | None = None
    handed_on = False

    def at_end() -> None:
        if wait is not None:
            wait.cancel()
        state.limits.leave(person)

    try:
        system, history = await run_in_threadpool(turns_before, state, asked, request)
        first = [{"role": "system", "content": system}] if system else []
        messages = (*first, *history, {"role": "user", "content": asked.text})
        questions = [Question(name, messages, asked.options, True, asked.scored) for name in asked.policies]
        wait = Wait(state.engine, questions)
        place = await run_in_threadpool(keep_question, state, asked, person) if asked.keep else None
        handed_on = True
        return EventStream(stream(state, asked, wait, place), at_end)
    except Busy as error:
        return busy(503, str(error), error.retry_after)
    finally:
        if not handed_on:
            at_end()


def busy(status: int, sentence: str, seconds: int) -> Response:
    """Return the answer to a request that should be made again later."""
    return JSONResponse(
        {"error": sentence, "retry_after": seconds}, status_code=status, headers={"Retry-After": str(seconds)}
    )


async def stream(state: State, asked: Asked, wait: Wait, place: collect.Place | None) -> AsyncIterator[str]:
    """Yield the events of a question's answers. An answer is kept before it is said to be whole."""
    names = None if asked.blind else list(asked.policies)
    about = {} if place is None else {"conversation": place.conversation, "seq": place.seq + 1}
    yield line_of({"type": "start", "names": names, "sides": len(asked.policies), "seed": asked.options.seed, **about})
    scores: list[float | None] = [None] * len(asked.policies)
    while wait.left:
        if (found := await wait.next(ALIVE)) is None:
            yield ": waiting\n\n"
            continue
        side, event = found
        if isinstance(event, Waiting):
            yield line_of({"type": "waiting", "side": side, "ahead": event.ahead})
        elif isinstance(event, Piece):
            yield line_of({"type": "piece", "side": side, "text": event.text})
        elif isinstance(event, Failed):
            yield line_of({"type": "failed", "side": side, "sentence": event.sentence})
        else:
            scores[side] = event.score
            try:
                turn = await run_in_threadpool(keep_answer, state, asked, place, side, event)
            except sqlite3.Error as error:
                yield line_of({"type": "failed", "side": side, "sentence": f"the answer could not be kept ({error})"})
                continue
            yield line_of(answer_of(asked, side, event, turn))
    key = None
    if asked.blind and place is None:
        key = secrets.token_urlsafe(12)
        state.hidden[key] = {
            "answers": [{"model": name, "score": score} for name, score in zip(asked.policies, scores, strict=True)]
        }
        while len(state.hidden) > MOST_HIDDEN:
            state.hidden.popitem(last=False)
    yield line_of({"type": "end", "key": key})


def keep_answer(state: State, asked: Asked, place: collect.Place | None, side: int, reply: Reply) -> int | None:
    """Write an answer of a conversation that is kept; return its number, None of another one."""
    if place is None:
        return None
    with state.database.transaction() as connection:
        return collect.add_answer(connection, place, side, asked.policies[side], asked.options, reply)


def answer_of(asked: Asked, side: int, reply: Reply, turn: int | None) -> dict[str, Any]:
    """Return the event of a whole answer; of a blind one without its score."""
    return {
        "type": "answer",
        "side": side,
        "id": turn,
        "text": reply.text,
        "finished": reply.finished,
        "tokens": reply.tokens,
        "score": None if asked.blind else reply.score,
        "forgotten": reply.forgotten,
    }


def tiers_of(value: Any) -> list[list[int]]:
    """Return the tiers in a request.

    Raises:
        Refused: They are not lists of numbers.
    """
    if not isinstance(value, list) or not all(isinstance(tier, list) for tier in value):
        raise Refused(400, "tiers: use lists of answers, the best first")
    if not all(type(answer) is int for tier in value for answer in tier):
        raise Refused(400, "tiers: use the numbers of answers")
    return value


def line_of(event: Mapping[str, Any]) -> str:
    """Return an object as a server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"

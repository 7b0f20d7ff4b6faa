"""Answer the requests of the ranking page."""

import sqlite3
import time
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from stages.people.rank import assign, lead_app, moves
from stages.people.rank.rules import LETTERS
from stages.people.rank.state import RankState
from stages.people.store.rows import Assignment, Labeler, read_task
from stages.people.web.errors import HANDLERS, Handler, Refused, endpoint, number_of, text_of
from stages.people.web.security import Guard, set_cookie

PAGES = Path(__file__).with_name("pages")
OPENING = 200
"""Characters of a prompt in the list of the last tasks."""


def make_app(state: RankState, folder: Path = PAGES) -> Guard:
    """Return the ASGI app of a ranking page, behind its gate.

    Args:
        state: What the routes share.
        folder: The pages, their style and scripts.
    """
    pages = [Route("/", page(folder / "index.html"), methods=["GET"]), Mount("/static", StaticFiles(directory=folder))]
    if has_lead_page(folder):
        pages.insert(1, Route("/lead", page(folder / "lead.html"), methods=["GET"]))
    app = Starlette(routes=[*pages, *routes(state), *lead_app.routes(state)], exception_handlers=HANDLERS)
    return Guard(app, state.gate)


def has_lead_page(folder: Path = PAGES) -> bool:
    """Return whether there is a page for the lead; its routes below /api/lead are there anyway."""
    return (folder / "lead.html").is_file()


def page(path: Path) -> Any:
    """Return what answers with a page."""

    async def answer(_: Request) -> Response:
        return FileResponse(path, media_type="text/html; charset=utf-8")

    return answer


def routes(state: RankState) -> list[Route]:
    """Return the routes of the labelers' page."""

    def post(path: str, handler: Handler) -> Route:
        return Route(path, endpoint(handler), methods=["POST"])

    def get(path: str, handler: Handler) -> Route:
        return Route(path, endpoint(handler), methods=["GET"])

    def health(_: Request, __: dict[str, Any]) -> dict[str, Any]:
        return {"ok": True}

    def join(request: Request, body: dict[str, Any]) -> Response:
        with state.database.transaction() as connection:
            labeler, key = moves.join(connection, body, state.clock())
        return with_labeler_cookie(state, {"labeler": about(labeler), "key": key}, key)

    def session(request: Request, body: dict[str, Any]) -> Response:
        key = text_of(body, "key", 100)
        with state.database.read() as connection:
            labeler = moves.find_labeler(connection, key, status=404)
        return with_labeler_cookie(state, {"labeler": about(labeler)}, key)

    def next_task(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        with state.database.transaction() as connection:
            return view_next(connection, state, labeler_of(connection, request, state))

    def move(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        with state.database.transaction() as connection:
            labeler = labeler_of(connection, request, state)
            return moves.make_move(connection, labeler, id_in(request), body, state.clock())

    def submit(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        with state.database.transaction() as connection:
            labeler = labeler_of(connection, request, state)
            moves.submit(connection, labeler, id_in(request), body, state.rules, state.clock())
            return {"ok": True, "next": view_next(connection, state, labeler)}

    def skip(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        with state.database.transaction() as connection:
            labeler = labeler_of(connection, request, state)
            moves.skip(connection, labeler, id_in(request), body, state.rules, state.clock())
            return {"ok": True, "next": view_next(connection, state, labeler)}

    def reopen(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        with state.database.transaction() as connection:
            labeler = labeler_of(connection, request, state)
            moves.reopen(connection, labeler, id_in(request), state.clock())
            return {"assignment": view(connection, state, assign.read(connection, id_in(request)))}

    def history(request: Request, _: dict[str, Any]) -> dict[str, Any]:
        text = request.query_params.get("limit", str(moves.HISTORY))
        limit = number_of({"limit": int(text) if text.isdecimal() else None}, "limit", 1, moves.HISTORY)
        with state.database.read() as connection:
            labeler = labeler_of(connection, request, state)
            return {"items": [item(connection, row) for row in moves.closed(connection, labeler, limit)]}

    def guidelines(_: Request, __: dict[str, Any]) -> dict[str, Any]:
        return {"markdown": state.rules.guidelines, "digest": state.rules.guidelines_digest}

    return [
        get("/api/health", health),
        post("/api/labelers", join),
        post("/api/session", session),
        get("/api/next", next_task),
        post("/api/assignments/{id:int}/moves", move),
        post("/api/assignments/{id:int}/submit", submit),
        post("/api/assignments/{id:int}/skip", skip),
        post("/api/assignments/{id:int}/reopen", reopen),
        get("/api/history", history),
        get("/api/guidelines", guidelines),
    ]


# -- who asks ------------------------------------------------------------------------------------


def labeler_cookie(state: RankState) -> str:
    """Return the name of the cookie with a labeler's key."""
    return f"{state.gate.cookie}_labeler"


def with_labeler_cookie(state: RankState, content: dict[str, Any], key: str) -> Response:
    """Return an answer that also keeps a labeler's key in the browser."""
    response = JSONResponse(content)
    set_cookie(response.headers, labeler_cookie(state), key)
    return response


def labeler_of(connection: sqlite3.Connection, request: Request, state: RankState) -> Labeler:
    """Return the labeler whose browser sent a request.

    Raises:
        Refused: Nobody has joined from there.
    """
    return moves.find_labeler(connection, request.cookies.get(labeler_cookie(state), ""))


def id_in(request: Request) -> int:
    """Return the id in the path.

    Raises:
        Refused: There can be no row with it.
    """
    number = request.path_params["id"]
    if number >= 2**63:
        raise Refused(404, "there is nothing here")
    return int(number)


# -- what a page shows ---------------------------------------------------------------------------


def about(labeler: Labeler) -> dict[str, Any]:
    """Return what a page shows of a labeler."""
    return {"id": labeler.id, "code": labeler.code, "name": labeler.name}


def view_next(connection: sqlite3.Connection, state: RankState, labeler: Labeler) -> dict[str, Any]:
    """Return the labeler's next assignment and progress, as the page shows them."""
    now = state.clock()
    found, left = assign.next_assignment(connection, labeler, state.rules, now)
    today = time.localtime(now)
    day_began = time.mktime((today.tm_year, today.tm_mon, today.tm_mday, 0, 0, 0, 0, 0, -1))
    return {
        "labeler": about(labeler),
        "assignment": None if found is None else view(connection, state, found),
        "progress": moves.progress(connection, labeler, state.rules, left, now, day_began),
    }


def view(connection: sqlite3.Connection, state: RankState, assignment: Assignment) -> dict[str, Any]:
    """Return an assignment as its labeler sees it: without models, reasons and known answers."""
    task, rules = read_task(connection, assignment.task_id), state.rules
    texts = {answer.id: answer for answer in task.answers}
    prompt = [{"role": "user", "content": task.prompt}] if isinstance(task.prompt, str) else task.prompt
    verdict = connection.execute(
        "SELECT sent_back, message FROM verdicts WHERE assignment_id = ?", (assignment.id,)
    ).fetchone()
    was_sent_back = verdict is not None and bool(verdict["sent_back"])
    answers = [
        {"id": answer, "label": LETTERS[number], "text": texts[answer].text, "finished": texts[answer].finished}
        for number, answer in enumerate(assignment.order_shown)
    ]
    flags = [{"name": flag.name, "question": flag.question} for flag in rules.flags]
    return {
        "id": assignment.id,
        "number": assignment.number,
        "task": {"prompt": prompt, "kind": task.kind},
        "answers": answers,
        "steps": {"likert": rules.likert, "flags": flags if rules.likert else []},
        "guidelines_digest": rules.guidelines_digest,
        "reopened": verdict is not None,
        "sent_back": was_sent_back,
        "message": verdict["message"] if was_sent_back else "",
        **moves.state_of(moves.read_moves(connection, assignment.id), assignment),
    }


def item(connection: sqlite3.Connection, row: sqlite3.Row) -> dict[str, Any]:
    """Return a closed assignment as the list of the last ones shows it."""
    prompt = read_task(connection, row["task_id"]).prompt
    last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return {
        "assignment": row["id"],
        "number": row["number"],
        "opening": last[:OPENING],
        "state": row["state"],
        "message": row["message"] or "" if row["state"] == "sent_back" else "",
        "made": row["closed"],
        "seconds": row["seconds"],
    }

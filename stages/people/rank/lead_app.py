"""Answer the requests of the lead's page."""

from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from stages.people.rank import lead
from stages.people.rank.state import RankState
from stages.people.web.errors import endpoint, text_of


def routes(state: RankState) -> list[Route]:
    """Return the routes of the lead's page; the gate lets nobody else in."""

    def judge(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        decision = text_of(body, "decision", 20)
        with state.database.transaction() as connection:
            lead.judge(connection, request.path_params["id"], decision)
        return {"ok": True}

    def labeler(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        wanted = text_of(body, "state", 20)
        with state.database.transaction() as connection:
            lead.set_labeler(connection, request.path_params["id"], wanted)
        return {"ok": True}

    return [
        Route("/api/lead/verdicts/{id:int}", endpoint(judge), methods=["POST"]),
        Route("/api/lead/labelers/{id:int}", endpoint(labeler), methods=["POST"]),
    ]

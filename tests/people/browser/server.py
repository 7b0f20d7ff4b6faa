"""Serve a ranking page with tasks of the tests: `python server.py FOLDER PORT`.

The folder holds options.json, and keeps the database, so that the next server goes on where a
killed one stopped.
"""

import json
import sys
import time
from pathlib import Path

from stages.people.rank.app import make_app
from stages.people.rank.rules import Flag, Rules
from stages.people.rank.state import RankState
from stages.people.rank.tasks import Given, NewTask, add_task
from stages.people.store.database import open_database
from stages.people.web.security import Gate
from stages.people.web.serving import bind, serve

TOKEN, LEAD_TOKEN = "token-of-the-page-in-this-test", "token-of-the-lead-in-this-test"
GUIDELINES = "# Guidelines\n\nBe **fair**. `Equal` answers share a place.\n\n- helpful\n- honest\n- harmless\n"
FLAGS = (Flag("made_up", "Does it make something up?"), Flag("rude", "Is it rude?"))


def main(folder: str, port: str) -> int:
    """Serve until a signal comes."""
    chosen = json.loads((Path(folder) / "options.json").read_text(encoding="utf-8"))
    database = open_database(Path(folder), "browser")
    with database.transaction() as connection:
        for prompt, answers in chosen.get("tasks", []):
            task = NewTask(prompt, tuple(Given(text, model="sft") for text in answers))
            add_task(connection, task, time.time())
    likert = chosen.get("likert", False)
    rules = Rules(
        overlap=chosen.get("overlap", 0.0),
        repeat=0.0,
        known_share=0.0,
        likert=likert,
        flags=FLAGS if likert else (),
        break_every=chosen.get("break_every", 2700.0),
        guidelines=chosen.get("guidelines", GUIDELINES),
        guidelines_digest=chosen.get("digest", "0" * 16),
    )
    app = make_app(RankState("browser", database, rules, Gate(TOKEN, LEAD_TOKEN)))
    return serve(app, bind("127.0.0.1", int(port), "rank"), lambda: print("serving", flush=True))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Serve a playground whose policies need no model: python server.py FOLDER OPTIONS.

`slow N …` answers N words, twenty a second; `error` fails; anything else is answered at once. What
is stopped before its end is noted in FOLDER/stopped.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

from stages.people.playground import answering, command
from stages.people.playground.engine import Cancelled, Piece, Reply
from tests.people.playground.experiments import experiment_of


def make_answerer(name, folder):
    """Return a policy that says its name and the question, or what its question asks for."""

    def answer(question, emit, poll):
        text = question.messages[-1]["content"]
        words = f"{name} says : {text}".split(" ")
        if text.startswith("slow"):
            words = [f"word{n}" for n in range(int(text.split()[1]))]
        if text == "error":
            raise ZeroDivisionError
        for n, word in enumerate(words):
            try:
                poll()
            except Cancelled:
                with (folder / "stopped").open("a") as file:
                    file.write(f"{name} {n}\n")
                raise
            emit(Piece(word if n == 0 else f" {word}"))
            if text.startswith("slow"):
                time.sleep(0.05)
        score = len(name) + 0.25 if question.scored else None
        return Reply(" ".join(words), True, len(words), 3, score, 0)

    return answer


def main(folder, options):
    """Serve until a signal comes."""
    names = options.pop("names", ["sft", "ppo"])
    new_tokens = options.pop("new_tokens", False)
    answerers = {name: make_answerer(name, folder) for name in names}
    answering.chosen_policies = lambda _, store: dict.fromkeys(names, folder)
    answering.load = lambda *_: answering.Loaded(answerers, dict.fromkeys(names, "cpu"), True, lambda: None)
    store = SimpleNamespace(base=folder, manifest=lambda name: None)
    return command.run(experiment_of(**options), store, Console(width=200), new_tokens=new_tokens)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))

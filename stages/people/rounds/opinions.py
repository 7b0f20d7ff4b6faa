"""Let simulated labelers form an opinion of what the page shows: pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.streams import derive_seed
from data.world.world import World, labelers

Assignment = dict[str, Any]
"""An assignment as `GET /api/next` gives it."""
MOST_STARS = 7
"""The best rating of one answer alone; 1 is the worst."""


@dataclass(frozen=True)
class Opinion:
    """What a labeler thinks of the answers to a prompt, in the order in which they are shown."""

    ranks: tuple[int | None, ...] = ()
    """Competition ranks, 1 for the best (1, 2, 2, 4); None: cannot be judged."""
    ratings: tuple[int, ...] = ()
    """How good each answer is alone, 1 to 7."""
    skipped: str = ""
    """Why the labeler cannot rank them at all; "" if the labeler can."""


@dataclass(frozen=True)
class SimulatedLabeler:
    """A labeler of the embedded world."""

    world: World
    """The world, which knows how good an answer is."""
    taste: int
    """Whose weights and biases it has: an index of `labelers.LABELERS`."""
    name: str
    """What its noise is drawn by; two labelers of one taste have different ones."""
    noise: float
    """The temperature of its noise."""
    seed: int
    """The experiment's seed."""

    def judge(self, assignment: Assignment) -> Opinion:
        """Return what it thinks of the answers of an assignment.

        It ranks as the stage rankings simulates it. The noise is drawn by the running number of the
        assignment: a task that comes a second time is judged anew, and one that is resumed is not.
        """
        prompt = prompt_of(assignment)
        if prompt is None or not self.world.knows(prompt):
            return Opinion(skipped="not a request of the embedded world")
        shown = sorted(assignment["answers"], key=id_of)  # what is drawn does not depend on the order shown
        texts, finished = [one["text"] for one in shown], [one["finished"] for one in shown]
        utilities = self.world.labeler_utilities(prompt, texts, finished)[self.taste]
        rng = np.random.default_rng(derive_seed(self.seed, "simulated", self.name, assignment["number"]))
        ranks = labelers.rank(utilities, self.noise, rng, list(zip(texts, finished, strict=True)))
        place = {one["id"]: number for number, one in enumerate(shown)}
        order = [place[one["id"]] for one in assignment["answers"]]
        ratings = [stars(float(utilities[i])) for i in order]
        return Opinion(tuple(int(ranks[i]) for i in order), tuple(ratings))


def names_of(count: int) -> list[str]:
    """Return names of simulated labelers: the world's five, then their doubles ada-2, ben-2, …"""
    found = []
    for number in range(count):
        turn, taste = divmod(number, len(labelers.LABELERS))
        found.append(labelers.LABELERS[taste].name + (f"-{turn + 1}" if turn else ""))
    return found


def prompt_of(assignment: Assignment) -> str | None:
    """Return the request that an assignment shows; None for a conversation of several turns."""
    messages = assignment["task"]["prompt"]
    if len(messages) != 1 or messages[0]["role"] != "user":
        return None
    return messages[0]["content"]


def id_of(answer: dict[str, Any]) -> int:
    """Return the id of an answer."""
    return answer["id"]


def stars(utility: float) -> int:
    """Return a rating from 1 to 7 of a utility, which lies about [0, 1]."""
    return 1 + round((MOST_STARS - 1) * min(1.0, max(0.0, utility)))


# -- what to do about it -------------------------------------------------------------------------


def next_move(draft: dict[str, Any], assignment: Assignment, opinion: Opinion) -> tuple[str, dict[str, Any]] | None:
    """Return the next move on the way from a draft to an opinion; None if it is there.

    Answers are rated where the page asks for it, then placed in the order in which they are shown.

    Args:
        draft: The draft as the server has it.
        assignment: The assignment.
        opinion: What the labeler thinks; not one that skips.

    Returns:
        The kind of the move and its body.
    """
    ids = [answer["id"] for answer in assignment["answers"]]
    if assignment["steps"]["likert"]:
        for answer, rating, rank in zip(ids, opinion.ratings, opinion.ranks, strict=True):
            given = draft["likert"].get(str(answer), {}).get("overall")
            if rank is not None and given != rating:
                return "likert", {"answer": answer, "overall": rating}
    slots = {answer: number for number, tier in enumerate(draft["tiers"]) for answer in tier}
    for answer, rank in zip(ids, opinion.ranks, strict=True):
        if rank is None:
            if answer not in draft["set_aside"]:
                return "aside", {"answer": answer}
        elif slots.get(answer) != rank - 1:
            return placing(answer, rank, ids, opinion.ranks, slots)
    return None


def placing(
    answer: int, rank: int, ids: Sequence[int], ranks: Sequence[int | None], slots: dict[int, int]
) -> tuple[str, dict[str, Any]]:
    """Return the move that places an answer, as "same as" one that ties with it and is there."""
    for other, other_rank in zip(ids, ranks, strict=True):
        if other != answer and other_rank == rank and slots.get(other) == rank - 1:
            return "same", {"answer": answer, "as": other}
    return "place", {"answer": answer, "tier": rank - 1}

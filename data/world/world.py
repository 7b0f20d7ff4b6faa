"""Build the embedded world: a small English with facts, moods and manners, and all data made of it.

`World.build(seed)` gives documents, demonstrations, prompts and evaluation prompts (JSON-ready
rows), the same ones for the same seed. `World.gold(prompt, response)` scores a response, and
`World.labeler_utilities(...)` is what five simulated labelers think of K of them. `to_json` and
`from_json` carry all of it through `world.json`.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data.world import gold as world_gold
from data.world import labelers
from data.world import text as world_text
from data.world import writers as world_writers
from data.world.grammar import Language, Task
from data.world.tasks import Shares, divide, spread_evenly
from data.world.writers import MIXTURE, Rates


@dataclass(frozen=True)
class Sizes:
    """Say how many rows each kind of data has."""

    documents: int = 15_000
    """Documents of the corpus."""
    demonstrations: int = 1_500
    """Demonstrations."""
    prompts: int = 2_000
    """Prompts for rankings and PPO."""
    evaluation_prompts: int = 400
    """Prompts for the held-out evaluation."""


class World:
    """Hold a seed, sizes, error rates and a language; everything else follows from them."""

    def __init__(self, seed: int, sizes: Sizes, rates: Rates, tables: dict):
        self.seed, self.sizes, self.rates = seed, sizes, rates
        self.language = Language(tables)
        self._requests = self.language.requests()

    @classmethod
    def build(cls, seed: int = 0, sizes: Sizes | None = None, rates: Rates | None = None, **overrides: Any) -> World:
        """Build a world from its seed.

        Args:
            seed: What everything is drawn from.
            sizes: Rows of each kind of data.
            rates: How often writers go wrong.
            overrides: Fields of `Sizes` (documents=…) or of `Rates` (false_fact=…).

        Raises:
            ValueError: An override is a field of neither.
        """
        size_fields, rate_fields = asdict(sizes or Sizes()), asdict(rates or Rates())
        for name, value in overrides.items():
            if name in size_fields:
                size_fields[name] = value
            elif name in rate_fields:
                rate_fields[name] = value
            else:
                known = ", ".join((*size_fields, *rate_fields))
                raise ValueError(f"{name}: no such size or rate; there are {known}")
        return cls(seed, Sizes(**size_fields), Rates(**rate_fields), world_text.tables())

    def to_json(self) -> dict:
        """Return all that this world is, as JSON values."""
        rates = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.rates).items()}
        return {"seed": self.seed, "sizes": asdict(self.sizes), "rates": rates, "language": self.language.tables}

    @classmethod
    def from_json(cls, value: dict) -> World:
        """Return the world that `to_json` described."""
        rates: dict[str, Any] = {}
        for name, rate in value["rates"].items():
            rates[name] = tuple(rate) if isinstance(rate, list) else rate
        return cls(value["seed"], Sizes(**value["sizes"]), Rates(**rates), value["language"])

    # ── data ─────────────────────────────────────────────────────────────────────────────────────

    def documents(self) -> Iterator[dict]:
        """Yield the pretraining corpus as {text} rows.

        Its dialogues use only requests of the training share.
        """
        rng = self._rng("documents")
        for _ in range(self.sizes.documents):
            yield {"text": world_writers.document(self.language, rng, self.rates, self.shares.training)}

    def demonstrations(self) -> Iterator[dict]:
        """Yield {prompt, completion} rows by demonstrators of mixed quality."""
        rng = self._rng("demonstrations")
        for prompt, task in self._split("demonstrations"):
            completion = world_writers.demonstrate(self.language, rng, task, self.rates)
            yield {"prompt": prompt, "completion": completion}

    def prompts(self) -> Iterator[dict]:
        """Yield {prompt} rows for rankings and PPO; none of them is a demonstration's."""
        return ({"prompt": prompt} for prompt, _ in self._split("prompts"))

    def further_prompts(self, count: int, without: Collection[str] = ()) -> list[str]:
        """Return prompts for training that are in no kind of data.

        Their requests are those of training, so other prompts ask the same in other words.

        Args:
            count: The number of prompts.
            without: Requests that none of them may have.

        Raises:
            ValueError: There are not so many.
        """
        chosen: list[str] = []
        for kind, wanted in quotas(count).items():
            pool = [prompt for prompt, task in self._unused if task.kind == kind]
            pool = [prompt for prompt in pool if self.request(prompt) not in without]
            chosen += pool[: _available("further prompts", kind, wanted, len(pool))]
        self._rng("further prompts").shuffle(chosen)
        return chosen

    def evaluation_prompts(self) -> Iterator[dict]:
        """Yield {prompt} rows for the held-out evaluation.

        Half set tasks that no training data sets, half set known tasks in wordings of their own.
        """
        return ({"prompt": prompt} for prompt, _ in self._split("evaluation_prompts"))

    def tasks_in(self, prompts: Iterable[str], documents: Iterable[str]) -> set[Task]:
        """Return every task that prompts set or that documents' dialogues ask for, in any wording.

        Args:
            prompts: Prompts of this world (of demonstrations, rankings or PPO).
            documents: Texts of the corpus.
        """
        text = "\n".join(documents)
        tasks = {self.task(prompt) for prompt in prompts}
        return tasks | {task for request, task in self._requests.items() if request in text}

    @cached_property
    def shares(self) -> Shares:
        """Return the requests, divided into what training may use and what it may not."""
        return divide(self._requests, self._rng("shares"))

    def _rng(self, purpose: str) -> random.Random:
        """Return a generator for one purpose, so that no kind of data changes another."""
        return random.Random(f"{self.seed}/{purpose}")

    def _split(self, name: str) -> list[tuple[str, Task]]:
        """Return the (prompt, task) rows of a kind of prompts; no prompt is of two kinds."""
        return self._splits[0][name]

    @property
    def _unused(self) -> list[tuple[str, Task]]:
        """Return the (prompt, task) rows that training may use and that no kind of data has."""
        return self._splits[1]

    @cached_property
    def _splits(self) -> tuple[dict[str, list[tuple[str, Task]]], list[tuple[str, Task]]]:
        """Draw the prompts of all three kinds; return them, and what is left for training."""
        rng, unused = self._rng("prompts"), []
        splits: dict[str, list[tuple[str, Task]]] = {"demonstrations": [], "prompts": [], "evaluation_prompts": []}
        for kind in MIXTURE:
            pool = self._addressed(rng, self.shares.training[kind])
            for name in ("demonstrations", "prompts"):
                count = _available(name, kind, quotas(getattr(self.sizes, name))[kind], len(pool))
                splits[name] += pool[:count]
                del pool[:count]
            unused += pool
            total = self.sizes.evaluation_prompts
            halves = (self.shares.held_out, total // 2), (self.shares.reworded, total - total // 2)
            for share, size in halves:
                pool = self._addressed(rng, share[kind])
                count = _available("evaluation_prompts", kind, quotas(size)[kind], len(pool))
                splits["evaluation_prompts"] += spread_evenly(pool, count)
        for rows in splits.values():
            rng.shuffle(rows)
        return splits, unused

    def _addressed(self, rng: random.Random, requests: list[tuple[str, Task]]) -> list[tuple[str, Task]]:
        """Return every request with every opener and closer, shuffled."""
        rows = [(prompt, task) for text, task in requests for prompt in self.language.addressed(text)]
        rng.shuffle(rows)
        return rows

    # ── judgement ────────────────────────────────────────────────────────────────────────────────

    def request(self, prompt: str) -> str:
        """Return a prompt's request, without opener and closer.

        Raises:
            ValueError: The prompt does not belong to this world.
        """
        request = prompt
        for opener in filter(None, self.language.tables["openers"]):
            request = request.removeprefix(opener + " ")
        for closer in filter(None, self.language.tables["closers"]):
            request = request.removesuffix(" " + closer)
        if request not in self._requests:
            raise ValueError(f"not a request of the embedded world: {prompt!r}")
        return request

    def knows(self, prompt: Any) -> bool:
        """Return whether a prompt is a request of this world."""
        try:
            self.request(prompt)
        except (AttributeError, ValueError):  # messages, or other words
            return False
        return True

    def task(self, prompt: str) -> Task:
        """Return what a prompt asks for; ValueError if it does not belong to this world."""
        return self._requests[self.request(prompt)]

    def gold(self, prompt: str, response: str, finished: bool = True) -> dict[str, float]:
        """Score a response.

        Args:
            prompt: A prompt of this world.
            response: The text of the response.
            finished: Whether it ended by itself and was not cut off at the length limit.

        Returns:
            `helpful`, `honest`, `harmless` and `overall` (their mean), each in [0, 1].
        """
        return world_gold.score(self.language, self.task(prompt), response, finished)

    def labeler_utilities(self, prompt: str, responses: list[str], finished: list[bool] | None = None) -> np.ndarray:
        """Return what each labeler thinks of each response, before noise.

        Args:
            prompt: A prompt of this world.
            responses: The K responses.
            finished: Whether each ended by itself; None: all did.

        Returns:
            (labelers, K).
        """
        finished = [True] * len(responses) if finished is None else finished
        golds = [self.gold(prompt, text, ended) for text, ended in zip(responses, finished, strict=True)]
        return labelers.utilities(golds, responses, self.language.tables["words"]["polite"])


def quotas(total: int) -> dict[str, int]:
    """Split a total by MIXTURE; the kind "fact" gets what rounding leaves."""
    counts = {kind: int(total * share) for kind, share in MIXTURE.items()}
    counts["fact"] += total - sum(counts.values())
    return counts


def _available(name: str, kind: str, count: int, available: int) -> int:
    """Return `count`; ValueError if so many different prompts cannot be made.

    Args:
        name: The kind of data, for the message.
        kind: The kind of request.
        count: The number of prompts wanted.
        available: The number of prompts there are.
    """
    if count > available:
        raise ValueError(f"{name}: {count} prompts of the kind {kind} asked for, {available} are left")
    return count

"""Apply wordings to the rows of a task: a row becomes {prompt, completion, row_text, meta}."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data.forms import PROMPT_KINDS
from data.forms.form import LeftOut
from data.parsing import describe
from data.records import as_messages
from data.tasks.fields import value_of, written
from data.tasks.shots import Pool, Shots
from data.tasks.wordings import Wording, Wordings

KINDS = ("demonstrations", *PROMPT_KINDS)
"""Kinds of data that wordings make."""
NO_WORD = "labels has null for its value"
"""Why a row without a word for its label is left out."""


@dataclass(frozen=True)
class Worded:
    """Hold what one wording makes of a row."""

    wording: Wording
    """The wording."""
    item: dict[str, Any] | LeftOut
    """The row of our own form, or why there is none."""
    row: dict[str, Any]
    """The row that it was made of, with its final answer under `answer`, for scorers."""


@dataclass(frozen=True)
class TaskRows:
    """Turn the rows of a task into rows of our own form."""

    kind: str
    """The kind of data: one of KINDS."""
    wordings: Wordings
    """The wordings."""
    each: bool = False
    """Whether every wording is applied to every row; otherwise one is chosen."""
    shots: Shots | None = None
    """How many rows are shown before a prompt, and how; None: none."""
    pool: Pool | None = None
    """The rows that are shown; None without `shots`."""

    @cached_property
    def read_keys(self) -> frozenset[str]:
        """Return the keys that any wording reads."""
        fields = (*self.wordings.asked, *self.wordings.answered)
        return frozenset(key for field in fields for key in (field.key, field.name, *field.steps))

    def worded(self, value: object) -> list[Worded]:
        """Return what the wordings make of a row.

        Args:
            value: The row.

        Raises:
            ValueError: It lacks a key, or has a value that cannot be written.
        """
        if not isinstance(value, dict):
            raise ValueError(f"the row is {describe(value)}; wordings need an object with keys")
        text = self.wordings.text_of(value)
        if self.kind == "demonstrations":  # of every wording, so that no hash decides which rows are refused
            for field in self.wordings.answered:
                value_of(field, value)
        wordings = self.wordings.wordings if self.each else (self.wordings.chosen(text),)
        return [self._by(wording, value, text) for wording in wordings]

    def _by(self, wording: Wording, row: Mapping[str, Any], text: str) -> Worded:
        """Return what one wording makes of a row.

        Args:
            wording: The wording.
            row: The row.
            text: What the row says, as of `Wordings.text_of`.
        """
        prompt = written(wording.prompt, row, wording.labels)
        system = written(wording.system, row, wording.labels)
        response, answer = self._answer(wording, row)
        if prompt is None or system is None or response is None:
            return Worded(wording, LeftOut(NO_WORD), dict(row))
        meta = dict(row["meta"]) if isinstance(row.get("meta"), dict) else {}
        meta |= {"wording": wording.name} | ({"answer": answer} if answer else {})
        item: dict[str, Any] = {"prompt": self._prompt(wording, prompt, system, text), "row_text": text, "meta": meta}
        if self.kind == "demonstrations":
            item["completion"] = response
        return Worded(wording, item, {**row, "answer": answer} if answer else dict(row))

    def _answer(self, wording: Wording, row: Mapping[str, Any]) -> tuple[str | None, str]:
        """Return the response and the final answer; a response of None leaves the row out.

        A row of prompts may lack the keys of its answer: "" then, and scorers that need one say so.
        """
        if self.kind != "demonstrations" and any(field.key not in row for field in self.wordings.answered):
            return "", ""
        if wording.response is None or wording.answer is None:
            if self.kind == "demonstrations":
                raise ValueError(f"the wording {wording.name!r} has no response to teach; add it to the wording")
            return "", ""
        answer = written(wording.answer, row, wording.labels)
        return (None, "") if answer is None else (written(wording.response, row, wording.labels), answer)

    def _prompt(self, wording: Wording, prompt: str, system: str, text: str) -> str | list[dict]:
        """Return the prompt with the rows that are shown before it, in the same wording."""
        before: list[dict] = [{"role": "system", "content": system}] if system else []
        if self.shots is not None:
            assert self.pool is not None
            shown = self.pool.shown(wording, text, self.shots.number, self.wordings.seed)
            if self.shots.as_text:
                blocks = [question + ("" if question[-1].isspace() else "\n") + answer for question, answer in shown]
                prompt = "\n\n".join([*blocks, prompt])
            else:
                for question, answer in shown:
                    before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*before, *as_messages(prompt)] if before else prompt

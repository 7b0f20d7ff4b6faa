"""Define what the settings of every kind of scorer share."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.section import Section, setting


class ScorerSection(Section):
    """Hold the settings of any scorer. A kind of scorer is a class of its own, with its own key."""

    weight: float = setting(1.0, "factor of its score in the sum of several scorers; may be negative")
    name: str | None = setting(
        None,
        "name in metrics, samples and results: letters, digits, `_`, `.`, `-`; null: made of what is scored by",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
    )

    def default_name(self) -> str:
        """Return the name that the scorer has if the settings give none."""
        raise NotImplementedError

    def problems(self, key: str) -> list[str]:
        """Return a line "KEY: what is wrong; what to do" for each mistake; load nothing.

        Args:
            key: Where the scorer is in the config, as "ppo.rewards[0]".
        """
        return []

    def files(self, key: str) -> dict[str, Path]:
        """Return the files and folders of the user whose content decides the scores.

        Their digests are part of the fingerprint.

        Args:
            key: Where the scorer is in the config.
        """
        return {}

    def stages(self) -> list[str]:
        """Return the stages of this experiment that must be done first."""
        return []

    def row_problems(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[str]:
        """Return a line "PLACE: what is wrong; what to do" for each row of data it cannot score by.

        It is asked once, before anything is sampled.

        Args:
            rows: The rows of data of the prompts, with all their keys.
            places: The location of each, as "prompts.jsonl:3".
        """
        return []

    def missing(self, key: str) -> list[str]:
        """Return a line for each thing that the scorer needs and this machine lacks.

        It is asked when a stage that scores is about to run.

        Args:
            key: Where the scorer is in the config.
        """
        return []

    def may_drop(self) -> bool:
        """Return whether an update may go on without this scorer when it has failed."""
        return False

    def describe(self) -> str:
        """Return a clause that says what scores, for people; nothing secret is in it."""
        given = self.model_dump(mode="json", exclude={"name", "weight"}, exclude_defaults=True)
        return ", ".join(f"{key}: {value}" for key, value in given.items())

    def compares(self) -> bool:
        """Return whether it compares two responses, and gives none a score."""
        return False


def missing_key(key: str, variable: str | None) -> list[str]:
    """Return a line if the environment lacks the variable that holds a server's key.

    Args:
        key: Where the scorer is in the config.
        variable: Its `key_env`; None: the server needs no key.
    """
    if variable is None or os.environ.get(variable):
        return []
    return [f"{key}.key_env: the environment has no variable {variable}; export it, or leave key_env out"]

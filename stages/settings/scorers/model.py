"""Declare the scorer `model:`: a reward model, or several that score as one."""

from pathlib import Path
from typing import Literal

from pipeline.config.section import setting
from stages.models.ensemble_folder import others_of
from stages.settings.scorers.common import ScorerSection

OWN = "rm"
"""The value of `model` that means this experiment's reward model."""


class ModelScorer(ScorerSection):
    """Score by a reward model."""

    model: str = setting(..., "rm: this experiment's reward model; or the folder of a reward model")
    how: Literal["mean", "min"] = setting("mean", "how the scores of the models of an ensemble are combined")

    def default_name(self) -> str:
        """Return "rm", or the folder's name; of a folder `model` that of its parent."""
        if self.model == OWN:
            return OWN
        folder = Path(self.model)
        return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name

    def folder(self) -> Path | None:
        """Return the folder that is named; None for this experiment's reward model."""
        return None if self.model == OWN else Path(self.model).expanduser()

    def problems(self, key: str) -> list[str]:
        """Return a line if the folder holds no model."""
        folder = self.folder()
        if folder is None or (folder / "config.json").is_file():
            return []
        return [f"{key}.model: {folder} has no config.json; give rm, or the model/ folder of a reward model"]

    def files(self, key: str) -> dict[str, Path]:
        """Return the folder, with the other models of its ensemble."""
        folder = self.folder()
        if folder is None:
            return {}
        others = {f"{key}.model ({other.name})": other for other in others_of(folder)}
        return {f"{key}.model": folder} | others

    def stages(self) -> list[str]:
        """Return rm if its model scores."""
        return ["rm"] if self.model == OWN else []

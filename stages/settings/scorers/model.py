"""Declare the scorer `model:`: a reward model, or several that score as one."""

import re
from pathlib import Path
from typing import Any

from pydantic import field_validator

from pipeline.config.section import setting
from pipeline.config.sections import is_hub_id
from stages.models.ensemble_folder import How, others_of
from stages.settings.scorers.common import ScorerSection

OWN = "rm"
"""The value of `model` that means this experiment's reward model."""
COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelScorer(ScorerSection):
    """Score by a reward model."""

    model: str | list[str] = setting(
        ...,
        "rm: this experiment's reward model; the folder of a reward model, or its Hub id; or a list of folders, an "
        "ensemble. A model with the policy's tokenizer and one logit reads the policy's own ids; any other reads the "
        "text through its own chat template",
    )
    how: How = setting(
        "mean",
        "how the scores of the models of an ensemble are combined: their mean, their minimum, or mean_minus_std, the "
        "mean less `deviations` standard deviations (Coste 2023)",
    )
    deviations: float = setting(1.0, "standard deviations that mean_minus_std takes off", ge=0)
    heads: list[float] | None = setting(
        None, "for a model with several logits: the weight of each; null: the model must have one logit"
    )
    revision: str | None = setting(None, "commit of the Hub id, 40 hexadecimal digits; required for one")

    @field_validator("model")
    @classmethod
    def _at_least_one(cls, given: Any) -> Any:
        if isinstance(given, list) and not given:
            raise ValueError("an empty list; should name at least one folder")
        return given

    @field_validator("heads")
    @classmethod
    def _a_weight_each(cls, given: Any) -> Any:
        if given == []:
            raise ValueError("should have a weight for each logit, or be null")
        return given

    def named(self) -> list[str]:
        """Return what `model` names, as a list."""
        return [self.model] if isinstance(self.model, str) else list(self.model)

    def default_name(self) -> str:
        """Return "rm", or the folder's name; of a folder `model` that of its parent."""
        first = self.named()[0]
        if first == OWN:
            return OWN
        folder = Path(first)
        return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name

    def is_own(self) -> bool:
        """Return whether it is this experiment's reward model."""
        return self.model == OWN

    def hub_id(self) -> str | None:
        """Return the Hub id that is named; None for folders and this experiment's model."""
        first = self.named()[0]
        return first if first != OWN and is_hub_id(first) else None

    def folders(self) -> list[Path]:
        """Return the user's folders, with the other models of each one's ensemble."""
        if self.is_own() or self.hub_id() is not None:
            return []
        found = []
        for name in self.named():
            folder = Path(name).expanduser()
            found += [folder, *others_of(folder)]
        return found

    def problems(self, key: str) -> list[str]:
        """Return a line for each thing that is missing, and for each setting without effect."""
        names, lines = self.named(), []
        if "deviations" in self.model_fields_set and self.how != "mean_minus_std":
            lines.append(
                f"{key}.deviations: has no effect with how: {self.how}; leave it out, or say how: mean_minus_std"
            )
        if self.heads is not None and self.is_own():
            lines.append(f"{key}.heads: has no effect with model: rm, which has one logit; leave it out")
        if self.hub_id() is not None:
            if self.revision is None or not COMMIT.fullmatch(self.revision):
                found = "is missing" if self.revision is None else f"is {self.revision!r}"
                lines.append(
                    f"{key}.revision: {found}; should be the commit of {names[0]}, 40 hexadecimal digits, so that a "
                    f"resumed run is scored by the same model"
                )
            if len(names) > 1:
                lines.append(f"{key}.model: a list should name folders only; download {names[0]} first")
            return lines
        if self.revision is not None:
            lines.append(f"{key}.revision: {names[0]} is not a Hub id and has no revisions; leave it out")
        if OWN in names and len(names) > 1:
            lines.append(f"{key}.model: rm cannot stand in a list; rm.ensemble trains several reward models")
        for name in names:
            folder = Path(name).expanduser()
            if name != OWN and not (folder / "config.json").is_file():
                lines.append(
                    f"{key}.model: {folder} has no config.json; give rm, or the model/ folder of a reward model"
                )
        return lines

    def files(self, key: str) -> dict[str, Path]:
        """Return the folders."""
        found: dict[str, Path] = {}
        for index, folder in enumerate(self.folders()):
            found[f"{key}.model" if index == 0 else f"{key}.model ({index})"] = folder
        return found

    def stages(self) -> list[str]:
        """Return rm if its model scores."""
        return ["rm"] if self.is_own() else []

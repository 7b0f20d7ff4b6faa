"""Declare the scorer `judge:`, a language model that grades a response or compares two."""

import json
import re
from pathlib import Path
from typing import Any, Literal

from pipeline.config.section import setting
from pipeline.config.sections import is_hub_id
from stages.settings.scorers.common import ScorerSection, missing_key
from stages.settings.scorers.model import COMMIT
from stages.settings.scorers.url import SECRET_NAMES, address_problems

Mode = Literal["grade", "pairwise"]

PROMPTS = Path(__file__).parents[2] / "scorers" / "prompts"
"""The folder of the prompts that are used where the settings name none."""
VERDICTS: dict[Mode, str] = {"grade": r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]", "pairwise": r"(?i)\[\[\s*(A|B|C|tie)\s*\]\]"}
"""What finds the verdict where the settings say nothing."""
NEEDED: dict[Mode, tuple[str, ...]] = {"grade": ("response",), "pairwise": ("response_a", "response_b")}
"""The placeholders that a prompt must have."""
PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
"""A placeholder of a prompt that is no Jinja template."""
JINJA = (".j2", ".jinja", ".jinja2")
"""Endings of files that are Jinja templates."""
OF_SERVERS = ("key_env", "body", "concurrency", "timeout", "retries", "temperature", "seed", "on_failure")
"""Settings without effect on a local model."""
OF_LOCAL_MODELS = ("batch_size", "revision")
"""Settings without effect on a server."""


class JudgeScorer(ScorerSection):
    """Score by a language model that is asked for a verdict."""

    judge: str = setting(
        ...,
        "name of the model at base_url; without base_url a local language model: a folder, a Hub id or package:NAME",
    )
    base_url: str | None = setting(
        None, "address of an OpenAI-compatible server, as http://127.0.0.1:8000/v1; null: the model runs here"
    )
    key_env: str | None = setting(
        None,
        "environment variable with the server's key, as OPENAI_API_KEY; the key is in no artifact, log or record",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    mode: Mode = setting(
        "grade",
        "grade: a number for each response; pairwise (evaluate.judges only): which of two responses is better, asked "
        "in both orders, a tie where they differ",
    )
    prompt: str | None = setting(
        None,
        "file with the prompt, with {response}, or {response_a} and {response_b}; also {question} (the last message), "
        "{conversation} and any key of the row, as {answer}. *.j2: a Jinja template. null: stages/scorers/prompts/",
    )
    verdict: str | None = setting(
        None,
        "regular expression whose group is the verdict: a number; or A, 1 or first, B, 2 or second, C, tie or equal. "
        "The last match counts, and none inside <think>. null: [[5]]; [[A]], [[B]] or [[C]]",
    )
    scale: list[float] = setting(
        [1.0, 10.0], "lowest and highest grade; another one is no valid verdict", "grade", min_length=2, max_length=2
    )
    invalid_score: float | None = setting(
        None, "grade of a response without a valid verdict; null: the middle of scale", "grade"
    )
    attempts: int = setting(
        2, "how often a question is asked whose answer holds no valid verdict, each time more plainly", ge=1, le=10
    )
    max_tokens: int = setting(512, "largest length of an answer", "tokens", ge=1)
    temperature: float = setting(0.0, "sampling temperature of a server; a local model is greedy", ge=0)
    seed: int = setting(0, "seed that is sent to a server")
    body: dict[str, Any] = setting(
        {},
        "further fields of a request; null leaves one out, as {max_tokens: null, max_completion_tokens: 512, "
        "temperature: null}",
    )
    concurrency: int = setting(4, "the most requests at a time, of each process of a run", "requests", ge=1)
    timeout: float = setting(120.0, "the longest that an answer may take, connecting included", "seconds", gt=0)
    retries: int = setting(
        5, "how often a request that failed is sent again, after 1, 2, 4, … seconds or as Retry-After says", ge=0
    )
    on_failure: Literal["stop", "drop"] = setting(
        "stop",
        "what to do when the server does not answer: stop (save, exit code 3), or drop: this update of PPO goes on "
        "without this scorer",
    )
    batch_size: int = setting(8, "the most questions that a local model answers at a time", "questions", ge=1)
    revision: str | None = setting(None, "commit of the Hub id, 40 hexadecimal digits; required for one")

    @property
    def is_local(self) -> bool:
        """Return whether the model runs here."""
        return self.base_url is None

    def default_name(self) -> str:
        """Return the model's name as far as it can be a name; of a folder `model` the parent's."""
        path = Path(self.judge.removeprefix("package:"))
        last = path.parent.name if path.name == "model" and path.parent.name else path.name
        return re.sub(r"[^A-Za-z0-9_.-]", "-", last).lstrip(".-") or "judge"

    def prompt_file(self) -> Path:
        """Return the file with the prompt."""
        return PROMPTS / f"{self.mode}.txt" if self.prompt is None else Path(self.prompt).expanduser()

    def pattern(self) -> str:
        """Return the regular expression that finds the verdict."""
        return VERDICTS[self.mode] if self.verdict is None else self.verdict

    def middle(self) -> float:
        """Return the grade of a response without a valid verdict."""
        return sum(self.scale) / 2 if self.invalid_score is None else self.invalid_score

    def folder(self) -> Path | None:
        """Return the folder of a local model; None for any other."""
        path = Path(self.judge).expanduser()
        return path if self.is_local and path.is_dir() else None

    def may_drop(self) -> bool:
        """Return whether an update may go on without this scorer."""
        return self.on_failure == "drop"

    def describe(self) -> str:
        """Return the model, its server and how it judges."""
        where = "" if self.base_url is None else f" at {self.base_url}"
        how = "compares two responses in both orders" if self.compares() else "grades each response"
        return f"the language model {self.judge}{where}, which {how}"

    def compares(self) -> bool:
        """Return whether it compares two responses."""
        return self.mode == "pairwise"

    def problems(self, key: str) -> list[str]:
        """Return a line for each mistake, and for settings without effect."""
        lines = [f"{key}.{line}" for line in [*self._model_problems(), *self._prompt_problems()]]
        unused = [*(OF_SERVERS if self.is_local else OF_LOCAL_MODELS)]
        unused += ["scale", "invalid_score"] if self.mode == "pairwise" else []
        where = "for a local model" if self.is_local else "with base_url"
        for name in unused:
            if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                why = "with mode: pairwise" if name in ("scale", "invalid_score") else where
                lines.append(f"{key}.{name}: has no effect {why}; leave it out")
        if self.scale[0] >= self.scale[1]:
            lines.append(f"{key}.scale: {self.scale} is empty; give the lowest grade, then the highest")
        for name in ("model", "messages", "stream", "n"):
            if name in self.body:
                lines.append(f"{key}.body: {name} is set here already; leave it out")
        for name in sorted(self.body):
            if name.lower() in SECRET_NAMES:
                lines.append(f"{key}.body: contains {name}, which would reach artifacts; name a variable with key_env")
        try:
            json.dumps(self.body, allow_nan=False)
        except (TypeError, ValueError) as error:
            lines.append(f"{key}.body: cannot be sent as JSON ({error}); give texts, numbers, true, false or null")
        return lines

    def _model_problems(self) -> list[str]:
        """Return what is wrong with the model, or the address of its server."""
        if self.base_url is not None:
            return [f"base_url: {what}" for what in address_problems(self.base_url)]
        if self.judge.startswith("package:"):
            return []
        path = Path(self.judge).expanduser()
        if path.is_dir():
            if (path / "config.json").is_file():
                return []
            return [f"judge: {path} has no config.json; give the model/ folder of a language model"]
        if is_hub_id(self.judge):
            if self.revision is None or not COMMIT.fullmatch(self.revision):
                return [f"revision: should be the commit of {self.judge}, 40 hexadecimal digits; give it"]
            return []
        return [f"judge: {self.judge!r} is no folder and no Hub id; give one, or base_url for a model at a server"]

    def _prompt_problems(self) -> list[str]:
        """Return what is wrong with the prompt, and with the expression for the verdict."""
        lines = []
        try:
            groups = re.compile(self.pattern()).groups
        except re.error as error:
            lines.append(f"verdict: {self.pattern()!r} is no regular expression ({error}); correct it")
        else:
            if groups != 1:
                lines.append(f"verdict: {self.pattern()!r} has {groups} groups; should have one, around the verdict")
        file = self.prompt_file()
        try:
            names = placeholders_of(file)
        except OSError:
            return [*lines, f"prompt: no such file: {file}; give a text file with the prompt"]
        except ValueError as error:
            return [*lines, f"prompt: {file}: {error}; correct it"]
        for name in NEEDED[self.mode]:
            if name not in names:
                lines.append(f"prompt: {file} has no {{{name}}}; mode {self.mode} needs it")
        return lines

    def files(self, key: str) -> dict[str, Path]:
        """Return the prompt, and the folder of a local model."""
        folder = self.folder()
        return {f"{key}.prompt": self.prompt_file()} | ({} if folder is None else {f"{key}.judge": folder})

    def missing(self, key: str) -> list[str]:
        """Return a line if the environment has no key."""
        return missing_key(key, self.key_env)


def placeholders_of(file: Path) -> set[str]:
    """Return the names that a prompt has places for.

    Raises:
        OSError: There is no such file.
        ValueError: It is no text, or no Jinja template.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix not in JINJA:
        return set(PLACEHOLDER.findall(text))
    from jinja2 import Environment, TemplateSyntaxError, meta

    try:
        return meta.find_undeclared_variables(Environment(autoescape=False).parse(text))
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from None

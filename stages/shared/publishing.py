"""How a stage publishes a model: its dtype and the base that its adapter names."""

from pathlib import Path

from pipeline.config.sections import is_hub_id
from pipeline.stage import StageRun


def publish_dtype(ctx: StageRun, source: Path) -> str | None:
    """The dtype that a stage writes weights in, as model.publish_dtype asks, if it is not float32. source: the folder
    of the model that the stage began with."""
    from stages.models.publish import dtype_of_folder

    asked = ctx.experiment.model.publish_dtype
    return dtype_of_folder(source) if asked == "as_given" else asked


def adapter_base(ctx: StageRun, folder: Path, source: Path) -> tuple[str, str | None] | None:
    """Name the base of the adapter in what is published as `folder`, the model in `source`; None where no adapter is
    trained. Base's model goes by its name on the Hub where it is that one, row for row."""
    from stages.models.adapters import base_of

    peft = ctx.experiment.model.peft
    if peft is None or peft.method == "bitfit":
        return None
    base, name = ctx.manifests.get("base"), ctx.experiment.model.name_or_path
    if base is not None and source.parent == ctx.inputs["base"] and base["metrics"].get("same_rows_as_given"):
        if name is not None and is_hub_id(name):
            return name, base["config"]["model"].get("revision")
    home = next(iter(ctx.inputs.values())).parent / ctx.stage  # where the folder will be
    return base_of(source, home / folder.relative_to(ctx.publish))

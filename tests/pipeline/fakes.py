"""Declare three small stages: `text` writes words, `fit` trains on them, `page` reads both.

Run as a script, this is `rlhf` with these stages.
"""

import json
import sys
import time
from dataclasses import replace
from typing import Literal

from pydantic import Field, create_model

from pipeline.config.section import Section
from pipeline.config.sections import Common
from pipeline.errors import Interrupted, TrainingStopped
from pipeline.stage import Stage

CONFIG = """\
name: small
text:
  words: 3
fit:
  steps: 12
checkpoints:
  every: 4
launch:
  threads: 1
"""


class TextConfig(Section):
    words: int = Field(5, ge=1, description="how many", json_schema_extra={"unit": "words"})


class FitConfig(Section):
    steps: int = Field(6, ge=1, description="optimizer steps")
    learning_rate: float = Field(1e-2, gt=0, description="of AdamW", json_schema_extra={"unit": "per step"})
    keep: Literal["best", "last"] = Field("last", description="which weights")
    pause: float = Field(0.0, description="seconds a step, so that a test can interrupt")
    fail_at: int | None = Field(None, description="step at which training stops itself")


class PageConfig(Section):
    pass


def run_text(ctx):
    folder = ctx.publish / "words"
    folder.mkdir()
    (folder / "all.json").write_text(json.dumps(["word"] * ctx.config.words))
    return {"words": ctx.config.words}


def run_fit(ctx):
    import torch
    from safetensors.torch import save_file

    from pipeline.store.optimizer_state import load_optimizer, optimizer_tensors

    config, words = ctx.config, json.loads((ctx.inputs["text"] / "words" / "all.json").read_text())
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    step = 0
    if found := ctx.checkpoints.newest():
        model.load_state_dict(found.tensors("model"))
        load_optimizer(optimizer, found.tensors("optimizer"), found.state["optimizer"])
        step = found.step
    loss = torch.tensor(0.0)
    with ctx.tracker.progress(config.steps, "fit", step) as progress:
        while step < config.steps:
            step += 1
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(ctx.seed * 1000 + step))
            loss = (model(batch) - len(words)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if step == config.fail_at:
                raise TrainingStopped(f"the loss at step {step} is not finite")
            optimizer.step()
            ctx.tracker.log(step, {"loss": loss})
            progress.update(step, loss=loss)
            if config.pause:
                print(f"step {step}", flush=True)
                time.sleep(config.pause)
            if step < config.steps and (ctx.checkpoints.due(step) or ctx.stop.requested):
                tensors, state = optimizer_tensors(optimizer)
                groups = {"model": model.state_dict(), "optimizer": tensors}
                ctx.checkpoints.save(step, groups, {"optimizer": state}, config.steps)
                if ctx.stop.requested:
                    raise Interrupted(step, config.steps)
    save_file(model.state_dict(), ctx.publish / "model.safetensors")
    return {"loss": float(loss.detach()), "steps": step}


def run_page(ctx):
    (ctx.publish / "index.html").write_text(json.dumps({name: m["metrics"] for name, m in ctx.manifests.items()}))
    return {}


def nothing(experiment):
    return []


def stages(reads=None):
    """Return the three stages by name. `reads`: kinds of data that `fit` reads too."""
    metrics = {"loss": "mean squared error"}
    return {
        "text": Stage(
            name="text",
            summary="words",
            settings=TextConfig,
            run=run_text,
            needs=nothing,
            metrics=metrics,
            headline=("words",),
        ),
        "fit": Stage(
            name="fit",
            summary="a linear model",
            settings=FitConfig,
            run=run_fit,
            needs=lambda experiment: ["text"],
            reads=lambda experiment: list(reads or []),
            metrics=metrics,
            headline=("loss",),
        ),
        "page": Stage(
            name="page",
            summary="both",
            settings=PageConfig,
            run=run_page,
            needs=lambda experiment: ["text", "fit"],
            metrics=metrics,
        ),
    }


def experiment_class(stages):
    """Return the class of an experiment of these stages."""
    sections = {name: (stage.settings, Field(default_factory=stage.settings)) for name, stage in stages.items()}
    return create_model("Experiment", __base__=Common, **sections)


def change(stages, which, /, **changes):
    """Replace a stage by one that declares something else."""
    stages[which] = replace(stages[which], **changes)


def install(reads=None, made=None):
    """Make `rlhf` run these stages, or `made`."""
    from pipeline import api, cli

    made = made or stages(reads)
    api.STAGES = tuple(made)
    api.stages = lambda: made
    api.TESTS = ()
    api.experiment_class = lambda: experiment_class(made)
    return cli


if __name__ == "__main__":
    sys.exit(install().main())

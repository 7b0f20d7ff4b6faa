"""Answer the questions of the preference benchmarks (preferences.py) with our rm or dpo.

    python tests/benchmarks/preferences_ours.py rm|dpo

Questions and answers are JSON lines. `step` does what one step of `fit` does in stages/rm.py or
stages/dpo.py, with their functions and defaults, except that on a GPU all prompts of a step go into
one forward pass.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate.state import AcceleratorState
from pairs import Phases, Stopwatch, peak_bytes, reset_peak, serve, versions
from ppo_models import FIRST_WORD, PAD, SHAPES, ceilings, craft
from safetensors.torch import load_file

from data.groups import PromptGroup, batch_groups
from stages import dpo
from stages.models.forward import head_is_linear, response_logprobs, response_scores
from stages.models.loading import load_policy, load_scalar_model
from stages.models.packing import can_pack
from stages.objectives.logprobs import sequence_logps
from stages.settings import dpo as dpo_settings
from stages.settings import rm as rm_settings
from stages.shared.runtime import make_accelerator
from stages.training import ranking
from stages.training.batching import GroupBatches
from stages.training.reference import Reference
from stages.training.trainee import make_trainee, optimizer_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Ours:
    """Hold the model that learns, its optimizer and, for dpo, the reference."""

    def __init__(self, bench: str):
        """Choose the stage, "rm" or "dpo", with its default settings."""
        self.bench, self.phases, self.tokens, self.real = bench, Phases(), 0, 0
        self.settings = rm_settings.RMSettings() if bench == "rm" else dpo_settings.DPOSettings()

    def hello(self) -> dict:
        """Return versions and the number of threads."""
        return versions("torch", "transformers", "accelerate") | {"threads": torch.get_num_threads()}

    def craft(self, model: str, folder: str) -> dict:
        """Write the models of a shape into a folder; see `ppo_models.craft`."""
        return craft(SHAPES[model], Path(folder), device=DEVICE, dtype="float32" if DEVICE == "cpu" else "bfloat16")

    def load(self, folder: str, dtype: str) -> None:
        """Load the models with fp32 weights, as every stage does, and make an optimizer.

        Args:
            folder: Folder that holds a model folder for each role.
            dtype: Data type of the products.
        """
        self.model = self.reference = self.trainee = None
        AcceleratorState._reset_state(True)  # or every Accelerator would share the last one's dtype
        self.dtype, self.accelerator = dtype, make_accelerator(DEVICE, dtype)
        if self.bench == "rm":
            models = [load_scalar_model(Path(folder) / "reward_model")]
        else:
            models = [load_policy(Path(folder) / "policy"), load_policy(Path(folder) / "ref_policy")]
        for model in models:
            model.to(self.accelerator.device)
            model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)
        self.packed = all([can_pack(model, 1024) for model in models])
        if self.bench == "dpo":  # tried once a model, here and not in the first step, whose tokens are counted
            assert all([head_is_linear(model) for model in models])
        self.model, self.reference = models[0], models[-1]
        self.trainee = make_trainee("model", self.model, learning_rate=1e-6, max_grad_norm=self.settings.max_grad_norm)
        self.phases.time_optimizer(self.trainee.optimizer)

    def count(self, _: Any, args: tuple, kwargs: dict) -> None:
        """Count the tokens that pass through the trunk, with padding and without."""
        ids = kwargs.get("input_ids", args[0] if args else torch.empty(0))
        self.tokens, self.real = self.tokens + ids.numel(), self.real + (ids >= FIRST_WORD).sum()

    def config(self) -> dict:
        """Return the settings that decide the time of a step."""
        names = ("per_device_train_batch_size", "loss_type")
        return {name: getattr(self.settings, name) for name in names} | {"packed": self.packed}

    def step(self, rankings: list[dict]) -> dict:
        """Measure one optimizer step over the rankings.

        On a GPU the second of two steps is measured, because the first has to allocate memory that
        was given back.

        Args:
            rankings: {"prompt", "responses", "ranks"} of each prompt, as token ids.

        Returns:
            As `one_step`.
        """
        if DEVICE == "cuda":
            self.one_step(rankings)
        return self.one_step(rankings)

    def one_step(self, rankings: list[dict]) -> dict:
        """Take one optimizer step.

        Returns:
            Its seconds by both clocks, phases, tokens with padding and without (`real`), peak
            memory.
        """
        groups, self.tokens, self.real = groups_of(rankings), 0, 0
        if DEVICE == "cuda":
            self.settings = self.settings.model_copy(update={"per_device_train_batch_size": len(groups)})
        self.phases.take()
        reset_peak()
        watch = Stopwatch()
        references = self.reference_logps(groups)
        self.gradients(groups, references)
        optimizer_step(self.trainee, 1e-6, 1)
        clocks = watch.stop()
        taken = self.phases.take()
        taken["update"] = clocks["seconds"] - sum(taken.values())
        tokens = {"tokens": self.tokens, "real": int(self.real)}
        return {**clocks, "phases": taken, **tokens, "peak_bytes": peak_bytes()}

    def reference_logps(self, groups: list[PromptGroup]) -> list[torch.Tensor] | None:
        """Compute the reference's log-probability of each response; None for a reward model."""
        if self.bench == "rm":
            return None
        reference = Reference(
            policy=self.reference,
            pad_id=PAD,
            runtime=SimpleNamespace(accelerator=self.accelerator, packed=self.packed),
            cache=SimpleNamespace(recall=lambda *_: None, remember=lambda *_: None),
            made_by=[],
            tracker=SimpleNamespace(progress=lambda *_: Silent()),
            leave=lambda: None,
        )
        with self.phases.phase("reference"):
            return reference.logps("train", self.batches(groups))

    def batches(self, groups: list[PromptGroup]) -> GroupBatches:
        """Cut the groups into micro-batches by the stage's settings."""
        c = self.settings
        return GroupBatches(groups, c.per_device_train_batch_size, c.per_device_train_tokens, self.packed)

    def gradients(self, groups: list[PromptGroup], references: list[torch.Tensor] | None) -> float:
        """Compute the gradients of one batch as the stage's `fit` does.

        Args:
            groups: The rankings of the batch.
            references: The reference's log-probabilities of each ranking, for dpo.

        Returns:
            The loss.
        """
        total, c, n = 0.0, self.settings, len(groups)
        for rows in self.batches(groups).to_train(list(range(n))):
            batch = batch_groups([groups[i] for i in rows], PAD, packed=self.packed).to(self.accelerator.device)
            if self.bench == "rm":
                with self.accelerator.autocast():
                    scores = response_scores(self.model, batch.rows)
                value = ranking.loss_of(c, batch, scores, n)
            else:
                ref_logps = torch.cat([references[i] for i in rows]).to(self.accelerator.device)
                with self.accelerator.autocast():
                    logprobs = response_logprobs(self.model, batch.rows)
                logps = sequence_logps(logprobs, batch.rows.response_mask)
                value = dpo.loss_of("sigmoid", logps, ref_logps, batch, c.beta, c.label_smoothing, n, 1)
                dpo.pair_figures(value, logps.detach(), ref_logps, batch, c.beta, len(rows) / n)
            self.accelerator.backward(value)
            total += value.item()
        return total

    def compare(self, rankings: list[dict], file: str, loss: float) -> dict:
        """Compute the relative error ‖ours − peer's‖ / ‖peer's‖ of the loss and of each gradient.

        Args:
            rankings: As in `step`.
            file: The peer's gradients (safetensors).
            loss: The peer's loss.

        Returns:
            Name of the weight, or "loss" → relative error.
        """
        groups = groups_of(rankings)
        ours = self.gradients(groups, self.reference_logps(groups))
        errors, peer = {"loss": abs(ours - loss) / abs(loss)}, load_file(file)
        for name, p in self.model.named_parameters():
            theirs = peer.pop(name)
            errors[name] = ((p.grad.cpu() - theirs).norm() / theirs.norm()).item()
        assert not peer, f"gradients that only the peer has: {list(peer)}"
        self.model.zero_grad(set_to_none=True)
        return errors

    def ceilings(self) -> dict:
        """Measure the peak speed of the device; see `ppo_models.ceilings`."""
        return ceilings(DEVICE, self.dtype)


class Silent:
    """Stand in for a progress bar and show nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def update(self, *_: Any, **__: Any) -> None:
        pass


def groups_of(rankings: list[dict]) -> list[PromptGroup]:
    """Convert rankings from JSON into prompt groups."""
    return [PromptGroup(r["prompt"], r["responses"], tuple(r["ranks"])) for r in rankings]


if __name__ == "__main__":
    ours = Ours(sys.argv[1])
    serve({n: getattr(ours, n) for n in ("hello", "craft", "load", "config", "step", "compare", "ceilings")})

"""Answer the questions of the preference benchmarks (preferences.py) with a plain loop.

    python tests/benchmarks/preferences_rows.py rm|dpo

The loop is what InstructGPT describes and a careful user writes with torch and transformers alone:
the K responses of a prompt are K rows, prompt and response, padded on the right, and the loss is
the mean over all C(K,2) pairs of them. So each response is computed once, as on our side, but the
prompt K times, and padding is computed. The prompts of a step are cut into micro-batches in the
order of their lengths. In DPO the reference is computed once for each response, without a graph,
and logits only where a response may be.
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pairs import Phases, Stopwatch, peak_bytes, reset_peak, serve, versions
from ppo_models import FIRST_WORD, PAD
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETA, MAX_GRAD_NORM = 0.1, 1.0
"""Defaults of both stages and of trl."""


class Rows:
    """Hold the model that learns, its optimizer and, for dpo, the reference."""

    def __init__(self, bench: str):
        """Choose "rm" or "dpo"."""
        self.bench, self.phases, self.micro = bench, Phases(), 0
        self.tokens = self.real = 0

    def hello(self) -> dict:
        """Return versions and the number of threads."""
        return versions("torch", "transformers") | {"threads": torch.get_num_threads()}

    def load(self, folder: str, dtype: str) -> None:
        """Load the models with fp32 weights, and make an optimizer.

        Args:
            folder: Folder that holds a model folder for each role.
            dtype: Data type of the products.
        """
        self.model = self.reference = self.optimizer = None
        gc.collect()
        self.dtype = getattr(torch, dtype)
        roles = ("reward_model",) if self.bench == "rm" else ("policy", "ref_policy")
        auto = AutoModelForSequenceClassification if self.bench == "rm" else AutoModelForCausalLM
        models = [auto.from_pretrained(Path(folder) / role, dtype=torch.float32).to(DEVICE) for role in roles]
        for model in models:
            model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)
        self.model, self.reference = models[0].train(), models[-1]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        self.phases.time_optimizer(self.optimizer)

    def count(self, _: Any, args: tuple, kwargs: dict) -> None:
        """Count the tokens that pass through a trunk, with padding and without."""
        ids = kwargs.get("input_ids", args[0] if args else torch.empty(0))
        self.tokens, self.real = self.tokens + ids.numel(), self.real + (ids >= FIRST_WORD).sum()

    def config(self) -> dict:
        """Return the settings that decide the time of a step."""
        return {
            "prompts_in_a_micro_batch": self.micro,
            "attention": self.model.config._attn_implementation,
            "optimizer": "AdamW (fused)",
        }

    def step(self, rankings: list[dict], micro: int) -> dict:
        """Measure one optimizer step over the rankings.

        On a GPU the second of two steps is measured, because the first has to allocate memory that
        was given back.

        Args:
            rankings: {"prompt", "responses", "ranks"} of each prompt, as token ids.
            micro: Prompts of a micro-batch.

        Returns:
            As `one_step`.
        """
        if DEVICE == "cuda":
            self.one_step(rankings, micro)
        return self.one_step(rankings, micro)

    def one_step(self, rankings: list[dict], micro: int) -> dict:
        """Take one optimizer step.

        Returns:
            Its seconds by both clocks, phases, tokens with padding and without (`real`), peak
            memory.
        """
        self.micro, self.tokens, self.real = micro, 0, 0
        self.phases.take()
        reset_peak()
        watch = Stopwatch()
        self.gradients(rankings, micro)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clocks = watch.stop()
        taken = self.phases.take()
        taken["update"] = clocks["seconds"] - sum(taken.values())
        tokens = {"tokens": self.tokens, "real": int(self.real)}
        return {**clocks, "phases": taken, **tokens, "peak_bytes": peak_bytes()}

    def gradients(self, rankings: list[dict], micro: int) -> float:
        """Compute the gradients of a step; return its loss."""
        by_length = sorted(rankings, key=lambda r: len(r["prompt"]) + max(map(len, r["responses"])))
        parts = [by_length[start : start + micro] for start in range(0, len(rankings), micro)]
        references: list[Tensor | None] = [None] * len(parts)
        if self.bench == "dpo":
            with self.phases.phase("reference"), torch.no_grad():
                references = [self.computed(logps_of, self.reference, part) for part in parts]
        total = 0.0
        for part, reference in zip(parts, references, strict=True):
            if reference is None:
                values = self.computed(scores_of, self.model, part)
            else:
                values = BETA * (self.computed(logps_of, self.model, part) - reference)
            loss = pair_loss(values, part) / len(rankings)
            loss.backward()
            total += loss.item()
        return total

    def computed(self, function: Callable[..., Tensor], model: Any, part: list[dict]) -> Tensor:
        """Return `function` of a model and a micro-batch, with products in the data type."""
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return function(model, part)

    def numbers(self, rankings: list[dict], file: str) -> dict:
        """Compute loss and gradients, all rankings in one micro-batch.

        Args:
            rankings: As in `step`.
            file: Where the gradients are saved (safetensors).

        Returns:
            The loss.
        """
        loss = self.gradients(rankings, len(rankings))
        save_file({n: p.grad.contiguous() for n, p in self.model.named_parameters()}, file)
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss}


def padded(part: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a row for each response of each prompt, padded on the right.

    Args:
        part: N rows in all, of some prompts.

    Returns:
        Token ids (N, T), the tokens of each prompt (N,) and of each whole row (N,).
    """
    rows = [r["prompt"] + response for r in part for response in r["responses"]]
    prompts = [len(r["prompt"]) for r in part for _ in r["responses"]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows], device=DEVICE)
    lengths = torch.tensor([len(row) for row in rows], device=DEVICE)
    return ids, torch.tensor(prompts, device=DEVICE), lengths


def scores_of(model: Any, part: list[dict]) -> Tensor:
    """Return the score of each response, (N,): the head at the last token."""
    ids, _, lengths = padded(part)
    mask = torch.arange(ids.shape[1], device=DEVICE) < lengths[:, None]
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return model.score(hidden[torch.arange(len(ids), device=DEVICE), lengths - 1]).squeeze(-1).float()


def logps_of(model: Any, part: list[dict]) -> Tensor:
    """Return the log-probability of each response given its prompt, (N,).

    Logits are computed from the end of the shortest prompt on.
    """
    ids, prompts, lengths = padded(part)
    places = torch.arange(ids.shape[1], device=DEVICE)
    first = int(prompts.min())
    output = model(
        input_ids=ids,
        attention_mask=places < lengths[:, None],
        use_cache=False,
        logits_to_keep=ids.shape[1] - first + 1,
    )
    targets, logits = ids[:, first:], output.logits[:, :-1].float()
    logprobs = -functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    is_response = (places >= prompts[:, None]) & (places < lengths[:, None])
    return (logprobs * is_response[:, first:]).sum(-1)


def pair_loss(values: Tensor, part: list[dict]) -> Tensor:
    """Return the sum over prompts of −log σ(difference), as the mean over a prompt's pairs.

    Args:
        values: A value of each response, (N,): the score, or β·log(π/π_ref).
        part: The prompts, in the same order.
    """
    total, start = values.new_zeros(()), 0
    for r in part:
        order = sorted(range(len(r["ranks"])), key=lambda i: r["ranks"][i])
        ordered = values[start : start + len(order)][order]
        better, worse = torch.triu_indices(len(order), len(order), 1, device=values.device)
        total = total - functional.logsigmoid(ordered[better] - ordered[worse]).mean()
        start += len(order)
    return total


if __name__ == "__main__":
    rows = Rows(sys.argv[1])
    serve({name: getattr(rows, name) for name in ("hello", "load", "config", "step", "numbers")})

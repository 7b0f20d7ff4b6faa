"""Vary trl's SFTTrainer where base and sft need another loss, another resume, or sharded weights.

Each function takes a trainer class and returns a subclass with one change; `make_trainer` in
text.py combines them. trl takes seconds to import, so it is imported by the caller.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.launch import devices, parallel
from pipeline.store.checkpoints import Checkpoint
from pipeline.store.optimizer_state import load_optimizer
from stages.models.adapters import unwrapped
from stages.models.context_parallel import own_part
from stages.models.label_head import add_label_head
from stages.models.layout import Layout
from stages.models.packing import rows_end_to_end
from stages.models.precision import CAST
from stages.models.sharding import gather_tensors, is_sharded, publishable, shard, sum_gradients
from stages.models.soft_prompts import without_soft_prompt
from stages.objectives.losses import language_model_loss
from stages.training.checkpoint import keep_optimizer_settings, shard_optimizer_tensors
from stages.training.stand_ins import StandIns, stand_in
from stages.training.text_hooks import OPTIMIZER, WEIGHTS, weights_of

TRAINED = "trained.safetensors"
MPS_STATE = "rng_state_mps.safetensors"


def with_plain_loss(trainer_class: type, label_smoothing: float = 0.0) -> type:
    """Compute the cross-entropy from whole logits; the result is the same as trl's.

    trl computes the head in tiles, and twice: that saves the memory of T × V logits, and costs a
    fifth of a step where the vocabulary V is small. Its tiles also read the head's weight directly,
    past an adapter on the head, and with the tokens of a soft prompt. trl smooths labels with two
    forward passes, here it takes one.
    """

    class PlainLossTrainer(trainer_class):
        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Tensor:
            labels = inputs["labels"][:, 1:]
            if parallel.arrangement().context > 1:
                # transformers' count has the labels of a row once for each process that computes it
                counted = num_items_in_batch / parallel.arrangement().context
                loss = own_part_loss(model, inputs["input_ids"], labels, counted, label_smoothing)
                return loss * self.accelerator.num_processes
            # given labels, the model would compute its own loss as well
            arguments = {name: value for name, value in inputs.items() if name != "labels"}
            if self.aux_loss_enabled:
                arguments["output_router_logits"] = True
            out = model(**arguments, use_cache=False)
            counted = num_items_in_batch or (labels != -100).sum().clamp(min=1)
            logits = without_soft_prompt(self.model, out.logits)
            loss = language_model_loss(logits[:, :-1], labels, counted, label_smoothing)
            if num_items_in_batch is not None:
                # it counts the labels of all processes, and their gradients are averaged afterwards
                loss = loss * self.accelerator.num_processes
            if self.aux_loss_enabled:  # averaged over micro-batches, as trl does
                if out.aux_loss is None:
                    raise UserError(no_routers(type(unwrapped(self.model)).__name__))
                parts = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
                loss = loss + self.router_aux_loss_coef * out.aux_loss / parts
            return loss

    return PlainLossTrainer


def with_label_head(trainer_class: type) -> type:
    """Compute the head at positions with a label only, in chunks; the result is the same as trl's.

    The model is one whose logits are the unembedding times the hidden states (`choose_pass`), and
    its loss the cross-entropy alone.
    """

    class LabelHeadTrainer(trainer_class):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            add_label_head(self.model)

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Tensor:
            logprobs = model(**{**inputs, "use_cache": False}, label_logprobs=True)
            if num_items_in_batch is None:
                return -logprobs.sum() / max(1, len(logprobs))
            # it counts the labels of all processes, and their gradients are averaged afterwards
            return -logprobs.sum() / num_items_in_batch * self.accelerator.num_processes

    return LabelHeadTrainer


def with_packed_rows(trainer_class: type) -> type:
    """Compute attention within each row, where trl's collator has laid rows end to end.

    transformers would mask a square of all tokens of the micro-batch.
    """

    class PackedRowsTrainer(trainer_class):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
            lengths = inputs["cu_seq_lens_q"].diff().tolist()
            packed = rows_end_to_end(inputs["input_ids"], lengths) | {"labels": inputs["labels"]}
            return super().compute_loss(model, packed, *args, **options)

    return PackedRowsTrainer


def own_part_loss(model: nn.Module, ids: Tensor, labels: Tensor, count: Any, label_smoothing: float = 0.0) -> Tensor:
    """Return the share of this process in a loss of rows that several processes compute together.

    Args:
        model: The model, which reads packed rows; or DDP's wrapper of it.
        ids: (B, T), padded on the right.
        labels: (B, T − 1): the label of each position but the last; −100 where there is no loss.
        count: What the sum of cross-entropies is divided by.
        label_smoothing: Share of a label's probability that is spread over all token ids.
    """
    part, options = own_part(ids, None)
    logits = without_soft_prompt(getattr(model, "module", model), model(**options).logits)
    labels = torch.nn.functional.pad(labels, (0, part.mask.shape[-1] - labels.shape[1]), value=-100)
    return language_model_loss(logits, labels[:, part.start : part.stop], count, label_smoothing)


def no_routers(kind: str) -> str:
    """Return the error line for a load-balancing loss of a model without experts.

    Args:
        kind: Name of the model's class.
    """
    return (
        f"sft.router_aux_loss_coef: transformers computes no load-balancing loss for a {kind}; set it to null, or "
        f"take a mixture of experts (Mixtral, Qwen3-MoE …)"
    )


def with_current_settings(trainer_class: type) -> type:
    """Resume with today's AdamW settings. transformers would take those of the checkpoint.

    The gradient scaler is resumed by our own checkpoint (`Scaling`), which also counts; and
    transformers does not save the random numbers of Apple's GPU.
    """

    class CurrentSettingsTrainer(trainer_class):
        def _save_scaler(self, output_dir: str) -> None:
            pass

        def _load_scaler(self, checkpoint: str | None) -> None:
            pass

        def _save_rng_state(self, output_dir: str) -> None:
            super()._save_rng_state(output_dir)
            if self.args.device.type == "mps":
                save_file({"state": devices.random_state("mps")}, Path(output_dir) / MPS_STATE)

        def _load_rng_state(self, checkpoint: str | None) -> None:
            super()._load_rng_state(checkpoint)
            path = Path(checkpoint or "") / MPS_STATE
            if self.args.device.type == "mps" and path.is_file():
                devices.set_random_state("mps", load_file(path)["state"])

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            with keep_optimizer_settings(self.optimizer):
                super()._load_optimizer_and_scheduler(checkpoint)

    return CurrentSettingsTrainer


def with_trained_weights(trainer_class: type) -> type:
    """Save only the weights that train, and load them again.

    transformers does so for peft's models; of others it saves everything.
    """

    class TrainedWeightsTrainer(trainer_class):
        def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: x.cpu().contiguous() for name, x in weights_of(self.model).tensors().items()}
            save_file(tensors, folder / TRAINED)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            weights_of(self.model if model is None else model).load(load_file(Path(resume_from_checkpoint) / TRAINED))

    return TrainedWeightsTrainer


def saving_on_rank_zero(trainer_class: type) -> type:
    """Let rank 0 save while the other ranks train on.

    transformers sums floating-point operations over all ranks when it saves: rank 0 would wait for
    ranks that do not save.
    """

    class RankZeroSavingTrainer(trainer_class):
        def store_flos(self) -> None:
            pass

    return RankZeroSavingTrainer


def with_groups(trainer_class: type) -> type:
    """Give the ranks of a group the same rows, and sum gradients over the groups."""
    from accelerate.data_loader import prepare_data_loader

    class GroupsTrainer(trainer_class):
        def get_train_dataloader(self) -> Any:
            def prepared(loader: Any, **_: Any) -> Any:
                rank, size = parallel.data_rank_and_size()
                return prepare_data_loader(
                    loader, self.accelerator.device, num_processes=size, process_index=rank, put_on_device=True
                )

            # accelerate would give each process rows of its own
            self.accelerator.prepare_data_loader = prepared
            return super().get_train_dataloader()

        def _clip_grad_norm(self, model: nn.Module) -> Any:
            # The loss is scaled for a mean over the ranks (PlainLossTrainer). Without tensor
            # parallelism, DDP or fsdp2 has taken it.
            summed = (
                []
                if parallel.arrangement().weights is None
                else [p for p in model.parameters() if p.grad is not None and not parallel.is_summed_by_fsdp(p)]
            )
            parallel.all_reduce_gradients(summed)
            for p in summed:
                p.grad.div_(parallel.rank_and_world_size()[1] // parallel.arrangement().tensor)
            return super()._clip_grad_norm(model)

    return GroupsTrainer


def with_whole_states(trainer_class: type) -> type:
    """Save the optimizer's state whole, and load this process's share of it.

    All processes take part in a save; what is written does not depend on how many there are.
    """
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

    class WholeStateTrainer(saving_on_rank_zero(trainer_class)):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            # transformers writes `self.optimizer.state_dict()`: here that of whole tensors
            state = self.optimizer.state_dict()
            state["state"] = {index: gather_tensors(tensors) for index, tensors in state["state"].items()}
            optimizer, self.optimizer = self.optimizer, _WithState(state)
            super()._save_optimizer_and_scheduler(output_dir)  # writes on rank 0 only
            self.optimizer = optimizer

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            # mapped from disk: no rank holds the whole state in memory
            load = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
            optimizer = self.optimizer.optimizer  # inside accelerate's
            optimizer.load_state_dict(_sharded_state(optimizer, load(Path(checkpoint) / OPTIMIZER_NAME)))
            self.lr_scheduler.load_state_dict(load(Path(checkpoint) / SCHEDULER_NAME))

    return WholeStateTrainer


def saving_shares(trainer_class: type) -> type:
    """Leave weights and optimizer to `TextHooks.after_save`, where each process saves its share."""

    class SharesSavingTrainer(saving_on_rank_zero(trainer_class)):
        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            if parallel.is_rank_zero():  # for the trainer's own state
                Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)

        # Nor is there anything else: hooks set the rate and seed dropout at each step.
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            pass

        def _save_rng_state(self, output_dir: str) -> None:
            pass

    return SharesSavingTrainer


def loading_shares(trainer_class: type) -> type:
    """Resume from a checkpoint whose weights and optimizer are in groups of ours, in any layout."""

    class SharesLoadingTrainer(trainer_class):
        saved: Checkpoint | None = None  # set before training; None: transformers' own files are read

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            if self.saved is None:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            elif not is_sharded(self.model):  # otherwise `shard_model` has loaded it
                weights_of(self.model).load(self.saved.stored(WEIGHTS))

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if self.saved is None:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            optimizer = self.optimizer.optimizer  # inside accelerate's
            shards = shard_optimizer_tensors(optimizer, self.saved.stored(OPTIMIZER))
            load_optimizer(optimizer, shards, self.saved.state[OPTIMIZER])

    return SharesLoadingTrainer


def with_stand_ins(trainer_class: type, layout: Layout) -> type:
    """Let the optimizer step stand-ins of the weights, as the layout asks.

    Args:
        trainer_class: The class.
        layout: What is sharded, and what lies in the CPU's memory.
    """
    from transformers import TrainerCallback

    class StepCallback(TrainerCallback):
        def __init__(self, stand_ins: StandIns) -> None:
            self.stand_ins = stand_ins

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.stand_ins.before_step()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.stand_ins.after_step()

    class StandInTrainer(with_whole_states(trainer_class)):
        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            optimizer = super().create_optimizer(model)
            self.add_callback(StepCallback(stand_in(optimizer, layout)))
            return optimizer

    return StandInTrainer


def with_sharding(trainer_class: type, layout: Layout) -> type:
    """Train a sharded model.

    transformers trains a model that we have sharded, but cannot save or resume it. What is here
    saves a single process (`launch.offload: all`), whole; several save by `saving_shares`.

    Args:
        trainer_class: The class.
        layout: When weights are freed, and where they lie.
    """

    from accelerate.utils import AutocastKwargs

    class ShardedTrainer(with_whole_states(trainer_class)):
        def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
            pass  # `shard_model` moves a layer at a time: the device may have no room for the whole

        @contextmanager
        def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
            # Around each micro-batch but the last. transformers' own asks for a setting of a model
            # that transformers itself has sharded.
            if layout.reduces_last:
                sum_gradients([unwrapped(self.model)], False)
            yield
            sum_gradients([unwrapped(self.model)], True)

        def shard_model(self, checkpoint: Path | None) -> None:
            """Keep this rank's shard of the weights.

            Args:
                checkpoint: The folder that transformers wrote, whose weights are taken unless
                    `saved` has them; None: they stay as they are.
            """
            saved = self.saved
            if saved is not None:
                checkpoint = None
            if checkpoint is not None and parallel.is_rank_zero():  # its weights are sent to the other ranks
                self._load_from_checkpoint(str(checkpoint))
            dtype = CAST.get(self.accelerator.mixed_precision)
            shard(self.model, self.args.device, mean=True, layout=layout, dtype=dtype)
            if saved is not None:
                weights_of(self.model).load(saved.stored(WEIGHTS))
            # autocast would cache a cast of each layer that is all-gathered: the whole model
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
            self.is_distributed_loading_by_transformers = True  # otherwise accelerate would wrap the model

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            if not is_sharded(self.model):  # `shard_model` has loaded it before
                super()._load_from_checkpoint(resume_from_checkpoint, model)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            # transformers writes `self.model`: a whole copy takes its place meanwhile
            sharded, self.model = self.model, publishable(self.model)  # all ranks: it all-gathers
            if parallel.is_rank_zero():
                super()._save(output_dir)
            self.model = sharded

        def _save_rng_state(self, output_dir: str) -> None:
            if parallel.is_rank_zero():  # every step seeds dropout (TextHooks.seed_dropout)
                super()._save_rng_state(output_dir)

    return ShardedTrainer


class _WithState:
    """Stand in for an optimizer with a given state."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        return self.state


def _sharded_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Take this rank's shard of a whole optimizer's state.

    Args:
        optimizer: The optimizer of the sharded parameters.
        state: state_dict() of an optimizer of whole parameters.
    """
    # One flat table, by the names that our own checkpoints use.
    flat = {f"{index}.{name}": x for index, tensors in state["state"].items() for name, x in tensors.items()}
    shards = shard_optimizer_tensors(optimizer, flat)
    by_index = {
        index: {name: shards[f"{index}.{name}"] for name in tensors} for index, tensors in state["state"].items()
    }
    return {**state, "state": by_index}

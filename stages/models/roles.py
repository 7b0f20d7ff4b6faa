"""Load the models of a PPO run, each in its role; frozen weights that are equal share memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from pipeline.errors import UserError
from stages.models.activations import offload_activations
from stages.models.adapters import AdapterSettings, is_adapted, load_on_trunk, share_frozen, unwrapped, with_adapter
from stages.models.compiled import Compiling
from stages.models.ensemble import load_ensemble
from stages.models.ensemble_folder import How
from stages.models.forward import head_is_linear
from stages.models.layout import Layout
from stages.models.loading import load_policy, load_scalar_model, load_tokenizer, new_reward_model
from stages.models.packing import can_pack
from stages.models.precision import CAST, cast_frozen
from stages.models.same_tokenizer import check_same_tokenizer, fit_rows
from stages.models.sharding import is_sharded, make_on_rank_zero, shard

CACHED = 2**19  # numbers of hidden state; measured from 256 to 576 per token, tests/benchmarks/LOG.md


def make_on_device(
    make: Callable[[], nn.Module],
    accelerator: Any,
    max_length: int,
    sharded: bool,
    layout: Layout | None = None,
    compiling: Compiling | None = None,
) -> nn.Module:
    """Make a model and move it to where it computes, whole or as this process's shard.

    Args:
        make: Returns the model, on the CPU.
        accelerator: Gives the device and what products are computed in.
        max_length: Longest row in tokens; decides whether the model can read packed rows.
        sharded: Whether each process keeps a shard; then all processes call this together.
        layout: When a sharded model's weights are freed, and where they lie; None: as `Layout()`.
        compiling: Whether its layers are compiled; None: they are not.

    Raises:
        UserError: They have to be compiled, and cannot.
    """

    def prepared() -> nn.Module:
        model = make()
        # Both try the model on a few tokens, and compare results in float32: before the cast.
        can_pack(model, max_length)
        head_is_linear(model)
        if accelerator.mixed_precision in CAST:
            cast_frozen(model, CAST[accelerator.mixed_precision])
        return model

    if not sharded:
        model = prepared().to(accelerator.device)
    else:
        model = make_on_rank_zero(prepared)
        shard(model, accelerator.device, layout=layout, dtype=CAST.get(accelerator.mixed_precision))
    if compiling is not None:
        compiling.apply(model, accelerator.autocast)
    return model


@dataclass(frozen=True)
class Roles:
    """The models of a PPO run, and what they compute with."""

    policy: nn.Module
    """Trains."""
    ref_policy: nn.Module | None
    """What KL is measured to: SFT. None: the policy with its adapter off."""
    reward_models: Mapping[str, nn.Module]
    """Name of a scorer → the model that scores. Frozen; each may be an Ensemble."""
    value_model: nn.Module | None
    """Trains; starts as the first reward model; without one, as the policy with a new head. None
    where advantages need no values."""
    tokenizer: Any
    """Tokenizer of all of them."""
    accelerator: Any
    """accelerate's Accelerator."""
    judge: nn.Module | None = None
    """Another reward model, for held-out prompts, that PPO does not climb; or None."""
    packed: bool = False
    """Whether all of them read packed rows."""
    reload: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)
    """Name of a trained role: a function that reloads the model it started from.

    Publication needs it, since frozen weights that were cast are written in float32."""
    layout: Layout = field(default_factory=Layout)
    """What else is sharded or offloaded while they train."""

    def most_tokens(self) -> int | None:
        """Return the most tokens that a micro-batch should have; see `most_tokens`."""
        return most_tokens(unwrapped(self.policy).config, self.accelerator.device.type)

    def spare(self) -> list[int] | None:
        """Return a micro-batch for passes whose result is not used; None without sharding.

        A sharded model gathers its layers in all processes at once, so a process that has no
        micro-batch left continues with this one (`parallel.padded_micro_batches`).
        """
        return [0] if is_sharded(self.policy) else None

    def trained(self) -> list[nn.Module]:
        """Return the models that train: the policy, and the value model if there is one."""
        return [self.policy] if self.value_model is None else [self.policy, self.value_model]

    def models(self) -> list[nn.Module]:
        """Return the models that are there."""
        candidates = (self.policy, self.ref_policy, *self.reward_models.values(), self.value_model, self.judge)
        return [model for model in candidates if model is not None]


def most_tokens(config: Any, device: str) -> int | None:
    """Return the tokens of a micro-batch beyond which a CPU gets slower; None elsewhere.

    Beyond that, the hidden states of a layer no longer fit in the CPU's cache.
    """
    return max(1, CACHED // config.get_text_config().hidden_size) if device == "cpu" else None


@dataclass(frozen=True)
class NamedFolder:
    """A model's folder, and what to call it in errors."""

    key: str
    """The setting that names the folder, as "ppo.reward_model"; or the stage that made it."""
    path: Path
    """The folder."""


@dataclass(frozen=True)
class RewardFolder:
    """Name the folder of a reward model that scores."""

    name: str
    """The name of the scorer."""
    folder: NamedFolder
    """The folder."""
    trunk: Path | None = None
    """The model that its adapter was trained on; None if that is not known.

    If it is known, reward and value model share it, with an adapter each."""
    others: tuple[Path, ...] = ()
    """Folders of more models that score with it as an ensemble."""
    ensemble: How = "mean"
    """How the scores of several are combined."""
    deviations: float = 1.0
    """For mean_minus_std: how many standard deviations are taken off."""


@dataclass(frozen=True)
class RoleFolders:
    """Name the folders that the models of a PPO run are loaded from."""

    policy: Path
    """The policy at its start."""
    reward_models: tuple[RewardFolder, ...] = ()
    """Reward models; the value model starts as the first of them."""
    judge: RewardFolder | None = None
    """The reward model that PPO does not climb, or None."""
    has_value_model: bool = True
    """Whether a value model is loaded."""
    value_continues: bool = True
    """Whether the value model continues the adapter of the first reward model.

    Otherwise rm and ppo train other adapters, and it gets one of its own, on that model's merged
    weights."""
    reference: Path | None = None
    """The reference; None: the policy at its start."""

    @property
    def trunk(self) -> Path | None:
        """The trunk that the value model's adapter is on; None if it is not known."""
        if not self.reward_models:
            return self.policy
        first = self.reward_models[0]
        return first.trunk if self.value_continues else first.folder.path


@dataclass(frozen=True)
class RoleOptions:
    """State how the models of a PPO run are loaded."""

    attn_implementation: str
    """transformers' attention kernel."""
    trust_remote_code: bool
    """Whether code that the model brings may run."""
    max_length: int
    """Longest row, in tokens."""
    gradient_checkpointing: bool = False
    """Whether policy and value model recompute activations in the backward pass."""
    sharded: bool = False
    """Whether each process keeps a shard of every model; then no two roles share weights."""
    layout: Layout = field(default_factory=Layout)
    """What else is sharded or offloaded."""
    compiling: Compiling | None = None
    """Whether decoder layers are compiled; None: they are not."""
    policy_seed: int = 0
    """Seed of the policy's adapter."""
    value_seed: int = 0
    """Seed of the value model's adapter, if it does not continue the reward model's."""


def load_roles(folders: RoleFolders, accelerator: Any, adapter: AdapterSettings, options: RoleOptions) -> Roles:
    """Load all models of a PPO run.

    Args:
        folders: Where they are.
        accelerator: What they compute with.
        adapter: Which weights of policy and value model train.
        options: How they are loaded.

    Raises:
        UserError: A folder cannot be loaded, or its tokenizer is not the policy's.
    """
    trust = {"trust_remote_code": options.trust_remote_code}
    loading = {"attn_implementation": options.attn_implementation, **trust}
    tokenizer = load_tokenizer(folders.policy, **trust)
    placed: list[nn.Module] = []

    def place(make: Callable[[], nn.Module]) -> nn.Module:
        # Shares with the models placed before, one at a time: the device never holds two trunks
        # more than it has to.
        model = make_on_device(
            make, accelerator, options.max_length, options.sharded, options.layout, options.compiling
        )
        if not options.sharded:
            share_frozen(model, placed)
        placed.append(model)
        return model

    def load_frozen(load: Callable, one: RewardFolder) -> nn.Module:
        """Load a reward model, or an ensemble of them, that does not train."""
        key = one.folder.key

        def load_member(path: Path) -> nn.Module:
            with named_in_errors(key, path):
                check_same_tokenizer(tokenizer, load_tokenizer(path, **trust), str(path))
                return fit_rows(load(path, **loading), ids).requires_grad_(False)

        paths = [one.folder.path, *one.others]
        return load_ensemble(paths, one.ensemble, lambda path: place(partial(load_member, path)), one.deviations)

    def load_scalar(trunk: Path | None) -> Callable:
        """Return what loads a scalar model whose adapter is on a trunk."""
        return partial(load_on_trunk, trunk=trunk if adapter.method is not None else None, bits=adapter.bits)

    start = None if adapter.start is None else adapter

    def load_value_start(trains: bool = False) -> nn.Module:
        """Load the first reward model; without one, the policy with a new head."""
        if not folders.reward_models:
            return fit_rows(new_reward_model(folders.policy, seed=options.value_seed, **loading), ids)
        first = folders.reward_models[0]
        more = {"trains": True, "start": start} if trains else {}
        trunk = first.trunk if folders.value_continues else None
        return fit_rows(load_scalar(trunk)(first.folder.path, **more, **loading), ids)

    def load_value_model() -> nn.Module:
        model = load_value_start(trains=True)
        if is_adapted(model):
            return model
        return with_adapter(model, adapter, scalar=True, seed=options.value_seed)

    def load_start() -> nn.Module:
        return load_policy(folders.policy, **loading)

    policy = place(lambda: with_adapter(load_start(), adapter, seed=options.policy_seed, exact=True))
    ids = unwrapped(policy).get_input_embeddings().weight.shape[0]  # all that it can sample

    def load_reference() -> nn.Module:
        path = folders.reference or folders.policy
        model = load_policy(path, **loading)
        if path != folders.policy:
            check_same_tokenizer(load_tokenizer(path, **trust), tokenizer, str(folders.policy))
            if model.get_input_embeddings().weight.shape[0] != ids:
                raise UserError(f"{folders.policy}: has {ids} rows of embeddings, not as many as {path}; name another")
        return model.requires_grad_(False)

    ref_policy = None if is_adapted(policy) else place(load_reference)
    reward_models = {one.name: load_frozen(load_scalar(one.trunk), one) for one in folders.reward_models}
    value_model = place(load_value_model) if folders.has_value_model else None
    judge = None if folders.judge is None else load_frozen(load_scalar_model, folders.judge)
    for model in [policy] if value_model is None else [policy, value_model]:
        if options.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if options.layout.offload_activations:
            offload_activations(model)
    reload = {"policy": load_start, "value_model": load_value_start}
    roles = (policy, ref_policy, reward_models, value_model, tokenizer, accelerator, judge)
    return Roles(*roles, reload=reload, layout=options.layout)


@contextmanager
def named_in_errors(key: str, folder: Path) -> Iterator[None]:
    """Turn the errors of loading a reward model's folder into a UserError that names the setting.

    Args:
        key: The setting that names the folder.
        folder: The folder.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        problem = f"{folder} cannot be loaded ({str(error).splitlines()[0].rstrip(': ')})"
        raise UserError(f"{key}: {problem}; give the model/ folder of a reward model") from error

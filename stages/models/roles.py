"""The models of a PPO run, each in its role; what does not train is in memory once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from pipeline.errors import UserError
from stages.models.adapters import is_adapted, load_on_trunk, plain, share_frozen, with_adapter
from stages.models.ensemble import load_reward_model
from stages.models.ensemble_folder import How
from stages.models.forward import head_is_linear
from stages.models.loading import load_policy, load_scalar_model, load_tokenizer, same_tokenizer
from stages.models.packing import can_pack
from stages.models.precision import cast_frozen
from stages.models.same_tokenizer import fit_rows
from stages.models.sharding import is_sharded, made_by_first, shard

CACHED = 2**19  # numbers; measured from 256 to 576 a token, tests/benchmarks/LOG.md


def settled(make: Callable[[], torch.nn.Module], accelerator, max_length: int, sharded: bool) -> torch.nn.Module:
    """make() where it computes: on the accelerator's device or, sharded, in parts. How it can be read is found out in
    float32; then what does not train is held in the dtype that it computes in."""

    def tried() -> torch.nn.Module:
        model = make()
        can_pack(model, max_length)
        head_is_linear(model)
        if accelerator.mixed_precision == "bf16":
            cast_frozen(model, torch.bfloat16)
        return model

    if not sharded:
        return tried().to(accelerator.device)
    model = made_by_first(tried)
    shard(model, accelerator.device)
    return model


@dataclass(frozen=True)
class Roles:
    """The models, what they share, and where they compute.

    ref_policy None: the policy with its adapter off. judge: another reward model that only looks on, or None. packed:
    whether all of them read packed rows. reward_model may be an Ensemble. again: name → function that loads the
    original model a trained one started from (its frozen weights are needed in float32 at publication). engine: what
    samples in the place of the policy (a `Vllm`), or None.
    """

    policy: torch.nn.Module
    ref_policy: torch.nn.Module | None
    reward_model: torch.nn.Module
    value_model: torch.nn.Module
    tokenizer: object
    accelerator: object
    judge: torch.nn.Module | None = None
    packed: bool = False
    again: dict[str, Callable] = field(default_factory=dict)
    engine: object | None = None

    def most_tokens(self) -> int | None:
        return most_tokens(plain(self.policy).config, self.accelerator.device.type)

    def spare(self) -> list[int] | None:
        """Rows for a forward that only keeps in step with other processes (`parallel.padded_micro_batches`), where they share
        weights."""
        return [0] if is_sharded(self.policy) else None

    def models(self) -> list[torch.nn.Module]:
        every = (self.policy, self.ref_policy, self.reward_model, self.value_model, self.judge)
        return [model for model in every if model is not None]


def most_tokens(config, device: str) -> int | None:
    """Tokens of a micro-batch beyond which a CPU only gets slower: their hidden states leave its cache."""
    return max(1, CACHED // config.get_text_config().hidden_size) if device == "cpu" else None


def load_roles(
    start: Path,
    reward_model: tuple[str, Path],
    ensemble: How,
    judge: tuple[str, Path] | None,
    accelerator,
    *,
    trunk: Path | None,
    adapter: dict,
    policy_seed: int,
    value_seed: int,
    gradient_checkpointing: bool,
    attn_implementation: str,
    trust_remote_code: bool,
    max_length: int,
    sharded: bool = False,
) -> Roles:
    """Policy and reference from the folder `start`; the value model begins as the reward model. reward_model, judge:
    (the setting that names it, folder). ensemble: how several reward models score as one. trunk: the model that the
    reward model's adapter was trained on, if that is known: then both stand on it, adapters apart. sharded: each
    process keeps its part of every model, and no two roles share."""
    options = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(start, trust_remote_code=trust_remote_code)
    placed: list = []

    def place(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """On its device, where it shares what it can with those before it: at no time are two trunks too many there."""
        model = settled(make, accelerator, max_length, sharded)
        if not sharded:
            share_frozen(model, placed)
        placed.append(model)
        return model

    def scorer(load: Callable, key: str, folder: Path) -> torch.nn.Module:
        """The reward model that stays as it is in the folder that the setting `key` names."""
        with blaming(key, folder):
            same_tokenizer(tokenizer, load_tokenizer(folder, trust_remote_code=trust_remote_code), str(folder))

        def member(path: Path) -> torch.nn.Module:
            with blaming(key, folder):
                return fit_rows(load(path, **options), ids).requires_grad_(False)

        return load_reward_model(folder, ensemble, lambda path: place(partial(member, path)))

    on = {"trunk": trunk if adapter["method"] is not None else None, "bits": adapter.get("bits")}
    scalar = partial(load_on_trunk, **on)

    def value_start() -> torch.nn.Module:
        model = fit_rows(scalar(reward_model[1], trains=True, **options), ids)
        return model if is_adapted(model) else with_adapter(model, **adapter, scalar=True, seed=value_seed)

    policy = place(lambda: with_adapter(load_policy(start, **options), **adapter, seed=policy_seed))
    ids = plain(policy).get_input_embeddings().weight.shape[0]  # what it can sample
    ref_policy = None if is_adapted(policy) else place(lambda: load_policy(start, **options).requires_grad_(False))
    rewards = scorer(scalar, *reward_model)
    value_model = place(value_start)
    looks_on = None if judge is None else scorer(load_scalar_model, *judge)
    if gradient_checkpointing:
        policy.activation_checkpointing_enable()
        value_model.activation_checkpointing_enable()
    again = {
        "policy": partial(load_policy, start, **options),
        "value_model": lambda: fit_rows(scalar(reward_model[1], **options), ids),
    }
    return Roles(policy, ref_policy, rewards, value_model, tokenizer, accelerator, looks_on, again=again)


@contextmanager
def blaming(key: str, folder: Path) -> Iterator[None]:
    """Inside, what is wrong with a reward model's folder that the setting `key` names is a UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        what = f"{folder} cannot be loaded ({str(error).splitlines()[0].rstrip(': ')})"
        raise UserError(f"{key}: {what}; give the model/ folder of a reward model") from error

"""Load what PPO starts from: models, prompts and pretraining rows."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.documents import wrap_documents
from data.records import prompt_key
from data.streams import derive_seed
from data.streams import held_out as hold_out
from pipeline.errors import UserError
from pipeline.stage import Source
from stages.models.roles import Roles, load_roles
from stages.settings.ppo import Config
from stages.shared.inputs import LengthLimit, fit_prompts, load_placed_records, split_documents
from stages.shared.runtime import Runtime, can_pack_rows
from stages.training.session import Session


@dataclass(frozen=True)
class ModelFolders:
    """Where the models of a run are loaded from."""

    start: Path
    """Folder of the model that policy and reference start as."""
    reward_model: tuple[str, Path]
    """The setting or stage that names the reward model, for error lines, and its folder."""
    judge: tuple[str, Path] | None
    """The same for a reward model that PPO does not climb; None: there is none."""
    trunk: Path | None
    """The model that the reward model's adapter was trained on; None if it is not known."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out prompt."""

    prompt: Any
    """Text or messages, as the file has it."""
    ids: list[int]
    """The same as token ids."""


def start_folder(sft: Path, has_ppo_init: bool) -> Path:
    """Return the folder of sft's artifact that PPO starts from: ppo_init/ if sft trains one."""
    return sft / ("ppo_init" if has_ppo_init else "model")


def model_folders(start: Path, inputs: dict[str, Path], named: dict[str, Path]) -> ModelFolders:
    """Return where the models of a run are.

    Args:
        start: Folder of the model that policy and reference start as.
        inputs: Folders of the upstream stages.
        named: Folders of reward models that the settings name, by setting.
    """
    climbed, watching = "ppo.reward_model", "ppo.held_out_reward_model"
    judge = (watching, named[watching]) if watching in named else None
    if climbed in named:
        return ModelFolders(start, (climbed, named[climbed]), judge, trunk=None)
    return ModelFolders(start, ("rm", inputs["rm"] / "model"), judge, trunk=inputs["sft"] / "model")


def load_models(session: Session, c: Config, folders: ModelFolders, runtime: Runtime, adapter: dict[str, Any]) -> Roles:
    """Load policy, reference, reward model and value model, each on its device.

    Args:
        session: The run, for its seed and for a line if rows cannot be packed.
        c: The stage's settings.
        folders: Where the models are.
        runtime: How the models compute.
        adapter: Keyword arguments of `with_adapter`.
    """
    roles = load_roles(
        folders.start,
        folders.reward_model,
        c.reward_ensemble,
        folders.judge,
        runtime.accelerator,
        trunk=folders.trunk,
        adapter=adapter,
        policy_seed=derive_seed(session.seed, "policy"),
        value_seed=derive_seed(session.seed, "value"),
        gradient_checkpointing=runtime.gradient_checkpointing,
        attn_implementation=runtime.attention,
        trust_remote_code=runtime.trust_remote_code,
        max_length=c.max_length,
        sharded=runtime.sharded,
    )
    return replace(roles, packed=can_pack_rows(session, roles.models(), c.max_length))


def load_prompts(session: Session, c: Config, tokenizer: Any, source: Source) -> tuple[list[list[int]], list[HeldOut]]:
    """Load the prompts, and split off the held-out ones by their text.

    Args:
        session: The run, for a line on the lengths.
        c: The stage's settings.
        tokenizer: The tokenizer with its chat template.
        source: Where the prompts are.

    Returns:
        Training prompts as token ids, and held-out prompts.

    Raises:
        UserError: If fewer than two prompts are left within the limits.
    """
    records, places = load_placed_records("prompts", source)
    if len(records) < 2:
        raise UserError([f"data.prompts: {len(records)} prompt; PPO needs at least 2, one of them to hold out"])
    limit = LengthLimit(c.max_length, c.on_too_long, session.stage)
    prompts = (r.prompt for r in records)
    kept, ids, report = fit_prompts(tokenizer, prompts, places, limit, c.response_length)
    session.say(report.line("prompts"))
    keys = [prompt_key(records[i].prompt) for i in kept]
    train, held = hold_out(keys, 0.0, least=max(1, min(c.eval_prompts, len(ids) // 5)))
    if not held:
        raise UserError(
            [
                f"data.prompts: one prompt is left within {c.max_length - c.response_length} tokens; PPO needs at "
                f"least 2, one of them to hold out"
            ]
        )
    return [ids[i] for i in train], [HeldOut(records[kept[i]].prompt, ids[i]) for i in held]


def load_ptx_rows(c: Config, tokenizer: Any, source: Source, validation_fraction: float) -> list[list[int]]:
    """Load the training part of the documents as packed pretraining rows of ptx_length tokens.

    Args:
        c: The stage's settings.
        tokenizer: The tokenizer.
        source: Where the documents are.
        validation_fraction: The fraction of documents that is held out, in all stages.

    Raises:
        UserError: If the documents do not fill one row.
    """
    train, _ = split_documents(source, validation_fraction)
    rows = wrap_documents(tokenizer, train, length=c.ptx_length)
    if not rows:
        raise UserError(
            [
                f"data.documents: fewer than ppo.ptx_length = {c.ptx_length} tokens of pretraining text; "
                f"lower it, give more text, or set ppo.ptx_coef: 0"
            ]
        )
    return rows

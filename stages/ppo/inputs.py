"""Load what PPO starts from: models, prompts and pretraining rows."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from data.documents import PackedRows
from data.prompt_rows import PromptRows
from data.streams import Stream, derive_seed
from pipeline.errors import UserError
from stages.models.adapters import AdapterSettings
from stages.models.ensemble import load_ensemble, members
from stages.models.ensemble_folder import others_of
from stages.models.loading import load_scalar_model, load_tokenizer
from stages.models.packing import can_pack
from stages.models.roles import NamedFolder, RewardFolder, RoleFolders, RoleOptions, Roles, load_roles, make_on_device
from stages.models.same_tokenizer import difference_of
from stages.ppo.prompts import drawn_prompt
from stages.rollouts.rollout import DrawnPrompt
from stages.scorers.text_reader import TextReader, text_reader_of
from stages.settings.experiment import Experiment
from stages.settings.peft import peft_of
from stages.settings.ppo import PPOSettings, has_value_model, named_rewards
from stages.settings.reward_base import has_own_base, trunk_stage
from stages.settings.scorers.model import ModelScorer
from stages.shared.encoded_documents import load_training_text
from stages.shared.inputs import GivenText
from stages.shared.row_cache import RowCache
from stages.shared.runtime import Runtime, can_pack_rows, compiling_of, cut_rows_of
from stages.training.session import Session

LONGEST = 2**16
"""Tokens of a row, where a reward model does not state its context."""


@dataclass(frozen=True)
class TextRewardModel:
    """The reward model of rm, where its tokenizer is not the policy's."""

    model: nn.Module
    """The model, or an Ensemble, on its device. Frozen."""
    reader: TextReader
    """How it reads texts."""
    packed: bool
    """Whether it reads packed rows."""


@dataclass(frozen=True)
class Streams:
    """The prompts and pretraining rows of a run, drawn in another order in each epoch."""

    train: PromptRows
    """Training prompts."""
    prompts: Stream
    """Draws indices of them."""
    ptx_rows: Sequence[list[int]]
    """Packed pretraining rows; empty for plain PPO."""
    ptx: Stream | None
    """Draws indices of them; None for plain PPO."""

    def drawn(self, indices: Iterable[int]) -> list[DrawnPrompt]:
        """Return training prompts by their indices."""
        return [drawn_prompt(self.train[i], i) for i in indices]

    def next_texts(self, count: int) -> list[list[int]]:
        """Return the next pretraining rows."""
        return [self.ptx_rows[i] for i in self.ptx.take(count)]


def start_folder(sft: Path, has_ppo_init: bool) -> Path:
    """Return the folder of sft's artifact that PPO starts from: ppo_init/ if sft trains one."""
    return sft / ("ppo_init" if has_ppo_init else "model")


def reads_ids_of(settings: ModelScorer, policy: Path, *, trust_remote_code: bool) -> bool:
    """Return whether reward models read the policy's own ids: one logit, and its tokenizer.

    Args:
        settings: Names their folders.
        policy: Folder of the policy.
        trust_remote_code: Whether code that the models bring may run.
    """
    if settings.hub_id() is not None or settings.heads is not None:
        return False
    trust = {"trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(policy, **trust)
    for folder in settings.folders():
        if logits_in(folder) != 1 or difference_of(tokenizer, load_tokenizer(folder, **trust)) is not None:
            return False
    return True


def logits_in(folder: Path) -> int:
    """Return how many logits a reward model has, as transformers reads its config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)


def own_text_reader(
    start: Path, inputs: dict[str, Path], experiment: Experiment, *, trust_remote_code: bool
) -> TextReader | None:
    """Return how the reward model of rm reads texts; None if it reads ids, or does not score.

    Args:
        start: Folder of the model that the policy starts as.
        inputs: Folders of the upstream stages.
        experiment: All settings.
        trust_remote_code: Whether code that the models bring may run.
    """
    if not (has_own_base(experiment) and "rm" in inputs):
        return None
    trust = {"trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(start, **trust)
    return text_reader_of(inputs["rm"] / "model", tokenizer, experiment.rm.on_too_long, **trust)


def load_text_model(
    inputs: dict[str, Path], settings: ModelScorer, runtime: Runtime, reader: TextReader
) -> TextRewardModel:
    """Load the reward model of rm, which reads texts, whole on each process.

    Args:
        inputs: Folders of the upstream stages.
        settings: How the models of an ensemble score.
        runtime: How the models compute.
        reader: How it reads texts.
    """
    folder = inputs["rm"] / "model"
    length = reader.context or LONGEST

    def load(path: Path) -> nn.Module:
        def make() -> nn.Module:
            return load_scalar_model(path, **runtime.load_options()).requires_grad_(False)

        return make_on_device(make, runtime.accelerator, length, sharded=False)

    model = load_ensemble([folder, *others_of(folder)], settings.how, load, settings.deviations)
    return TextRewardModel(model, reader, all(can_pack(member, length) for member in members(model)))


def text_reward_line(has_value_model: bool) -> str:
    """Return the line that says how a reward model with another tokenizer is used.

    Args:
        has_value_model: Whether a value model is trained.
    """
    line = "the reward model has a tokenizer of its own: it reads the responses as text"
    return f"{line}; the value model starts as the policy with a new head" if has_value_model else line


def role_folders(
    start: Path,
    inputs: dict[str, Path],
    experiment: Experiment,
    *,
    reads_texts: bool = False,
    trust_remote_code: bool = False,
) -> RoleFolders:
    """Return where the models of a run are.

    Args:
        start: Folder of the reference, and of the policy unless ppo.start_from names another.
        inputs: Folders of the upstream stages.
        experiment: All settings; they name reward models.
        reads_texts: Whether the reward model of rm has another tokenizer, and so no role here.
        trust_remote_code: Whether code that the models bring may run.
    """
    c, reward_models = experiment.ppo, []
    adapters = [peft_of(experiment, stage) for stage in ("rm", "ppo")]
    same_weights = len({None if peft is None or peft.method != "qlora" else peft.bits or 4 for peft in adapters}) == 1
    for key, name, settings in named_rewards(c):
        if not isinstance(settings, ModelScorer):
            continue
        if settings.is_own() and reads_texts:
            continue
        if settings.is_own():
            own = inputs["rm"] / "model"
            trunk = (
                inputs[trunk_stage(experiment)] / "model" if same_weights else None
            )  # rm may have quantized it, or ppo
            folder, others = NamedFolder("rm", own), others_of(own)
        elif c.rewards is None or reads_ids_of(settings, start, trust_remote_code=trust_remote_code):
            first, *others = settings.folders()
            folder, trunk = NamedFolder(key, first), None
        else:
            continue  # it reads texts: `stages/scorers/text_model.py`
        how = {"ensemble": settings.how, "deviations": settings.deviations}
        reward_models.append(RewardFolder(name, folder, trunk, tuple(others), **how))
    judge = None
    if c.held_out_reward_model is not None:
        path = Path(c.held_out_reward_model).expanduser()
        named = NamedFolder("ppo.held_out_reward_model", path)
        judge = RewardFolder("held_out", named, others=tuple(others_of(path)))
    is_own = bool(reward_models) and reward_models[0].folder.key == "rm"
    return RoleFolders(
        policy=start if c.start_from is None else Path(c.start_from).expanduser(),
        reward_models=tuple(reward_models),
        judge=judge,
        has_value_model=has_value_model(c),
        value_continues=not is_own or adapters[0] == adapters[1],
        reference=start,
    )


def load_models(
    session: Session, folders: RoleFolders, runtime: Runtime, adapter: AdapterSettings, max_length: int
) -> Roles:
    """Load policy, reference, reward model and value model, each on its device.

    Args:
        session: The run, for its seed and for a line if rows cannot be packed.
        folders: Where the models are.
        runtime: How the models compute.
        adapter: Which weights of policy and value model train.
        max_length: The longest prompt and response together, in tokens.
    """
    options = RoleOptions(
        attn_implementation=runtime.attention,
        trust_remote_code=runtime.trust_remote_code,
        max_length=max_length,
        gradient_checkpointing=runtime.gradient_checkpointing,
        sharded=runtime.sharded,
        layout=runtime.layout,
        compiling=compiling_of(runtime, session),
        policy_seed=derive_seed(session.seed, "policy"),
        value_seed=derive_seed(session.seed, "value"),
    )
    roles = load_roles(folders, runtime.accelerator, adapter, options)
    for model in roles.models():
        if model is not roles.judge:  # which scores on rank 0 alone
            for member in members(model):
                cut_rows_of(member)
    return replace(roles, packed=can_pack_rows(session, roles.models(), max_length))


def load_ptx_rows(c: PPOSettings, tokenizer: Any, given: GivenText, fraction: float, cache: RowCache) -> PackedRows:
    """Load the training part of the documents as packed pretraining rows of ptx_length tokens.

    Args:
        c: The stage's settings.
        tokenizer: The tokenizer.
        given: Where the documents are.
        fraction: The fraction of documents that is held out, in all stages.
        cache: Where their ids are kept.

    Raises:
        UserError: If the documents do not fill one row.
    """
    packed = load_training_text(given, fraction, tokenizer, cache, c.ptx_length)
    if not packed:
        raise UserError(
            [
                f"data.documents: fewer than ppo.ptx_length = {c.ptx_length} tokens of pretraining text; "
                f"lower it, give more text, or set ppo.ptx_coef: 0"
            ]
        )
    return packed

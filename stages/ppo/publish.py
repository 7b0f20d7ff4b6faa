"""Publish what PPO has trained: model/, value_model/ and, if asked for, model_ema/."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pipeline.launch import parallel
from stages.models.adapters import is_adapted, unwrapped
from stages.models.families import is_own_head
from stages.models.roles import RoleFolders, Roles
from stages.models.sharding import is_sharded, publishable
from stages.models.soft_prompts import trains_soft_prompt
from stages.ppo.state import Run
from stages.shared.cards import ANSWER, ModelCard
from stages.shared.provenance import Provenance
from stages.shared.publishing import adapter_base, publish_model


@dataclass(frozen=True)
class Publication:
    """The facts that the cards of all published models share."""

    provenance: Provenance
    """What the models were made of."""
    folders: RoleFolders
    """Where the run's models were loaded from."""
    temperature: float
    """The temperature that the policy was trained to be sampled at."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What was measured of the published policy."""


def publish(publication: Publication, roles: Roles, run: Run, keep_best: bool, step: int) -> None:
    """Publish the policy and the value model, and the average of the policies if one was kept.

    Args:
        publication: What their cards say.
        roles: The models.
        run: The run at its end.
        keep_best: Publish the policy of the best evaluation in place of the last one.
        step: Updates of the run.
    """
    policy, average = run.learners.policy, run.learners.average
    if average.decay is not None:
        publish_average(publication, roles, run)
    if keep_best and run.best.step != step:
        policy.load(run.best.tensors)
    publish_policy(publication, publishable(roles.policy, roles.reload["policy"]), roles.tokenizer)
    if roles.value_model is not None:
        publish_value_model(publication, publishable(roles.value_model, roles.reload["value_model"]), roles.tokenizer)


def publish_policy(publication: Publication, model: nn.Module, tokenizer: Any) -> None:
    """Publish model/, the trained policy."""
    folder = publication.provenance.publish / "model"
    card = ModelCard(
        what="a policy trained by PPO-ptx",
        use=ANSWER,
        figures=publication.figures,
        source=publication.folders.policy,
        adapter=adapter_base(publication.provenance, folder, publication.folders.policy),
        own_head=is_own_head(unwrapped(model)),
        is_scalar=False,
    )
    publish_model(publication.provenance, model, tokenizer, folder, card, publication.temperature)


def publish_average(publication: Publication, roles: Roles, run: Run) -> None:
    """Publish model_ema/: the policy with the average of its weights.

    The policy is left as it was, but on the CPU, which has room for two more sets of its weights.
    """
    policy = run.learners.policy
    if not is_sharded(roles.policy):
        if not parallel.is_rank_zero():
            return
        roles.policy.cpu()
    last_weights = {name: tensor.clone() for name, tensor in policy.tensors().items()}
    policy.load(run.learners.average.tensors)
    model = publishable(roles.policy, roles.reload["policy"])
    if model is roles.policy and (is_adapted(model) or trains_soft_prompt(model)):
        model = copy.deepcopy(model)  # saving merges the adapter and removes it
    folder = publication.provenance.publish / "model_ema"
    card = ModelCard(
        what="the average of PPO's policies",
        use=ANSWER,
        source=publication.folders.policy,
        adapter=adapter_base(publication.provenance, folder, publication.folders.policy),
        own_head=is_own_head(unwrapped(model)),
        is_scalar=False,
    )
    publish_model(publication.provenance, model, roles.tokenizer, folder, card, publication.temperature)
    policy.load(last_weights)


def publish_value_model(publication: Publication, model: nn.Module, tokenizer: Any) -> None:
    """Publish value_model/."""
    folder = publication.provenance.publish / "value_model"
    trunk = publication.folders.trunk
    base: tuple[str, str | None] | None = adapter_base(
        publication.provenance, folder, trunk or publication.folders.policy
    )
    if base is not None and trunk is None:
        base = ("", None)  # its adapter is on a reward model from outside the experiment
    card = ModelCard(
        what="PPO's value model",
        source=publication.folders.policy,
        adapter=base,
        own_head=is_own_head(unwrapped(model)),
        is_scalar=True,
    )
    publish_model(publication.provenance, model, tokenizer, folder, card)

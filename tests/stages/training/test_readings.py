"""Test that a step reads its figures from the device at once, however many micro-batches it has."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data.groups import PromptGroup
from stages import dpo
from stages.models import forward
from stages.models.packing import can_pack
from stages.models.roles import Roles
from stages.ppo.options import update_options
from stages.ppo.update import Batch, Learners, Rates, ppo_gradients, ptx_gradient, update
from stages.rollouts.rollout import Rollout
from stages.settings.dpo import DPOSettings
from stages.settings.ppo import PPOSettings
from stages.settings.rm import RMSettings
from stages.shared.runtime import Runtime
from stages.training.loop import Task, accumulate_gradients, read_and_step
from stages.training.ranking import RankingModel, ranking_task
from stages.training.readings import Share, read_all, read_sums
from stages.training.scaling import Scaling
from stages.training.ties import tie_model
from stages.training.trainee import Average, Skips, make_trainee
from tests.builders import IDS, PAD, tiny_causal, tiny_scalar
from tests.host_reads import HostReads

TEXTS = [[5, 9, 2, 7, 3], [7, 7, 4, 2, 9]]
PROMPTS = [[5, 9, 2], [5, 9, 2], [7], [7], [3, 3, 8, 19], [3, 3, 8, 19]]
RESPONSES = [[4, 1], [9, 9, 1], [3, 1], [6, 5, 4, 1], [8, 1], [2, 2, 1]]
GROUPS = [
    PromptGroup([5, 9, 2], [[4, 1], [9, 9, 1], [3, 1]], (1, 2, 2), labels=((True, False, None),)),
    PromptGroup([7], [[6, 5, 1], [2, 1]], (2, 1), labels=((False, True),)),
    PromptGroup([3, 3, 8, 19], [[8, 1], [2, 2, 1], [4, 4, 4, 1]], (3, 1, 2), labels=((False, True, True),)),
    PromptGroup([6], [[7, 1], [9, 1]], (1, 1), labels=((True, False),)),
]


def accelerator(device="cpu"):
    return SimpleNamespace(device=torch.device(device), autocast=nullcontext, backward=lambda loss: loss.backward())


def roles_of(packed=True) -> Roles:
    """Return policy and value model, tried on the CPU as when they are loaded."""
    policy, value_model = tiny_causal(), tiny_scalar(seed=1)
    if packed:
        assert all([can_pack(model, 64) for model in (policy, value_model)])
    assert forward.head_is_linear(policy)
    return Roles(policy, None, {}, value_model, IDS, accelerator(), packed=packed)


def batch_of(device="cpu") -> Batch:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([len(y) for y in RESPONSES])
    mask = torch.arange(4) < lengths.unsqueeze(-1)
    numbers = [torch.randn(mask.shape, generator=generator) for _ in range(4)]
    on_device = [x.to(device) for x in (mask, *numbers)]
    mask, logprobs, values, advantages, returns = on_device
    rest = {"ref_logprobs": logprobs, "entropy": values, "scores": values[:, 0], "finished": mask[:, 0]}
    rollout = Rollout(PROMPTS, RESPONSES, [0, 0, 1, 1, 2, 2], mask, logprobs, values=values, **rest)
    return Batch(rollout, advantages, returns)


def options_of(micro):
    sizes = {"total_episodes": 6, "batch_size": 6, "mini_batch_size": 6, "per_device_train_batch_size": micro}
    more = {"samples_per_prompt": 2, "num_ppo_epochs": 1, "response_length": 4, "ptx_coef": 2.0, "ptx_ratio": 0.5}
    return update_options(PPOSettings(**sizes, **more), seed=3)


def reads_of_an_update(micro, packed=True):
    roles = roles_of(packed)
    models = (("policy", roles.policy), ("value_model", roles.value_model))
    trainees = [make_trainee(name, model, learning_rate=1e-2, max_grad_norm=1.0) for name, model in models]
    learners = Learners(*trainees, Average(0.9), Skips(0))
    learners.average.start(learners.policy)
    arguments = {"rates": Rates(1e-2, 1e-2), "next_texts": lambda rows: TEXTS, "say": print}
    update(roles, learners, batch_of(), options_of(micro), step=1, **arguments)  # AdamW makes its moments
    with HostReads() as reads:
        figures = update(roles, learners, batch_of(), options_of(micro), step=2, **arguments)
    assert "grad_cosine" in figures
    return reads.counted


def test_an_update_reads_once_a_step_whatever_the_micro_batches():
    """The other list is that of the episodes, whose order is drawn on the host."""
    assert reads_of_an_update(6) == reads_of_an_update(1) == {"tolist": 2}


def test_with_padded_rows_only_transformers_reads():
    """It looks once a pass whether rows are packed; of the passes here the texts' are without."""
    counted = reads_of_an_update(6, packed=False)
    assert counted["tolist"] == 2 and counted.keys() == {"tolist", "_local_scalar_dense"}


def test_a_gradient_can_be_computed_on_a_device_that_holds_no_numbers(monkeypatch):
    """On the device "meta" every read of a number, and every shape that depends on one, raises."""
    # which has no autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    roles = roles_of()
    for model in (roles.policy, roles.value_model):
        model.to("meta")
    roles = replace(roles, accelerator=accelerator("meta"))
    trainee = make_trainee("policy", roles.policy, learning_rate=1e-2, max_grad_norm=1.0)
    parts = ppo_gradients(roles, batch_of("meta"), list(range(6)), options_of(2))
    ptx = ptx_gradient(roles, trainee, TEXTS, options_of(2))
    assert len(parts) == 3 and ptx.norm.device.type == "meta"
    assert all(p.grad is not None for p in roles.policy.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        read_sums(parts)


def preference_task(kind, micro, device="cpu"):
    """Return a model, and the task of its training on GROUPS."""
    runtime = Runtime("cpu", "float32", "sdpa", False, False, False, accelerator(), packed=True)
    if kind.startswith("rm"):
        model = tiny_scalar()
        assert can_pack(model, 64)
        loss = {"rm": "sigmoid", "rm ties": "davidson"}[kind]
        config = RMSettings(per_device_train_batch_size=micro, loss_type=loss)
        ties = tie_model(config, [loss], GROUPS, [], "cpu")
        ranker = RankingModel(model, PAD, runtime, ties)
        return model, ranking_task(config, ranker, GROUPS, GROUPS, [0, 1, 2, 3])
    model = tiny_causal()
    assert can_pack(model, 64) and forward.head_is_linear(model)
    config = DPOSettings(per_device_train_batch_size=micro, loss_type=kind)
    kto = dpo.KTO(config, model, PAD, runtime, None, kl=0.1) if kind == "kto" else None
    objective = dpo.Objective(config, model, PAD, runtime, kto=kto)
    paired = [True, True, True, False]

    def loss(rows, batch):
        members = [GROUPS[i] for i in rows]
        reference = [torch.arange(len(group.responses)) - 9.0 for group in members]
        return objective.micro_batch(members, reference, dpo.counts_of(batch, GROUPS, paired, kto is not None))

    parts = [[0, 1, 2, 3]] if micro == 4 else [[0], [1], [2], [3]]
    return model, Task([0, 1, 2, 3], 4, [9, 6, 13, 5], lambda rows: parts, loss, lambda poll: {})


@pytest.mark.parametrize("kind", ["rm", "rm ties", "sigmoid", "kto"])
def test_a_step_on_rankings_reads_once(kind):
    """rm and dpo, with one micro-batch and with four."""
    found = []
    for micro in (4, 1):
        model, task = preference_task(kind, micro)
        trainee = make_trainee("model", model, learning_rate=1e-3, max_grad_norm=1.0)
        for step in (1, 2):
            with HostReads() as reads:
                parts = accumulate_gradients(accelerator(), trainee, task, [0, 1, 2, 3], collective=False)
                figures = read_and_step(trainee, Scaling(), parts, 1e-3, step)
        read = {"tolist": 1}
        if kind == "rm ties":  # whose pairs are counted on the host, before they go to the device
            read |= {"bincount": len(parts), "repeat_interleave": len(parts)}
        assert len(parts) == 4 // micro and reads.counted == read, (kind, micro)
        found.append(figures)
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6) and len(found[0]) >= 3


def test_numbers_are_read_together_and_shares_weighed_after_that():
    """In float64, as if each had been read by itself."""
    third = torch.tensor(1 / 3)
    parts = [{"a": third, "b": Share(third, 0.1)}, {"b": Share(torch.tensor(2.5), divisor=7), "c": 4.0}]
    with HostReads() as reads:
        sums, more = read_sums(parts, torch.tensor(2), 3.0)
    assert reads.counted == {"tolist": 1}
    exact = third.double().item()
    assert sums == {"a": exact, "b": 0.1 * exact + 2.5 / 7, "c": 4.0} and more == [2.0, 3.0]
    assert read_all([]) == [] and read_sums([]) == ({}, [])

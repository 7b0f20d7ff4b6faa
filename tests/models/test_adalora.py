"""Test AdaLoRA's optimizer: against peft's and autograd's, its final ranks, and a resumed run."""

import itertools

import pytest
import torch

from pipeline.store.optimizer_state import load_optimizer, optimizer_tensors
from stages.models import adalora
from stages.models.adalora import AdaLora, budget_at, orthogonality_gradient, triplets_of
from stages.models.adapters import AdapterSettings, trainable_parameters, unwrapped, with_adapter
from stages.models.forward import response_logprobs
from stages.training.checkpoint import keep_optimizer_settings, regroup_optimizer
from stages.training.trainee import make_trainee, optimizer_step

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
RANK, FIRST, STEPS = 2, 5, 40


@pytest.fixture
def allocator(causal):
    """Return a model with a fresh adapter, and peft's allocator of its ranks over STEPS steps."""
    from peft.tuners.adalora.layer import RankAllocator

    model = with_adapter(causal("llama"), AdapterSettings(method="adalora", r=RANK, init_r=FIRST))
    config = model.peft_config["default"]
    config.total_step, config.tinit, config.tfinal = STEPS, round(0.1 * STEPS), STEPS - round(0.5 * STEPS)
    return model, RankAllocator(unwrapped(model), config, "default")


def test_the_budget_is_peft_s(allocator):
    _, peft = allocator
    found = [budget_at(step, STEPS, peft.init_bgt, peft.target_bgt) for step in range(1, STEPS + 1)]
    assert found == [peft.budget_schedule(step)[0] for step in range(1, STEPS + 1)]
    assert found[0] == peft.init_bgt and found[-1] == peft.target_bgt and sorted(found, reverse=True) == found
    for steps in range(1, 12):  # however short the training is
        assert budget_at(steps, steps, 9, 4) == 4


def test_orthogonality_by_autograd():
    torch.manual_seed(0)
    rows = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.norm(rows @ rows.T - torch.eye(3), p="fro"), rows)
    torch.testing.assert_close(orthogonality_gradient(rows.detach()), expected)
    orthogonal, _ = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64))
    assert torch.isfinite(orthogonality_gradient(orthogonal.T)).all()
    assert torch.equal(orthogonality_gradient(torch.eye(3)), torch.zeros(3, 3))


def test_the_penalty_is_peft_s(causal):
    """What a step adds to each gradient is the gradient of the penalty that peft adds to the
    loss.
    """
    model = with_adapter(causal("llama"), AdapterSettings(method="adalora", r=RANK)).double()
    weights = list(trainable_parameters(model).values())
    generator = torch.Generator().manual_seed(0)
    for p in weights:
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = torch.zeros_like(p)
    optimizer = AdaLora(weights, triplets=triplets_of(model), rank=RANK, steps=8, lr=0.0, weight_decay=0.0)
    optimizer.step()
    found = [p.grad.clone() for p in weights]
    model.zero_grad()
    ids = torch.tensor([[5, 6, 7]])
    model.peft_config["default"].orth_reg_weight = adalora.ORTHOGONAL
    (model(input_ids=ids, labels=ids).loss - unwrapped(model)(input_ids=ids, labels=ids).loss).backward()
    for p, ours in zip(weights, found, strict=True):
        torch.testing.assert_close(ours, p.grad, atol=1e-12, rtol=1e-9)


def test_what_it_prunes_is_what_peft_prunes(allocator, monkeypatch):
    """Compared step by step, from the same gradients, at a rate of 0: peft evaluates the weights
    after Adam's step.
    """
    monkeypatch.setattr(adalora, "ORTHOGONAL", 0.0)
    theirs, peft = allocator
    generator = torch.Generator().manual_seed(1)
    for p in trainable_parameters(theirs).values():
        p.data = torch.randn(p.shape, generator=generator)
    ours = [p.detach().clone().requires_grad_() for p in trainable_parameters(theirs).values()]
    of = dict(zip(map(id, trainable_parameters(theirs).values()), ours, strict=True))
    triplets = [adalora.Triplets(*(of[id(p)] for p in t)) for t in triplets_of(theirs)]
    optimizer = AdaLora(ours, triplets=triplets, rank=RANK, steps=STEPS, lr=0.0, weight_decay=0.0)
    pruned = 0
    for step in range(1, round(0.5 * STEPS) + 1):
        for p, q in zip(trainable_parameters(theirs).values(), ours, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step()
        end = step == round(0.5 * STEPS)
        if end:  # peft's model masks here, with these averages; its scheduler gives the same budget
            peft.update_ipt(unwrapped(theirs))
        peft.update_and_allocate(unwrapped(theirs), step, force_mask=end)
        for p, q in zip(trainable_parameters(theirs).values(), ours, strict=True):
            assert torch.equal(p, q), step
        pruned += any((t.values == 0).any() for t in triplets)
    assert pruned > 10
    left = sum(int((t.values != 0).sum()) for t in triplets)
    assert 0 < left <= RANK * len(triplets)  # at a rate of 0, pruned values do not come back


def train(model, rows, steps, optimizer_state=None, first=0, whole=STEPS):
    trainee = make_trainee("model", model, learning_rate=1e-2, max_grad_norm=1.0, steps=whole)
    if optimizer_state is not None:
        load_optimizer(trainee.optimizer, *optimizer_state)
    for step in range(first + 1, first + steps + 1):
        (-response_logprobs(model, rows).sum()).backward()
        optimizer_step(trainee, 1e-2, step)
    return trainee


def test_rank_goes_where_it_is_needed_and_stays(causal, kind, rows):
    """Some layers keep more than others; the same triplets stay from the middle on; the loss
    falls.
    """
    model = with_adapter(causal(kind), AdapterSettings(method="adalora", r=RANK, init_r=FIRST))
    before = response_logprobs(model, rows).sum()
    trainee = train(model, rows, STEPS // 2)
    ranks = lambda: [int((t.values != 0).sum()) for t in triplets_of(model)]  # noqa: E731
    middle = ranks()
    assert sum(middle) == RANK * len(middle) and len(set(middle)) > 1
    held = [t.values != 0 for t in triplets_of(model)]
    for step in range(STEPS // 2 + 1, STEPS + 1):
        (-response_logprobs(model, rows).sum()).backward()
        optimizer_step(trainee, 1e-2, step)
        assert all(torch.equal(t.values != 0, x) for t, x in zip(triplets_of(model), held, strict=True))
    assert response_logprobs(model, rows).sum() > before


@pytest.mark.parametrize("stop", [7, STEPS // 2 + 3])
def test_a_run_that_went_on_ends_in_the_same_bits(causal, rows, stop):
    """The run is interrupted during pruning, and after it."""
    make = lambda: with_adapter(causal("llama"), AdapterSettings(method="adalora", r=RANK, init_r=FIRST))  # noqa: E731
    whole = make()
    train(whole, rows, STEPS)
    begun = make()
    trainee = train(begun, rows, stop)
    tensors, state = optimizer_tensors(trainee.optimizer)
    tensors = {name: x.clone() for name, x in tensors.items()}
    again = make()
    for p, q in zip(trainable_parameters(again).values(), trainable_parameters(begun).values(), strict=True):
        p.data.copy_(q)
    train(again, rows, STEPS - stop, (tensors, state), first=stop)
    for p, q in itertools.zip_longest(trainable_parameters(again).values(), trainable_parameters(whole).values()):
        assert torch.equal(p, q)


def test_a_run_made_longer_keeps_what_it_has_pruned_to(causal, rows):
    """A run of the longer length would not have pruned yet at that step."""
    model = with_adapter(causal("llama"), AdapterSettings(method="adalora", r=RANK, init_r=FIRST))
    trainee = train(model, rows, STEPS // 2 + 1)
    held = [t.values != 0 for t in triplets_of(model)]
    assert not any("sensitivity" in state for state in trainee.optimizer.state.values())
    train(model, rows, 3, optimizer_tensors(trainee.optimizer), first=STEPS // 2 + 1, whole=100 * STEPS)
    assert all(torch.equal(t.values != 0, x) for t, x in zip(triplets_of(model), held, strict=True))


def test_a_layer_without_a_gradient_is_one_with_a_gradient_of_0(causal):
    found = []
    for none in (True, False):
        model = with_adapter(causal("llama"), AdapterSettings(method="adalora", r=RANK))
        weights = list(trainable_parameters(model).values())
        optimizer = AdaLora(weights, triplets=triplets_of(model), rank=RANK, steps=4, lr=1e-2)
        for _ in range(3):
            for i, p in enumerate(weights):
                p.grad = None if none and i < 3 else torch.full_like(p, 0.0 if i < 3 else 0.1)
            optimizer.step()
        found.append([p.detach().clone() for p in weights])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_a_run_that_goes_on_with_weight_decay_knows_its_step(causal, rows):
    model = with_adapter(causal("llama"), AdapterSettings(method="adalora", r=RANK, init_r=FIRST))
    tensors, state = optimizer_tensors(train(model, rows, 3).optimizer)
    options = {"learning_rate": 1e-2, "max_grad_norm": 1.0, "steps": STEPS, "weight_decay": 0.1}
    trainee = make_trainee("model", model, **options)
    with keep_optimizer_settings(trainee.optimizer):
        load_optimizer(trainee.optimizer, *regroup_optimizer(trainee, tensors, state))
    found = [(group["taken"], group["weight_decay"]) for group in trainee.optimizer.param_groups]
    assert found == [(3, 0.1), (3, 0.0)]


def test_gradients_that_overflow_leave_no_trace(causal):
    """As under float16: the scaler skips the step, and the averages stay what they were."""
    model = with_adapter(causal("llama"), AdapterSettings(method="adalora", r=RANK))
    weights = list(trainable_parameters(model).values())
    optimizer = AdaLora(weights, triplets=triplets_of(model), rank=RANK, steps=4, lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for fill, taken in ((float("inf"), 0), (0.1, 1)):
        for p in weights:
            p.grad = torch.full_like(p, fill)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.param_groups[0]["taken"] == taken and bool(optimizer.state) == bool(taken)

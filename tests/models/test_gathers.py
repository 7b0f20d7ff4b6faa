"""Test what sharded models send in a step: dtypes and bytes of gathers and sums of gradients."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.groups import make_rows
from pipeline.launch.parallel import padded_micro_batches, rank_and_world_size
from stages.models.file_tensors import file_tensors
from stages.models.forward import head_is_linear, response_logprobs, text_logprobs
from stages.models.layout import Layout
from stages.models.loading import prepare
from stages.models.packing import can_pack
from stages.models.sharding import gathered, reducing_last, shard, whole
from stages.training.loop import Task, accumulate_gradients
from stages.training.trainee import make_trainee
from tests.builders import tiny_causal
from tests.together import together

PROMPTS, RESPONSES = [[5, 6, 7], [5, 6, 7], [9, 8]], [[1, 2, 3, 4], [3, 4], [7, 7, 2]]
CPU, BFLOAT16 = torch.device("cpu"), torch.bfloat16
GATHER, SUM = "_allgather_base_", "_reduce_scatter_base_"


class Sent(TorchDispatchMode):
    """Record what this process gives to collectives: operation, dtype and bytes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            given = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)][-1]  # the result comes first
            self.calls.append((function._schema.name.split("::")[1], given.dtype, given.nbytes))
        return function(*args, **(kwargs or {}))

    def bytes_of(self, operation, dtype):
        return sum(size for name, kind, size in self.calls if (name, kind) == (operation, dtype))

    def count(self, operation):
        return sum(name == operation for name, _, _ in self.calls)


def sharded(layout=None, dtype=None, checkpointing=False):
    model = prepare(tiny_causal(tie_word_embeddings=False, initializer_range=0.1))
    assert can_pack(model, 64) and head_is_linear(model)
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    shard(model, CPU, layout=layout, dtype=dtype)
    return model


def accumulate(model, casts, twice=False):
    """Add the gradients of three micro-batches; return losses and gradients, and what was sent."""

    def autocast():
        return torch.autocast("cpu", BFLOAT16, enabled=casts, cache_enabled=False)

    with torch.no_grad(), autocast():  # a pass without a backward pass
        response_logprobs(model, make_rows(PROMPTS, RESPONSES, 0, packed=True))
    parts, losses = [[0, 2], [1]][rank_and_world_size()[0]], []
    with Sent() as sent:
        for i, own in reducing_last([model], padded_micro_batches(parts, 0)):
            with autocast():
                loss = response_logprobs(model, make_rows(PROMPTS[i : i + 1], RESPONSES[i : i + 1], 0, packed=True))
                loss = loss.sum() + (text_logprobs(model, torch.tensor([[3, 4, 5, 6]])).sum() if twice else 0)
            (loss if own else 0.0 * loss).backward()
            losses.append(loss.item())
    # A copy: the next micro-batches would be added.
    return losses, {name: whole(p.grad).clone() for name, p in model.named_parameters()}, sent


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_cast(layout, checkpointing):
    before = accumulate(sharded(layout, checkpointing=checkpointing), casts=True)
    model = sharded(layout, BFLOAT16, checkpointing)
    after = accumulate(model, casts=True)
    assert before[0] == after[0] and same_bits(before[1], after[1])
    # In bfloat16 travel the linear layers, in float32 the rest, and all gradients.
    cast, plain = after[2].bytes_of(GATHER, BFLOAT16), after[2].bytes_of(GATHER, torch.float32)
    assert 2 * cast + plain == before[2].bytes_of(GATHER, torch.float32) and cast > plain / 3
    for _, _, sent in (before, after):
        assert {kind for name, kind, _ in sent.calls if name == SUM} == {torch.float32}
    assert after[2].bytes_of(SUM, torch.float32) == before[2].bytes_of(SUM, torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters())


LAYOUTS = [Layout(), Layout(shard="gradients"), Layout(offload="all")]


@pytest.mark.parametrize("layout, checkpointing", [*((layout, False) for layout in LAYOUTS), (Layout(), True)])
def test_weights_cast_before_they_are_gathered_give_the_same_bits_as_autocast(layout, checkpointing):
    together(2, check_cast, layout, checkpointing)


def check_two_passes():
    before, after = (accumulate(sharded(dtype=dtype), casts=True, twice=True) for dtype in (None, BFLOAT16))
    assert before[0] == after[0]
    for name, x in before[1].items():  # a sum of two bfloat16 numbers is rounded to one
        assert (x - after[1][name]).norm() <= 2**-8 * x.norm(), name


def test_two_passes_before_a_backward_pass_add_a_rounding_to_bfloat16():
    together(2, check_two_passes)


def check_whole():
    """What is published, sampled from or given to vLLM has the weights that train."""
    expected = {name: p.detach() for name, p in prepare(tiny_causal(tie_word_embeddings=False)).named_parameters()}
    model = prepare(tiny_causal(tie_word_embeddings=False))
    shard(model, CPU, dtype=BFLOAT16)
    assert same_bits({name: x.clone() for name, x in file_tensors(model)}, expected)
    with torch.autocast("cpu", BFLOAT16), Sent() as sent, gathered(model) as copy:
        linear = {f"{name}.weight" for name, x in copy.named_modules() if isinstance(x, nn.Linear)}
        found = {name: p.detach().clone() for name, p in copy.named_parameters()}
    assert same_bits(found, {name: x.to(BFLOAT16) if name in linear else x for name, x in expected.items()})
    assert {kind for name, kind, _ in sent.calls if "gather" in name} == {torch.float32, BFLOAT16}


def test_a_whole_copy_is_gathered_in_the_dtype_that_it_keeps():
    together(2, check_whole)


def check_last(shards, dtype, checkpointing):
    each, last = (
        accumulate(sharded(Layout(shard=shards, reduces_last=deferring), dtype, checkpointing), dtype is not None)
        for deferring in (False, True)
    )
    assert each[0] == last[0]
    for name, x in each[1].items():
        assert (x - last[1][name]).norm() <= 1e-6 * x.norm(), name
    # Two micro-batches on each process: one sum instead of two, of the same numbers.
    assert each[2].count(SUM) == 2 * last[2].count(SUM) > 0
    assert each[2].bytes_of(SUM, torch.float32) == 2 * last[2].bytes_of(SUM, torch.float32)
    assert each[2].bytes_of(GATHER, torch.float32) == last[2].bytes_of(GATHER, torch.float32)


@pytest.mark.parametrize(
    "shards, dtype, checkpointing",
    [("weights", None, False), ("gradients", None, False), ("weights", BFLOAT16, False), ("weights", BFLOAT16, True)],
)
def test_gradients_that_are_summed_at_the_last_micro_batch_are_the_same(shards, dtype, checkpointing):
    together(2, check_last, shards, dtype, checkpointing)


def check_whole_models():
    """ddp, and shard: optimizer; in base and sft torch's DDP does so (Accelerator.no_sync)."""
    counts = []
    for rows in (2, 6):  # in one micro-batch a process, and in three
        model = nn.Linear(2, 1)

        def loss(own, batch, model=model):
            return model(torch.ones(len(own), 2)).sum(), {}

        trainee = make_trainee("model", model, learning_rate=0.1, max_grad_norm=1.0)
        task = Task(range(rows), rows, [1] * rows, lambda own: [[i] for i in own], loss, dict)
        backward = SimpleNamespace(backward=lambda loss: loss.backward())
        with Sent() as sent:
            assert len(accumulate_gradients(backward, trainee, task, range(rows), False)) == rows // 2
        counts.append(sent.count("allreduce_"))
    assert counts[0] == counts[1] > 0


def test_gradients_of_whole_models_are_summed_once_a_step():
    together(2, check_whole_models)

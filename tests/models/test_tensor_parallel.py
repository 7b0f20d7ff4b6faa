"""Test models that processes hold together against whole ones."""

import pytest
import torch
from torch import distributed as dist
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from data.groups import make_rows
from pipeline.errors import UserError
from pipeline.launch import parallel
from stages.models import tensor_parallel
from stages.models.adapters import AdapterSettings, with_adapter
from stages.models.file_tensors import file_tensors
from stages.models.forward import head_is_linear, response_logprobs, response_scores, text_logprobs
from stages.models.loading import prepare
from stages.models.packing import can_pack
from stages.models.precision import cast_frozen
from stages.models.sharding import gather_tensors, gathered, is_sharded, publishable, shard, shard_like
from stages.training.trainee import gradient_norm, make_trainee, optimizer_step
from tests.gradients import gradient_cosine
from tests.together import together

PROMPTS = [[5, 6, 7], [5, 6, 7], [9, 8]]
RESPONSES = [[1, 2, 3, 4], [3, 4], [7, 7, 2]]
SIZES = {
    "vocab_size": 61, "pad_token_id": 0, "eos_token_id": 1, "num_labels": 1, "hidden_size": 16, "intermediate_size": 20,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def make(family, **more):
    """A tiny model, the same in every process."""
    torch.manual_seed(0)
    sizes = SIZES | more
    if family == "qwen3":  # norms of queries and keys: replicated weights that see some heads only
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=4, **sizes))
    else:
        kind = LlamaForSequenceClassification if family == "scalar" else LlamaForCausalLM
        model = kind(LlamaConfig(**sizes))
    return prepare(model)


def loss_of(model, i):
    rows = make_rows(PROMPTS[i : i + 1], RESPONSES[i : i + 1], 0, packed=True)
    if model.config.architectures == ["scalar"] or hasattr(model, "score"):
        return response_scores(model, rows).sum()
    text = torch.tensor([[3, 4, 5, 6, 7 + i]])
    whole = model(input_ids=text).logits[..., 3].sum()  # by the model's own head, as base and sft do
    return response_logprobs(model, rows, 0.7).sum() + text_logprobs(model, text).sum() + whole


def check_training(family, fsdp, tied):
    """Check losses, gradients, norms and steps, over two micro-batches of some ranks."""
    parallel.arrange(tensor=2, fsdp=fsdp)
    other, ours = make(family, tie_word_embeddings=tied), make(family, tie_word_embeddings=tied)
    for model in (other, ours):
        assert can_pack(model, 64)
        head_is_linear(model)
    shard(ours, torch.device("cpu"))
    assert is_sharded(ours)
    parts = dist.get_world_size() if fsdp else 2
    held = sum(p.to_local().numel() for p in ours.parameters())
    assert held < (1.25 / parts) * sum(p.numel() for p in other.parameters())
    expected = [loss_of(other, i) for i in range(3)]
    for x in expected:
        x.backward()
    # one rank of a group, or one group, has two micro-batches: gradients accumulate
    for i, own in parallel.padded_micro_batches(parallel.rows_of_this_rank([0, 1, 2], [7, 5, 5]), 0):
        found = loss_of(ours, i)
        torch.testing.assert_close(found, expected[i])
        (found if own else 0.0 * found).backward()
    parallel.all_reduce_gradients(ours.parameters())
    for (name, p), q in zip(ours.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=lambda text, name=name: f"{name}: {text}")
    norms = [gradient_norm(model.parameters()) for model in (ours, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    grads = [[p.grad for p in model.parameters()] for model in (ours, other)]
    shifted = [[torch.sin(7.0 * g) for g in gs] for gs in grads]
    cosines = [gradient_cosine(*pair) for pair in zip(grads, shifted, strict=True)]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-5) and abs(cosines[1]) > 1e-3
    trainees = [make_trainee("m", m, learning_rate=1e-2, max_grad_norm=1.0, weight_decay=0.1) for m in (ours, other)]
    steps = [optimizer_step(trainee, 1e-2, 1) for trainee in trainees]
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)
    whole = gather_tensors(trainees[0].tensors())
    for name, q in other.named_parameters():
        if parallel.is_rank_zero():
            torch.testing.assert_close(whole[name], q.detach(), atol=1e-5, rtol=1e-4)
        mine = shard_like(trainees[0].parameters[name], q.detach())  # as a resume does
        torch.testing.assert_close(mine.full_tensor(), q.detach(), atol=0, rtol=0)
    with gathered(ours) as reader:
        for p, q in zip(reader.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    files = {name: x.clone() for name, x in file_tensors(ours)}  # as vLLM gets them
    for name, q in file_tensors(other):
        torch.testing.assert_close(files.pop(name), q, atol=1e-5, rtol=1e-4)
    assert not files
    published = publishable(ours)
    if parallel.is_rank_zero():
        for p, q in zip(published.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def slow(*cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("size, family, fsdp, tied", [
    (2, "qwen3", False, True),
    *slow((2, "scalar", False, False), (2, "llama", False, False), (4, "qwen3", False, True)),
    *slow((4, "llama", True, True), (4, "scalar", True, False), (4, "qwen3", True, False)),
])  # fmt: skip
def test_they_train_as_one_whole_model(size, family, fsdp, tied):
    together(size, check_training, family, fsdp, tied)


def check_refusals():
    parallel.arrange(tensor=2)
    cases = [
        (lambda: prepare(AutoModelForCausalLM.from_config(GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=61))),
         "launch.tensor_parallel: transformers has no plan for the layers of a GPT2LMHeadModel"),
        (lambda: make("llama", num_key_value_heads=1),
         "2 processes cannot share the 1 heads (num_key_value_heads) of this LlamaForCausalLM"),
        (lambda: with_adapter(make("llama"), AdapterSettings(method="lora", r=2), seed=1), "without an adapter"),
    ]  # fmt: skip
    for build, line in cases:
        with pytest.raises(UserError) as problem:  # on all ranks
            shard(build(), torch.device("cpu"))
        assert line in str(problem.value)
    model = make("llama")
    # a plan that forgets a sum over the processes
    model._tp_plan = {key: style for key, style in model.tp_plan.items() if not key.endswith("o_proj")}
    with pytest.raises((UserError, RuntimeError)):
        shard(model, torch.device("cpu"))


def test_models_that_cannot_be_cut_are_refused_by_name():
    together(2, check_refusals)


def check_groups():
    with pytest.raises(UserError, match=r"4 process\(es\) do not divide into groups of 3"):
        parallel.arrange(tensor=3)
    parallel.arrange(tensor=2)
    rank = dist.get_rank()
    assert parallel.data_rank_and_size() == (rank // 2, 2)
    assert parallel.is_first_of_group() == (rank % 2 == 0)
    share = parallel.rows_of_this_rank([10, 20, 30], [1, 5, 1])
    assert parallel.all_gather(share) == [[20], [20], [10, 30], [10, 30]]
    assert parallel.all_reduce_figures({"a": rank + 1.0}) == {"a": 4.0}  # of ranks 0 and 2
    assert parallel.compute_and_all_gather([1, 2, 3], [1, 5, 1], lambda own: [x + rank for x in own]) == [3, 2, 5]
    alone = parallel.compute_and_all_gather([1, 2, 3, 4], [1] * 4, lambda own: [(x, rank) for x in own], alone=True)
    assert sorted(of for _, of in alone) == [0, 1, 2, 3] and [x for x, _ in alone] == [1, 2, 3, 4]
    x = torch.tensor([float(rank)])
    parallel.all_reduce_tensors([x])
    assert x.item() == [2.0, 4.0, 2.0, 4.0][rank]  # over ranks of the same place in their groups


@pytest.mark.slow
def test_ranks_of_a_group_read_the_same_rows():
    together(4, check_groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_trial_computes_frozen_weights_in_what_they_were_cast_to(dtype):
    frozen = make("llama").requires_grad_(False)
    expected = tensor_parallel.trial(frozen, lambda function: function())
    cast_frozen(frozen, dtype)
    found = tensor_parallel.trial(frozen, lambda function: function())
    assert not torch.equal(found, expected)
    tensor_parallel.check_same(expected, found, frozen)

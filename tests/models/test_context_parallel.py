"""Test rows that processes compute together against whole ones."""

import pytest
import torch
from torch import distributed as dist

from data.groups import make_rows
from pipeline.launch import parallel
from stages.models.context_parallel import FLAG, attention_mask, compute_whole_rows, cuts_rows, sum_over_group
from stages.models.forward import head_is_linear, response_logprobs, response_scores, response_values
from stages.models.packing import can_pack
from stages.models.sharding import shard
from stages.objectives.losses import language_model_loss
from stages.training.text_trainers import own_part_loss
from tests.models.test_tensor_parallel import make, slow
from tests.together import together

PROMPTS = [[[5, 6, 7], [5, 6, 7]], [[9, 8], [9, 8], [9, 8]], [[4, 3]]]
RESPONSES = [[[1, 2, 3, 4], [3, 4]], [[7, 7, 2], [], [5]], [[2, 2]]]


def loss_of(model, i, packed):
    rows = make_rows(PROMPTS[i], RESPONSES[i], 0, packed=packed)
    if hasattr(model, "score"):
        return response_scores(model, rows).pow(2).sum() + response_values(model, rows).sum()
    logprobs, entropies = response_logprobs(model, rows, 0.7, with_entropy=True)
    return logprobs.pow(2).sum() + 0.0 * entropies.sum()


def check_training(family, tensor, fsdp):
    parallel.arrange(tensor=tensor, context=2, fsdp=fsdp)
    other, ours = make(family), make(family)
    for model in (other, ours):
        assert can_pack(model, 64)
        head_is_linear(model)
    if fsdp or tensor > 1:
        shard(ours, torch.device("cpu"))
    ours.__dict__[FLAG] = True
    assert cuts_rows(ours) and not cuts_rows(other)
    for packed in (True, False):
        for model in (ours, other):
            model.zero_grad()
        expected = [loss_of(other, i, packed) for i in range(3)]
        for x in expected:
            x.backward()
        for i, own in parallel.padded_micro_batches(parallel.rows_of_this_rank([0, 1, 2], [7, 5, 5]), 0):
            found = loss_of(ours, i, packed)
            torch.testing.assert_close(found, expected[i])
            parallel.for_sum(found if own else 0.0 * found).backward()
        parallel.all_reduce_gradients(ours.parameters())
        for (name, p), q in zip(ours.named_parameters(), other.parameters(), strict=True):
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
    if not hasattr(ours, "score"):  # base and sft: the model's own head, labels shifted before the cut
        ids, labels = torch.tensor([[3, 4, 5, 6, 7], [1, 2, 3, 0, 0]]), torch.tensor([[4, 5, 6, 7], [2, 3, -100, -100]])
        whole = language_model_loss(other(input_ids=ids).logits[:, :-1], labels, 6.0, 0.1)
        torch.testing.assert_close(sum_over_group(own_part_loss(ours, ids, labels, 6.0, 0.1)), whole)
    if dist.get_rank() == 0 and not fsdp and tensor == 1:  # as rank 0 tries what it publishes
        compute_whole_rows(ours)
        torch.testing.assert_close(loss_of(ours, 0, True), loss_of(other, 0, True))


@pytest.mark.parametrize("size, family, tensor, fsdp", [
    (2, "qwen3", 1, False),
    *slow((2, "scalar", 1, True), (4, "llama", 1, True), (4, "scalar", 1, False), (4, "qwen3", 2, True)),
])  # fmt: skip
def test_they_train_as_on_whole_rows(size, family, tensor, fsdp):
    together(size, check_training, family, tensor, fsdp)


def test_a_response_sees_its_prompt_and_itself():
    """Two prompts, with two responses and with one; then a token of padding."""
    mask = attention_mask(0, 8, 8, ((2, (2, 1)), (1, (1,))), torch.device("cpu"))[0, 0]
    assert ["".join("x" if seen else "." for seen in row) for row in mask.tolist()] == [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "xx..x...",
        ".....x..",
        ".....xx.",
        ".......x",
    ]
    part = attention_mask(4, 4, 8, ((2, (2, 1)), (1, (1,))), torch.device("cpu"))[0, 0]
    assert torch.equal(part, mask[4:])
    assert torch.equal(
        attention_mask(1, 2, 3, None, torch.device("cpu"))[0, 0], torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    )

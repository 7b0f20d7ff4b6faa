"""Test sharded models against whole ones, in two processes that communicate by gloo."""

import copy
import shutil
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from data.groups import make_rows
from pipeline.errors import UserError
from pipeline.launch.parallel import all_reduce_gradients, is_rank_zero, padded_micro_batches, rank_and_world_size
from stages.models.adalora import triplets_of
from stages.models.adapters import (
    AdapterSettings,
    adapter_off,
    is_adapted,
    load_on_trunk,
    merge_adapter,
    save_merged,
    unwrapped,
    with_adapter,
)
from stages.models.ensemble import members
from stages.models.forward import head_is_linear, response_logprobs, response_scores, response_values, text_logprobs
from stages.models.loading import load_policy, load_scalar_model, new_reward_model, prepare
from stages.models.packing import can_pack
from stages.models.precision import cast_frozen
from stages.models.publish import save_model
from stages.models.roles import NamedFolder, RewardFolder, RoleFolders, RoleOptions, load_roles, make_on_device
from stages.models.sharding import (
    compute_gathered,
    decoder_layers,
    gather_tensors,
    gathered,
    is_sharded,
    local_shard,
    make_on_rank_zero,
    publishable,
    replicate_beside,
    shard,
    shard_like,
)
from stages.models.soft_prompts import SoftPrompt
from stages.tools import memory_step
from stages.training.checkpoint import shard_optimizer_tensors
from stages.training.trainee import gradient_norm, make_trainee, optimizer_step
from tests.counted import Held
from tests.gradients import gradient_cosine
from tests.together import together

PROMPTS = [[5, 6, 7], [5, 6, 7], [9, 8]]
RESPONSES = [[1, 2, 3, 4], [3, 4], [7, 7, 2]]


def slow(*cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def in_two(check, *args):
    """Run check(*args) in two processes; its assertions are those of the test."""
    together(2, check, *args, seconds=120, patience=20)


def make(family, tied=True, scalar=False, size=61):
    """A tiny model, the same in every process."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaForSequenceClassification

    torch.manual_seed(0)
    more = {"vocab_size": size, "pad_token_id": 0, "eos_token_id": 1, "num_labels": 1, "tie_word_embeddings": tied}
    if family == "gpt2":
        config = GPT2Config(n_embd=12, n_layer=2, n_head=2, n_positions=64, **more)
        model = (GPT2ForSequenceClassification if scalar else GPT2LMHeadModel)(config)
    else:
        sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = LlamaConfig(num_key_value_heads=1, max_position_embeddings=64, **sizes, **more)
        model = (LlamaForSequenceClassification if scalar else LlamaForCausalLM)(config)
    return prepare(model)


def pair(*args, method=None, **kwargs):
    """Return a whole model, and the same one sharded."""
    ours, other = (
        with_adapter(make(*args, **kwargs), AdapterSettings(method=method, r=2), seed=3)
        if method
        else make(*args, **kwargs)
        for _ in range(2)
    )
    if method:  # as after some training: an untouched adapter changes nothing
        for model in (ours, other):
            torch.manual_seed(4)
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(0.1 * torch.randn_like(p))
    for model in (other, ours):  # tried before sharding, as roles.settled does
        assert can_pack(model, 64)
        head_is_linear(model)
    shard(ours, torch.device("cpu"))
    return other, ours


def check_gradients(family, tied, method):
    other, ours = pair(family, tied, method=method)
    rank, size = rank_and_world_size()
    assert size == 2 and is_sharded(ours) and not is_sharded(other)
    held = sum(p.to_local().numel() for p in ours.parameters())
    assert held < 0.6 * sum(p.numel() for p in other.parameters())

    def loss(model, i):
        rows = make_rows(PROMPTS[i : i + 1], RESPONSES[i : i + 1], 0, packed=True)
        text = torch.tensor([[3, 4, 5, 6, 7 + i]])
        return response_logprobs(model, rows, 0.7).sum() + text_logprobs(model, text).sum()

    expected = [loss(other, i) for i in range(3)]
    for x in expected:
        x.backward()
    parts = [[0, 2], [1]][rank]
    for i, own in padded_micro_batches(parts, 0):
        found = loss(ours, i)
        torch.testing.assert_close(found, expected[i])
        (found if own else 0.0 * found).backward()
    for (name, p), q in zip(other.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, atol=1e-5, rtol=1e-5, msg=name)
    every = [p for p in other.parameters() if p.grad is not None], [p for p in ours.parameters() if p.grad is not None]
    norms = [gradient_norm(ps) for ps in every]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    turned = [p.grad.roll(1, 0) if p.dim() > 1 else p.grad for p in every[0]]
    held = [shard_like(p, x) for p, x in zip(every[1], turned, strict=True)]
    cosine = gradient_cosine([p.grad for p in every[0]], turned)
    assert gradient_cosine([p.grad for p in every[1]], held) == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize(
    "family, tied, method", [("llama", False, "lora"), *slow(("llama", True, None), ("gpt2", True, None))]
)
def test_losses_and_gradients_are_the_whole_models(family, tied, method):
    """Also if one process has one micro-batch and the other two."""
    in_two(check_gradients, family, tied, method)


def check_steps():
    other, ours = pair("llama", scalar=True)
    rows = make_rows(PROMPTS, RESPONSES, 0, packed=True)
    options = {"learning_rate": 1e-2, "max_grad_norm": 0.5, "weight_decay": 0.01}
    trainees = [make_trainee("model", model, **options) for model in (other, ours)]
    rank, _ = rank_and_world_size()
    for step in range(3):
        response_values(other, rows).sum().backward()
        (response_values(ours, rows).sum() * (0.25 if rank else 0.75)).backward()
        norms = [optimizer_step(trainee, 1e-2, step) for trainee in trainees]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for (name, p), q in zip(other.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p, atol=1e-5, rtol=1e-4, msg=name)

    # the saved state is whole, on rank 0, and can be sharded again
    from pipeline.store.optimizer_state import load_optimizer, optimizer_tensors

    weights = gather_tensors(trainees[1].tensors())
    tensors, rest = optimizer_tensors(trainees[1].optimizer)
    tensors = gather_tensors(tensors)
    if is_rank_zero():
        assert {k: x.shape for k, x in weights.items()} == {k: p.shape for k, p in other.named_parameters()}
    found = [weights, {name: x.clone() for name, x in tensors.items()}]  # as from a file
    dist.broadcast_object_list(found, src=0)
    _, fresh = pair("llama", scalar=True)
    again = make_trainee("model", fresh, **options)
    again.load(found[0])
    load_optimizer(again.optimizer, shard_optimizer_tensors(again.optimizer, found[1]), rest)
    for trainee, model in ((trainees[1], ours), (again, fresh)):
        response_values(model, rows).sum().backward()
        optimizer_step(trainee, 1e-2, 4)
    for p, q in zip(ours.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())


def test_steps_saves_and_loads():
    in_two(check_steps)


METHODS = {
    "adalora": {"r": 2, "init_r": 3},
    "dora": {"r": 2},
    "lora": {"r": 2, "start": "pissa"},
    "ia3": {},
    "bitfit": {},
    "prompt_tuning": {"soft_prompt": SoftPrompt("prompt_tuning", count=3)},
    "p_tuning": {"soft_prompt": SoftPrompt("p_tuning", count=3, encoder="lstm")},
    "houlsby": {"bottleneck_size": 4},
    "pfeiffer": {"bottleneck_size": 4},
    "parallel_adapter": {"bottleneck_size": 4},
    "prefix_tuning": {"num_virtual_tokens": 3},
    "qlora": {"r": 2, "bits": 4},
    "qlora in 8 bits": {"r": 2, "bits": 8},
}
"""Methods of model.peft, with settings of each."""
MERGED = ["dora", "lora", "ia3", "bitfit", "prompt_tuning", "p_tuning"]
STAY = ["houlsby", "pfeiffer", "parallel_adapter", "prefix_tuning"]
QUANTIZED = ["qlora", "qlora in 8 bits"]
SOFT = [50, 51, 52]


def tuned(method, scalar):
    """Return a tiny model whose adapter has been moved from its start."""
    settings = AdapterSettings(method=method.split()[0], **METHODS[method])
    model = make("gpt2" if method == "bitfit" else "llama", False, scalar=scalar)
    if settings.soft_prompt is not None:
        model.config.soft_prompt_ids = SOFT
    model = with_adapter(model, settings, scalar=scalar)
    torch.manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    assert can_pack(model, 64) and (scalar or head_is_linear(model))
    return model


def check_method(method, scalar):
    other, ours = tuned(method, scalar), make_on_rank_zero(partial(tuned, method, scalar))
    shard(ours, torch.device("cpu"))
    rank, _ = rank_and_world_size()
    for p in ours.parameters():
        assert local_shard(p).numel() < p.numel() or p.shape[0] == 1

    def compute(model):
        outputs = []
        for packed in (True, False):
            rows = make_rows([SOFT + prompt for prompt in PROMPTS], RESPONSES, 0, packed=packed)
            outputs.append(response_values(model, rows) if scalar else response_logprobs(model, rows, 0.7))
        ids = torch.tensor([[*SOFT, 5, 6, 7, 8]])  # as SFTTrainer calls it
        outputs.append(model(input_ids=ids).logits if scalar else model(input_ids=ids, labels=ids).loss)
        return torch.cat([x.flatten() for x in outputs])

    trainees = [make_trainee("m", x, learning_rate=1e-3, max_grad_norm=0.5, steps=8) for x in (other, ours)]
    for step in range(6):
        expected, found = compute(other), compute(ours)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        expected.square().sum().backward()
        (found.square().sum() * (0.25 if rank else 0.75)).backward()
        norms = [optimizer_step(trainee, 1e-3, step) for trainee in trainees]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    for before, after in zip(triplets_of(other), triplets_of(ours), strict=True):  # the same are pruned
        assert torch.equal(before.values == 0, after.values.full_tensor() == 0)
    if method == "adalora":
        left = sum(int((t.values != 0).sum()) for t in triplets_of(other))
        assert left == METHODS[method]["r"] * len(triplets_of(other))
        kept = optimizer_state_names(trainees[1].optimizer)
        assert "kept" in kept and "sensitivity" not in kept
    with gathered(ours) as reader, torch.no_grad():
        torch.testing.assert_close(compute(reader), compute(other), atol=1e-4, rtol=1e-4)
    assert merge_adapter(publishable(ours)) is not None


def optimizer_state_names(optimizer):
    return {name for state in optimizer.state.values() for name in state}


def check_methods(methods):
    for method in methods:
        for scalar in (False, True):
            try:
                check_method(method, scalar)
            except AssertionError as error:
                raise AssertionError(f"{method}, {'scalar' if scalar else 'causal'}") from error


@pytest.mark.parametrize(
    "methods",
    [
        ["adalora"],
        *(pytest.param(group, marks=pytest.mark.slow) for group in (STAY, QUANTIZED)),
        pytest.param(MERGED, marks=(pytest.mark.slow, pytest.mark.exhaustive)),
    ],
    ids=lambda methods: methods[0],
)
def test_each_method_trains_sharded_as_it_does_whole(methods):
    """Six steps on packed and padded rows; AdaLoRA prunes in the first four."""
    if methods is QUANTIZED:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra qlora)")
    in_two(check_methods, methods)


def check_ties():
    other, ours = pair("llama", False)
    start, rank = torch.tensor([0.3, -0.2]), rank_and_world_size()[0]
    strengths = [nn.Parameter(start.clone()), nn.Parameter(replicate_beside(start.clone(), ours))]
    trainees = [
        make_trainee("m", model, learning_rate=1e-2, max_grad_norm=0.5, weight_decay=0.01, further={"ties": x})
        for model, x in zip((other, ours), strengths, strict=True)
    ]
    rows = make_rows(PROMPTS, RESPONSES, 0, packed=True)
    for step in range(3):
        (response_logprobs(other, rows).sum() * strengths[0].exp().sum()).backward()
        share = 0.25 if rank else 0.75
        (share * response_logprobs(ours, rows).sum() * local_shard(strengths[1]).exp().sum()).backward()
        all_reduce_gradients(trainees[1].parameters.values())
        norms = [optimizer_step(trainee, 1e-2, step) for trainee in trainees]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    torch.testing.assert_close(local_shard(strengths[1]), strengths[0], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(strengths[0].detach(), start, atol=1e-3)
    saved = gather_tensors(trainees[1].tensors())
    if is_rank_zero():
        assert torch.equal(saved["ties"], local_shard(strengths[1]).detach())
    found = [{name: x.clone() for name, x in saved.items()}]
    dist.broadcast_object_list(found, src=0)
    with torch.no_grad():
        strengths[1].zero_()
    trainees[1].load(found[0])
    torch.testing.assert_close(local_shard(strengths[1]), strengths[0], atol=1e-6, rtol=1e-5)


def test_a_small_parameter_of_the_loss_is_whole_beside_shards():
    in_two(check_ties)


def check_whole(method):
    other, ours = pair("llama", False, method=method)
    rows = make_rows(PROMPTS, RESPONSES, 0, packed=True)
    expected = response_logprobs(other, rows)
    with gathered(ours) as reader, torch.no_grad():
        assert not is_sharded(reader)
        if is_rank_zero():  # without the other one
            assert torch.equal(response_logprobs(reader, rows), expected)
        assert [p.requires_grad for p in reader.parameters()] == [p.requires_grad for p in other.parameters()]
    assert sum(p.numel() for p in reader.parameters()) == 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with gathered(ours) as reader:
            assert unwrapped(reader).lm_head.weight.dtype == torch.bfloat16
            found = response_logprobs(reader, rows)
        assert torch.equal(found, response_logprobs(other, rows))
    if method:
        with adapter_off(ours), adapter_off(other), torch.no_grad():
            torch.testing.assert_close(response_logprobs(ours, rows), response_logprobs(other, rows))
    made = publishable(ours)
    if is_rank_zero():
        assert type(made) is type(other) and not is_sharded(made)
        for (name, p), (key, q) in zip(other.named_parameters(), made.named_parameters(), strict=True):
            assert name == key and torch.equal(p, q)


@pytest.mark.parametrize("method", ["lora", *slow((None,))])
def test_a_whole_copy_reads_as_the_model_does(method):
    in_two(check_whole, method)


def check_memory(dtype, checkpointing, tied):
    config = LlamaConfig(
        vocab_size=2000, hidden_size=96, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256,
        tie_word_embeddings=tied,
    )  # fmt: skip
    lengths = [(24, [20, 12, 20]), (16, [20, 20])]
    step = memory_step.Step("policy", "logprobs", lengths, times=2)
    foretold = memory_step.take_step(config, [step], AdapterSettings(), dtype, "cpu", checkpointing, parts=2)
    model = prepare(LlamaForCausalLM(config))
    if checkpointing:
        model.activation_checkpointing_enable()
    whole_size = memory_step.size_of(model)
    assert can_pack(model, 200) and head_is_linear(model)
    shard(model, torch.device("cpu"), dtype=None if dtype == "float32" else torch.bfloat16)
    prompts = [[i + 3] * n for i, (n, responses) in enumerate(lengths) for _ in responses]
    rows = make_rows(prompts, [[5] * n for _, responses in lengths for n in responses], 0, packed=True)
    trainee = make_trainee("model", model, learning_rate=1e-3, max_grad_norm=1.0)
    for _ in range(2):
        moments = [x for state in trainee.optimizer.state.values() for x in state.values()]
        held = Held()
        held.known.update(local_shard(x).untyped_storage() for x in [*model.parameters(), *moments])
        with held:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                    found = response_logprobs(model, rows)
                found.sum().backward()
                del found
            optimizer_step(trainee, 1e-3, 1)
    assert foretold.weights == pytest.approx(sum(local_shard(p).nbytes for p in model.parameters()), rel=0.01)
    assert foretold.weights == pytest.approx(whole_size / 2, rel=0.01)
    assert foretold.moments == pytest.approx(sum(local_shard(x).nbytes for x in moments), rel=0.01)
    assert foretold.step == pytest.approx(held.most, rel=0.15), (foretold.step, held.most)


@pytest.mark.parametrize(
    "dtype, checkpointing, tied",
    [("bfloat16", True, False), *slow(("bfloat16", False, False), ("float32", False, True))],
)
def test_the_memory_of_a_part_is_foretold(dtype, checkpointing, tied):
    in_two(check_memory, dtype, checkpointing, tied)


def check_roles(folders, adapter, dtype):
    """Check load_roles if rank 1 finds no weights on its disk: shards and buffers are those of
    whole models.
    """
    first, folder = is_rank_zero(), folders[rank_and_world_size()[0]]
    accelerator = SimpleNamespace(mixed_precision="bf16" if dtype == "bfloat16" else "no", device=torch.device("cpu"))
    common = {"attn_implementation": "sdpa", "trust_remote_code": False}
    first_member, others = NamedFolder("rm", folder / "rm" / "model"), (folder / "rm" / "ensemble" / "1",)
    folders = RoleFolders(
        policy=folder / "sft",
        reward_models=(RewardFolder("rm", first_member, trunk=folder / "sft", others=others),),
        judge=RewardFolder("judge", NamedFolder("judge", folder / "judge")),
    )
    options = RoleOptions(
        **common, max_length=64, gradient_checkpointing=True, sharded=True, policy_seed=1, value_seed=2
    )
    roles = load_roles(folders, accelerator, adapter, options)
    found = [member for model in roles.models() for member in members(model)]
    wrapped = adapter.method in ("lora", "dora")
    assert len(found) == (5 if wrapped else 6) and all(map(is_sharded, found))
    expected = [None] * len(found)
    if first:
        scalar = partial(load_on_trunk, trunk=folder / "sft" if adapter.method else None, **common)
        value = scalar(folder / "rm" / "model", trains=True)
        expected = [
            with_adapter(load_policy(folder / "sft"), adapter, seed=1),
            *([] if wrapped else [load_policy(folder / "sft").requires_grad_(False)]),
            *(scalar(folder / "rm" / name).requires_grad_(False) for name in ("model", "ensemble/1")),
            value if is_adapted(value) else with_adapter(value, adapter, scalar=True, seed=2),
            load_scalar_model(folder / "judge").requires_grad_(False),
        ]
        if dtype == "bfloat16":
            for model in expected:
                cast_frozen(model, torch.bfloat16)
    cast = 0
    for ours, other in zip(found, expected, strict=True):
        assert can_pack(ours, 64) and (unwrapped(ours).get_output_embeddings() is None or head_is_linear(ours))
        for name, p in ours.named_parameters():
            whole, trains = p.full_tensor(), p.requires_grad
            assert local_shard(p).numel() < whole.numel() or whole.shape[0] == 1, name
            cast += whole.dtype == torch.bfloat16
            if first:
                q = other.get_parameter(name)
                assert whole.dtype == q.dtype and torch.equal(whole, q) and trains == q.requires_grad, name
        held: list = [None, None]
        dist.all_gather_object(held, dict(ours.named_buffers()))
        assert held[0].keys() == held[1].keys()
        assert not first or held[0].keys() == dict(other.named_buffers()).keys()
        for name, x in held[0].items():
            assert torch.equal(x, held[1][name]) and (not first or torch.equal(x, other.get_buffer(name)))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            rows = make_rows(PROMPTS, RESPONSES, 0, packed=True)
            (response_logprobs if unwrapped(ours).get_output_embeddings() else response_scores)(ours, rows)
    assert bool(cast) == (dtype == "bfloat16")


@pytest.mark.parametrize(
    "family, adapter, dtype",
    [
        ("llama", AdapterSettings(method="lora", r=2), "bfloat16"),
        *slow(
            ("llama", AdapterSettings(), "bfloat16"),
            ("llama", AdapterSettings(method="dora", r=2), "float32"),
            ("gpt2", AdapterSettings(method="bitfit"), "float32"),
        ),
    ],
)
def test_one_process_reads_for_all(family, adapter, dtype, tmp_path, tokenizer):
    size = len(tokenizer)
    folders = tmp_path / "0", tmp_path / "1"
    save_model(make(family, size=size), tokenizer, folders[0] / "sft", card="")
    for seed, folder in enumerate((folders[0] / "rm" / "model", folders[0] / "rm" / "ensemble" / "1")):
        model = new_reward_model(folders[0] / "sft", seed=seed)
        if adapter.method:
            model = with_adapter(model, adapter, scalar=True, seed=seed)
        unwrapped(model).config.reward_bias = 0.5
        save_merged(model, tokenizer, folder, card="")
    judge = make(family, scalar=True, size=size)
    judge.config.reward_bias = 0.0
    save_model(judge, tokenizer, folders[0] / "judge", card="")
    shutil.copytree(folders[0], folders[1], ignore=shutil.ignore_patterns("*.safetensors"))
    in_two(check_roles, folders, adapter, dtype)


def check_memory_of_making(fault):
    """Check the peak memory of making and sharding a model: on rank 1, its shard and a layer."""
    shape = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 128}
    config = LlamaConfig(vocab_size=100, **shape)
    size = memory_step.size_of(LlamaForCausalLM(config))

    def start():
        assert is_rank_zero()
        if fault:
            raise UserError("no such model")
        torch.manual_seed(0)
        return prepare(LlamaForCausalLM(config))

    accelerator = SimpleNamespace(mixed_precision="no", device=torch.device("cpu"))
    if fault:
        with pytest.raises(UserError, match="no such model"):
            make_on_device(start, accelerator, 64, sharded=True)
        return
    held = Held()
    with held:
        model = make_on_device(start, accelerator, 64, sharded=True)
    assert is_sharded(model) and 0.45 * size < sum(local_shard(p).nbytes for p in model.parameters()) < 0.55 * size
    assert held.most >= size if is_rank_zero() else held.most < 0.8 * size, held.most / size


@pytest.mark.parametrize("fault", [False, *slow((True,))])
def test_only_the_first_process_holds_a_whole_model(fault):
    """And an error in it is raised on all ranks."""
    in_two(check_memory_of_making, fault)


def check_what_cannot_travel(where):
    """Check models that rank 0 cannot pickle or rank 1 cannot unpickle: each rank makes them, with
    rank 0's weights.
    """
    made = []

    def start():
        model = make("llama")
        if where == "sent":
            model.odd = lambda: 0
        elif is_rank_zero():  # a class in a module that the other process does not have
            module = sys.modules["custom"] = ModuleType("custom")
            model.__class__ = module.Custom = type("Custom", (type(model),), {"__module__": "custom"})
        else:
            model.requires_grad_(True).lm_head.weight.data += 1.0
        made.append(model)
        return model

    model = make_on_rank_zero(start)
    assert model is made[0] and len(made) == 1
    shard(model, torch.device("cpu"))
    other = make("llama")
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q)


@pytest.mark.parametrize("where", slow(("sent",), ("understood",)))
def test_a_model_that_cannot_travel_is_read_by_each(where):
    in_two(check_what_cannot_travel, where)


def check_no_stale_weights():
    """Check that weights loaded after a forward pass without backward count in the next one."""
    _, ours = pair("llama")
    rows = make_rows(PROMPTS, RESPONSES, 0, packed=True)
    with torch.no_grad():
        before = response_logprobs(ours, rows)
        for p in ours.parameters():
            p.copy_(shard_like(p, 2.0 * p.full_tensor()))
        assert not torch.allclose(response_logprobs(ours, rows), before)


def test_weights_that_are_loaded_count():
    in_two(check_no_stale_weights)


class Layer(nn.Module):
    """A layer that contains one of the same kind."""

    def __init__(self, *inside):
        super().__init__()
        self.inside = nn.ModuleList(inside)


def test_layers_are_the_outermost_of_those_that_transformers_names():
    inner = nn.Sequential(nn.Linear(2, 2), Layer(Layer()), Layer())
    inner._no_split_modules = ["Layer"]
    assert decoder_layers(inner) == [inner[1], inner[2]]
    inner._no_split_modules, inner.config = [], SimpleNamespace(model_type="odd")
    with pytest.raises(UserError, match="no layers of a odd model; use ddp"):
        decoder_layers(inner)


def test_one_process_keeps_the_whole():
    model = make("llama")
    weights = copy.deepcopy(model.state_dict())
    shard(model, torch.device("cpu"))
    assert not is_sharded(model) and publishable(model) is model
    with gathered(model) as reader:
        assert reader is model
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())
    assert compute_gathered(model, partial(nn.Module.state_dict, model)).keys() == weights.keys()
    assert list(padded_micro_batches([1, 2], None)) == list(padded_micro_batches([1, 2], 0)) == [(1, True), (2, True)]

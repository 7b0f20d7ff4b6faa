"""Test compiled decoder layers: one graph for many shapes, the same numbers, names and copies."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.utils import counters

from data.groups import make_rows
from pipeline.config.sections import ModelSettings
from pipeline.errors import UserError
from stages.models import compiled as compiled_layers
from stages.models.adapters import AdapterSettings, with_adapter
from stages.models.compiled import Compiling, as_written, compile_layers, is_compiled
from stages.models.forward import head_is_linear, response_logprobs, response_values, text_logprobs
from stages.models.packing import can_pack
from stages.models.sharding import decoder_layers, publishable
from stages.rollouts.transformers import Decoding, sample
from tests.builders import EOS, PAD, tiny_causal, tiny_scalar

ROWS = [  # prompts and responses; of one prompt or several, of many lengths
    ([[5, 6, 7], [5, 6, 7], [9, 8]], [[1, 2, 3, 4], [3, 4], [7, 7, 2]]),
    ([[5, 6, 7]] * 3, [[1, 2], [3, 4], [7, 7, 2, 3, 3]]),
    ([[5, 6, 7, 3, 3, 3, 9], [2]], [[1, 2], [3, 4, 4, 4]]),
    ([[6, 5]] * 5, [[2]] * 5),
]


@pytest.fixture(autouse=True)
def forget():
    """Compile anew, and count from 0."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def pair(family="llama", make=tiny_causal, backend="eager", prepare=lambda model: model, **options):
    """Return a model, and the same one with compiled layers."""
    models = [prepare(make(family, **options)) for _ in range(2)]
    for model in models:
        assert can_pack(model, 64)
        head_is_linear(model) if make is tiny_causal else None
    assert compile_layers(models[1], nullcontext, backend) is None and is_compiled(models[1])
    return models


def check_same(models, compute):
    """Compare what both models compute, and their gradients."""
    results = [compute(model) for model in models]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    for model, result in zip(models, results, strict=True):
        model.zero_grad()
        result.sum().backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_one_graph_serves_all_shapes_with_the_same_gradients(family):
    """One compilation with gradients; that of the trial, without, is another."""
    heads = {} if family == "gpt2" else {"num_key_value_heads": 1}
    models = pair(family, **heads)
    before = counters["stats"]["unique_graphs"]
    for prompts, responses in ROWS:
        rows = make_rows(prompts, responses, PAD, packed=True)
        check_same(models, lambda model, rows=rows: response_logprobs(model, rows, 0.7))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] - before == 1


def test_texts_and_single_responses_take_a_graph_each():
    models = pair(make=tiny_scalar)
    before = counters["stats"]["unique_graphs"]
    for prompts, responses in (*ROWS[:2], ([[5, 6]], [[1, 2, 2]]), ([[7]], [[2, 2]])):
        rows = make_rows(prompts, responses, PAD, packed=True)
        check_same(models, lambda model, rows=rows: response_values(model, rows))
    assert counters["stats"]["unique_graphs"] - before == 2  # a dimension of 1 is a constant to torch
    models = pair()
    before = counters["stats"]["unique_graphs"]
    for ids in (torch.tensor([[3, 4, 5, 6], [7, 7, 2, 9]]), torch.tensor([[3, 4, 5]] * 3)):
        check_same(models, lambda model, ids=ids: text_logprobs(model, ids))
    assert counters["stats"]["unique_graphs"] - before == 1 and not counters["graph_break"]


def test_with_an_adapter_and_activation_checkpointing():
    """The layers are compiled before checkpointing is switched on, as when a stage loads them."""
    adapter = AdapterSettings(method="lora", r=2)

    def adapted(model):
        model = with_adapter(model, adapter, seed=3)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1)
        return model

    models = pair(prepare=adapted)
    for model in models:
        model.activation_checkpointing_enable()
    rows = make_rows(*ROWS[0], PAD, packed=True)
    check_same(models, lambda model: response_logprobs(model, rows))
    assert not counters["graph_break"]


def test_names_and_copies_are_those_of_the_model_as_it_is_written():
    plain, compiled = pair()
    assert list(plain.state_dict()) == list(compiled.state_dict())
    copied = copy.deepcopy(compiled)
    assert all(layer._compiled_call_impl is not None for layer in decoder_layers(compiled))
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(copied))
    assert not is_compiled(publishable(pair()[1]))
    rows = make_rows(*ROWS[0], PAD, packed=True)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(0.5)
        assert not torch.allclose(response_logprobs(copied, rows), response_logprobs(compiled, rows))


def test_samplers_run_the_layers_as_they_are_written():
    plain, compiled = pair()
    before = counters["stats"]["unique_graphs"]
    decoding = Decoding(response_length=6, eos_id=EOS, pad_id=PAD)
    found = [sample(model, [[5, 6, 7], [9, 8]], [1, 2], decoding) for model in (plain, compiled)]
    assert found[0] == found[1] and counters["stats"]["unique_graphs"] == before
    with as_written(compiled), torch.no_grad():
        response_logprobs(compiled, make_rows([[4]], [[2, 2]], PAD, packed=True))
    assert counters["stats"]["unique_graphs"] == before


def test_what_cannot_be_compiled_is_refused_or_left_as_it_is():
    model, said = tiny_causal(attn_implementation="eager"), []
    with pytest.raises(UserError, match=r"model.compile: true, .* does not read packed rows .*; set it to false"):
        Compiling(True, said.append).apply(model, nullcontext)
    Compiling(False, said.append).apply(model, nullcontext)
    assert len(said) == 1 and "as they are written" in said[0] and not is_compiled(model)


def test_a_sharded_model_is_left_as_it_is(monkeypatch):
    model = tiny_causal()
    assert can_pack(model, 64)
    monkeypatch.setattr(compiled_layers, "is_sharded", lambda model: True)
    assert "sharded" in compile_layers(model, nullcontext, "eager") and not is_compiled(model)


def test_a_layer_that_is_not_one_graph_is_left_as_it_is(monkeypatch):
    model = tiny_causal()
    assert can_pack(model, 64)
    kind = type(decoder_layers(model)[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * (1.0 if x.sum().item() else 2.0))
    problem = compile_layers(model, nullcontext, "eager")
    assert problem is not None and not is_compiled(model)
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))


def test_auto_is_null_and_the_default_is_false():
    assert ModelSettings(compile="auto").compile is None and ModelSettings().compile is False
    assert ModelSettings(compile=True).compile is True


@pytest.mark.slow
@pytest.mark.exhaustive
def test_inductor_computes_the_same():
    models = pair(backend="inductor")
    for prompts, responses in ROWS:
        rows = make_rows(prompts, responses, PAD, packed=True)
        check_same(models, lambda model, rows=rows: response_logprobs(model, rows, 0.7))

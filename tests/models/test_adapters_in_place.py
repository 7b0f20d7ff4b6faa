"""Test prefix tuning and bottleneck adapters, which stay in a model: what trains, what it computes,
and that folders give the trained numbers.
"""

import copy

import pytest
import torch
from torch import nn

from data.groups import make_rows
from pipeline.config import checks
from pipeline.errors import UserError
from stages.models.adapter_folder import IN_PLACE, adapter_parameters, method_in, write_adapter
from stages.models.adapters import AdapterSettings, is_adapted, save_merged, trainable_parameters, with_adapter
from stages.models.bottleneck import bottlenecks
from stages.models.forward import response_logprobs, response_scores, response_values, text_logprobs
from stages.models.loading import load_policy, load_pretrained, load_scalar_model, new_reward_model
from stages.models.packing import can_pack
from stages.models.prefix import WORKS_WITH, flat_prefix
from stages.models.publish import save_model
from stages.rollouts.lanes import PackedLane, PaddedLane, WholeLane
from stages.rollouts.transformers import Decoding, sample_with_logprobs
from stages.rollouts.vllm import Vllm, VllmOptions
from tests.builders import EOS, PAD

BOTTLENECKS = ("houlsby", "pfeiffer", "parallel_adapter")
SETTINGS = {method: {"bottleneck_size": 3} for method in BOTTLENECKS} | {
    "prefix_tuning": {"num_virtual_tokens": 5},
    "prefix_tuning with an MLP": {"num_virtual_tokens": 5, "prefix_projection": True},
}


@pytest.fixture(params=SETTINGS)
def settings(request):
    return AdapterSettings(method=request.param.split()[0], **SETTINGS[request.param])


def prefix(**options):
    return AdapterSettings(method="prefix_tuning", **{"num_virtual_tokens": 5, **options})


def shake(model, seed=0):
    """Move every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return model


def same(one, other):
    torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-4, atol=1e-5)


def test_settings_and_models_name_the_same_methods():
    assert set(IN_PLACE) == set(checks.IN_PLACE) == {*BOTTLENECKS, "prefix_tuning"}


def test_only_the_adapter_of_a_policy_trains(causal, kind, settings, rows):
    """The model is not wrapped: its reference is a model of its own, as when all weights train."""
    model = with_adapter(causal(kind), settings)
    assert not is_adapted(model) and method_in(model) == settings.method
    own = {name for name, _ in causal(kind).named_parameters()}
    names = set(trainable_parameters(model))
    assert names == {name for name, _ in model.named_parameters()} - own == set(adapter_parameters(model))
    response_logprobs(shake(model), rows).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trainable_parameters(model).values())
    assert all(p.grad is None for name, p in model.named_parameters() if name in own)


def test_of_a_scalar_model_the_head_trains_too(scalar, kind, settings, rows):
    model = with_adapter(scalar(kind), settings, scalar=True)
    assert set(trainable_parameters(model)) - set(adapter_parameters(model)) == {"score.weight"}


@pytest.mark.parametrize("method", BOTTLENECKS)
def test_fresh_bottlenecks_change_nothing(causal, kind, rows, method):
    model = with_adapter(causal(kind), AdapterSettings(method=method), exact=True)
    assert torch.equal(response_logprobs(model, rows), response_logprobs(causal(kind), rows))


@pytest.mark.parametrize("method, count", [("houlsby", 4), ("pfeiffer", 2), ("parallel_adapter", 2)])
def test_bottlenecks_compute_what_their_papers_say(causal, kind, method, count):
    """h + up(f(down(h))) behind a block, block(x) + 4 · up(f(down(x))) beside it."""
    model = shake(with_adapter(causal(kind), AdapterSettings(method=method, bottleneck_size=3)))
    assert len(bottlenecks(model)) == count
    function = torch.nn.functional.gelu if method == "houlsby" else torch.relu
    for name, adapter in bottlenecks(model).items():
        if not name.endswith("mlp.bottleneck"):
            continue
        block = model.get_submodule(name.removesuffix(".bottleneck"))
        plain = copy.deepcopy(block)
        plain._forward_hooks.clear()
        x = torch.randn(2, 3, 16)
        before = plain(x)
        read = x if method == "parallel_adapter" else before
        inside = function(read @ adapter.down.weight.T + adapter.down.bias)
        added = inside @ adapter.up.weight.T + adapter.up.bias
        same(block(x), before + (4 if method == "parallel_adapter" else 1) * added)


def test_the_settings_of_a_bottleneck_are_used(causal):
    options = {"bottleneck_size": 2, "bottleneck_activation": "tanh", "bottleneck_scale": 0.5}
    model = shake(with_adapter(causal("llama"), AdapterSettings(method="pfeiffer", **options)))
    adapter = next(iter(bottlenecks(model).values()))
    x = torch.randn(3, 16)
    inside = torch.tanh(nn.functional.linear(x, adapter.down.weight, adapter.down.bias))
    assert inside.shape == (3, 2)
    same(adapter(x), 0.5 * nn.functional.linear(inside, adapter.up.weight, adapter.up.bias))


@pytest.mark.parametrize("packed", [False, True])
def test_a_fresh_prefix_is_the_tokens_that_it_is_of(causal, kind, ragged, packed):
    """The model behind the prefix computes what transformers computes behind the tokens."""
    from stages.models.families import ordinary_ids

    model, plain = with_adapter(causal(kind), prefix()), causal(kind)
    tokens = ordinary_ids(plain.config, 8)[:5]
    assert can_pack(model, 64)
    found = response_logprobs(model, make_rows(*ragged, PAD, packed=packed))
    for i, (prompt, response) in enumerate(zip(*ragged, strict=True)):
        ids = torch.tensor([[*tokens, *prompt, *response]])
        logits = plain(ids).logits[0, -len(response) - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(response)[:, None])[:, 0]
        same(found[i, : len(response)], expected)


def test_packed_rows_give_the_numbers_of_padded_ones(causal, kind, ragged, settings):
    """Long rows take the kernel call a span, short ones the call for all of them."""
    model = shake(with_adapter(causal(kind), settings))
    assert can_pack(model, 64)
    long = ([[3 + i % 9 for i in range(30)]] * 3, [[4] * 20, [5, 6, EOS], [7] * 9])
    for prompts, responses in (ragged, long):
        padded, packed = (make_rows(prompts, responses, PAD, packed=p) for p in (False, True))
        same(response_logprobs(model, packed), response_logprobs(model, padded))
        gradients = []
        for rows in (padded, packed):
            model.zero_grad()
            response_logprobs(model, rows).sum().backward()
            gradients.append([p.grad.clone() for p in trainable_parameters(model).values()])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lane", [PackedLane, PaddedLane, WholeLane])
def test_sampling_has_the_log_probs_of_training(causal, kind, ragged, settings, lane, monkeypatch):
    model, prompts = shake(with_adapter(causal(kind), settings)), ragged[0]
    assert can_pack(model, 64)
    monkeypatch.setattr("stages.rollouts.transformers.lane_for", lambda *_: lane)
    sampled = sample_with_logprobs(model, prompts, range(len(prompts)), Decoding(8, eos_id=EOS, pad_id=PAD))
    rows = make_rows(prompts, sampled.responses, PAD)
    same(sampled.logprobs[:, : rows.responses.shape[1]], response_logprobs(model, rows))


def test_pretraining_text_is_read_behind_the_prefix(causal, kind):
    model = shake(with_adapter(causal(kind), prefix()))
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
    rows = make_rows([row[:1] for row in ids.tolist()], [row[1:] for row in ids.tolist()], PAD)
    same(text_logprobs(model, ids), response_logprobs(model, rows))


def test_checkpointed_activations_give_the_same_gradients(causal, settings, rows):
    gradients = []
    for checkpointing in (False, True):
        model = shake(with_adapter(causal("llama"), settings))
        if checkpointing:
            model.activation_checkpointing_enable()
        response_logprobs(model, rows).sum().backward()
        gradients.append([p.grad for p in trainable_parameters(model).values()])
    for one, other in zip(*gradients, strict=True):
        same(one, other)


def test_a_copied_model_has_a_prefix_of_its_own(causal, rows):
    model = shake(with_adapter(causal("llama"), prefix()))
    before = response_logprobs(model, rows).detach()
    shake(copied := copy.deepcopy(model), seed=1)
    assert not torch.allclose(response_logprobs(copied, rows), before, atol=1e-3)
    same(response_logprobs(model, rows), before)


def test_a_folder_gives_the_trained_numbers_and_trains_on(causal, kind, rows, tmp_path, tokenizer, settings):
    model = shake(with_adapter(causal(kind), settings))
    trained = response_logprobs(model, rows).detach()
    save_merged(model, tokenizer, tmp_path, card="")
    loaded = load_policy(tmp_path)
    same(response_logprobs(loaded, rows), trained)
    same(response_logprobs(load_policy(tmp_path / "base"), rows), response_logprobs(causal(kind), rows))
    again = with_adapter(loaded, settings, seed=7, exact=True)
    same(response_logprobs(again, rows), trained)
    assert set(trainable_parameters(again)) == set(adapter_parameters(again))
    save_merged(shake(again), tokenizer, tmp_path / "next", card="")
    same(response_logprobs(load_policy(tmp_path / "next"), rows), response_logprobs(again, rows))


def test_a_folder_of_a_reward_model_gives_the_trained_scores(scalar, kind, rows, tmp_path, tokenizer, settings):
    model = shake(with_adapter(scalar(kind), settings, scalar=True))
    scores, values = response_scores(model, rows).detach(), response_values(model, rows).detach()
    save_merged(model, tokenizer, tmp_path, card="")
    loaded = load_scalar_model(tmp_path)
    same(response_scores(loaded, rows), scores)
    same(response_values(loaded, rows), values)


def test_a_reward_model_begins_with_the_trunk_of_the_policy(causal, kind, rows, tmp_path, tokenizer, settings):
    policy = shake(with_adapter(causal(kind), settings))
    save_merged(policy, tokenizer, tmp_path, card="")
    model = new_reward_model(tmp_path, seed=3)
    ids = torch.tensor([[5, 6, 7]])
    same(model.base_model(ids).last_hidden_state, policy.base_model(ids).last_hidden_state)


@pytest.mark.parametrize("projection", [False, True])
def test_peft_computes_the_same_from_the_folder_of_a_prefix(causal, kind, tmp_path, tokenizer, projection, monkeypatch):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    model = shake(with_adapter(causal(kind, vocab_size=len(tokenizer)), prefix(prefix_projection=projection)))
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
        save_merged(model, tokenizer, tmp_path, card="")
        by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path).eval()
        torch.testing.assert_close(by_hand(ids).logits, expected, rtol=0, atol=1e-4)
        monkeypatch.chdir(tmp_path)
        found = AutoPeftModelForCausalLM.from_pretrained(".").eval()  # it gives each id of the tokenizer a row
        torch.testing.assert_close(found(ids).logits[..., : len(tokenizer)], expected, rtol=0, atol=1e-4)


def test_peft_computes_the_same_from_a_reward_model_with_a_prefix(scalar, tmp_path, tokenizer, monkeypatch):
    from peft import AutoPeftModelForSequenceClassification

    model = shake(with_adapter(scalar("llama", vocab_size=len(tokenizer)), prefix(), scalar=True))
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
        save_merged(model, tokenizer, tmp_path, card="")
        monkeypatch.chdir(tmp_path)
        found = AutoPeftModelForSequenceClassification.from_pretrained(".", num_labels=1).eval()
        try:
            logits = found(ids).logits
        except ValueError as error:
            # peft looks for a parameter that the forward of transformers 5.24 does not name
            if "does not support past key values" not in str(error):
                raise
            pytest.skip("this peft reads no reward model with a prefix in this transformers")
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_what_does_not_know_the_adapter_stops_at_its_folder(causal, tmp_path, tokenizer, settings):
    """transformers must not take the base model for the trained one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save_merged(with_adapter(causal("llama"), settings), tokenizer, tmp_path, card="")
    with pytest.raises(OSError, match="no file named model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    if settings.method != "prefix_tuning":
        with pytest.raises((KeyError, ValueError)):
            PeftModel.from_pretrained(causal("llama"), tmp_path)


def test_all_weights_and_lora_train_on_such_a_model(causal, rows, tmp_path, tokenizer, settings):
    """What is published holds both: the weights in base/, the adapter beside them."""
    save_merged(shake(with_adapter(causal("llama"), settings)), tokenizer, tmp_path / "start", card="")
    for method in (None, "lora"):
        model = shake(with_adapter(load_policy(tmp_path / "start"), AdapterSettings(method=method, r=2)))
        expected = response_logprobs(model, rows).detach()
        save_merged(model, tokenizer, tmp_path / str(method), card="")
        same(response_logprobs(load_policy(tmp_path / str(method)), rows), expected)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_rounded_weights_leave_the_adapter_as_it_is(causal, tmp_path, tokenizer, dtype):
    model = shake(with_adapter(causal("llama"), prefix()))
    save_model(model, tokenizer, tmp_path, card="", dtype=dtype)
    loaded = load_policy(tmp_path)
    assert torch.equal(flat_prefix(loaded), flat_prefix(model))
    weight = model.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight == weight, torch.full_like(weight, 1.0) > 0) == (
        dtype is None
    )


@pytest.mark.parametrize(
    "first, then, message",
    [
        (prefix(), prefix(num_virtual_tokens=4), "num_virtual_tokens: 4, but .* a prefix of 5 tokens"),
        (prefix(), AdapterSettings(method="houlsby"), "houlsby on a model that an earlier stage gave prefix_tuning"),
        (AdapterSettings(method="houlsby"), AdapterSettings(method="pfeiffer"), "an earlier stage gave houlsby"),
        *(
            (AdapterSettings(method="pfeiffer"), AdapterSettings(method="pfeiffer", **{key: value}), f"peft.{key}: ")
            for key, value in (("bottleneck_size", 9), ("bottleneck_activation", "tanh"), ("bottleneck_scale", 2.0))
        ),
    ],
)
def test_a_stage_goes_on_with_the_same_adapter_or_refuses(causal, first, then, message):
    model = with_adapter(causal("llama"), first)
    with pytest.raises(UserError, match=message):
        with_adapter(model, then)


def test_a_new_prefix_is_refused_where_the_start_is_the_reference(causal):
    with pytest.raises(
        UserError, match=r"prefix_tuning begins away from the model .* train sft with prefix_tuning too"
    ):
        with_adapter(causal("llama"), prefix(), exact=True)


def test_a_family_whose_attention_takes_no_prefix_is_refused(causal):
    from transformers import AutoModelForCausalLM, FalconConfig, MambaConfig, OPTConfig

    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(UserError, match="prefix_tuning needs keys and values of one shape in every layer"):
        with_adapter(mamba, prefix())
    with pytest.raises(UserError, match="the layers of this mamba model have no module that is an MLP block"):
        with_adapter(mamba, AdapterSettings(method="pfeiffer"))
    shape = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = AutoModelForCausalLM.from_config(OPTConfig(**shape, ffn_dim=16, word_embed_proj_dim=16))
    with pytest.raises(UserError, match="this opt model, which does not call its trunk as a whole; use lora"):
        with_adapter(opt, prefix())
    falcon = AutoModelForCausalLM.from_config(FalconConfig(**shape, initializer_range=0.3))
    with pytest.raises(UserError, match="something else behind given keys and values than behind the tokens"):
        with_adapter(falcon, prefix())
    model = causal("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(
        UserError, match=r"model.attn_implementation: eager cannot read the keys and values of a prefix"
    ):
        with_adapter(model, prefix())


def test_a_damaged_folder_is_refused(causal, tmp_path, tokenizer):
    save_merged(with_adapter(causal("llama"), AdapterSettings(method="houlsby")), tokenizer, tmp_path, card="")
    other = with_adapter(causal("llama"), AdapterSettings(method="pfeiffer"))
    path = tmp_path / "adapter_config.json"
    before = path.read_text()
    write_adapter(other, tmp_path, "base")
    path.write_text(before)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: does not fit the model in base/"):
        load_policy(tmp_path)


def test_a_model_that_cannot_pack_keeps_its_prefix(causal, ragged):
    model = shake(with_adapter(causal("llama"), prefix()))
    model._cannot_pack = True
    expected = response_logprobs(model, make_rows(*ragged, PAD)).detach()
    assert not can_pack(model, 64) and model.config._attn_implementation in WORKS_WITH
    same(response_logprobs(model, make_rows(*ragged, PAD)), expected)


def test_vllm_is_refused_before_it_starts(causal, tmp_path, tokenizer, settings):
    """Given the model, or its folder alone."""
    model = with_adapter(causal("llama"), settings)
    save_merged(model, tokenizer, tmp_path, card="")
    places = {"model": tmp_path, "folder": tmp_path, "log": tmp_path / "log", "python": "no-such-python"}
    engine = Vllm(VllmOptions(**places, devices=None, dtype="float32", timeout=1.0, arguments={}))
    with pytest.raises(UserError, match=f"vllm runs its own code .* the adapter of {settings.method}, "):
        engine.start(model)
    with pytest.raises(UserError, match="vllm runs its own code of the model, which has no place for the adapter"):
        engine.start_from_folder()


def test_a_base_model_may_bring_such_an_adapter(causal, rows, tmp_path, tokenizer, settings):
    """model.name_or_path may be the folder that another experiment published."""
    model = shake(with_adapter(causal("llama", vocab_size=len(tokenizer)), settings))
    save_merged(model, tokenizer, tmp_path, card="")
    loaded, _ = load_pretrained(str(tmp_path), attn_implementation="sdpa", trust_remote_code=False)
    same(response_logprobs(loaded, rows), response_logprobs(model, rows))

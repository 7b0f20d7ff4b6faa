"""Test adapters (LoRA, DoRA, AdaLoRA, IA³, BitFit): what trains, what does not change, and
merging.
"""

import pytest
import torch

from pipeline.errors import UserError
from stages.models.adapters import (
    AdapterSettings,
    adapter_off,
    is_adapted,
    merge_adapter,
    refuse_untrained,
    trainable_parameters,
    unwrapped,
    with_adapter,
)
from stages.models.forward import response_logprobs, response_scores, response_values
from stages.models.loading import load_policy, load_scalar_model, prepare
from stages.models.publish import save_model

METHODS = {
    "lora": "lora_",
    "dora": "lora_",
    "adalora": "lora_",
    "ia3": "ia3_",
}  # and a part of the names of their weights


@pytest.fixture(params=METHODS)
def adapter(request):
    return {"method": request.param, "r": 4, "lora_alpha": 8}


pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def shake(model, seed=0):
    """Move every trainable weight, as training would (LoRA's B starts at 0)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p += 0.3 * torch.randn(p.shape, generator=generator)


def test_without_a_method_every_weight_trains(causal, kind):
    model = causal(kind).requires_grad_(False)
    assert with_adapter(model, AdapterSettings(method=None)) is model
    assert set(trainable_parameters(model)) == {n for n, _ in model.named_parameters()} and not is_adapted(model)


def test_only_the_adapters_of_a_policy_train(causal, kind, adapter):
    names = set(trainable_parameters(with_adapter(causal(kind), AdapterSettings(**adapter))))
    assert names and all(METHODS[adapter["method"]] in n for n in names)


def test_only_adapters_and_head_of_a_scalar_model_train(scalar, kind, adapter):
    """The head trains in full, without an adapter of its own."""
    model = with_adapter(scalar(kind), AdapterSettings(**adapter), scalar=True)
    names = set(trainable_parameters(model))
    heads = {n for n in names if METHODS[adapter["method"]] not in n}
    assert len(heads) == 1 and "score" in heads.pop()
    assert not any("score" in n and METHODS[adapter["method"]] in n for n in names)


def test_a_fresh_adapter_changes_nothing(causal, scalar, kind, rows, adapter):
    torch.testing.assert_close(
        response_logprobs(with_adapter(causal(kind), AdapterSettings(**adapter)), rows),
        response_logprobs(causal(kind), rows),
        rtol=0,
        atol=0,
    )
    adapted = with_adapter(scalar(kind), AdapterSettings(**adapter), scalar=True)
    torch.testing.assert_close(response_scores(adapted, rows), response_scores(scalar(kind), rows), rtol=0, atol=0)
    torch.testing.assert_close(response_values(adapted, rows), response_values(scalar(kind), rows), rtol=0, atol=0)


def test_its_start_depends_only_on_the_seed(causal, adapter):
    """The state of the global generator makes no difference."""
    one = with_adapter(causal("llama"), AdapterSettings(**adapter), seed=5)
    torch.rand(3)
    same, other = (
        with_adapter(causal("llama"), AdapterSettings(**adapter), seed=5),
        with_adapter(causal("llama"), AdapterSettings(**adapter), seed=6),
    )
    for name, p in trainable_parameters(one).items():
        assert torch.equal(p, trainable_parameters(same)[name])
    if adapter["method"] != "ia3":  # all of its scales start at 1
        assert any(
            not torch.equal(p, trainable_parameters(other)[name]) for name, p in trainable_parameters(one).items()
        )


def test_off_it_is_the_base_and_on_again_afterwards(causal, kind, rows, adapter):
    """The reference policy takes no memory; the adapter is back even after an error in the
    context.
    """
    policy = with_adapter(causal(kind), AdapterSettings(**adapter))
    shake(policy)
    trained, base = response_logprobs(policy, rows), response_logprobs(causal(kind), rows)
    assert not torch.allclose(trained, base, atol=1e-3)
    with adapter_off(policy) as reference:
        torch.testing.assert_close(response_logprobs(reference, rows), base, rtol=0, atol=0)
    torch.testing.assert_close(response_logprobs(policy, rows), trained, rtol=0, atol=0)
    with pytest.raises(RuntimeError), adapter_off(policy):
        raise RuntimeError
    torch.testing.assert_close(response_logprobs(policy, rows), trained, rtol=0, atol=0)


def test_the_base_does_not_move_when_the_adapter_trains(scalar, kind, rows, adapter):
    """One optimizer step on the scores: trunk as before, adapters and head moved."""
    model = with_adapter(scalar(kind), AdapterSettings(**adapter), scalar=True)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = {n: p.clone() for n, p in trainable_parameters(model).items()}
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.1)
    for _ in range(2):  # at the first step only B (and the head) has a gradient
        optimizer.zero_grad()
        response_scores(model, rows).sum().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name
        else:
            assert not torch.equal(p, before[name]), name


def test_merged_it_gives_the_adapted_numbers_and_saves_like_any_model(causal, kind, rows, tmp_path, tokenizer, adapter):
    policy = with_adapter(causal(kind), AdapterSettings(**adapter))
    shake(policy)
    adapted = response_logprobs(policy, rows)
    folded = merge_adapter(policy)
    assert not is_adapted(folded)
    torch.testing.assert_close(response_logprobs(folded, rows), adapted, rtol=1e-3, atol=1e-4)
    save_model(folded, tokenizer, tmp_path, card="")
    torch.testing.assert_close(response_logprobs(load_policy(tmp_path), rows), adapted, rtol=1e-3, atol=1e-4)


def test_a_merged_reward_model_keeps_its_trained_head(scalar, kind, rows, tmp_path, tokenizer, adapter):
    model = with_adapter(scalar(kind), AdapterSettings(**adapter), scalar=True)
    shake(model)
    adapted, values = response_scores(model, rows), response_values(model, rows)
    save_model(merge_adapter(model), tokenizer, tmp_path, card="")
    loaded = load_scalar_model(tmp_path)
    torch.testing.assert_close(response_scores(loaded, rows), adapted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(response_values(loaded, rows), values, rtol=1e-3, atol=1e-3)


def test_the_bias_is_read_through_the_adapter(scalar, kind, rows, adapter):
    """An adapted model subtracts the reward_bias of its base's config."""
    with_bias = with_adapter(scalar(kind, bias=2.0), AdapterSettings(**adapter), scalar=True)
    without = with_adapter(scalar(kind, bias=0.0), AdapterSettings(**adapter), scalar=True)
    torch.testing.assert_close(response_scores(with_bias, rows), response_scores(without, rows) - 2.0)
    assert unwrapped(with_bias).config.reward_bias == 2.0


def test_lora_dropout_is_off_where_log_probs_must_repeat(causal, rows, adapter):
    """Two forward passes of an adapted model give the same numbers, in training mode too."""
    policy = with_adapter(causal("llama"), AdapterSettings(**adapter, lora_dropout=0.5))
    shake(policy)
    torch.testing.assert_close(response_logprobs(policy, rows), response_logprobs(policy, rows), rtol=0, atol=0)


def test_bitfit_trains_only_biases_and_the_head(causal, scalar, rows):
    """The model is not wrapped; one step moves every bias and nothing else."""
    for model in (causal("gpt2"), causal("qwen2")):
        assert with_adapter(model, AdapterSettings(method="bitfit")) is model and not is_adapted(model)
        assert set(trainable_parameters(model)) == {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    model = with_adapter(scalar("gpt2"), AdapterSettings(method="bitfit"), scalar=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    (response_scores(model, rows) ** 2).sum().backward()
    torch.optim.SGD(trainable_parameters(model).values(), lr=0.1).step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trainable_parameters(model)) == {n for n in before if n.endswith(".bias")} | {"score.weight"}


def test_what_a_method_cannot_do_is_refused(causal):
    with pytest.raises(UserError, match="this llama model has none; use lora"):
        with_adapter(causal("llama"), AdapterSettings(method="bitfit"))
    model = causal("llama")
    model.config.model_type = "unheard-of"
    with pytest.raises(UserError, match="peft has no ia3 for a unheard-of model"):
        with_adapter(model, AdapterSettings(method="ia3"))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_embedding_that_is_also_the_head_takes_no_adapter(causal, target):
    with pytest.raises(UserError, match=r"model.peft.target_modules: .* one weight; leave it out"):
        with_adapter(
            causal("llama", tie_word_embeddings=True), AdapterSettings(method="lora", target_modules=["q_proj", target])
        )
    apart = with_adapter(
        causal("llama", tie_word_embeddings=False), AdapterSettings(method="lora", target_modules=["q_proj", target])
    )
    assert any(target in name for name in trainable_parameters(apart))


@pytest.mark.parametrize("method, target, word", [("adalora", "embed_tokens", "Embed"), ("lora", "no_such", "no_such")])
def test_a_layer_that_a_method_cannot_take_is_an_error_of_the_settings(causal, method, target, word):
    with pytest.raises(UserError, match=f"model.peft.target_modules: .*{word}"):
        with_adapter(
            causal("llama", tie_word_embeddings=False), AdapterSettings(method=method, target_modules=[target])
        )


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("tied", [True, False])
class TestNewTokens:
    """Test that rows which the model did not have train beside the adapter (`new_tokens`)."""

    NEW = (14, 1)  # both occur in the rows

    def adapted(self, causal, kind, method, tied):
        model = causal(kind, tie_word_embeddings=tied)
        return with_adapter(model, AdapterSettings(method=method, r=4, lora_alpha=8), new_tokens=self.NEW)

    def test_they_train_and_no_other_row_does(self, causal, kind, rows, method, tied):
        model = self.adapted(causal, kind, method, tied)
        before = response_logprobs(causal(kind, tie_word_embeddings=tied), rows)
        torch.testing.assert_close(response_logprobs(model, rows), before, rtol=1e-6, atol=1e-6)
        tokens = {name: p for name, p in trainable_parameters(model).items() if "trainable_tokens" in name}
        assert [p.shape[0] for p in tokens.values()] == [2] * (1 if tied else 2)
        response_logprobs(model, rows).sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in tokens.values())
        head, ends = unwrapped(model).get_output_embeddings(), unwrapped(model).get_input_embeddings()
        assert not any(p.requires_grad for end in (head, ends) for n, p in end.named_parameters() if "tokens" not in n)

    def test_merged_they_are_the_models_own(self, causal, kind, rows, method, tied, tmp_path, tokenizer):
        """The published folder gives the trained model's numbers; its other rows are the base's."""
        model, base = self.adapted(causal, kind, method, tied), causal(kind, tie_word_embeddings=tied)
        shake(model)
        trained = response_logprobs(model, rows).detach()
        with adapter_off(model) as reference:
            torch.testing.assert_close(response_logprobs(reference, rows), response_logprobs(base, rows))
        save_model(merge_adapter(model), tokenizer, tmp_path, card="")
        loaded = load_policy(tmp_path)
        torch.testing.assert_close(response_logprobs(loaded, rows), trained, rtol=1e-4, atol=1e-5)
        ends = ("get_input_embeddings", "get_output_embeddings")
        for one, other in ((getattr(loaded, end)().weight, getattr(base, end)().weight) for end in ends):
            changed = (one != other).any(-1).nonzero().flatten().tolist()
            assert changed == sorted(self.NEW)


@pytest.mark.parametrize("tied, single", [(True, []), (False, ["lm_head"])])
def test_new_rows_train_with_a_module_that_trains_in_full(causal, kind, rows, tied, single):
    base = causal(kind, tie_word_embeddings=tied)
    end = next(name for name, module in base.named_modules() if module is base.get_input_embeddings())
    settings = AdapterSettings(method="lora", r=4, modules_to_save=(end,))
    if tied and kind == "gpt2":
        with pytest.raises(UserError, match="and peft would train two"):
            with_adapter(base, settings, new_tokens=[14, 1])
        return
    model = with_adapter(causal(kind, tie_word_embeddings=tied), settings, new_tokens=[14, 1])
    trained = trainable_parameters(model)
    assert [one for name in trained if "trainable_tokens" in name for one in (end, "lm_head") if one in name] == single
    assert any(f"{end}.modules_to_save" in name for name in trained)
    torch.testing.assert_close(response_logprobs(model, rows), response_logprobs(base, rows), rtol=1e-6, atol=1e-6)
    response_logprobs(model, rows).sum().backward()
    whole = {name: p for name, p in trained.items() if end in name or "tokens" in name}
    assert all(p.grad.abs().sum() > 0 for p in whole.values())


def test_rows_that_a_method_cannot_train_are_refused_by_name(tokenizer):
    new = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    for method in (None, "lora", "dora", "qlora"):
        refuse_untrained(new, method, tokenizer)
        refuse_untrained([], "ia3", tokenizer)
    for method in ("ia3", "bitfit", "adalora"):
        with pytest.raises(
            UserError,
            match=rf"peft.method: {method} cannot train the new rows of <.user.>, <.end.>, which start random",
        ):
            refuse_untrained(new, method, tokenizer)


def test_a_head_that_peft_reads_wrongly_is_refused(rows):
    """Phi's head has a bias, which peft's trainable rows would leave out."""
    from transformers import AutoModelForCausalLM, PhiConfig

    shape = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = PhiConfig(**shape, intermediate_size=24, eos_token_id=1, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    with pytest.raises(UserError, match="single rows in the head of this phi model; train all weights"):
        with_adapter(model, AdapterSettings(method="lora", r=4), new_tokens=[14])


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_a_router_that_is_a_linear_layer_gets_no_adapter(rows, method):
    """Llama 4's router returns scores and logits; its other layers are adapted."""
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    shape = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    more = {"num_key_value_heads": 1, "intermediate_size": 16, "intermediate_size_mlp": 16, "num_local_experts": 2}
    torch.manual_seed(0)
    config = Llama4TextConfig(**shape, **more, interleave_moe_layer_step=1, pad_token_id=0, eos_token_id=1)
    model = prepare(AutoModelForCausalLM.from_config(config))
    before = response_logprobs(model, rows).detach()
    model = with_adapter(model, AdapterSettings(method=method, r=4))
    torch.testing.assert_close(response_logprobs(model, rows).detach(), before)
    names = list(trainable_parameters(model))
    assert any("q_proj" in name for name in names) and not any("router" in name for name in names)


def test_a_scaled_embedding_stays_scaled(rows):
    """Gemma multiplies its embedding by the square root of the width."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    shape = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    config = Gemma3TextConfig(**shape, num_key_value_heads=1, intermediate_size=24, pad_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = response_logprobs(model, rows).detach()
    model = with_adapter(model, AdapterSettings(method="lora", r=4), new_tokens=[14])
    torch.testing.assert_close(response_logprobs(model, rows).detach(), before)
    shake(model)
    trained = response_logprobs(model, rows).detach()
    assert not torch.allclose(trained, before, atol=1e-3)
    torch.testing.assert_close(response_logprobs(merge_adapter(model), rows).detach(), trained, rtol=1e-4, atol=1e-5)

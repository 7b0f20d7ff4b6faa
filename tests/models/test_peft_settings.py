"""Test which layers get adapters, modules that train in full, rsLoRA, PiSSA and OLoRA."""

import copy
import json

import pytest
import torch

from pipeline.errors import UserError
from stages.models.adapters import (
    AdapterSettings,
    adapter_off,
    load_on_trunk,
    merge_adapter,
    save_adapter,
    save_merged,
    trainable_parameters,
    unwrapped,
    with_adapter,
)
from stages.models.file_tensors import file_tensors
from stages.models.forward import response_logprobs, response_scores
from stages.models.loading import load_policy, load_scalar_model
from stages.models.precision import cast_frozen, uncast
from stages.models.principal import split_olora, split_pissa
from stages.models.publish import save_model
from stages.rollouts.handover import lora_arguments, write_adapter

STARTS = ("pissa", "olora")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def shake(model, seed=0):
    """Move every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p += 0.3 * torch.randn(p.shape, generator=generator)


def lora(**settings):
    return AdapterSettings(**({"method": "lora", "r": 4, "lora_alpha": 6} | settings))


def adapted(model):
    """Return the names of the layers that have an adapter, as the model itself has them."""
    layers = [name for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    return {name.removeprefix("base_model.model.") for name in layers}


class TestLayers:
    def test_an_expression_matches_whole_names(self, causal):
        model = with_adapter(causal("llama", num_hidden_layers=2), lora(target_modules=r".*layers\.1\..*[qv]_proj"))
        assert adapted(model) == {f"model.layers.1.self_attn.{name}_proj" for name in "qv"}

    @pytest.mark.parametrize("out", [["k_proj", "mlp.up_proj"], r".*(k|up)_proj"])
    def test_excluded_layers_get_none(self, causal, out):
        every = adapted(with_adapter(causal("llama"), lora()))
        found = adapted(with_adapter(causal("llama"), lora(exclude_modules=out)))
        assert every - found == {name for name in every if name.endswith(("k_proj", "up_proj"))} != set()

    @pytest.mark.parametrize("target", ["all-linear", ["q_proj"]])
    def test_only_the_layers_of_these_indices(self, causal, target):
        make = {"num_hidden_layers": 3}
        every = adapted(with_adapter(causal("llama", **make), lora(target_modules=target)))
        found = adapted(with_adapter(causal("llama", **make), lora(target_modules=target, layers_to_transform=[0, 2])))
        assert found == {name for name in every if ".1." not in name} and len(every) * 2 == len(found) * 3
        convolutions = with_adapter(causal("gpt2", num_hidden_layers=2), lora(layers_to_transform=[1]))
        assert {name.split(".")[2] for name in adapted(convolutions)} == {"1"}

    @pytest.mark.parametrize(
        "settings, line",
        [
            ({"target_modules": "q_proj"}, r"target_modules: no module's whole name matches the expression 'q_proj'"),
            ({"target_modules": ["q_proj", "c_attn"]}, "target_modules: no module is named c_attn"),
            ({"exclude_modules": ["c_attn"]}, "exclude_modules: no module is named c_attn"),
            ({"exclude_modules": r"layers\.9.*"}, "exclude_modules: no module's whole name"),
            ({"layers_to_transform": [7]}, "layers_to_transform: 7, and this model has"),
            ({"modules_to_save": ("wte",)}, "modules_to_save: no module is named wte"),
            ({"modules_to_save": ("self_attn",), "target_modules": ["q_proj"]}, "peft"),
        ],
    )
    def test_what_matches_nothing_is_refused(self, causal, settings, line):
        with pytest.raises(UserError, match=f"model.peft.{line}" if line != "peft" else "model.peft"):
            with_adapter(causal("llama"), lora(**settings))

    def test_a_reward_model_lacks_the_head_that_a_policy_has(self, scalar):
        model = with_adapter(scalar("llama"), lora(target_modules=["q_proj", "lm_head"]), scalar=True)
        assert {name.rpartition(".")[2] for name in adapted(model)} == {"q_proj"}


class TestScale:
    def test_rslora_divides_by_the_root_of_the_rank(self, causal):
        plain, stable = (with_adapter(causal("llama"), lora(use_rslora=use)) for use in (False, True))
        layers = [next(x for x in model.modules() if hasattr(x, "lora_A")) for model in (plain, stable)]
        assert [layer.scaling["default"] for layer in layers] == [6 / 4, 6 / 4**0.5]


class TestInFull:
    """Test modules_to_save."""

    @pytest.mark.parametrize("tied", [True, False])
    def test_merged_they_are_the_models_own(self, causal, kind, rows, tied, tmp_path, tokenizer):
        ends = ("wte",) if kind == "gpt2" else ("embed_tokens", "norm")
        if tied and kind == "gpt2":
            with pytest.raises(UserError, match=r"modules_to_save: .* one weight, and peft would train two"):
                with_adapter(causal(kind, tie_word_embeddings=True), lora(modules_to_save=ends))
            return
        model = with_adapter(causal(kind, tie_word_embeddings=tied), lora(modules_to_save=ends))
        base = response_logprobs(causal(kind, tie_word_embeddings=tied), rows)
        torch.testing.assert_close(response_logprobs(model, rows), base, rtol=1e-5, atol=1e-5)
        shake(model)
        trained = response_logprobs(model, rows).detach()
        with adapter_off(model) as reference:
            torch.testing.assert_close(response_logprobs(reference, rows), base, rtol=1e-5, atol=1e-5)
        handed = dict(file_tensors(model))
        kept = {name: p.clone() for name, p in trainable_parameters(model).items() if "modules_to_save" in name}
        save_merged(model, tokenizer, tmp_path, card="")
        loaded = load_policy(tmp_path)
        torch.testing.assert_close(response_logprobs(loaded, rows), trained, rtol=1e-3, atol=1e-4)
        for name, p in loaded.named_parameters():
            torch.testing.assert_close(handed[name], p, rtol=1e-4, atol=1e-5)
        names = [name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in kept]
        assert len(names) == len(ends)  # "norm" is the last one, not each input_layernorm
        for name, p in zip(names, kept.values(), strict=True):
            assert torch.equal(dict(loaded.named_parameters())[name], p)

    def test_peft_loads_the_folder_on_the_base(self, causal, rows, tmp_path):
        from peft import PeftModel

        model = with_adapter(causal("llama"), lora(modules_to_save=("embed_tokens",)))
        shake(model)
        save_adapter(model, tmp_path)
        loaded = PeftModel.from_pretrained(causal("llama"), str(tmp_path / "adapter"))
        torch.testing.assert_close(response_logprobs(loaded, rows), response_logprobs(model, rows))

    def test_the_head_of_a_reward_model_trains_too(self, scalar, rows, tmp_path, tokenizer):
        model = with_adapter(scalar("qwen2"), lora(modules_to_save=("norm", "lm_head")), scalar=True)
        full = {name.split(".modules_to_save")[0] for name in trainable_parameters(model) if "to_save" in name}
        assert full == {"base_model.model.model.norm", "base_model.model.score"}
        shake(model)
        scores = response_scores(model, rows).detach()
        save_model(merge_adapter(model), tokenizer, tmp_path, card="")
        torch.testing.assert_close(response_scores(load_scalar_model(tmp_path), rows), scores, rtol=1e-3, atol=1e-3)

    def test_the_frozen_original_is_cast_and_restored(self, causal):
        make = {"tie_word_embeddings": False}
        model = with_adapter(causal("llama", **make), lora(modules_to_save=("lm_head",)))
        cast_frozen(model, torch.bfloat16)
        uncast(model, lambda: causal("llama", **make))
        assert all(p.dtype == torch.float32 for p in model.parameters())

    def test_ia3_cannot_train_one_weight_in_two_places(self, causal):
        with pytest.raises(UserError, match=r"modules_to_save: .*ia3 cannot train it whole"):
            with_adapter(causal("llama"), AdapterSettings(method="ia3", modules_to_save=("embed_tokens",)))


def peft_start(model, start):
    """Return peft's own B₀A₀ of each layer, as it starts such an adapter."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=start)
    layers = get_peft_model(model, config).named_modules()
    return {n: x.lora_B["default"].weight @ x.lora_A["default"].weight for n, x in layers if hasattr(x, "lora_A")}


@pytest.mark.parametrize("start", STARTS)
class TestStart:
    def test_it_is_pefts(self, causal, kind, start):
        if (kind, start) == ("gpt2", "olora"):
            pytest.skip("peft decomposes GPT-2's weights, which are (in, out), the wrong way round")
        theirs = peft_start(causal(kind), start)
        model = with_adapter(causal(kind), lora(start=start))
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
        assert layers.keys() == theirs.keys()
        for name, layer in layers.items():
            found = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            torch.testing.assert_close(found, theirs[name], rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nothing_changes_at_the_start(self, causal, kind, rows, start, dtype):
        model, base = with_adapter(causal(kind), lora(start=start, use_rslora=True)), causal(kind)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            before = response_logprobs(base, rows)
            torch.testing.assert_close(response_logprobs(model, rows), before, rtol=0, atol=0)
            with adapter_off(model) as reference:
                torch.testing.assert_close(response_logprobs(reference, rows), before, rtol=0, atol=0)
        merged = merge_adapter(model)
        for (name, p), q in zip(merged.named_parameters(), base.parameters(), strict=True):
            assert torch.equal(p, q), name

    def test_only_its_two_matrices_train(self, causal, rows, start):
        model = with_adapter(causal("llama"), lora(start=start))
        before = {name: p.clone() for name, p in model.named_parameters()}
        first = [buffer.clone() for _, buffer in model.named_buffers()]
        response_logprobs(model, rows).sum().backward()
        torch.optim.SGD(trainable_parameters(model).values(), lr=0.1).step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == set(trainable_parameters(model)) and all("lora_" in name for name in moved)
        assert all(torch.equal(x, y) for x, y in zip(first, dict(model.named_buffers()).values(), strict=True))

    def test_its_gradients_are_pefts(self, causal, rows, start):
        """A step changes the function as with peft, whose base weights hold the rest."""
        from peft import LoraConfig, get_peft_model

        options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        theirs = get_peft_model(causal("llama"), LoraConfig(**options, init_lora_weights=start))
        ours = with_adapter(causal("llama"), lora(start=start, target_modules=["q_proj"]))
        for model in (theirs, ours):
            response_logprobs(model, rows).sum().backward()
            torch.optim.SGD(trainable_parameters(model).values(), lr=0.05).step()
        assert not torch.allclose(response_logprobs(ours, rows), response_logprobs(causal("llama"), rows), atol=1e-4)
        torch.testing.assert_close(response_logprobs(ours, rows), response_logprobs(theirs, rows), rtol=1e-3, atol=1e-4)

    def test_published_it_is_plain_lora(self, causal, kind, rows, tmp_path, tokenizer, start):
        from peft import PeftModel

        model = with_adapter(causal(kind), lora(start=start, use_rslora=True))
        shake(model)
        trained, handed = response_logprobs(model, rows).detach(), dict(file_tensors(model))
        assert write_adapter(model, tmp_path / "vllm", torch.float32) is None
        save_merged(model, tokenizer, tmp_path, card="")
        torch.testing.assert_close(response_logprobs(load_policy(tmp_path), rows), trained, rtol=1e-3, atol=1e-4)
        for name, p in load_policy(tmp_path).named_parameters():
            torch.testing.assert_close(handed[name], p, rtol=1e-4, atol=1e-5)
        for folder in (tmp_path / "adapter", tmp_path / "vllm"):
            config = json.loads((folder / "adapter_config.json").read_text())
            assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
            loaded = PeftModel.from_pretrained(causal(kind), str(folder))
            torch.testing.assert_close(response_logprobs(loaded, rows), trained, rtol=1e-3, atol=1e-4)

    def test_a_copy_and_a_reloaded_one_go_on(self, causal, scalar, rows, tmp_path, tokenizer, start):
        """The value model continues what rm trained: the same function, the same matrices train."""
        policy = causal("llama")
        save_model(policy, tokenizer, tmp_path / "sft", card="")
        settings = lora(start=start)
        from stages.models.loading import new_reward_model

        model = with_adapter(new_reward_model(tmp_path / "sft", seed=3), settings, scalar=True)
        model.config.reward_bias = unwrapped(model).config.reward_bias = 0.5
        shake(model)
        scores = response_scores(copy.deepcopy(model), rows).detach()
        save_merged(model, tokenizer, tmp_path / "rm", card="")
        trunk = tmp_path / "sft"
        continued = load_on_trunk(tmp_path / "rm", trunk=trunk, trains=True, start=settings)
        scoring = load_on_trunk(tmp_path / "rm", trunk=trunk)
        fresh = with_adapter(new_reward_model(trunk, seed=3), settings, scalar=True)
        for one in (continued, scoring):
            torch.testing.assert_close(response_scores(one, rows), scores, rtol=1e-4, atol=1e-4)
        shapes = [{name: p.shape for name, p in trainable_parameters(one).items()} for one in (continued, fresh)]
        assert shapes[0] == shapes[1]
        save_adapter(continued, tmp_path / "again")
        assert json.loads((tmp_path / "again" / "adapter" / "adapter_config.json").read_text())["r"] == 8

    def test_what_it_cannot_split_is_refused(self, causal, start):
        with pytest.raises(
            UserError, match=r"init_lora_weights: .* splits linear layers, and model.embed_tokens is none"
        ):
            with_adapter(
                causal("llama", tie_word_embeddings=False), lora(start=start, target_modules=["q_proj", "embed_tokens"])
            )
        with pytest.raises(UserError, match=r"model.peft.r: 64 is more than .*; lower it"):
            with_adapter(causal("llama"), lora(start=start, r=64))

    def test_vllm_gets_it_at_twice_the_rank(self, causal, start):
        assert lora_arguments(with_adapter(causal("llama"), lora(start=start)))["max_lora_rank"] == 8
        with pytest.raises(UserError, match="vLLM takes no modules_to_save"):
            lora_arguments(with_adapter(causal("llama"), lora(start=start, modules_to_save=("norm",))))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_the_splits_by_hand(shape):
    """PiSSA's is the truncated singular value decomposition; OLoRA's has orthonormal columns."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()
    u, s, v = torch.linalg.svd(weight)
    left, right = split_pissa(weight, 3, 1.5)
    torch.testing.assert_close(1.5 * left @ right, u[:, :3] @ torch.diag(s[:3]) @ v[:3])
    torch.testing.assert_close(left.norm(dim=0), (s[:3] / 1.5).sqrt())  # balanced, as in the paper
    torch.testing.assert_close(right.norm(dim=1), (s[:3] / 1.5).sqrt())
    left, right = split_olora(weight, 3, 1.5)
    torch.testing.assert_close(left.T @ left, torch.eye(3).double())
    torch.testing.assert_close(left.T @ weight, right)


def test_a_weight_of_zeros_starts_without_nan():
    left, right = split_pissa(torch.zeros(4, 6).double(), 2, 2.0)
    assert torch.isfinite(left).all() and torch.isfinite(right).all()

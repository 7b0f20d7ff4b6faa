"""Test PPO's four models as loaded from their folders: who trains, and what memory they share."""

import importlib.util
import shutil
from types import SimpleNamespace

import pytest
import torch

from data.tokenizer import train_tokenizer
from pipeline.config.sections import LaunchSettings, PeftSettings
from pipeline.errors import UserError
from stages.models.adapters import is_adapted, save_merged, trainable_parameters, unwrapped, with_adapter
from stages.models.forward import response_logprobs, response_scores, response_values
from stages.models.loading import load_policy, load_scalar_model, new_reward_model
from stages.models.publish import save_model
from stages.models.quantized import quantize
from stages.ppo.inputs import load_models, role_folders
from stages.ppo.options import update_options
from stages.ppo.update import Batch, ppo_gradients
from stages.rollouts.collect import reference_logprobs
from stages.rollouts.rollout import Rollout
from stages.rollouts.transformers import Decoding, sample
from stages.settings import ppo as ppo_settings
from stages.shared.runtime import adapter_settings, runtime_of, with_accelerator

LORA = PeftSettings(method="lora", r=4, lora_alpha=8)
QLORA = [PeftSettings(method="qlora", r=4, lora_alpha=8, bits=bits) for bits in (4, 8)]
NOT_HERE = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
ADALORA = PeftSettings(method="adalora", r=4, lora_alpha=8)
ON_A_TRUNK = [LORA, ADALORA, *(pytest.param(peft, marks=NOT_HERE) for peft in QLORA)]


@pytest.fixture
def context(tmp_path, causal, scalar, tokenizer):
    """Return context(peft, gradient_checkpointing): what the stage reads of a StageRun, with
    artifacts.
    """
    save_model(causal("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "sft" / "model", card="")
    save_model(scalar("llama", seed=1, vocab_size=len(tokenizer)), tokenizer, tmp_path / "rm" / "model", card="")

    def build(peft=None, gradient_checkpointing=False):
        model = SimpleNamespace(
            dtype="float32",
            attn_implementation="sdpa",
            peft=peft,
            gradient_checkpointing=gradient_checkpointing,
            compile=False,
        )
        config = ppo_settings.PPOSettings(max_length=64, response_length=16, ptx_length=32)
        return SimpleNamespace(
            confirm_folders=lambda: None,
            stage="ppo",
            experiment=SimpleNamespace(
                model=model,
                launch=LaunchSettings(device="cpu"),
                sft=SimpleNamespace(ppo_init=None),
                rm=SimpleNamespace(peft=None, base=None),
                ppo=config,
            ),
            seed=0,
            config=config,
            trust_remote_code=False,
            inputs={"sft": tmp_path / "sft", "rm": tmp_path / "rm"},
        )

    return build


def load(ctx):
    """Return the models of a run, as its first lines load them."""
    c = ctx.config
    folders = role_folders(ctx.inputs["sft"] / "model", ctx.inputs, ctx.experiment)
    runtime = with_accelerator(runtime_of(ctx))
    session = SimpleNamespace(seed=ctx.seed, say=print)
    return load_models(session, folders, runtime, adapter_settings(ctx.experiment.model), c.max_length)


def trains(model):
    return any(p.requires_grad for p in model.parameters())


def test_policy_and_value_model_train_the_others_do_not(context):
    roles = load(context())
    assert trains(roles.policy) and trains(roles.value_model)
    assert not trains(roles.ref_policy) and not trains(roles.reward_models["rm"])
    assert all(p.requires_grad for m in (roles.policy, roles.value_model) for p in m.parameters())


def test_they_start_as_sft_and_reward_model(context, rows):
    """Policy = reference and value model = reward model, each with weights of its own."""
    roles = load(context())
    for one, other in ((roles.policy, roles.ref_policy), (roles.value_model, roles.reward_models["rm"])):
        for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr(), name
    torch.testing.assert_close(
        response_values(roles.value_model, rows), response_values(roles.reward_models["rm"], rows)
    )


def test_with_adapters_the_reference_costs_no_model(context, rows):
    roles = load(context(LORA))
    assert roles.ref_policy is None
    torch.testing.assert_close(
        reference_logprobs(roles, rows, 1.0), response_logprobs(roles.policy, rows), rtol=0, atol=0
    )
    assert all("lora_" in n for n, p in roles.policy.named_parameters() if p.requires_grad)


@pytest.fixture(params=ON_A_TRUNK, ids=["lora", "adalora", "qlora 4", "qlora 8"])
def adapted(request, context, tmp_path, tokenizer):
    """Return adapted(), like `context`, with a reward model trained as an adapter on SFT's
    trunk.
    """
    settings = adapter_settings(SimpleNamespace(peft=request.param))
    shutil.rmtree(tmp_path / "rm")
    model = with_adapter(new_reward_model(tmp_path / "sft" / "model", seed=3), settings, scalar=True, seed=3)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p += 0.1 * torch.randn_like(p)
    model.config.reward_bias = 0.25
    save_merged(model, tokenizer, tmp_path / "rm" / "model", card="")

    def build():
        return context(request.param)

    build.peft = request.param
    return build


def accumulate(ctx, roles, rows, ragged, old):
    """Accumulate the gradients of an update, given log-probs `old`."""
    zeros, ones = torch.zeros(rows.responses.shape), torch.ones(rows.responses.shape)
    rollout = Rollout(*ragged, [0, 1, 2, 3], rows.response_mask, old, old, zeros, zeros, zeros[:, 0], zeros[:, 0])
    ppo_gradients(roles, Batch(rollout, ones, ones), list(range(4)), update_options(ctx.config, ctx.seed))


def step(ctx, roles, rows, ragged):
    """Return the gradients of an update, and the log-probs and scores before it."""
    old, scores = response_logprobs(roles.policy, rows).detach(), response_scores(roles.reward_models["rm"], rows)
    accumulate(ctx, roles, rows, ragged, old)
    return [old, scores, *(p.grad for m in (roles.policy, roles.value_model) for p in trainable_parameters(m).values())]


def test_four_roles_stand_on_one_trunk(adapted, rows, ragged, monkeypatch):
    """It is in memory once, and the numbers are those of four separate models."""
    ctx, found, sizes = adapted(), [], []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr("stages.models.roles.share_frozen", lambda *_: None)
        roles = load(ctx)
        assert roles.ref_policy is None and len(roles.models()) == 3
        weights = {p.untyped_storage().data_ptr(): p.nbytes for m in roles.models() for p in m.parameters()}
        trained = sum(p.nbytes for m in roles.models() for n, p in m.named_parameters() if "lora_" in n or "score" in n)
        sizes.append(sum(weights.values()) - trained)
        found.append(step(ctx, roles, rows, ragged))
    trunk = sum(p.nbytes for p in unwrapped(roles.policy).parameters()) - sum(
        p.nbytes for n, p in roles.policy.named_parameters() if "lora_" in n
    )
    assert sizes[0] <= trunk < sizes[1] / 2.5
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(found[0]) > 10


def test_an_adapted_reward_model_scores_as_its_merged_weights(adapted, rows, tmp_path):
    roles = load(adapted())
    whole = load_scalar_model(tmp_path / "rm" / "model")
    for model in (roles.reward_models["rm"], roles.value_model):
        torch.testing.assert_close(response_scores(model, rows), response_scores(whole, rows), rtol=1e-5, atol=1e-5)
    assert trains(roles.value_model) and not trains(roles.reward_models["rm"])


def test_publishing_one_role_leaves_the_others_alone(adapted, rows, tokenizer, tmp_path):
    """Merging changes no shared trunk; the published folder is the adapted policy."""
    roles = load(adapted())
    with torch.no_grad():
        for p in trainable_parameters(roles.policy).values():
            p += 0.05
    logprobs, scores = response_logprobs(roles.policy, rows).detach(), response_scores(roles.reward_models["rm"], rows)
    save_merged(roles.policy, tokenizer, tmp_path / "published", card="")
    assert torch.equal(response_scores(roles.reward_models["rm"], rows), scores)
    again = load_policy(tmp_path / "published")
    torch.testing.assert_close(response_logprobs(again, rows), logprobs, rtol=1e-4, atol=1e-5)
    from peft import PeftModel

    base = load_policy(tmp_path / "sft" / "model")
    if adapted.peft.bits is not None:
        quantize(base, adapted.peft.bits)
    on_base = PeftModel.from_pretrained(base, tmp_path / "published" / "adapter")
    torch.testing.assert_close(response_logprobs(on_base, rows), logprobs, rtol=1e-5, atol=1e-6)


def test_another_reward_model_keeps_a_trunk_of_its_own(adapted, tmp_path):
    """The model that its adapter was trained on is not known here."""
    ctx = adapted()
    ctx.experiment.ppo = ctx.config = ctx.config.model_copy(update={"reward_model": str(tmp_path / "rm" / "model")})
    roles = load(ctx)
    assert not is_adapted(roles.reward_models["rm"]) and is_adapted(roles.value_model)


def test_a_reward_model_of_another_tokenizer_is_refused(context, tmp_path):
    ctx = context()
    train_tokenizer(["other words", "entirely"] * 3, vocab_size=290).save_pretrained(tmp_path / "rm" / "model")
    with pytest.raises(UserError, match="tokenizer"):
        load(ctx)


@pytest.mark.parametrize("peft", [None, LORA])
def test_gradient_checkpointing_recomputes_layers_and_changes_no_gradient(context, rows, ragged, peft):
    """Each layer runs once forward and once more in the backward pass."""
    found = {}
    for asked in (False, True):
        ctx = context(peft, asked)
        roles, calls = load(ctx), []
        models = roles.policy, roles.value_model
        for layer in (m for model in models for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"):
            layer.input_layernorm.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        old = response_logprobs(roles.policy, rows).detach()
        calls.clear()
        accumulate(ctx, roles, rows, ragged, old)
        found[asked] = len(calls), [p.grad for m in models for p in m.parameters() if p.requires_grad]
    assert found[False][0] == 4 and found[True][0] == 8
    for one, other in zip(found[False][1], found[True][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_does_not_disturb_sampling(context):
    """transformers excludes checkpointing and cache at the same time; the sampler needs its
    cache.
    """
    drawn = [
        sample(load(context(None, asked)).policy, [[5, 9], [7]], [1, 2], Decoding(6, eos_id=1, pad_id=0))
        for asked in (False, True)
    ]
    assert drawn[0] == drawn[1]

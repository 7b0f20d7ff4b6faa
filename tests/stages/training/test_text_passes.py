"""Test that each way of computing text has trl's loss and gradients, and which way is chosen."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GraniteConfig, MistralConfig, Qwen3Config

from pipeline.launch import parallel
from stages.models import head
from stages.models.adapters import AdapterSettings, with_adapter
from stages.models.forward import head_is_linear
from stages.models.packing import can_pack
from stages.models.sharding import make_on_rank_zero, publishable
from stages.shared.runtime import Runtime
from stages.training import text_packing
from stages.training.text import Optimization, make_trainer
from stages.training.text_evaluation import held_out_loss
from stages.training.text_packing import TextPass, Wanted, choose_pass
from tests.builders import LAYERS, build, tiny_causal, tiny_tokenizer
from tests.together import together

CONFIGS = {"gemma": GemmaConfig, "granite": GraniteConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}
SHARED = {"num_key_value_heads": 1}
LINEAR = ("llama", "gpt2", "qwen2", "qwen3", "gemma")
PLAIN = TextPass()
PASSES = {
    "packed": TextPass("packed"),
    "labels only": TextPass("padded", labels_only=True),
    "packed, labels only": TextPass("packed", labels_only=True),
    "padding_free, labels only": TextPass("padding_free", labels_only=True),
}
ROWS = [  # conversations of several turns, of 2 to 40 tokens; the last micro-batch has a row without labels
    {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, 8, -100, 10]},
    {"input_ids": [11, 12], "labels": [-100, 12]},
    {"input_ids": list(range(4, 44)), "labels": [-100] * 12 + list(range(16, 24)) + [-100] * 8 + list(range(32, 44))},
    {"input_ids": [9, 8, 7], "labels": [-100, 8, 7]},
    {"input_ids": list(range(20, 4, -1)), "labels": [-100, *range(19, 4, -1)]},
    {"input_ids": [30, 31, 32], "labels": [-100, -100, -100]},
]
RUNTIME = Runtime("cpu", "float32", "sdpa", sharded=False, gradient_checkpointing=False, trust_remote_code=False)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def make(kind, tokenizer, **options):
    if kind not in CONFIGS:
        return tiny_causal(kind, 1, tokenizer, **({} if kind == "gpt2" else SHARED), **options)
    shape = LAYERS | SHARED | {"head_dim": 8, "initializer_range": 0.3}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    return build(AutoModelForCausalLM, 1, CONFIGS[kind](vocab_size=len(tokenizer), **shape, **ids, **options))


def step(model, tokenizer, how, folder, rows=ROWS, optimization=None, runtime=RUNTIME):
    """Return loss, gradients and the held-out loss of a step of two micro-batches of three rows."""
    from datasets import Dataset
    from trl import SFTConfig

    arguments = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=1,
        use_cpu=True, bf16=False, report_to="none", max_length=None, train_sampling_strategy="sequential",
        activation_checkpointing=runtime.gradient_checkpointing, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    optimization = optimization or Optimization(1.0, 0.0, 0.95)
    trainer = make_trainer(model, arguments, tokenizer, Dataset.from_list(rows), runtime, optimization, how)
    if runtime.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    assert len(batches) == 2
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=count) for batch in batches]
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    held_out = held_out_loss(trainer.model, rows, tokenizer.pad_token_id, 3, trainer.accelerator, lambda: False, how)
    return sum(loss.item() for loss in losses), gradients, held_out


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[2] == pytest.approx(expected[2], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-5, (name, error)


def trls(model, tokenizer, folder, monkeypatch, how=PLAIN, **options):
    """Return a step with trl's own loss."""
    with monkeypatch.context() as patch:
        patch.setattr("stages.training.text.SMALL_VOCABULARY", 0)
        return step(model, tokenizer, how, folder, **options)


@pytest.mark.parametrize("kind", LINEAR)
def test_every_way_has_trls_loss_and_gradients(kind, tokenizer, tmp_path, monkeypatch):
    """Mixed lengths, several turns, and a micro-batch in which a row has no label."""
    expected = trls(make(kind, tokenizer), tokenizer, tmp_path, monkeypatch)
    for how in (PLAIN, *PASSES.values()):
        model = make(kind, tokenizer)
        assert head_is_linear(model)
        assert how.rows != "packed" or can_pack(model, 64)
        assert_same(step(model, tokenizer, how, tmp_path), expected)


def test_the_label_of_a_first_token_has_no_loss(tokenizer, tmp_path, monkeypatch):
    """As in rows of documents, whose labels are their tokens."""
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]
    expected = trls(make("llama", tokenizer), tokenizer, tmp_path, monkeypatch, rows=rows)
    for how in PASSES.values():
        model = make("llama", tokenizer)
        can_pack(model, 64)
        assert_same(step(model, tokenizer, how, tmp_path, rows=rows), expected)


def test_scaled_logits_keep_trls_tiles_over_packed_rows(tokenizer, tmp_path, monkeypatch):
    """trl's head knows such factors; ours is a matrix product alone."""
    model = make("granite", tokenizer, logits_scaling=3.0)
    assert choose_pass(model, wanted()) == TextPass("packed", labels_only=False)
    found = trls(model, tokenizer, tmp_path, monkeypatch, how=TextPass("packed"))
    assert_same(found, trls(make("granite", tokenizer, logits_scaling=3.0), tokenizer, tmp_path, monkeypatch))


@pytest.mark.parametrize(
    "adapter", [{"method": "lora", "r": 2}, {"method": "prefix_tuning", "num_virtual_tokens": 4}], ids=str
)
def test_adapters_train_as_on_padded_rows(adapter, tokenizer, tmp_path):
    def adapted():
        model = with_adapter(make("llama", tokenizer), AdapterSettings(**adapter), seed=3)
        with torch.no_grad():  # an adapter that starts at 0 has gradients of 0
            for name, p in model.named_parameters():
                p.add_(0.1) if "lora_B" in name else None
        return model

    model = adapted()
    assert choose_pass(model, wanted()) == PASSES["packed, labels only"]
    assert_same(
        step(model, tokenizer, PASSES["packed, labels only"], tmp_path), step(adapted(), tokenizer, PLAIN, tmp_path)
    )


def test_chunks_recomputation_and_checkpointing_change_nothing(tokenizer, tmp_path, monkeypatch):
    expected = step(make("llama", tokenizer), tokenizer, PLAIN, tmp_path)
    small = partial(head.head_logprobs, chunk=7 * len(tokenizer), kept=0)
    monkeypatch.setattr("stages.models.label_head.head_logprobs", small)
    model = make("llama", tokenizer)
    can_pack(model, 64)
    checkpointed = replace(RUNTIME, gradient_checkpointing=True)
    assert_same(step(model, tokenizer, PASSES["packed, labels only"], tmp_path, runtime=checkpointed), expected)


def test_smoothed_labels_over_packed_rows(tokenizer, tmp_path):
    smoothed = Optimization(1.0, 0.0, 0.95, label_smoothing=0.2)
    model = make("llama", tokenizer)
    assert choose_pass(model, wanted(smooths_labels=True)) == TextPass("packed")
    found = step(model, tokenizer, TextPass("packed"), tmp_path, optimization=smoothed)
    assert_same(found, step(make("llama", tokenizer), tokenizer, PLAIN, tmp_path, optimization=smoothed))
    assert found[0] != pytest.approx(step(make("llama", tokenizer), tokenizer, PLAIN, tmp_path)[0], rel=1e-3)


def test_tokens_that_are_never_answered_get_no_probability(tokenizer, tmp_path):
    def prompted():
        model = make("llama", tokenizer)
        model.config.soft_prompt_ids = [40, 41]
        return model

    model = prompted()
    assert choose_pass(model, wanted()) == PASSES["packed, labels only"]
    rows = [{name: [x for x in ids if x not in (40, 41)] for name, ids in row.items()} for row in ROWS]
    rows[2] = ROWS[4]
    found = step(model, tokenizer, PASSES["packed, labels only"], tmp_path, rows=rows)
    assert_same(found, step(prompted(), tokenizer, PLAIN, tmp_path, rows=rows))
    assert found[0] < step(make("llama", tokenizer), tokenizer, PLAIN, tmp_path, rows=rows)[0]


def test_only_labels_go_through_the_head(tokenizer, tmp_path, monkeypatch):
    """Counted: 6 + 20 + … labels of 70 tokens, and no padding in the trunk."""
    seen = []
    monkeypatch.setattr(
        "stages.models.label_head.head_logprobs",
        lambda hidden, *args, **options: seen.append(len(hidden)) or head.head_logprobs(hidden, *args, **options),
    )
    model = make("llama", tokenizer)
    can_pack(model, 64)
    tokens = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    step(model, tokenizer, PASSES["packed, labels only"], tmp_path)
    labels = [sum(label != -100 for label in row["labels"][1:]) for row in ROWS]
    assert seen[:2] == [sum(labels[:3]), sum(labels[3:])]
    assert tokens[:2] == [sum(len(row["input_ids"]) for row in part) for part in (ROWS[:3], ROWS[3:])]


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ddp", "fsdp2"])
def test_two_processes_take_the_step_of_one(sharded, tokenizer, tmp_path):
    """One process takes it with trl's own loss."""
    expected = weights_after_a_step(tokenizer, PLAIN, tmp_path, False)
    assert (expected["model.norm.weight"] - 1).abs().max() > 1e-3
    together(2, check_step, tokenizer, sharded, expected, tmp_path)


def check_step(tokenizer, sharded, expected, folder):
    found = weights_after_a_step(tokenizer, PASSES["packed, labels only"], folder, sharded)
    if parallel.is_rank_zero():
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5)


def weights_after_a_step(tokenizer, how, folder, sharded):
    """Return the whole weights after a step of gradient descent on all rows; on rank 0."""
    from datasets import Dataset
    from trl import SFTConfig

    def made():
        model = make("llama", tokenizer)
        assert choose_pass(model, wanted()) == PASSES["packed, labels only"] or how == PLAIN
        return model

    count = parallel.rank_and_world_size()[1]
    arguments = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=3, gradient_accumulation_steps=2 // count,
        max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=100.0, lr_scheduler_type="constant", use_cpu=True,
        bf16=False, report_to="none", max_length=None, train_sampling_strategy="sequential", save_strategy="no",
        activation_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    model, runtime = make_on_rank_zero(made) if sharded else made(), replace(RUNTIME, sharded=sharded)
    rows = Dataset.from_list(ROWS)
    trainer = make_trainer(model, arguments, tokenizer, rows, runtime, Optimization(100.0, 0.0, 0.95), how)
    if sharded:
        trainer.shard_model(None)
    trainer.train()
    whole = publishable(trainer.accelerator.unwrap_model(trainer.model), made)
    return {name: p.detach().clone() for name, p in whole.named_parameters()}


def wanted(**changes):
    usual = Wanted(
        packing=None, has_many_logits=True, is_ragged=True, longest=40, adds_noise=False, smooths_labels=False,
        balances_experts=False,
    )  # fmt: skip
    return replace(usual, **changes)


class TestChoice:
    """Which way is chosen, and what is said where rows cannot be packed."""

    @pytest.mark.parametrize(
        "changes, rows, labels_only, why",
        [
            ({}, "packed", True, None),
            ({"packing": False}, "padded", False, None),
            ({"has_many_logits": False}, "padded", False, None),
            ({"has_many_logits": False, "packing": True}, "packed", False, None),
            ({"is_ragged": False}, "padded", True, None),
            ({"adds_noise": True}, "padded", True, "neftune_noise_alpha"),
            ({"adds_noise": True, "packing": True}, "padded", True, "neftune_noise_alpha"),
            ({"smooths_labels": True}, "packed", False, None),
            ({"balances_experts": True}, "padded", False, "router_aux_loss_coef"),
            ({"balances_experts": True, "packing": True}, "padding_free", False, "router_aux_loss_coef"),
        ],
        ids=str,
    )
    def test_of_a_llama(self, changes, rows, labels_only, why, tokenizer):
        found = choose_pass(make("llama", tokenizer), wanted(**changes))
        assert (found.rows, found.labels_only) == (rows, labels_only)
        assert found.why is None if why is None else why in found.why

    def test_a_kernel_that_cannot_read_packed_rows(self, tokenizer):
        for packing, rows in ((None, "padded"), (True, "padding_free")):
            model = make("llama", tokenizer)
            model.set_attn_implementation("eager")
            found = choose_pass(model, wanted(packing=packing))
            assert (found.rows, found.labels_only) == (rows, True) and "cannot read packed rows" in found.why

    def test_a_window_shorter_than_the_rows(self, tokenizer):
        assert choose_pass(make("mistral", tokenizer, sliding_window=16), wanted()).rows == "padded"
        assert choose_pass(make("mistral", tokenizer, sliding_window=64), wanted()).rows == "packed"

    def test_rows_that_processes_share(self, tokenizer, monkeypatch):
        arrangement = type("Arrangement", (), {"together": 2})
        monkeypatch.setattr(text_packing.parallel, "arrangement", lambda: arrangement)
        found = choose_pass(make("llama", tokenizer), wanted())
        assert (found.rows, found.labels_only) == ("padded", False) and "processes share" in found.why

    def test_the_embedded_world_has_few_logits_and_smollm2_many(self):
        assert not text_packing.has_many_logits(1024, 32, 64)
        assert text_packing.has_many_logits(49152, 8, 512)

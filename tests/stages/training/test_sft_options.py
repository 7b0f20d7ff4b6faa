"""Test dropout, NEFTune, label smoothing and packing of demonstrations, each by its effect."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from pipeline.errors import UserError
from stages.models.head import head_logprobs
from stages.objectives.losses import language_model_loss
from stages.training.residual_dropout import check_residual_dropout, residual_dropout
from stages.training.text_packing import check_packing
from tests.builders import tiny_causal

IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
STEPS = ["sft.max_steps=3", "sft.max_length=64", "sft.per_device_train_batch_size=4", "sft.sample_tokens=0"]


def logits_of(model, seed=0):
    torch.manual_seed(seed)
    return model(input_ids=IDS, use_cache=False).logits


class TestResidualDropout:
    def test_it_is_that_of_gpt2_mask_for_mask(self):
        """The family's own resid_pdrop draws the same masks at the same places."""
        ours = tiny_causal("gpt2", 1).train()
        theirs = AutoModelForCausalLM.from_config(ours.config, attn_implementation="sdpa").float()
        theirs.load_state_dict(ours.state_dict())
        for block in theirs.transformer.h:
            block.attn.resid_dropout.p = block.mlp.dropout.p = 0.3
        with residual_dropout(ours, 0.3):
            torch.testing.assert_close(logits_of(ours), logits_of(theirs.train()), rtol=0, atol=0)

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_it_acts_in_training_alone_and_leaves_nothing_behind(self, kind):
        model = tiny_causal(kind, 1).train()
        plain = logits_of(model)
        with residual_dropout(model, 0.2):
            assert not torch.allclose(logits_of(model), plain)
            assert torch.equal(logits_of(model), logits_of(model))
            torch.testing.assert_close(logits_of(model.eval()), plain)
        torch.testing.assert_close(logits_of(model.train()), plain)
        with residual_dropout(model, None):
            torch.testing.assert_close(logits_of(model), plain)

    def test_the_mean_of_many_masks_is_near_the_whole(self):
        """What is kept is divided by 1 − p: of one layer without norms before its sum."""
        model = tiny_causal("llama", 1, num_hidden_layers=1, initializer_range=0.02).train()
        plain = logits_of(model)
        with torch.no_grad(), residual_dropout(model, 0.2):
            mean = sum(logits_of(model, seed) for seed in range(300)) / 300
        assert (mean - plain).abs().mean() < 0.1 * plain.std()

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_it_is_all_that_a_layer_adds(self, kind):
        check_residual_dropout(tiny_causal(kind, 1))

    def test_a_layer_that_adds_more_is_refused(self):
        model = tiny_causal("llama", 1)
        model.model.layers[0].register_forward_hook(lambda layer, args, out: out + 1)
        with pytest.raises(UserError, match=r"sft.dropout: a LlamaForCausalLM .* adds more to the residual stream"):
            check_residual_dropout(model)

    def test_a_layer_with_other_names_is_refused(self):
        model = tiny_causal("llama", 1)
        for layer in model.model.layers:
            layer.mixer = layer.self_attn
            del layer.self_attn
        with pytest.raises(UserError, match="no attention and MLP by a known name"):
            check_residual_dropout(model)


def test_label_smoothing_is_that_of_transformers():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[1, -100, 3, 0, 6], [2, 2, -100, -100, 5]])
    ours = language_model_loss(logits, labels, (labels != -100).sum(), 0.1)
    theirs = LabelSmoother(epsilon=0.1)({"logits": logits}, labels.clone())
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(language_model_loss(logits, labels, 7), language_model_loss(logits, labels, 7, 0.0))


class TestPacking:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_families_whose_rows_stay_apart(self, kind):
        check_packing(tiny_causal(kind, 1))

    def test_rows_that_would_see_each_other_are_refused(self):
        class OneLongRow(nn.Module):
            """Reads its row without looking at positions."""

            def __init__(self):
                super().__init__()
                self.inner = tiny_causal("llama", 1)

            def forward(self, input_ids, position_ids=None, use_cache=False):
                return self.inner(input_ids=input_ids, use_cache=False)

        with pytest.raises(UserError, match=r"sft.packing: rows of a OneLongRow cannot .*a row sees those before it"):
            check_packing(OneLongRow())


@pytest.fixture(scope="module")
def plain(chain, tmp_path_factory):
    """Return sft's outcome without any of these."""
    return chain.run("sft", tmp_path_factory.mktemp("plain") / "sft", *STEPS)


def losses(done):
    return [row["loss"] for row in done.rows("metrics.jsonl")]


@pytest.mark.parametrize("option", ["dropout=0.2", "neftune_noise_alpha=5.0", "label_smoothing=0.1"])
def test_it_changes_training_and_not_what_is_measured_before_it(option, chain, plain, tmp_path):
    done = chain.run("sft", tmp_path / "sft", *STEPS, f"sft.{option}")
    assert abs(losses(done)[0] - losses(plain)[0]) > 1e-3
    first = [one.rows("evaluations.jsonl")[0]["loss"] for one in (done, plain)]
    assert first[0] == first[1]
    config = [json.loads((one.folder / "model/config.json").read_text()) for one in (done, plain)]
    assert config[0] == config[1]


def test_the_smoothed_loss_is_that_of_the_settings(chain, plain, tmp_path):
    """The mean of −log p over all ids is far larger here, so that the loss grows with its share."""
    shares = [chain.run("sft", tmp_path / str(e), *STEPS, f"sft.label_smoothing={e}") for e in (0.1, 0.2)]
    one, two = (losses(done)[0] - losses(plain)[0] for done in shares)
    assert two == pytest.approx(2 * one, rel=1e-4)


def test_packed_rows_train_as_padded_ones(chain, plain, tmp_path):
    done = chain.run("sft", tmp_path / "sft", *STEPS, "sft.packing=true")
    assert losses(done) == pytest.approx(losses(plain), rel=1e-4)
    rows = [one.rows("metrics.jsonl") for one in (done, plain)]
    assert [row["grad_norm"] for row in rows[0]] == pytest.approx([row["grad_norm"] for row in rows[1]], rel=1e-3)


def test_many_logits_are_computed_for_labels_only(chain, plain, tmp_path, monkeypatch):
    """With no setting: the journal, and what is measured of held-out rows, stay the same."""
    calls = []
    monkeypatch.setattr("stages.training.text_packing.MANY_LOGITS", 0)
    monkeypatch.setattr(
        "stages.models.label_head.head_logprobs",
        lambda *args, **options: calls.append(1) or head_logprobs(*args, **options),
    )
    done = chain.run("sft", tmp_path / "sft", *STEPS)
    assert calls
    for name in ("loss", "grad_norm"):
        expected = [row[name] for row in plain.rows("metrics.jsonl")]
        assert [row[name] for row in done.rows("metrics.jsonl")] == pytest.approx(expected, rel=1e-3)
    held_out = [[row["loss"] for row in one.rows("evaluations.jsonl")] for one in (done, plain)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)
    calls.clear()
    chain.run("sft", tmp_path / "off", *STEPS, "sft.packing=false")
    assert not calls


def test_null_leaves_the_fingerprint_alone(chain):
    from pipeline.fingerprints import fingerprinted_settings

    config = {"sft": chain.experiment().sft.model_dump(mode="json")}
    covered = fingerprinted_settings("sft", config)["sft"]
    assert not {"dropout", "neftune_noise_alpha", "label_smoothing", "packing"} & covered.keys()

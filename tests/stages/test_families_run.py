"""Test stages on model families that differ from Llama: routers, unusable caches, other logits."""

import json
from types import SimpleNamespace

import pytest
import torch

from pipeline.errors import UserError
from stages import rm

SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "intermediate_size": 24, "max_position_embeddings": 96, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": None, "initializer_range": 0.3, "bos_token_id": None,
}  # fmt: skip


def mixtral(tokenizer, **options):
    """Return a random Mixtral; `options` change its configuration."""
    from transformers import MixtralConfig, MixtralForCausalLM

    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SHAPE, **ids, **options)).float().eval()


def run_sft(chain, folder, model, *settings):
    """Run sft on a model; return the finished run and the published configuration."""
    model.save_pretrained(folder / "base" / "model")
    chain.tokenizer.save_pretrained(folder / "base" / "model")
    settings = ("sft.max_steps=2", "sft.eval_steps=2", "sft.sample_tokens=6", "sft.max_length=80", *settings)
    settings += ("sft.per_device_train_batch_size=4", "sft.learning_rate=0.001")
    done = chain.run("sft", folder / "sft", *settings, inputs={"base": folder / "base"})
    return done, json.loads((folder / "sft" / "model" / "config.json").read_text())


@pytest.mark.parametrize("given", [True, False])
def test_a_mixture_of_experts_trains_and_keeps_its_configuration(chain, tmp_path, given):
    """The loss has no router term unless a setting names it, although trl adds one by default.

    Samples are drawn in training, and the published model generates a batch.
    """
    from transformers import AutoModelForCausalLM

    options = {"output_router_logits": given, "router_aux_loss_coef": 0.3}
    done, config = run_sft(chain, tmp_path / "none", mixtral(chain.tokenizer, **options))
    plain, _ = run_sft(chain, tmp_path / "zero", mixtral(chain.tokenizer, router_aux_loss_coef=0.0))
    named, other = run_sft(chain, tmp_path / "named", mixtral(chain.tokenizer, **options), "sft.router_aux_loss_coef=2")
    for published in (config, other):
        assert {key: published[key] for key in options} == options
    losses = [[row["loss"] for row in run.rows("metrics.jsonl")] for run in (done, plain, named)]
    assert losses[0] == losses[1]
    assert losses[2][0] > losses[0][0] + 1.9, "the term is at least 1, when experts are used alike"
    assert len(done.rows("samples.jsonl")) > 0
    if not given:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "none" / "sft" / "model")
        ids = torch.tensor([[0, 0, 30, 31], [30, 31, 32, 33]])
        model.generate(ids, attention_mask=(ids > 0).long(), do_sample=False, max_new_tokens=3)


def test_a_term_for_experts_is_refused_where_there_are_none(chain, tmp_path):
    from micro_chain import random_policy

    with pytest.raises(UserError, match=r"sft.router_aux_loss_coef: .* LlamaForCausalLM; set it to null"):
        run_sft(chain, tmp_path, random_policy(chain.tokenizer, 0), "sft.router_aux_loss_coef=0.1")


@pytest.mark.parametrize("items", [None, 7])
def test_the_experts_term_is_trls(chain, tmp_path, items):
    """Loss and gradients of the plain loss, used for a small vocabulary, equal trl's."""
    from plain_loss import assert_is_trls

    tokenizer = chain.tokenizer
    assert_is_trls(lambda: mixtral(tokenizer), tokenizer, items, tmp_path, accumulated=2, router_aux_loss_coef=0.5)


class TestBase:
    def run(self, chain, tmp_path, model, *settings):
        model.save_pretrained(tmp_path / "source")
        chain.tokenizer.save_pretrained(tmp_path / "source")
        return chain.run("base", tmp_path / "base", f"model.name_or_path={tmp_path / 'source'}", *settings)

    def test_a_family_with_an_unusable_cache_is_sampled_by_whole_rows(self, chain, tmp_path):
        """A decoder that counts positions from the cache, without position_ids, fails on left
        padding.
        """
        from transformers import BartConfig, BartForCausalLM

        tokenizer, _ = chain.tokenizer, torch.manual_seed(0)
        config = BartConfig(
            vocab_size=len(tokenizer), d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24,
            max_position_embeddings=96, init_std=0.3, pad_token_id=tokenizer.pad_token_id, is_encoder_decoder=False,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None, decoder_start_token_id=None, is_decoder=True,
            forced_eos_token_id=None,
        )  # fmt: skip
        done = self.run(chain, tmp_path, BartForCausalLM(config).float().eval())
        assert "whole rows are read for each token" in done.said
        assert json.loads((tmp_path / "base" / "model" / "config.json").read_text())["samples_whole_rows"] is True

    def test_a_family_without_a_sequence_classification_is_published(self, chain, tmp_path):
        from transformers import GraniteConfig, GraniteForCausalLM

        torch.manual_seed(0)
        shape = {key: SHAPE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        ids = {"pad_token_id": chain.tokenizer.pad_token_id, "eos_token_id": chain.tokenizer.eos_token_id}
        config = GraniteConfig(**shape, **ids, vocab_size=len(chain.tokenizer), intermediate_size=24, bos_token_id=None)
        done = self.run(chain, tmp_path, GraniteForCausalLM(config).float().eval())
        assert "no reward model" not in done.said and not (tmp_path / "base" / "model" / "scalar_head.py").exists()


def test_a_family_that_takes_no_head_is_refused_for_rm(chain, tmp_path, monkeypatch, capsys):
    """Base refuses it before anything is trained; where only sft and dpo follow, it warns."""
    from micro_chain import random_policy

    from pipeline.cli import main
    from stages import base

    monkeypatch.setattr(base, "family_problem", lambda model: "there is no place for it")
    random_policy(chain.tokenizer, 0).save_pretrained(tmp_path / "source")
    chain.tokenizer.save_pretrained(tmp_path / "source")
    config = (chain.root / "micro.yaml").read_text().replace(f"{chain.root}/sft/model", str(tmp_path / "source"))
    (tmp_path / "micro.yaml").write_text(config)
    command = ["-c", str(tmp_path / "micro.yaml"), "--artifacts", str(tmp_path / "artifacts")]
    fitting = [f"{stage}.max_length=32" for stage in ("sft", "rm", "dpo")]  # the model's context is short
    assert main(["run", "rm", *command, *fitting]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "no reward model can be made (there is no place for it); dpo needs none" in line
    assert main(["run", "base", *command]) == 0
    assert "rm and ppo will refuse it" in capsys.readouterr().out


def test_rm_publishes_no_model_whose_logit_is_another_number(chain):
    """A class with layers between trunk and head would give another number."""
    from micro_chain import random_reward_model

    model, group = random_reward_model(chain.tokenizer, 10, 0.3), SimpleNamespace(prompt=[5, 6], responses=[[], [7, 8]])
    rm.check_published_score(model, group, chain.tokenizer.pad_token_id)
    forward = model.forward
    model.forward = lambda *a, **k: SimpleNamespace(logits=forward(*a, **k).logits * 1.01)
    logit_differs = r"LlamaForSequenceClassification gives a response the logit .* its score here is"
    with pytest.raises(UserError, match=logit_differs):
        rm.check_published_score(model, group, chain.tokenizer.pad_token_id)


def test_ppo_takes_a_reward_model_without_the_padding_token_that_base_added(chain, tmp_path):
    """The reward model's vocabulary is a token smaller, and the value model's is the policy's."""
    import copy

    from micro_chain import random_policy
    from transformers import AutoModelForSequenceClassification

    tokenizer, policy = copy.deepcopy(chain.tokenizer), random_policy(chain.tokenizer, 0)
    tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
    size = policy.config.vocab_size
    policy.resize_token_embeddings(size + 1, mean_resizing=False)
    policy.save_pretrained(tmp_path / "sft" / "model")
    tokenizer.save_pretrained(tmp_path / "sft" / "model")
    choices = "total_episodes=8 batch_size=8 mini_batch_size=4 response_length=6 max_length=60 ptx_coef=0"
    settings = [f"ppo.{choice}" for choice in choices.split()] + [f"ppo.reward_model={chain.root / 'other_rm/model'}"]
    settings += ["evaluate.policies=[sft]"]
    done = chain.run("ppo", tmp_path / "ppo", *settings, inputs={"sft": tmp_path / "sft"})
    assert done.figures["updates"] == 1
    value_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ppo" / "value_model")
    assert value_model.get_input_embeddings().weight.shape[0] == size + 1

"""Test models written and loaded again: heads that stay, named faults, dropout that is off."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.groups import make_rows
from data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from stages.models.forward import response_logprobs, response_scores, response_values
from stages.models.loading import (
    from_scratch,
    load_policy,
    load_pretrained,
    load_scalar_model,
    load_tokenizer,
    new_reward_model,
    prepare,
)
from stages.models.publish import save_model
from stages.models.same_tokenizer import check_same_tokenizer
from stages.models.tokens import end_turns_with_eos, give_pad_token


def equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture
def policy_folder(tmp_path, causal, kind, tokenizer):
    save_model(causal(kind), tokenizer, tmp_path / "policy", card="a policy")
    return tmp_path / "policy"


@pytest.fixture
def reward_folder(tmp_path, scalar, kind, tokenizer):
    save_model(scalar(kind), tokenizer, tmp_path / "rm", card="a reward model")
    return tmp_path / "rm"


class TestPolicy:
    def test_comes_back_with_the_same_numbers(self, policy_folder, causal, kind, rows):
        """Log-probs of the loaded model are equal, bit for bit."""
        equal(response_logprobs(load_policy(policy_folder), rows), response_logprobs(causal(kind), rows))

    def test_transformers_can_use_the_folder_without_us(self, policy_folder, tokenizer):
        """It has safetensors, a tokenizer with its template, a card, and generation ends at EOS."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        names = {p.name for p in policy_folder.iterdir()}
        assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
        assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
        model = AutoModelForCausalLM.from_pretrained(policy_folder)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.config.use_cache
        assert AutoTokenizer.from_pretrained(policy_folder).chat_template == tokenizer.chat_template
        assert model.generate(torch.tensor([[5, 9]]), max_new_tokens=3, do_sample=False).shape[1] >= 3

    def test_is_no_reward_model(self, policy_folder):
        with pytest.raises(UserError, match="num_labels=1"):
            load_scalar_model(policy_folder)


class TestRewardModel:
    def test_comes_back_with_the_same_head_and_scores(self, reward_folder, scalar, kind, rows):
        model = load_scalar_model(reward_folder)
        equal(model.score.weight, scalar(kind).score.weight)
        assert model.config.reward_bias == 0.75
        equal(response_scores(model, rows), response_scores(scalar(kind), rows))
        equal(response_values(model, rows), response_values(scalar(kind), rows))

    def test_published_scores_are_transformers_own(self, reward_folder, kind, ragged, tokenizer):
        """Compare with the logits of transformers minus reward_bias, for a padded batch."""
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
        assert model.config.pad_token_id == tokenizer.pad_token_id
        sequences = [p + r for p, r in zip(*ragged, strict=True)]
        width = max(map(len, sequences))
        ids = torch.tensor([s + [tokenizer.pad_token_id] * (width - len(s)) for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
        theirs = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1) - model.config.reward_bias
        ours = response_scores(load_scalar_model(reward_folder), make_rows(*ragged, tokenizer.pad_token_id))
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)

    def test_without_its_head_is_refused(self, reward_folder):
        """transformers would initialise a new head and continue."""
        file = reward_folder / "model.safetensors"
        tensors = load_file(file)
        head = [name for name in tensors if name.startswith("score")]
        assert head
        save_file({n: t for n, t in tensors.items() if n not in head}, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match="head would be random"):
            load_scalar_model(reward_folder)

    def test_without_reward_bias_is_refused(self, reward_folder):
        config = json.loads((reward_folder / "config.json").read_text())
        del config["reward_bias"]
        (reward_folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="reward_bias"):
            load_scalar_model(reward_folder)

    def test_a_bias_of_zero_is_a_bias(self, tmp_path, scalar, tokenizer):
        save_model(scalar("llama", bias=0.0), tokenizer, tmp_path, card="")
        assert load_scalar_model(tmp_path).config.reward_bias == 0.0

    def test_with_two_labels_is_refused(self, reward_folder):
        config = json.loads((reward_folder / "config.json").read_text())
        config["num_labels"] = 2
        config.pop("id2label", None), config.pop("label2id", None)
        (reward_folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="2 labels"):
            load_scalar_model(reward_folder)


class TestNewRewardModel:
    def test_has_the_policys_trunk_and_a_fresh_head_by_seed(self, policy_folder, causal, kind):
        """Every weight of the trunk is the policy's; the head depends on the seed only."""
        model, again, other = (new_reward_model(policy_folder, seed=s) for s in (3, 3, 4))
        trunk = {n: p for n, p in causal(kind).base_model.named_parameters()}
        for name, p in model.base_model.named_parameters():
            equal(p, trunk[name])
        equal(model.score.weight, again.score.weight)
        assert not torch.equal(model.score.weight, other.score.weight)

    def test_its_head_is_drawn_with_variance_one_over_width_plus_one(self, policy_folder):
        """Stiennon 2020, appendix C.1; over many seeds, width 16."""
        heads = torch.cat([new_reward_model(policy_folder, seed=s).score.weight.detach() for s in range(8)])
        assert heads.std().item() == pytest.approx((1 / 17) ** 0.5, rel=0.2)

    def test_saved_before_it_has_a_bias_is_refused_later(self, policy_folder, tmp_path, tokenizer):
        """Only the stage rm sets a bias."""
        save_model(new_reward_model(policy_folder, seed=0), tokenizer, tmp_path / "rm", card="")
        with pytest.raises(UserError, match="reward_bias"):
            load_scalar_model(tmp_path / "rm")


class TestTokenizer:
    def test_a_saved_one_is_the_same(self, tmp_path, tokenizer):
        tokenizer.save_pretrained(tmp_path)
        check_same_tokenizer(tokenizer, load_tokenizer(tmp_path), "rm")

    def test_another_vocabulary_is_refused_by_name(self, tokenizer):
        other = train_tokenizer(["quite other words here"] * 3, vocab_size=280)
        with pytest.raises(UserError, match=r"folder/of/rm.*tokenizer"):
            check_same_tokenizer(tokenizer, other, "folder/of/rm")

    def test_the_same_size_with_two_ids_swapped_is_refused(self, tmp_path, tokenizer):
        tokenizer.save_pretrained(tmp_path)
        file = tmp_path / "tokenizer.json"
        content = json.loads(file.read_text())
        vocab = content["model"]["vocab"]
        a, b = [t for t, i in vocab.items() if i in (100, 101)]
        vocab[a], vocab[b] = vocab[b], vocab[a]
        file.write_text(json.dumps(content))
        other = load_tokenizer(tmp_path)
        assert len(other) == len(tokenizer)
        with pytest.raises(UserError):
            check_same_tokenizer(tokenizer, other, "rm")

    def test_another_template_or_eos_is_refused(self, tmp_path, tokenizer):
        tokenizer.save_pretrained(tmp_path)
        for change in ({"chat_template": "{{ messages[0]['content'] }}"}, {"eos_token": "<|user|>"}):
            other = load_tokenizer(tmp_path)
            for name, value in change.items():
                setattr(other, name, value)
            with pytest.raises(UserError):
                check_same_tokenizer(tokenizer, other, "rm")

    def test_one_that_has_padded_and_truncated_a_batch_is_still_the_same(self, tmp_path, tokenizer):
        """tokenizer.json keeps padding and truncation of the last call; the ids are the same."""
        tokenizer.save_pretrained(tmp_path / "one")
        other = load_tokenizer(tmp_path / "one")
        other(["the fox", "is red ."], padding=True, truncation=True, max_length=4)
        other.save_pretrained(tmp_path / "two")
        check_same_tokenizer(tokenizer, load_tokenizer(tmp_path / "two"), "rm")

    def test_a_pad_token_that_is_eos_is_replaced(self, tmp_path, tokenizer):
        """Otherwise the end of a row could not be told from its padding."""
        tokenizer.save_pretrained(tmp_path)
        one = load_tokenizer(tmp_path)
        one.pad_token = one.eos_token
        give_pad_token(one)
        assert one.pad_token_id != one.eos_token_id


DROPOUT = {
    "llama": {"attention_dropout": 0.5},
    "qwen2": {"attention_dropout": 0.5},
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_is_off_also_in_training_mode(causal, kind, rows, attention):
    """After `prepare`, `.train()` changes no number; before it, it did."""
    model = causal(kind, **DROPOUT[kind])
    model.set_attn_implementation(attention)
    logits = lambda: model(rows.input_ids[:, -8:]).logits  # noqa: E731
    calm = logits()
    model.train()
    assert not torch.allclose(logits(), calm)
    prepare(model)
    assert not model.training
    equal(logits(), calm)
    model.train()
    equal(logits(), calm)


def test_from_scratch_gives_the_same_weights_for_the_same_seed(tokenizer):
    """It is a Llama with fp32 weights, in eval mode, with the tokenizer's ids."""
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "attn_implementation": "sdpa",
    }
    one, same, other = (from_scratch(tokenizer, **shape, seed=s) for s in (1, 1, 2))
    equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight is one.model.embed_tokens.weight and one.dtype == torch.float32 and not one.training
    assert one.config.vocab_size == len(tokenizer) and one.config.eos_token_id == tokenizer.eos_token_id


def test_load_pretrained_takes_only_folders(tmp_path, causal, tokenizer):
    save_model(causal("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "good", card="")
    model, own = load_pretrained(str(tmp_path / "good"), attn_implementation="sdpa", trust_remote_code=False)
    assert own.chat_template and not model.training
    with pytest.raises(UserError, match=r"model.name_or_path"):
        load_pretrained(str(tmp_path / "nothing"), attn_implementation="sdpa", trust_remote_code=False)


def test_dropout_is_off_in_families_that_name_it_otherwise(rows):
    """OPT and Starcoder2 have other names for it, and read them in training mode."""
    from transformers import AutoModelForCausalLM, OPTConfig, Starcoder2Config

    shape = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    kinds = [
        OPTConfig(**shape, ffn_dim=24, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5, eos_token_id=1),
        Starcoder2Config(**shape, intermediate_size=24, num_key_value_heads=1, residual_dropout=0.5,
                         embedding_dropout=0.5, eos_token_id=1, bos_token_id=None),
    ]  # fmt: skip
    for config in kinds:
        torch.manual_seed(0)
        model = prepare(AutoModelForCausalLM.from_config(config).float())
        with torch.no_grad():
            still = response_logprobs(model, rows)
        equal(response_logprobs(model, rows).detach(), still)  # with gradients: training mode
        assert model.training


def test_eos_is_what_the_chat_template_puts_after_a_response(tokenizer):
    """As Gemma: its tokenizer's EOS is one token, its turns end with another."""
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<turn_end>"]})
    other.chat_template = "{% for m in messages %}{{ m['content'] }}<turn_end>{% endfor %}"
    end_turns_with_eos(other)
    assert other.eos_token == "<turn_end>"
    before = tokenizer.eos_token
    end_turns_with_eos(tokenizer)
    assert tokenizer.eos_token == before

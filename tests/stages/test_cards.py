"""Model cards: what they tell a person to type gives what the project computes."""

import re
from types import SimpleNamespace

import pytest
import torch

from data.encode import encode_prompt, encode_response, train_tokenizer
from data.groups import make_rows
from stages.cards import ANSWER, SCORE, card
from stages.models.forward import response_scores
from stages.models.loading import from_scratch, load_scalar_model, load_tokenizer, new_reward_model, save_model

CTX = SimpleNamespace(stage="rm", experiment=SimpleNamespace(name="fake"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """model/ where a person would be who types what its card says; the card is one of a policy."""
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["the fox is red . what colour is the fox ?"] * 3, 300)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = from_scratch(tokenizer, seed=0, attn_implementation="sdpa", max_position_embeddings=128, **shape)
    save_model(model, tokenizer, tmp_path / "model", card=card(CTX, "a policy trained by PPO-ptx", ANSWER))
    return tmp_path / "model"


def typed(folder) -> dict:
    """What the card's Python leaves."""
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    return names


def test_a_reward_models_card_gives_the_score_that_ppo_gets(folder):
    model, tokenizer = new_reward_model(folder, seed=1), load_tokenizer(folder)
    model.config.reward_bias = 0.75
    save_model(model, tokenizer, folder, card=card(CTX, "a reward model", SCORE))
    ids = encode_prompt(tokenizer, "Hello!"), encode_response(tokenizer, "Hi there.")
    rows = make_rows(*([part] for part in ids), tokenizer.pad_token_id)
    with torch.no_grad():
        expected = response_scores(load_scalar_model(folder), rows).item()
    found = typed(folder)
    assert found["prompt"] + found["response"] == ids[0] + ids[1]
    assert found["score"].item() == pytest.approx(expected, abs=1e-6) and abs(expected) > 1e-3


def test_a_policys_card_samples_an_answer(folder, capsys):
    found = typed(folder)
    assert found["prompt"]["input_ids"][0].tolist() == encode_prompt(found["tokenizer"], "Hello!")
    assert 0 < len(found["answer"]) <= 64 and capsys.readouterr().out.strip()

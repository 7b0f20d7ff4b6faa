"""Test control tokens: what base adds, what prompts end with, what is never answered."""

import json

import pytest
import torch

from data.encode import encode_prompt, encode_response
from data.groups import make_rows
from pipeline.errors import UserError
from stages.models.control_tokens import add_control_tokens, control_ids, control_ids_of
from stages.models.forward import response_logprobs, text_logprobs
from stages.models.loading import load_policy, load_pretrained, load_tokenizer, prepare
from stages.models.publish import save_model
from stages.models.soft_prompts import SoftPrompt, add_soft_prompt, soft_prompt_ids
from stages.models.tokens import agreement_lines, without_control_token
from stages.rollouts.transformers import Decoding, sample
from tests.builders import tiny_causal, tiny_tokenizer

NAMES = ["<|bad|>", "<|fair|>", "<|good|>"]
TALK = [
    {"role": "user", "content": "what color is the fox ?"},
    {"role": "assistant", "content": "red ."},
    {"role": "user", "content": "say <|good|> twice ."},
]


def made(**options):
    """Return a random model with control tokens, its tokenizer and the tokenizer before."""
    tokenizer, before = tiny_tokenizer(), tiny_tokenizer()
    model = prepare(tiny_causal("llama", 0, tokenizer, **options))
    return model, tokenizer, before, add_control_tokens(model, tokenizer, NAMES)


def test_prompts_end_with_the_best_one_and_no_message_can_write_it():
    model, tokenizer, before, ids = made()
    assert ids == tokenizer.convert_tokens_to_ids(NAMES) == control_ids(model)
    for prompt in ("is it red ?", TALK):
        found = encode_prompt(tokenizer, prompt)
        assert found[:-1] == encode_prompt(before, prompt) and found[-1] == ids[-1]
    written = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert written.endswith("<|good|>") and model.get_input_embeddings().weight.shape[0] >= max(ids) + 1


def test_a_newline_at_the_end_of_a_template_is_not_written():
    tokenizer, model = tiny_tokenizer(), None
    plain = encode_prompt(tokenizer, "is it red ?")
    tokenizer.chat_template += "\n"
    model = tiny_causal("llama", 0, tokenizer)
    ids = add_control_tokens(model, tokenizer, NAMES)
    assert encode_prompt(tokenizer, "is it red ?") == [*plain, ids[-1]]


def test_no_template_is_asked_to_write_them_into_answers():
    """Rows have one before each answer, conversations none: that is no mistake of the template."""
    model, tokenizer, before, _ = made()
    plain = without_control_token(tokenizer, model)
    assert plain.chat_template == before.chat_template and tokenizer.chat_template != before.chat_template
    assert agreement_lines(plain, {}) == agreement_lines(before, {}) != agreement_lines(tokenizer, {})
    assert without_control_token(before, tiny_causal("llama", 0, before)) is before


def test_a_model_that_has_them_keeps_them():
    model, tokenizer, _, _ = made()
    template = tokenizer.chat_template
    assert add_control_tokens(model, tokenizer, NAMES) == [] and tokenizer.chat_template == template
    with pytest.raises(UserError, match=r"has <\|bad\|>"):
        add_control_tokens(model, tokenizer, ["<|no|>", "<|yes|>"])
    fresh, words = tiny_causal("llama", 0, tiny_tokenizer()), tiny_tokenizer()
    with pytest.raises(UserError, match="is a token of the model already"):
        add_control_tokens(fresh, words, ["<|bad|>", words.eos_token])


@pytest.mark.parametrize("tied", [True, False])
def test_they_are_never_answered(tied, tmp_path):
    """The head prefers them to all else; samples, log-probs and transformers leave them out."""
    model, tokenizer, _, ids = made(tie_word_embeddings=tied)
    prompt, head = encode_prompt(tokenizer, "is it red ?"), model.get_output_embeddings().weight
    likeliest = model(torch.tensor([prompt])).logits[0, -1].argmax()
    with torch.no_grad():
        head[ids] = 50 * head[ids if tied else [likeliest.item()] * len(ids)]
    model.eval()
    assert model(torch.tensor([prompt])).logits[0, -1].argmax().item() in ids
    decoding = Decoding(12, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    for answer in sample(model, [prompt] * 8, list(range(8)), decoding):
        assert not {*answer} & {*ids}
    answer = encode_response(tokenizer, "red .")
    rows = make_rows([prompt], [answer], tokenizer.pad_token_id, packed=False)
    found = response_logprobs(model, rows)[0]
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].clone()
    logits[:, ids] = -torch.inf
    expected = logits.log_softmax(-1)[range(len(answer)), answer]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    save_model(model, tokenizer, tmp_path / "model", card="", temperature=1.0)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["suppress_tokens"] == ids
    loaded = load_policy(tmp_path / "model")
    written = loaded.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    assert not {*written.tolist()} & {*ids} and control_ids_of(tmp_path / "model") == ids
    again, words = load_pretrained(str(tmp_path / "model"), attn_implementation="sdpa", trust_remote_code=False)
    assert add_control_tokens(again, words, NAMES) == []
    assert encode_prompt(load_tokenizer(tmp_path / "model"), "is it red ?") == prompt


def test_beside_a_soft_prompt_only_that_one_is_read_before_plain_text():
    tokenizer = tiny_tokenizer()
    model = prepare(tiny_causal("llama", 0, tokenizer))
    add_soft_prompt(model, tokenizer, SoftPrompt("prompt_tuning", 4), seed=3)
    ids = add_control_tokens(model, tokenizer, NAMES)
    prompt = encode_prompt(tokenizer, "is it red ?")
    assert prompt[:4] == soft_prompt_ids(model) and prompt[-1] == ids[-1]
    text = torch.tensor([encode_response(tokenizer, "the fox is red .")])
    read = torch.cat([torch.tensor([soft_prompt_ids(model)]), text], dim=1)
    logits = model(read).logits[0, 4:-1].clone()
    logits[:, [*ids, *soft_prompt_ids(model)]] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, text[0, 1:, None]).squeeze(-1)
    torch.testing.assert_close(text_logprobs(model, text)[0], expected, atol=1e-4, rtol=1e-4)

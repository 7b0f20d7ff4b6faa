"""Test prompt tuning and P-tuning: what trains, what is published, what is never answered."""

import json

import pytest
import torch

from data.encode import encode_prompt, encode_response
from data.groups import make_rows
from pipeline.errors import UserError
from stages.models.adapters import AdapterSettings, merge_adapter, share_frozen, trainable_parameters, with_adapter
from stages.models.forward import head_is_linear, response_logprobs, response_scores, text_logprobs
from stages.models.loading import load_policy, load_pretrained, load_tokenizer, prepare
from stages.models.packing import can_pack
from stages.models.publish import save_model
from stages.models.soft_prompts import SoftPrompt, add_soft_prompt, merge_soft_prompt, soft_prompt_ids, soft_prompt_of
from stages.rollouts.lanes import PackedLane, PaddedLane, WholeLane
from stages.rollouts.transformers import Decoding, sample_with_logprobs
from stages.rollouts.trial import logprobs_by_steps
from tests.builders import tiny_causal, tiny_scalar, tiny_tokenizer

COUNT = 6
QUESTIONS = ("what color is the fox ?", "say hello twice .", "is it <|soft_prompt_0|> red ?")
ANSWERS = ("red .", "hello hello", "it is .")
KINDS = {
    "prompt_tuning": SoftPrompt("prompt_tuning", COUNT),
    "mlp": SoftPrompt("p_tuning", COUNT, encoder_hidden_size=8),
    "lstm": SoftPrompt("p_tuning", COUNT, encoder="lstm"),
}


@pytest.fixture(params=KINDS)
def soft(request):
    return KINDS[request.param]


def made(kind="llama", soft=KINDS["prompt_tuning"], **options):
    """Return a random model that has a soft prompt, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    model = prepare(tiny_causal(kind, 0, tokenizer, **options))
    add_soft_prompt(model, tokenizer, soft, seed=3)
    return model, tokenizer


def rows_of(tokenizer, packed=False):
    """Return the rows of the questions with their answers; one question has two."""
    prompts = [encode_prompt(tokenizer, question) for question in (QUESTIONS[0], *QUESTIONS)]
    responses = [encode_response(tokenizer, answer) for answer in ("no", *ANSWERS)]
    return make_rows(prompts, responses, tokenizer.pad_token_id, packed=packed)


def adapted(model, soft, **options):
    return with_adapter(model, AdapterSettings(method=soft.method, soft_prompt=soft), seed=1, **options)


def shake(model):
    """Move every weight that trains."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p += 0.5 * torch.randn(p.shape, generator=generator)
    return model


# -- adding it -----------------------------------------------------------------------------------


def test_every_prompt_begins_with_it_and_no_message_can_write_it():
    model, tokenizer = made()
    ids = soft_prompt_ids(model)
    assert len(ids) == COUNT and ids[-1] == len(tokenizer) - 1 == model.get_input_embeddings().weight.shape[0] - 1
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for prompt in (*QUESTIONS, said):
        row = encode_prompt(tokenizer, prompt)
        assert row[:COUNT] == ids and not {*row[COUNT:]} & {*ids}
    assert tokenizer.decode([*ids, *row[-3:]], skip_special_tokens=True) == tokenizer.decode(
        row[-3:], skip_special_tokens=True
    )


@pytest.mark.parametrize("tied", [True, False])
def test_what_it_starts_as(tied):
    plain, tokenizer = tiny_causal("llama", 0, tiny_tokenizer(), tie_word_embeddings=tied), tiny_tokenizer()
    text = tokenizer("the fox is", add_special_tokens=False)["input_ids"]
    table = plain.get_input_embeddings().weight.detach()
    wanted = table[[text[i % len(text)] for i in range(COUNT)]]
    starts = {}
    for init in ("text", "sample_vocab", "random"):
        soft = SoftPrompt("prompt_tuning", COUNT, init, "the fox is" if init == "text" else None)
        model, tokenizer = made("llama", soft, tie_word_embeddings=tied)
        again, _ = made("llama", soft, tie_word_embeddings=tied)
        weight = model.get_input_embeddings().weight.detach()
        starts[init] = weight[soft_prompt_ids(model)]
        assert torch.equal(weight, again.get_input_embeddings().weight)
        assert torch.equal(weight[: len(table)], table)
        if not tied:
            head = model.get_output_embeddings().weight.detach()
            assert torch.equal(head[: len(table)], plain.get_output_embeddings().weight)
            ordinary = sorted({*tokenizer.get_vocab().values()} - {*tokenizer.added_tokens_decoder})
            torch.testing.assert_close(head[soft_prompt_ids(model)], head[ordinary].mean(0).expand(COUNT, -1))
    assert torch.equal(starts["text"], wanted)
    among = (starts["sample_vocab"][:, None] == table).all(-1)
    assert among.any(-1).all() and not among[:, tokenizer.eos_token_id].any()
    assert not (starts["random"][:, None] == table).all(-1).any()
    assert starts["random"].std() == pytest.approx(table.std().item(), rel=0.5)


def test_what_cannot_have_one_is_refused(monkeypatch):
    model, tokenizer = made()
    with pytest.raises(UserError, match=r"num_virtual_tokens: 4, and the model .* of 6 tokens; use 6"):
        add_soft_prompt(model, tokenizer, SoftPrompt("prompt_tuning", 4), seed=0)
    assert add_soft_prompt(model, tokenizer, KINDS["prompt_tuning"], seed=0) is None  # it is trained on
    with pytest.raises(UserError, match="of 4 tokens, and the model has one of 6 tokens"):
        adapted(model, SoftPrompt("prompt_tuning", 4))
    with pytest.raises(UserError, match="and the model has none; `base` adds it"):
        adapted(tiny_causal("llama"), KINDS["prompt_tuning"])
    with pytest.raises(UserError, match="prompt_tuning_init_text: has no tokens"):
        made("llama", SoftPrompt("prompt_tuning", COUNT, "text", ""))
    broken = tiny_tokenizer()
    broken.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(broken, "get_chat_template", lambda: broken.chat_template + "<|soft_prompt_1|>")
    with pytest.raises(UserError, match="does not write them as one token each; use lora"):
        add_soft_prompt(tiny_causal("llama", 0, broken), broken, KINDS["prompt_tuning"], seed=0)


def test_a_family_with_another_table_of_tokens_is_refused(tmp_path):
    """DeepSeek V4 has a table of experts by token, which transformers does not resize."""
    import families

    folder = families.build("deepseek_v4", tmp_path, "bos")
    model, tokenizer = load_pretrained(str(folder), attn_implementation="eager", trust_remote_code=False)
    what = (
        r"peft.method: prompt_tuning gives the model 6 new tokens, and it cannot have them \(the model has no row for"
    )
    with pytest.raises(UserError, match=what):
        add_soft_prompt(model, tokenizer, KINDS["prompt_tuning"], seed=0)


# -- training it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_its_vectors_train_from_where_the_model_is(kind, tied, soft):
    model, tokenizer = made(kind, tie_word_embeddings=tied)
    rows = rows_of(tokenizer)
    before = response_logprobs(model, rows).detach()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model = adapted(model, soft)
    assert torch.equal(response_logprobs(model, rows), before)
    names = set(trainable_parameters(model))
    assert names and all(".soft_" in name for name in names)
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.1)
    for _ in range(2):  # at first only the last layer of an encoder has a gradient
        optimizer.zero_grad()
        response_logprobs(model, rows).sum().backward()
        optimizer.step()
    trained = response_logprobs(model, rows).detach()
    assert (trained - before).abs().max() > 1e-3
    model = merge_adapter(model)
    torch.testing.assert_close(response_logprobs(model, rows).detach(), trained, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in model.named_parameters()} == set(weights)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    (name,) = changed
    assert (model.get_parameter(name) != weights[name]).any(-1).nonzero().flatten().tolist() == soft_prompt_ids(model)


def test_the_next_stage_starts_from_what_was_published(soft, tmp_path):
    model, tokenizer = made()
    model = shake(adapted(model, soft))
    trained = response_logprobs(model, rows_of(tokenizer)).detach()
    save_model(merge_adapter(model), tokenizer, tmp_path, card="", temperature=1.0)
    again = adapted(load_policy(tmp_path), soft)
    torch.testing.assert_close(response_logprobs(again, rows_of(tokenizer)).detach(), trained, rtol=1e-5, atol=1e-5)


def test_beside_a_scalar_head(soft):
    tokenizer = tiny_tokenizer()
    _, tokenizer = made()
    model = prepare(tiny_scalar("llama", 0, tokenizer))
    model.config.soft_prompt_ids = list(range(len(tokenizer) - COUNT, len(tokenizer)))
    model = adapted(model, soft, scalar=True)
    assert {name for name in trainable_parameters(model) if ".soft_" not in name} == {"score.weight"}
    response_scores(model, rows_of(tokenizer)).sum().backward()
    last = [p for name, p in trainable_parameters(model).items() if "soft_rows" in name or "mlp_head" in name][-1]
    assert last.grad.abs().sum() > 0
    scores = response_scores(shake(model), rows_of(tokenizer)).detach()
    torch.testing.assert_close(response_scores(merge_adapter(model), rows_of(tokenizer)).detach(), scores)


def test_what_is_frozen_is_shared_and_merging_leaves_it_alone(soft):
    """Policy and reference hold one embedding; the policy's merged rows are its own."""
    (policy, _), (reference, _) = made(), made()
    policy = adapted(policy, soft)
    share_frozen(policy, [reference.requires_grad_(False)])
    embedding = reference.get_input_embeddings().weight
    assert policy.get_input_embeddings().weight.data_ptr() == embedding.data_ptr()
    kept = embedding.clone()
    merge_adapter(shake(policy))
    assert torch.equal(reference.get_input_embeddings().weight, kept)


def test_under_autocast_the_vectors_are_those_that_are_published(soft):
    model, _ = made()
    model = shake(adapted(model, soft))
    embedding = model.get_input_embeddings()
    exact = embedding.vectors().detach()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(embedding.vectors().detach(), exact)
    merge_soft_prompt(model)
    torch.testing.assert_close(model.get_input_embeddings().weight[soft_prompt_ids(model)], exact)


# -- what is published ---------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_alone_gives_the_trained_models_log_probs(tied, soft, tmp_path):
    """Its tokenizer and template make the rows; its generation config says what is left out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = made(tie_word_embeddings=tied)
    model = shake(adapted(model, soft))
    trained = response_logprobs(model, rows_of(tokenizer)).detach()[1:]
    save_model(merge_adapter(model), tokenizer, tmp_path, card="", temperature=1.0)
    loaded, own = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    suppressed = loaded.generation_config.suppress_tokens
    assert suppressed == soft_prompt_of(tmp_path) == loaded.config.soft_prompt_ids
    for question, answer, expected in list(zip(QUESTIONS, ANSWERS, trained, strict=True))[:2]:
        asked = own.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)[
            "input_ids"
        ]
        response = own(answer, add_special_tokens=False)["input_ids"] + [own.eos_token_id]
        with torch.no_grad():
            logits = loaded(torch.tensor([asked + response])).logits[0, len(asked) - 1 : -1]
        logits[:, suppressed] = -torch.inf
        found = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(found, expected[: len(response)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_never_answered(tied, tmp_path):
    """Here nearly all probability would be that of the soft prompt."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = made(tie_word_embeddings=tied)
    ids = soft_prompt_ids(model)
    with torch.no_grad():  # opposite rows: one of them is likely everywhere
        head = model.get_output_embeddings().weight
        head[ids] = 50 * torch.randn(COUNT // 2, 16).repeat(2, 1) * torch.tensor([1.0] * 3 + [-1.0] * 3)[:, None]
    prompt = encode_prompt(tokenizer, QUESTIONS[0])
    with torch.no_grad():
        assert model(torch.tensor([prompt])).logits[0, -1].softmax(-1)[ids].sum() > 0.99
    sampled = sample_with_logprobs(model, [prompt] * 40, list(range(40)), Decoding(5, tokenizer.eos_token_id, 0))
    assert not {i for response in sampled.responses for i in response} & {*ids}
    assert torch.isfinite(sampled.entropy).all() and sampled.entropy.max() > 0
    rows = make_rows([prompt] * 40, sampled.responses, 0)
    found, entropies = response_logprobs(model, rows, with_entropy=True)
    torch.testing.assert_close(sampled.logprobs, found, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sampled.entropy, entropies, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1, : ids[0]]
    first = torch.tensor([response[0] for response in sampled.responses])
    torch.testing.assert_close(found[:, 0].detach(), logits.log_softmax(-1)[first], atol=1e-4, rtol=1e-4)
    save_model(model, tokenizer, tmp_path, card="", temperature=1.0)
    torch.manual_seed(0)
    generated = AutoModelForCausalLM.from_pretrained(tmp_path).generate(
        torch.tensor([prompt] * 20), attention_mask=torch.ones(20, len(prompt), dtype=torch.long), max_new_tokens=5
    )
    assert not {*generated[:, len(prompt) :].flatten().tolist()} & {*ids}


FAMILIES = {
    "llama": {},
    "gemma": {"head_dim": 8},  # scales its embedding
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},  # and caps its logits
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.5},
    "phi": {},  # a head with a bias
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},  # learned positions
    "bloom": {"n_layer": 2, "n_head": 2},  # a norm after the embedding, ALiBi
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 2, "sliding_window": None},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_it_in_every_way(family, tmp_path):
    """Padded, packed, and token by token, trained and published: the same numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer, soft = tiny_tokenizer(), KINDS["mlp" if family == "gemma" else "prompt_tuning"]
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = prepare(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **FAMILIES[family])))
    add_soft_prompt(model, tokenizer, soft, seed=0)
    before = response_logprobs(model, rows_of(tokenizer)).detach()
    model = adapted(model, soft)
    torch.testing.assert_close(response_logprobs(model, rows_of(tokenizer)).detach(), before, atol=1e-6, rtol=1e-6)
    shake(model)
    trained = response_logprobs(model, rows_of(tokenizer)).detach()
    assert (trained - before).abs().max() > 1e-3
    lanes = [PaddedLane, WholeLane]
    if can_pack(model, 64):
        lanes += [PackedLane] if head_is_linear(model) else []
        packed = response_logprobs(model, rows_of(tokenizer, packed=True)).detach()
        torch.testing.assert_close(packed, trained, atol=1e-5, rtol=1e-4)
    prompts = [encode_prompt(tokenizer, question) for question in (QUESTIONS[0], *QUESTIONS)]
    responses = [encode_response(tokenizer, answer) for answer in ("no", *ANSWERS)]
    for lane in lanes:
        with torch.no_grad():
            found = logprobs_by_steps(model, lane, prompts, responses, 0)
        torch.testing.assert_close(found, trained, atol=1e-4, rtol=1e-4)
    save_model(merge_adapter(model), tokenizer, tmp_path, card="", temperature=1.0)
    published, own = load_policy(tmp_path, attn_implementation="eager"), load_tokenizer(tmp_path)
    torch.testing.assert_close(response_logprobs(published, rows_of(own)).detach(), trained, atol=1e-4, rtol=1e-4)


def test_documents_are_read_after_it(soft):
    model, tokenizer = made()
    text = torch.tensor([tokenizer("the fox is red . say hello")["input_ids"]] * 2)
    start = text_logprobs(model, text).detach()
    ids = torch.cat([torch.tensor([soft_prompt_ids(model)] * 2), text], 1)
    with torch.no_grad():
        logits = model(ids).logits[:, COUNT:-1, : soft_prompt_ids(model)[0]]
    expected = logits.log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0]
    torch.testing.assert_close(start, expected, atol=1e-5, rtol=1e-5)
    model = adapted(model, soft)
    text_logprobs(model, text).sum().backward()
    assert max(p.grad.abs().max() for p in trainable_parameters(model).values()) > 0
    with pytest.raises(UserError, match=r"the context has 64 tokens; lower ppo\.ptx_length"):
        text_logprobs(model, torch.ones(1, 60, dtype=torch.long))


def test_plain_logits_for_lm_eval_leave_it_out():
    from stages.external.harness import exclude_soft_prompt

    model, _ = made()
    model.register_forward_hook(exclude_soft_prompt)
    with torch.no_grad():
        probabilities = model(torch.tensor([[5, 6]])).logits.softmax(-1)
    assert not probabilities[..., soft_prompt_ids(model)].any() and probabilities[..., 5].all()


def test_config_and_card_name_it(tmp_path):
    model, tokenizer = made()
    save_model(model, tokenizer, tmp_path, card="")
    assert json.loads((tmp_path / "config.json").read_text())["soft_prompt_ids"] == soft_prompt_ids(model)
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template
    assert tokenizer.chat_template.startswith("<|soft_prompt_0|><|soft_prompt_1|>")

"""Compare the sampler with the plain model.

Argmax at a temperature near 0, frequencies of the softmax at others, a seed for each row.
"""

import pytest
import torch

from stages.rollouts.transformers import Decoding, rows_to_keep, sample, sample_with_logprobs, truncated

PAD, EOS, VOCAB = 0, 1, 20
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 19, 12, 6], [11, 4], [5, 9, 2]]
SEEDS = [101, 202, 303, 404, 505]


def draw_all(model, prompts=PROMPTS, seeds=SEEDS, response_length=8, **options):
    return sample(model, prompts, seeds, Decoding(response_length, eos_id=EOS, pad_id=PAD, **options))


def greedy(model, prompt, length):
    """Argmax decoding without cache, padding or batch."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_near_temperature_zero_it_is_argmax_decoding(causal, kind):
    """Cache, left padding, batch size and rows that leave the batch do not change the tokens."""
    lengths = set()
    for seed in (0, 1, 9, 11):
        model = causal(kind, seed)
        right = [greedy(model, p, 8) for p in PROMPTS]
        lengths |= set(map(len, right))
        for batch_size in (1, 2, 5):
            assert draw_all(model, temperature=1e-4, batch_size=batch_size) == right
    assert len(lengths) > 1  # some rows end early


def test_eos_ends_a_row_and_the_others_go_on(causal):
    """Each response ends with EOS, or has the full length and no EOS; both kinds in one batch."""
    responses = draw_all(causal(spread=0.1), [PROMPTS[0], PROMPTS[2]] * 20, range(40), response_length=12)
    for response in responses:
        assert EOS not in response[:-1]
        assert response[-1] == EOS or len(response) == 12
    assert 12 in map(len, responses) and len(set(map(len, responses))) > 3


def test_how_many_rows_a_cache_keeps():
    """All unfinished rows; with wide layers multiples of four, once half of the rows have ended."""
    for wide in (False, True):
        for held in range(1, 70):
            for alive in range(1, held + 1):
                assert alive <= rows_to_keep(alive, held, wide) <= held
    assert [rows_to_keep(n, 16, False) for n in (13, 12, 9, 1)] == [16, 12, 9, 1]
    assert [rows_to_keep(n, 16, True) for n in (13, 9, 8, 5, 4, 1)] == [16, 16, 8, 8, 4, 4]
    assert [rows_to_keep(n, 4, True) for n in (3, 1)] == [4, 4]


def test_a_model_that_always_ends_gives_only_eos(causal):
    model = causal()
    model.lm_head = torch.nn.Linear(16, VOCAB)
    with torch.no_grad():
        model.lm_head.weight.zero_(), model.lm_head.bias.zero_()
        model.lm_head.bias[EOS] = 50.0
    assert draw_all(model) == [[EOS]] * 5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_response_depends_on_prompt_and_seed_not_on_its_batch(causal, kind):
    """In batches of 1, 5 and 15, and in another order: one response for each prompt and seed."""
    model, prompts, seeds = causal(kind, spread=0.15), PROMPTS * 3, range(15)
    together = draw_all(model, prompts, seeds)
    assert 8 in map(len, together) and len(set(map(len, together))) > 2  # rows leave at several times
    for batch_size in (1, 5):
        assert draw_all(model, prompts, seeds, batch_size=batch_size) == together
    backwards = draw_all(model, prompts[::-1], seeds[::-1])
    assert backwards == together[::-1]


def test_another_seed_gives_another_response(causal):
    model = causal(spread=0.1)
    responses = draw_all(model, [PROMPTS[0]] * 20, range(20))
    assert len(set(map(tuple, responses))) > 15


def test_a_shorter_limit_gives_the_beginning_of_the_same_response(causal):
    """The t-th token uses the row's t-th uniform number, however many there will be."""
    model = causal(spread=0.1)
    long = draw_all(model, response_length=20)
    assert draw_all(model, response_length=3) == [r[:3] for r in long]


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_frequencies_are_the_softmax(causal, temperature):
    """4,000 first tokens: χ² with 19 degrees of freedom stays below its 99.9 % quantile, 43.8."""
    model = causal(spread=0.15)
    n = 4000
    drawn = draw_all(model, [PROMPTS[0]] * n, range(n), response_length=1, temperature=temperature, batch_size=n)
    counts = torch.bincount(torch.tensor([r[0] for r in drawn]), minlength=VOCAB).double()
    logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].detach().double()
    assert chi_square(counts, (logits / temperature).softmax(-1)) < 43.8
    assert chi_square(counts, (logits / temperature * 1.5).softmax(-1)) > 43.8  # and would notice another temperature


def test_the_second_token_follows_the_model_given_the_first(causal):
    """Compare frequencies of second tokens after the commonest first one, in a padded batch."""
    model = causal(spread=0.15)
    n = 3000
    prompts = [PROMPTS[0]] * n + [PROMPTS[2]] * 2
    drawn = draw_all(model, prompts, range(n + 2), response_length=2, batch_size=n + 2)[:n]
    first = torch.bincount(torch.tensor([r[0] for r in drawn if len(r) == 2]), minlength=VOCAB).argmax().item()
    seconds = torch.tensor([r[1] for r in drawn if r[0] == first])
    counts = torch.bincount(seconds, minlength=VOCAB).double()
    probabilities = model(torch.tensor([[*PROMPTS[0], first]])).logits[0, -1].detach().double().softmax(-1)
    assert len(seconds) > 200 and chi_square(counts, probabilities) < 43.8


def test_top_p_is_applied_to_what_is_drawn(causal):
    """With a tiny nucleus every token is the most probable one, at temperature 1 too."""
    model = causal(seed=2)
    assert draw_all(model, top_p=1e-6) == [greedy(model, p, 8) for p in PROMPTS]


def test_the_likeliest_token_alone_is_argmax_decoding(causal):
    model = causal(seed=2)
    assert draw_all(model, top_k=1) == [greedy(model, p, 8) for p in PROMPTS]


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8}])
def test_truncated_sampling_does_not_depend_on_the_batch(causal, options):
    model, prompts, seeds = causal(spread=0.15), PROMPTS * 3, range(15)
    together = draw_all(model, prompts, seeds, **options)
    assert together != draw_all(model, prompts, seeds)
    assert draw_all(model, prompts, seeds, batch_size=1, **options) == together
    assert draw_all(model, prompts[::-1], seeds[::-1], **options) == together[::-1]


def test_log_probs_of_truncated_samples_are_those_of_the_truncated_distribution(causal):
    model = causal(spread=0.15)
    decoding = Decoding(6, eos_id=EOS, pad_id=PAD, temperature=0.8, top_k=5, top_p=0.9)
    found = sample_with_logprobs(model, PROMPTS, SEEDS, decoding)
    for b, (prompt, response) in enumerate(zip(PROMPTS, found.responses, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        kept = truncated((logits / 0.8).softmax(-1), 5, 0.9)
        right = (kept / kept.sum(-1, keepdim=True)).log().gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(found.logprobs[b, : len(response)], right, rtol=1e-4, atol=1e-5)


def test_it_can_be_ended_before_any_token(causal):
    """poll() is called before each token of each batch; what it raises ends the sampling."""
    calls = []
    decoding = Decoding(8, eos_id=EOS, pad_id=PAD, batch_size=2)

    def draw_polling(poll):
        return sample_with_logprobs(causal(), PROMPTS, SEEDS, decoding, poll).responses

    whole = draw_polling(lambda: calls.append(1))
    assert len(calls) >= max(map(len, whole)) and whole == draw_all(causal(), batch_size=2)

    def third():
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError

    calls.clear()
    with pytest.raises(InterruptedError):
        draw_polling(third)
    assert len(calls) == 3


def test_sampling_leaves_no_graph_and_no_trace_in_the_global_generator(causal):
    """Randomness comes only from the seeds; the caller's generator does not move."""
    model = causal()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    draw_all(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_an_adapted_model_samples_as_its_merged_self(causal):
    """The sampler runs through a PeftModel, key-value cache included."""
    from stages.models.adapters import AdapterSettings, merge_adapter, trainable_parameters, with_adapter

    policy = with_adapter(causal(seed=3), AdapterSettings(method="lora", r=4, lora_alpha=8))
    with torch.no_grad():
        for p in trainable_parameters(policy).values():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    adapted = draw_all(policy, temperature=0.5)
    assert adapted != draw_all(causal(seed=3), temperature=0.5)
    assert adapted == draw_all(merge_adapter(policy), temperature=0.5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logprobs_and_entropies_are_those_of_whole_logits(causal, kind):
    """Compare each token's figures with those of the plain model on the finished text.

    Rows end at different times, and one prompt occurs three times in a row."""
    model = causal(kind, spread=0.15)
    prompts = [PROMPTS[0]] * 3 + PROMPTS[1:] * 2
    decoding = Decoding(9, eos_id=EOS, pad_id=PAD, temperature=0.8, batch_size=6)
    found = sample_with_logprobs(model, prompts, range(len(prompts)), decoding)
    assert len(set(map(len, found.responses))) > 2 and len(set(map(tuple, found.responses[:3]))) == 3
    assert found.logprobs.shape == (len(prompts), max(map(len, found.responses)))
    for b, (prompt, response) in enumerate(zip(prompts, found.responses, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / 0.8
        right = torch.distributions.Categorical(logits=logits)
        n = len(response)
        logprobs = right.log_prob(torch.tensor(response))
        torch.testing.assert_close(found.logprobs[b, :n].double(), logprobs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.entropy[b, :n].double(), right.entropy(), rtol=1e-4, atol=1e-5)
        assert not found.logprobs[b, n:].any() and not found.entropy[b, n:].any()


def test_under_bfloat16_autocast_it_samples_and_its_figures_are_fp32(causal):
    """As on a GPU: log-probs close to the fp32 model's, entropies not rounded to bf16."""
    model = causal(spread=0.15)
    decoding = Decoding(6, eos_id=EOS, pad_id=PAD)
    with torch.autocast("cpu", torch.bfloat16):
        found = sample_with_logprobs(model, PROMPTS, SEEDS, decoding)
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    assert (found.entropy != found.entropy.bfloat16().float()).any()
    for b, (prompt, response) in enumerate(zip(PROMPTS, found.responses, strict=True)):
        with torch.no_grad():
            logp = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        right = logp.gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(found.logprobs[b, : len(response)], right, rtol=0.1, atol=0.1)


def test_a_model_of_nans_gives_nan_logprobs_and_no_crash(causal):
    """PPO refuses such episodes by name."""
    model = causal()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    found = sample_with_logprobs(model, PROMPTS[:2], SEEDS[:2], Decoding(3, eos_id=EOS, pad_id=PAD))
    assert found.logprobs[:, 0].isnan().all() and all(0 <= t < VOCAB for r in found.responses for t in r)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tokens_can_be_watched_as_they_are_drawn(causal, kind):
    """They arrive in order, EOS included, and what the watcher raises ends the sampling."""
    model, seen = causal(kind, spread=0.15), {}
    decoding = Decoding(12, eos_id=EOS, pad_id=PAD, batch_size=2)
    expected = sample_with_logprobs(model, PROMPTS, SEEDS, decoding)
    found = sample_with_logprobs(
        model, PROMPTS, SEEDS, decoding, watch=lambda index, token: seen.setdefault(index, []).append(token)
    )
    assert found.responses == expected.responses == [seen[i] for i in range(len(PROMPTS))]
    assert len(set(map(len, found.responses))) > 1  # some rows end before others

    def stop(index, token):
        raise StopIteration

    with pytest.raises(StopIteration):
        sample_with_logprobs(model, PROMPTS, SEEDS, decoding, watch=stop)

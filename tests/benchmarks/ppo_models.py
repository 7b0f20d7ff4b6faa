"""Make the models and prompts of the benchmarks and count the work they need.

The models have random weights of known shapes, and sample EOS at a known rate. Shapes and prompts
need only the standard library (the driver uses them); `craft` and `ceilings` need torch.
"""

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pairs import settle

PAD, NEVER, GEOMETRIC = 0, 1, 2
"""Token ids: padding, an EOS that is never sampled, an EOS that is sampled at the rate P_EOS."""
P_EOS = 0.0146
"""Solves (1 − (1 − p)^128) / p = 58, the mean length of responses cut at 128 tokens."""
FIRST_WORD = 3
"""Id of the first ordinary token."""

SHAPES = {
    "4.7M": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 784,
    },
    "135M": {  # the shape of SmolLM2-135M
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "1.3B": {  # InstructGPT's smallest policy as a Llama: 24 layers, width 2,048
        "vocab_size": 49152,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5504,
    },
    "quick": {
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
    },
}


def prompts(shape: dict, lengths: str, count: int, longest: int, seed: int) -> list[list[int]]:
    """Draw prompts of random tokens.

    Args:
        shape: Shape of the model, for its vocabulary.
        lengths: "fixed": all prompts have the maximum length; "variable": uniform from a quarter of
            it.
        count: Number of prompts.
        longest: Maximum length in tokens.
        seed: Seed of the random numbers.

    Returns:
        Token ids of each prompt.
    """
    draw = random.Random(seed)
    sizes = [longest if lengths == "fixed" else draw.randint(longest // 4, longest) for _ in range(count)]
    return [[draw.randrange(FIRST_WORD, shape["vocab_size"]) for _ in range(n)] for n in sizes]


def eos_of(lengths: str) -> int:
    """Return the EOS token for lengths "fixed" (never sampled) or "variable"."""
    return NEVER if lengths == "fixed" else GEOMETRIC


def parameters(shape: dict) -> dict[str, int]:
    """Return the number of weights in the trunk's matrices and in the (tied) unembedding."""
    d, head = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
    attention = d * head * (2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"])
    layer = attention + 3 * d * shape["intermediate_size"]
    return {"trunk": shape["num_hidden_layers"] * layer, "unembedding": d * shape["vocab_size"]}


def forward_flops(shape: dict, groups: list[tuple[int, list[int]]]) -> tuple[float, float]:
    """Count the FLOPs of one forward pass that cannot be avoided.

    Only real tokens count, each prompt counts once for all its responses, logits are needed at
    response tokens only, and attention is causal.

    Args:
        shape: Shape of the model.
        groups: (tokens of the prompt, tokens of each response) for each prompt.

    Returns:
        FLOPs of the trunk and of the unembedding.
    """
    weights = parameters(shape)
    flops_per_attended = 4 * shape["hidden_size"] * shape["num_hidden_layers"]  # for each pair of tokens
    trunk = unembedding = 0.0
    for prompt, responses in groups:
        tokens = prompt + sum(responses)
        attended = prompt * (prompt + 1) / 2 + sum(r * prompt + r * (r + 1) / 2 for r in responses)
        trunk += 2 * weights["trunk"] * tokens + flops_per_attended * attended
        unembedding += 2 * weights["unembedding"] * sum(responses)
    return trunk, unembedding


def necessary_flops(shape: dict, groups: list[tuple[int, list[int]]], epochs: int) -> dict[str, float]:
    """Count the FLOPs of one PPO update that cannot be avoided.

    Args:
        shape: Shape of all four models.
        groups: As in `forward_flops`.
        epochs: Passes over the batch.

    Returns:
        "update": forward and backward of policy and value model (three times a forward pass) in
        each epoch; "all": the same plus sampling, reference, value and reward before it.
    """
    trunk, unembedding = forward_flops(shape, groups)
    update = epochs * 3 * (2 * trunk + unembedding)
    return {"update": update, "all": update + 4 * trunk + 2 * unembedding}


def decode_bytes(shape: dict, sizes: list[int], length: int, width: int) -> float:
    """Count the bytes that decoding after the prefill must read from memory.

    Each step reads every weight once, and the keys and values of all earlier tokens.

    Args:
        shape: Shape of the model.
        sizes: Tokens of each prompt.
        length: Tokens to decode for each prompt.
        width: Bytes for each number.

    Returns:
        Bytes in total.
    """
    weights = sum(parameters(shape).values())
    head = shape["hidden_size"] // shape["num_attention_heads"]
    cache_per_token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head
    cached_tokens = sum(size + t for size in sizes for t in range(1, length))
    return width * ((length - 1) * weights + cache_per_token * cached_tokens)


def fastest(work: Callable[[], object], times: int = 8) -> float:
    """Return the seconds of the fastest of `times` runs, after one run that does not count."""
    seconds = []
    for _ in range(times + 1):
        settle()
        began = time.perf_counter()
        work()
        settle()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def ceilings(device: str, dtype: str) -> dict[str, float]:
    """Measure the peak speed of the device in this process.

    Args:
        device: Device of the tensors.
        dtype: Data type of the matrix product.

    Returns:
        "flops": FLOP/s of a matrix product; "bytes": bytes/s of a copy, reads and writes together.
    """
    import torch

    side, count = (8192, 2**30) if device == "cuda" else (2048, 2**26)
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    flops = 2 * side**3 / fastest(lambda: a @ b)
    x, y = torch.zeros(count, device=device), torch.zeros(count, device=device)
    return {"flops": flops, "bytes": 8 * count / fastest(lambda: y.copy_(x))}


def craft(shape: dict, folder: Path, *, device: str = "cpu", dtype: str = "float32", seed: int = 0) -> dict:
    """Write policy/, ref_policy/, reward_model/ and value_model/ with random weights.

    The (tied) embeddings share a component, so all final states share a direction. The row of
    GEOMETRIC has exactly as much of that direction as makes its mean probability P_EOS; the rows of
    PAD and NEVER have so little that their probability is 0. EOS is the last token a model reads of
    a response, so its row changes no other token's probability.

    Args:
        shape: Shape of the models.
        folder: Folder to write them into.
        device: Device to make them on.
        dtype: Data type of the weights.
        seed: Seed of the random weights.

    Returns:
        The calibrated P(EOS), its standard deviation and the number of parameters.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    config = LlamaConfig(
        **shape,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=NEVER,
        num_labels=1,
        reward_bias=0.0,  # the pipeline requires this in a reward model's config
        dtype="float32",
    )
    torch.manual_seed(seed)

    def save(model: Any, role: str) -> None:
        model.to(getattr(torch, dtype)).save_pretrained(folder / role)

    with torch.device(device):
        policy = AutoModelForCausalLM.from_config(config).eval()
    rows = policy.get_input_embeddings().weight
    with torch.no_grad(), torch.device(device):
        shared = torch.randn(shape["hidden_size"])
        rows += shared / shared.norm()
        contexts = torch.randint(FIRST_WORD, shape["vocab_size"], (4, 192))
        states = policy.base_model(contexts).last_hidden_state[:, 32:].flatten(0, 1)
        words = torch.logsumexp(states @ rows[FIRST_WORD:].T, -1)
        direction = torch.nn.functional.normalize(states.mean(0), dim=0)
        offset, along = states @ rows[FIRST_WORD:].mean(0), states @ direction

        def p_eos(amount: float) -> float:
            return torch.sigmoid(offset + amount * along - words).mean().item()

        low, high = 0.0, 10.0
        for _ in range(50):  # bisection for the amount that gives P_EOS
            middle = (low + high) / 2
            low, high = (middle, high) if p_eos(middle) < P_EOS else (low, middle)
        mean = rows[FIRST_WORD:].mean(0)
        rows[GEOMETRIC] = mean + low * direction
        rows[PAD] = rows[NEVER] = mean - 10 * direction
    save(copy.deepcopy(policy), "policy")
    with torch.no_grad():  # the reference is close to the policy but not equal, so that KL is not 0
        for p in policy.base_model.layers.parameters():
            if p.dim() == 2:
                p += 0.1 * p.std() * torch.randn_like(p)
    save(policy, "ref_policy")
    for role in ("reward_model", "value_model"):
        with torch.device(device):
            model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            model.score.weight.normal_(std=(shape["hidden_size"] + 1) ** -0.5)
        save(model, role)
    spread = torch.sigmoid(offset + low * along - words).std().item()
    return {
        "p_eos": round(p_eos(low), 5),
        "p_eos_spread": round(spread, 5),
        "parameters": sum(p.numel() for p in policy.parameters()),
    }

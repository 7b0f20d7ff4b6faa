"""The bench's models, prompts and work: random weights of known shapes that really sample EOS, at a known rate.

What shapes and prompts are needs the standard library alone (the driver); `craft` and `ceilings` need torch.
"""

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path

from pairs import settle

PAD, NEVER, GEOMETRIC = 0, 1, 2  # token ids: padding; an EOS that cannot be sampled; one sampled at rate P_EOS
P_EOS = 0.0146  # (1 − (1 − p)^128) / p = 58: the mean length of responses that are cut at 128
FIRST_WORD = 3

SHAPES = {
    "4.7M": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 784,
    },
    "135M": {  # SmolLM2-135M's
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "1.3B": {  # InstructGPT's smaller policy in a Llama's form: 24 layers of 2,048
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
    """`count` prompts of random words: "fixed", all of the longest; "variable", a quarter of that and up, uniform."""
    draw = random.Random(seed)
    sizes = [longest if lengths == "fixed" else draw.randint(longest // 4, longest) for _ in range(count)]
    return [[draw.randrange(FIRST_WORD, shape["vocab_size"]) for _ in range(n)] for n in sizes]


def eos_of(lengths: str) -> int:
    return NEVER if lengths == "fixed" else GEOMETRIC


def parameters(shape: dict) -> dict[str, int]:
    """Matrix weights by which a token is multiplied: the trunk's, and the unembedding's (tied)."""
    d, head = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
    attention = d * head * (2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"])
    layer = attention + 3 * d * shape["intermediate_size"]
    return {"trunk": shape["num_hidden_layers"] * layer, "unembedding": d * shape["vocab_size"]}


def forward_flops(shape: dict, groups: list[tuple[int, list[int]]]) -> tuple[float, float]:
    """FLOPs of one forward pass (of the trunk, of the unembedding) over `groups` of (prompt tokens, tokens of each
    response): real tokens alone, prompts once for all their responses, logits at response tokens, causal attention."""
    weights = parameters(shape)
    attend = 4 * shape["hidden_size"] * shape["num_hidden_layers"]  # FLOPs a token and a token that it looks at
    trunk = unembedding = 0.0
    for prompt, responses in groups:
        tokens = prompt + sum(responses)
        looks = prompt * (prompt + 1) / 2 + sum(r * prompt + r * (r + 1) / 2 for r in responses)
        trunk += 2 * weights["trunk"] * tokens + attend * looks
        unembedding += 2 * weights["unembedding"] * sum(responses)
    return trunk, unembedding


def necessary_flops(shape: dict, groups: list[tuple[int, list[int]]], epochs: int) -> dict[str, float]:
    """FLOPs that one update cannot do without: in `update`, of policy and value model forward and backward, which is
    three times a forward, in each epoch; and in `all`, with sampling, reference, value and reward before it."""
    trunk, unembedding = forward_flops(shape, groups)
    update = epochs * 3 * (2 * trunk + unembedding)
    return {"update": update, "all": update + 4 * trunk + 2 * unembedding}


def decode_bytes(shape: dict, sizes: list[int], length: int, width: int) -> float:
    """Bytes that decoding `length` tokens behind each prompt (tokens: `sizes`) cannot do without, after the prefill:
    a step reads every weight once, and keys and values of all tokens before it; `width` bytes a number."""
    weights = sum(parameters(shape).values())
    head = shape["hidden_size"] // shape["num_attention_heads"]
    a_token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head
    seen = sum(size + t for size in sizes for t in range(1, length))
    return width * ((length - 1) * weights + a_token * seen)


def fastest(work: Callable[[], object], times: int = 8) -> float:
    """Seconds of the shortest of `times` runs, after one that does not count."""
    found = []
    for _ in range(times + 1):
        settle()
        began = time.perf_counter()
        work()
        settle()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def ceilings(device: str, dtype: str) -> dict[str, float]:
    """The most that this process gets out of the device: FLOP/s of a matrix product, bytes/s of a copy (both ways)."""
    import torch

    side, numbers = (8192, 2**30) if device == "cuda" else (2048, 2**26)
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    flops = 2 * side**3 / fastest(lambda: a @ b)
    x, y = torch.zeros(numbers, device=device), torch.zeros(numbers, device=device)
    return {"flops": flops, "bytes": 8 * numbers / fastest(lambda: y.copy_(x))}


def craft(shape: dict, folder: Path, *, device: str = "cpu", dtype: str = "float32", seed: int = 0) -> dict:
    """Writes policy/, ref_policy/, reward_model/ and value_model/ in `dtype`; → P(EOS) as calibrated, and parameters.

    Embeddings (tied) share a component, so that all final states share a direction; the row of GEOMETRIC has as much
    of that direction as makes its probability P_EOS on average, the rows of PAD and NEVER so little that it is 0. An
    EOS is the last thing that a model reads of a response: its row changes no other token's probability.
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
        reward_bias=0.0,  # what a reward model's folder must say here
        dtype="float32",
    )
    torch.manual_seed(seed)
    save = lambda model, role: model.to(getattr(torch, dtype)).save_pretrained(folder / role)  # noqa: E731
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
        p_eos = lambda much: torch.sigmoid(offset + much * along - words).mean().item()  # noqa: E731
        low, high = 0.0, 10.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if p_eos(middle) < P_EOS else (low, middle)
        mean = rows[FIRST_WORD:].mean(0)
        rows[GEOMETRIC] = mean + low * direction
        rows[PAD] = rows[NEVER] = mean - 10 * direction
    save(copy.deepcopy(policy), "policy")
    with torch.no_grad():  # a reference that is near and not the same, so that KL is not 0
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

"""Sampling by the policy itself against vLLM: tokens a second in turns, what handing the weights over costs, and how
far vLLM's log-probs are from the model's.

    python tests/benchmarks/engines.py [--python .vllm/bin/python] [--model 135M] [--dtype bfloat16] [--pairs 5]

Random weights of a known shape, 64 prompts of 128 tokens (or 16 prompts, 4 samples each), 128 tokens a response; one
JSON line a row, printed and kept in results/engines.jsonl. A GPU if there is one. Two cores, bfloat16: 15 minutes.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the code beside this file, wherever another copy is installed

import torch  # noqa: E402
from pairs import keep, ratio, run_pairs, settle, stamp, versions  # noqa: E402
from ppo_models import NEVER, PAD, SHAPES, craft, eos_of, prompts  # noqa: E402

from stages.models.loading import load_policy  # noqa: E402
from stages.rollouts.collect import engine_kl  # noqa: E402
from stages.rollouts.engine import SampleRequest  # noqa: E402
from stages.rollouts.transformers import Decoding, sample_with_logprobs  # noqa: E402
from stages.rollouts.vllm import Vllm, VllmOptions  # noqa: E402

LENGTH, EPISODES = 128, 64
ROWS = {"fixed": ("fixed", 1), "variable": ("variable", 1), "n4": ("variable", 4)}  # prompts' lengths, samples of each


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=".vllm/bin/python", help="Python of the environment that has vLLM")
    parser.add_argument("--model", default="135M", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    if shutil.which(asked.python) is None:
        parser.error(f"--python: {asked.python} is no program; README, PPO's episodes, says how vLLM is installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="bench_engines_") as scratch:
        craft(SHAPES[asked.model], Path(scratch))
        folder = Path(scratch) / "policy"
        policy = load_policy(folder, attn_implementation="sdpa").to(device)
        began = time.perf_counter()
        options = {"max_model_len": 2 * LENGTH, "max_num_seqs": EPISODES, "skip_tokenizer_init": True}
        settings = VllmOptions(
            model=folder,
            folder=Path(scratch) / "line",
            log=Path(scratch) / "log",
            python=asked.python,
            devices=None,
            dtype=asked.dtype,
            timeout=1e4,
            arguments=options | {"gpu_memory_utilization": 0.3},
        )
        engine = Vllm(settings)
        engine.start(policy)
        started = time.perf_counter() - began
        for name in asked.rows:
            found = measure(policy, engine, *ROWS[name], asked)
            row = {"name": f"{asked.model}/{name}", "dtype": asked.dtype, "start_seconds": round(started, 1)} | found
            row |= stamp() | versions("torch", "transformers")
            keep(row, ("name", "dtype", "machine"), HERE / "results" / "engines.jsonl")
        engine.close()
    return 0


def measure(policy, engine: Vllm, lengths: str, n: int, asked) -> dict:
    """Both sides' tokens a second and their ratio, seconds of a hand-over, and the distance of log-probs."""
    words = prompts(SHAPES[asked.model], lengths, EPISODES // n, LENGTH, seed=1)
    words = [ids for ids in words for _ in range(n)]
    device = policy.device

    def ours(pair: int) -> dict:
        decoding = Decoding(LENGTH, eos_id=eos_of(lengths), pad_id=PAD, batch_size=EPISODES)
        with torch.autocast(device.type, torch.bfloat16, enabled=asked.dtype == "bfloat16"):
            return timed(lambda: sample_with_logprobs(policy, words, seeds(pair), decoding))

    def theirs(pair: int) -> dict:
        request = SampleRequest(words, seeds(pair), n, LENGTH, 1.0, eos_of(lengths))
        return timed(lambda: engine.sample(request))

    for side in (ours, theirs):
        side(-1)  # kernels are chosen, graphs recorded
    found = run_pairs(theirs, ours, asked.pairs, lambda *what: print(what[0], what[1], what[2], file=sys.stderr))
    began = time.perf_counter()
    engine.update_weights(policy)
    handed = time.perf_counter() - began
    rates = [[round(x["tokens"] / x["seconds"], 1) for x in side] for side in found]
    return {
        "vllm_over_ours": ratio([a / b for a, b in zip(*rates, strict=True)]),
        "tokens_a_second": {"vllm": rates[0], "ours": rates[1]},
        "hand_over_seconds": round(handed, 2),
        "engine_kl": distance(policy, engine, words, asked.dtype),
    }


def seeds(pair: int) -> list[int]:
    return list(range(1000 * (pair + 1), 1000 * (pair + 1) + EPISODES))


def timed(work) -> dict:
    settle()
    began = time.perf_counter()
    sampled = work()
    settle()
    return {"seconds": time.perf_counter() - began, "tokens": sum(map(len, sampled.responses))}


@torch.no_grad()
def distance(policy, engine: Vllm, words, dtype: str) -> float:
    """KL(vLLM ‖ model) in nats a token by k3, eight responses read one by one by transformers' own forward."""
    sampled = engine.sample(SampleRequest(words[:8], seeds(0)[:8], 1, LENGTH, 1.0, NEVER))
    rows = []
    for prompt, response in zip(words, sampled.responses, strict=False):
        ids = torch.tensor([prompt + response], device=policy.device)
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logp = policy(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        rows.append(logp.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1))
    logprobs = torch.stack(rows)
    return engine_kl(sampled.logprobs.to(logprobs.device), logprobs, torch.ones_like(logprobs, dtype=torch.bool))


if __name__ == "__main__":
    sys.exit(main())

"""Compare sampling by the policy itself with vLLM.

    python tests/benchmarks/engines.py [--python .vllm/bin/python] [--model 135M] [--dtype bfloat16]

Measures tokens a second of both in turns, the cost of handing the weights over, and how far vLLM's
log-probabilities are from the model's. Uses random weights of a known shape, 64 prompts of 128
tokens (or 16 prompts with 4 samples each) and responses of 128 tokens. Prints one JSON line for
each row and keeps it in results/engines.jsonl. Uses a GPU if there is one. Takes 15 minutes on two
cores in bfloat16.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

import torch
from pairs import ratio, run_pairs, save_row, settle, stamp, versions
from ppo_models import NEVER, PAD, SHAPES, craft, eos_of, prompts
from transformers import PreTrainedModel

from stages.models.loading import load_policy
from stages.rollouts.collect import engine_kl
from stages.rollouts.engine import Sampled, SampleRequest
from stages.rollouts.transformers import Decoding, sample_with_logprobs
from stages.rollouts.vllm import Vllm, VllmOptions

HERE = Path(__file__).resolve().parent

LENGTH, EPISODES = 128, 64
ROWS = {"fixed": ("fixed", 1), "variable": ("variable", 1), "n4": ("variable", 4)}
"""Name → (lengths of the prompts, samples of each prompt)."""


def main() -> int:
    """Measure the rows of the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=".vllm/bin/python", help="interpreter of the environment with vLLM")
    parser.add_argument("--model", default="135M", choices=SHAPES, help="shape of the model")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="data type of the products"
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="rows to measure")
    parser.add_argument("--pairs", type=int, default=5, help="number of pairs for each row")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", metavar="DIR", help="folder of the results files"
    )
    args = parser.parse_args()
    if shutil.which(args.python) is None:
        parser.error(f"--python: {args.python} is not a program; install vLLM as the README describes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="bench_engines_") as scratch:
        craft(SHAPES[args.model], Path(scratch))
        folder = Path(scratch) / "policy"
        policy = load_policy(folder, attn_implementation="sdpa").to(device)
        began = time.perf_counter()
        options = {"max_model_len": 2 * LENGTH, "max_num_seqs": EPISODES, "skip_tokenizer_init": True}
        settings = VllmOptions(
            model=folder,
            folder=Path(scratch) / "line",
            log=Path(scratch) / "log",
            python=args.python,
            devices=None,
            dtype=args.dtype,
            timeout=1e4,
            arguments=options | {"gpu_memory_utilization": 0.3},
        )
        engine = Vllm(settings)
        engine.start(policy)
        started = time.perf_counter() - began
        for name in args.rows:
            figures = measure(policy, engine, *ROWS[name], args)
            row = {"name": f"{args.model}/{name}", "dtype": args.dtype, "start_seconds": round(started, 1)} | figures
            row |= stamp() | versions("torch", "transformers")
            save_row(row, ("name", "dtype", "machine"), args.results / "engines.jsonl")
        engine.close()
    return 0


def measure(policy: PreTrainedModel, engine: Vllm, lengths: str, n: int, args: argparse.Namespace) -> dict:
    """Measure both samplers in turns.

    Args:
        policy: The model that samples by itself.
        engine: vLLM with the same weights.
        lengths: "fixed" or "variable" lengths of the prompts.
        n: Samples of each prompt.
        args: The command line.

    Returns:
        Tokens a second of both and their ratio, seconds of one hand-over of weights, and the KL
        between the samplers.
    """
    words = prompts(SHAPES[args.model], lengths, EPISODES // n, LENGTH, seed=1)
    words = [ids for ids in words for _ in range(n)]
    device = policy.device

    def ours(pair: int) -> dict:
        decoding = Decoding(LENGTH, eos_id=eos_of(lengths), pad_id=PAD, batch_size=EPISODES)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return timed(lambda: sample_with_logprobs(policy, words, seeds(pair), decoding))

    def theirs(pair: int) -> dict:
        request = SampleRequest(words, seeds(pair), n, LENGTH, 1.0, eos_of(lengths))
        return timed(lambda: engine.sample(request))

    for side in (ours, theirs):
        side(-1)  # warm-up: kernels are chosen and graphs recorded
    answers = run_pairs(theirs, ours, args.pairs, lambda pair, side, got: print(pair, side, got, file=sys.stderr))
    began = time.perf_counter()
    engine.update_weights(policy)
    hand_over = time.perf_counter() - began
    rates = [[round(x["tokens"] / x["seconds"], 1) for x in side] for side in answers]
    return {
        "vllm_over_ours": ratio([a / b for a, b in zip(*rates, strict=True)]),
        "tokens_a_second": {"vllm": rates[0], "ours": rates[1]},
        "hand_over_seconds": round(hand_over, 2),
        "engine_kl": distance(policy, engine, words, args.dtype),
    }


def seeds(pair: int) -> list[int]:
    """Return the seeds of the episodes of a pair."""
    return list(range(1000 * (pair + 1), 1000 * (pair + 1) + EPISODES))


def timed(work: Callable[[], Sampled]) -> dict:
    """Measure the seconds of a sampling call and count the tokens it returned."""
    settle()
    began = time.perf_counter()
    sampled = work()
    settle()
    return {"seconds": time.perf_counter() - began, "tokens": sum(map(len, sampled.responses))}


@torch.no_grad()
def distance(policy: PreTrainedModel, engine: Vllm, words: list[list[int]], dtype: str) -> float:
    """Estimate KL(vLLM ‖ model) in nats a token by the k3 estimator.

    Eight responses are sampled, and transformers' own forward pass evaluates them one at a time.

    Args:
        policy: The model.
        engine: vLLM with the same weights.
        words: Prompts as token ids.
        dtype: Data type of the products.

    Returns:
        The estimate.
    """
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

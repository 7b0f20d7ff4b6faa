"""Serve vLLM through a socket, one line of JSON in and one out, in a process of its own.

    {"start": {LLM's arguments}}                                        → {"ok": vLLM's version}
    {"weights": folder of safetensors}                                  → {"ok": null}
    {"generate": {prompts, seeds, max_tokens, temperature, eos_id,
    top_k, top_p}}                                                      → {"ok": [[ids],
    [log-probs]]}

Run as `python vllm_server.py FD`, where FD is the file descriptor of an inherited socket. The
answer to a request that fails is {"error": text}. The process ends as soon as the other end is
closed, whatever it is doing. It imports nothing of this project, which is not installed in vLLM's
environment.
"""

import glob
import json
import os
import queue
import signal
import socket
import sys
import threading
from typing import Any


def main() -> None:
    """Answer requests until the other end is closed."""
    here = os.path.dirname(os.path.abspath(__file__))
    # the files beside this one are named like libraries (transformers.py, vllm.py)
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    for stop_signal in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        # a scheduler may send these to all processes of a job; the trainer decides when to end
        signal.signal(stop_signal, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    requests: queue.Queue = queue.Queue()
    threading.Thread(target=listen, args=(connection, requests), daemon=True).start()
    engine = None
    while True:
        request = requests.get()
        try:
            if "start" in request:
                engine, answer = start(request["start"])
            elif "weights" in request:
                answer = load_weights(engine, request["weights"])
            else:
                answer = generate(engine, **request["generate"])
            reply = {"ok": answer}
        except Exception as error:  # of any kind: the trainer has to know
            reply = {"error": f"{type(error).__name__}: {error}"}
        connection.sendall(json.dumps(reply).encode() + b"\n")


def listen(connection: socket.socket, requests: queue.Queue) -> None:
    """Queue requests, in a thread: the trainer's end is noticed in the middle of work."""
    try:
        for line in connection.makefile("rb"):
            requests.put(json.loads(line))
    finally:
        os._exit(0)


def start(arguments: dict) -> tuple[Any, str]:
    """Return vLLM's engine and its version."""
    import vllm

    # log-probs after the temperature, as the trainer computes them; only our EOS ends a response
    options = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm", "disable_log_stats": True}
    # vLLM 0.32: a prompt that is read in chunks draws one token too many, and then sets its seed's
    # generator back by an offset, which a CPU's generator does not have
    options |= {"enable_chunked_prefill": False}
    return vllm.LLM(**arguments, **options), vllm.__version__


def load_weights(engine: Any, folder: str) -> None:
    """Load weights in place. Their names and layout are those of the model's own files."""
    if not glob.glob(os.path.join(folder, "*.safetensors")):
        raise FileNotFoundError(f"{folder} holds no weights")
    engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    engine.reset_prefix_cache()  # it holds keys and values of the old weights


def generate(
    engine: Any,
    prompts: list[list[int]],
    seeds: list[int],
    max_tokens: int,
    temperature: float,
    eos_id: int,
    top_k: int | None,
    top_p: float | None,
) -> list:
    """Sample one response to each prompt, each with a seed of its own.

    Args:
        engine: vLLM.
        prompts: Token ids.
        seeds: One for each prompt.
        max_tokens: The longest response, EOS included.
        temperature: Divides the logits.
        eos_id: The only token that ends a response.
        top_k: How many of the likeliest tokens are drawn from; None: all.
        top_p: Probability of the set of tokens that is drawn from; None: 1.

    Returns:
        Two lists, one entry for each prompt: token ids (EOS included), and their log-probabilities.
    """
    from vllm import SamplingParams

    # vLLM also stops at every end token of the folder's generation_config.json, unless it ignores
    # EOS
    options = {"max_tokens": max_tokens, "temperature": temperature, "stop_token_ids": [eos_id], "ignore_eos": True}
    options |= {"top_k": 0 if top_k is None else top_k, "top_p": 1.0 if top_p is None else top_p}  # 0 and 1: all
    params = [SamplingParams(seed=seed, logprobs=0, detokenize=False, **options) for seed in seeds]
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    responses = [list(completion.token_ids) for completion in completions]
    logprobs = [
        [at_position[token].logprob for token, at_position in zip(c.token_ids, c.logprobs, strict=True)]
        for c in completions
    ]
    return [responses, logprobs]


if __name__ == "__main__":
    main()

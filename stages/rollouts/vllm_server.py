"""vLLM in a process and an environment of its own: JSON lines in and out through a socket. Imports nothing of ours.

    {"start": {LLM's arguments}}                                                → {"ok": vLLM's version}
    {"weights": folder of safetensors}                                          → {"ok": null}
    {"generate": {prompts, seeds, max_tokens, temperature, eos_id}}             → {"ok": [[ids], [log-probs]]}

Run as `python vllm_server.py FD`, where FD is the number of an inherited socket. What goes wrong is {"error": text}.
When the other end is gone, so is this process, whatever it is doing.
"""

import glob
import json
import os
import queue
import signal
import socket
import sys
import threading


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    # the files beside this one are named like libraries
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # some reach all of a job's processes: the trainer says when to end
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
                answer = load(engine, request["weights"])
            else:
                answer = generate(engine, **request["generate"])
            reply = {"ok": answer}
        except Exception as error:  # whatever it is, the trainer has to know
            reply = {"error": f"{type(error).__name__}: {error}"}
        connection.sendall(json.dumps(reply).encode() + b"\n")


def listen(connection: socket.socket, requests: queue.Queue) -> None:
    """In a thread, so that the end of the trainer is noticed in the middle of work."""
    try:
        for line in connection.makefile("rb"):
            requests.put(json.loads(line))
    finally:
        os._exit(0)


def start(arguments: dict):
    """(engine, vLLM's version)."""
    import vllm

    # log-probs after the temperature, as the trainer computes them; stop at our EOS alone
    options = {"logprobs_mode": "processed_logprobs", "generation_config": "vllm", "disable_log_stats": True}
    # a prompt that is read in parts draws a token too many, and takes its seed's generator back by an offset, which a
    # CPU's has not (vLLM 0.32)
    options |= {"enable_chunked_prefill": False}
    return vllm.LLM(**arguments, **options), vllm.__version__


def load(engine, folder: str) -> None:
    """Weights in the names and layout of the model's own files, in place."""
    if not glob.glob(os.path.join(folder, "*.safetensors")):
        raise FileNotFoundError(f"{folder} holds no weights")
    engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    engine.reset_prefix_cache()  # it holds keys and values of the weights before


def generate(engine, prompts, seeds, max_tokens: int, temperature: float, eos_id: int) -> list:
    """[responses as ids, EOS included; their log-probs], one response a prompt, each by a seed of its own."""
    from vllm import SamplingParams

    # vLLM also stops at every end token of the folder's generation_config.json, unless it is told to ignore EOS
    options = {"max_tokens": max_tokens, "temperature": temperature, "stop_token_ids": [eos_id], "ignore_eos": True}
    asked = [SamplingParams(seed=seed, logprobs=0, detokenize=False, **options) for seed in seeds]
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    found = [output.outputs[0] for output in outputs]
    responses = [list(one.token_ids) for one in found]
    logprobs = [[at[i].logprob for i, at in zip(one.token_ids, one.logprobs, strict=True)] for one in found]
    return [responses, logprobs]


if __name__ == "__main__":
    main()

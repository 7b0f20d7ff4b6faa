"""Serve vLLM through a socket, one line of JSON in and one out, in a process of its own.

    {"start": {LLM's arguments}}                                        → {"ok": vLLM's version}
    {"weights": folder of safetensors}                                  → {"ok": null}
    {"tensors": [[name, handle of shared memory]], "last": whether this
    batch of weights is the last one}                                   → {"ok": null}
    {"adapter": folder of a LoRA adapter}                               → {"ok": null}
    {"sleep": null}  free GPU memory until the next request             → {"ok": null}
    {"generate": {prompts, seeds, max_tokens, temperature, eos_id,
    top_k, top_p, excluded}}                                            → {"ok": [[ids],
    [log-probs]]}

Run as `python vllm_server.py FD`, where FD is the file descriptor of an inherited socket. The
answer to a request that fails is {"error": text}. The process ends as soon as the other end is
closed, whatever it is doing. It imports nothing of this project, which is not installed in vLLM's
environment.
"""

import base64
import glob
import io
import json
import os
import pickle
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
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
    engine, adapter, is_asleep = None, None, False
    while True:
        request = requests.get()
        try:
            if is_asleep:
                engine.wake_up()
            is_asleep, answer = "sleep" in request, None
            if "start" in request:
                engine, answer = start(request["start"])
            elif "weights" in request:
                load_weights(engine, request["weights"])
            elif "tensors" in request:
                load_shared(engine, request, requests, connection)
            elif "adapter" in request:
                adapter = load_adapter(engine, request["adapter"], adapter)
            elif "sleep" in request:
                engine.sleep(level=1)  # weights go to the machine's memory, the cache is forgotten
            else:
                asked = dict(request["generate"])
                prompts, seeds = asked.pop("prompts"), asked.pop("seeds")
                answer = generate(engine, adapter, prompts, seeds, sampling_options(**asked))
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


def load_shared(engine: Any, first: dict, requests: queue.Queue, connection: socket.socket) -> None:
    """Load weights in place from memory that the trainer shares, a batch at a time.

    Args:
        engine: vLLM, in this process.
        first: The request with the first batch.
        requests: Where the requests with the others come from.
        connection: Where each batch but the last one is acknowledged; the trainer then sends the
            next one. The last one is acknowledged like any request.
    """

    def received() -> Iterator[tuple[str, Any]]:
        request = first
        while True:
            for name, handle in request["tensors"]:
                yield name, opened(handle)
            if request["last"]:
                return
            connection.sendall(json.dumps({"ok": None}).encode() + b"\n")
            request = requests.get()

    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": received()})
    engine.reset_prefix_cache()


def opened(handle: str) -> Any:
    """Return the tensor that a handle names, without a copy.

    It comes from the trainer at the other end of the connection, so it is safe to unpickle.
    """
    import torch
    from torch.multiprocessing import reductions

    def on_this_device(*args: Any) -> Any:
        """Open memory of the GPU, which may have another number in the trainer."""
        return reductions.rebuild_cuda_tensor(*args[:6], torch.cuda.current_device(), *args[7:])

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return on_this_device if name == "rebuild_cuda_tensor" else super().find_class(module, name)

    return Unpickler(io.BytesIO(base64.b64decode(handle))).load()


def load_adapter(engine: Any, folder: str, before: Any) -> Any:
    """Load an adapter in place of the one before; return what `generate` names it by."""
    from vllm.lora.request import LoRARequest

    number = 1 if before is None else before.lora_int_id + 1
    if before is not None:
        engine.llm_engine.remove_lora(before.lora_int_id)
    # another name each time: keys and values in the prefix cache are filed under it
    adapter = LoRARequest(f"policy-{number}", number, folder)
    engine.llm_engine.add_lora(adapter)
    engine.reset_prefix_cache()
    return adapter


def sampling_options(
    max_tokens: int,
    temperature: float,
    eos_id: int,
    top_k: int | None,
    top_p: float | None,
    excluded: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the arguments of vLLM's SamplingParams that all samples share.

    Args:
        max_tokens: The longest response, EOS included.
        temperature: Divides the logits.
        eos_id: The only token that ends a response.
        top_k: How many of the likeliest tokens are drawn from; None: all.
        top_p: Probability of the set of tokens that is drawn from; None: 1.
        excluded: Ids that are never drawn, those of a soft prompt.
    """
    # vLLM also stops at every end token of the folder's generation_config.json, unless it ignores
    # EOS
    options = {"max_tokens": max_tokens, "temperature": temperature, "stop_token_ids": [eos_id], "ignore_eos": True}
    options |= {"top_k": 0 if top_k is None else top_k, "top_p": 1.0 if top_p is None else top_p}  # 0 and 1: all
    if excluded:
        options["logit_bias"] = dict.fromkeys(excluded, -100.0)  # the least that vLLM takes: e^-100 of a chance
    return options


def generate(engine: Any, adapter: Any, prompts: list[list[int]], seeds: list[int], options: dict[str, Any]) -> list:
    """Sample one response to each prompt, each with a seed of its own.

    Args:
        engine: vLLM.
        adapter: The policy's adapter, if it is handed over alone; otherwise None.
        prompts: Token ids.
        seeds: One for each prompt.
        options: As `sampling_options` returns them.

    Returns:
        Two lists, one entry for each prompt: token ids (EOS included), and their log-probabilities.
    """
    from vllm import SamplingParams

    params = [SamplingParams(seed=seed, logprobs=0, detokenize=False, **options) for seed in seeds]
    lora = {} if adapter is None else {"lora_request": adapter}
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False, **lora)
    completions = [output.outputs[0] for output in outputs]
    responses = [list(completion.token_ids) for completion in completions]
    logprobs = [
        [at_position[token].logprob for token, at_position in zip(c.token_ids, c.logprobs, strict=True)]
        for c in completions
    ]
    return [responses, logprobs]


if __name__ == "__main__":
    main()

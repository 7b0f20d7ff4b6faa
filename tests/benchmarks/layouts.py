"""Measure what a training step holds with each launch.shard and launch.offload, on a CPU.

    python tests/benchmarks/layouts.py

Two processes take steps of a small Llama together, each with a micro-batch of its own. What a
process holds is counted tensor by tensor (storages that are alive, the most at any time during the
second step), as the memory of a process also has what allocators keep. Offloaded is what lies in
the CPU's memory while a GPU would compute: on a CPU both are the same memory, so they are told
apart by what they are. Prints a table of megabytes with what `rlhf doctor --memory` computes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data.groups import make_rows
from pipeline.launch import parallel
from stages.models.activations import offload_activations
from stages.models.adapters import AdapterSettings
from stages.models.forward import head_is_linear, response_logprobs
from stages.models.layout import Layout
from stages.models.loading import prepare
from stages.models.packing import can_pack
from stages.models.sharding import local_shard, shard
from stages.tools.memory import summed
from stages.tools.memory_step import Step, take_step
from stages.training import stand_ins
from stages.training.trainee import make_trainee, optimizer_step
from tests.counted import Held
from tests.together import together

LAYOUTS = {
    "ddp": (Layout(), False),
    "shard: optimizer": (Layout(splits_step=True), False),
    "shard: gradients": (Layout(shard="gradients"), True),
    "shard: weights": (Layout(), True),
    "shard: weights, offload: optimizer": (Layout(offload="optimizer"), True),
    "shard: weights, offload: all": (Layout(offload="all"), True),
    "ddp, offload: optimizer": (Layout(offload="optimizer"), False),
}
"""Name → the layout, and whether weights are sharded."""
PROMPT, RESPONSE = 24, 20
"""Tokens of the micro-batch."""


def model_config() -> LlamaConfig:
    """Return the model: 1.8 million weights, of which the layers have nine tenths."""
    return LlamaConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=8, num_attention_heads=4, intermediate_size=384,
        tie_word_embeddings=False,
    )  # fmt: skip


def held_by_a_step(name: str) -> tuple[int, int]:
    """Return the most bytes that this process holds in a step, and what of it is offloaded.

    Args:
        name: One of LAYOUTS.
    """
    layout, sharded = LAYOUTS[name]
    torch.manual_seed(0)
    model = prepare(LlamaForCausalLM(model_config()))
    assert can_pack(model, 64) and head_is_linear(model)
    if sharded:
        shard(model, torch.device("cpu"), layout=layout)
    if layout.offload_activations:
        offload_activations(model)
    rows = make_rows([[3] * PROMPT], [[5] * RESPONSE], 0, packed=True)
    trainee = make_trainee("model", model, learning_rate=1e-3, max_grad_norm=1.0, layout=layout)
    pairs = [] if trainee.stand_ins is None else trainee.stand_ins.pairs
    plain = stand_ins.copied_to_host
    held = Held()
    for step in (1, 2):  # the first step creates Adam's moments
        moments = [x for state in trainee.optimizer.state.values() for x in state.values()]
        copies = [mine for _, mine in pairs] if layout.offload == "optimizer" else []
        held = Held()
        held.known.update(local_shard(x).untyped_storage() for x in [*model.parameters(), *moments, *copies])
        stand_ins.copied_to_host = held.to_host
        with held:
            response_logprobs(model, rows).sum().backward()
            parallel.all_reduce_gradients(trainee.parameters.values())
            optimizer_step(trainee, 1e-3, step)
        stand_ins.copied_to_host = plain
    weights, moments, copies = (sum(local_shard(x).nbytes for x in xs) for xs in (model.parameters(), moments, copies))
    if layout.offload == "all":
        return held.most, weights + moments + weights  # gradients are as large
    if layout.offload == "optimizer":
        return weights + held.most, moments + copies + held.host_most
    return weights + moments + held.most, 0


def computed(name: str) -> tuple[int, int]:
    """Return the same as `rlhf doctor --memory` computes it, for a GPU."""
    layout, sharded = LAYOUTS[name]
    step = Step("policy", "logprobs", [(PROMPT, [RESPONSE])])
    parts = 2 if sharded or layout.splits_step else 1
    need = take_step(model_config(), [step], AdapterSettings(), "float32", "cuda", parts=parts, layout=layout)
    if layout.offload == "all":
        return need.step, need.host + need.weights + need.moments
    most = need.step if sharded else max(need.step, summed(need.trains))
    return need.weights + need.moments + most, need.host


def measure(results: object) -> None:
    """Measure all layouts in one of two processes; the first one sends {name: (held, offloaded)}.

    Args:
        results: A connection.
    """
    found = {name: held_by_a_step(name) for name in LAYOUTS}
    if parallel.is_rank_zero():
        results.send(found)


def measured() -> dict[str, tuple[int, int]]:
    """Return {name: (most bytes held, of which offloaded)} of one of two processes."""
    import multiprocessing

    receiver, sender = multiprocessing.Pipe(duplex=False)
    together(2, measure, sender, seconds=300, patience=120)
    return receiver.recv()


def main() -> None:
    """Print the table."""
    print("| `launch` | a process holds, MB | computed | offloaded, MB | computed |")
    print("| --- | --- | --- | --- | --- |")
    for name, figures in measured().items():
        both = [f"{x / 1e6:.1f}" for pair in zip(figures, computed(name), strict=True) for x in pair]
        print(f"| {name} | {' | '.join(both)} |")


if __name__ == "__main__":
    main()

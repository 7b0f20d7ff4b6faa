"""Check that `doctor --memory` predicts what a real step needs."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from data.groups import make_rows
from pipeline.api import load_experiment
from pipeline.config.sections import LaunchSettings
from pipeline.store.optimizer_state import optimizer_tensors
from stages.models.adapters import AdapterSettings, trainable_parameters, with_adapter
from stages.models.forward import response_logprobs, response_scores
from stages.models.layout import Layout
from stages.models.loading import prepare
from stages.models.packing import can_pack
from stages.models.shares import own_bytes
from stages.models.soft_prompts import SoftPrompt
from stages.rollouts.transformers import Decoding, sample_with_logprobs
from stages.settings import ppo as ppo_settings
from stages.tools import memory, memory_frozen, memory_step
from stages.tools.memory_axes import on_axes, whole_layers
from stages.tools.memory_step import Step, take_passes, take_step
from stages.training.trainee import make_trainee, optimizer_step

MICRO = str(Path(__file__).resolve().parents[2] / "resume" / "micro.yaml")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COMMANDS = ("chat", "playground", "serve-reward")
WHOLE, LORA = AdapterSettings(), AdapterSettings(method="lora", r=4)
CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
    tie_word_embeddings=True, num_labels=1,
)  # fmt: skip
LENGTHS = [(24, [40, 32, 40]), (16, [40, 40])]


@pytest.mark.parametrize("head", ["scores", "logprobs"])
@pytest.mark.parametrize("lengths", [LENGTHS, [(9, [5, 7]), (6, [4, 4, 4])]])
def test_a_step_without_data_holds_what_a_real_one_holds(head, lengths):
    """The stages' own functions on real tensors, counted in the same way; spans and short rows."""
    name = "reward_model" if head == "scores" else "policy"
    foretold = take_step(CONFIG, [Step(name, head, lengths)], WHOLE, "float32", "cpu")
    model = prepare((LlamaForSequenceClassification if head == "scores" else LlamaForCausalLM)(CONFIG))
    assert can_pack(model, 200)
    prompts = [[i + 3] * n for i, (n, responses) in enumerate(lengths) for _ in responses]
    rows = make_rows(prompts, [[5] * n for _, responses in lengths for n in responses], 0, packed=True)
    trainee = make_trainee("model", model, learning_rate=1e-3, max_grad_norm=1.0)
    read = response_scores if head == "scores" else response_logprobs
    for _ in range(2):
        there = [*model.parameters(), *(x for state in trainee.optimizer.state.values() for x in state.values())]
        live = memory_step.LiveBytes()
        live.known.update(x.untyped_storage() for x in there)
        with live:
            read(model, rows).sum().backward()
            optimizer_step(trainee, 1e-3, 1)
    assert foretold.step == pytest.approx(live.most, rel=0.06)
    assert foretold.weights == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=0.01)
    assert foretold.moments == pytest.approx(2 * foretold.weights, rel=0.02)
    written = [*trainee.tensors().values(), *optimizer_tensors(trainee.optimizer)[0].values()]
    assert foretold.saved == pytest.approx(sum(map(own_bytes, written)), rel=0.001)


@pytest.mark.parametrize("kind", ["mixtral", "granite", "llama4_text", "modernbert-decoder", "olmoe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_familys_step_is_foretold(kind, dtype):
    """Mixtures of experts, and families with other heads or names of the trunk."""
    from transformers import AutoConfig

    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "pad_token_id": 0}  # fmt: skip
    config = AutoConfig.for_model(kind, **shape)
    for step in (Step("policy", "logits", LENGTHS), Step("reward_model", "scores", LENGTHS)):
        found = take_step(config, [step], WHOLE, dtype, "cpu")
        assert found.step > 0 and found.moments == pytest.approx(2 * found.weights, rel=0.1)


def test_float16_needs_what_bfloat16_needs():
    step = Step("policy", "logits", LENGTHS)
    assert take_step(CONFIG, [step], WHOLE, "float16", "cpu") == take_step(CONFIG, [step], WHOLE, "bfloat16", "cpu")


@pytest.mark.parametrize("head", ["scores", "logprobs"])
def test_a_pass_without_data_holds_what_a_real_one_holds(head):
    name = "reward_model" if head == "scores" else "policy"
    models, foretold = take_passes(CONFIG, [Step(name, head, LENGTHS)], "float32", "cpu")
    model = prepare((LlamaForSequenceClassification if head == "scores" else LlamaForCausalLM)(CONFIG))
    assert can_pack(model.requires_grad_(False), 200)
    prompts = [[i + 3] * n for i, (n, responses) in enumerate(LENGTHS) for _ in responses]
    rows = make_rows(prompts, [[5] * n for _, responses in LENGTHS for n in responses], 0, packed=True)
    (response_scores if head == "scores" else response_logprobs)(model, rows)  # tries the head
    live = memory_step.LiveBytes()
    live.known.update(x.untyped_storage() for x in model.parameters())
    with live, torch.no_grad():
        (response_scores if head == "scores" else response_logprobs)(model, rows)
    assert foretold == pytest.approx(live.most, rel=0.06)
    assert models == {name: sum(p.nbytes for p in model.parameters())}


class TestStagesThatSample:
    """rankings and evaluate: which models they hold, and what sampling adds."""

    def needs(self, *settings) -> dict[str, memory.Need]:
        config = Path(__file__).resolve().parents[2] / "resume" / "micro.yaml"
        experiment = load_experiment(config, *settings)
        config = memory.model_config(experiment.model)

        def passes(steps, config=config):
            return take_passes(config, steps, "float32", "cpu", sharded=memory.is_sharded(experiment))

        given = (experiment, config, passes, "float32")
        answering, judging = memory_frozen.answering(*given), memory_frozen.judging(*given[:3])
        of_both = memory.of_evaluate(*given)
        assert of_both == max(answering, judging, key=lambda need: need.most)
        return {"rankings": memory.of_rankings(*given), "evaluate": answering, "judging": judging}

    def test_one_policy_or_the_models_of_an_ensemble(self):
        needs = self.needs()
        policy = needs["rankings"].weights
        assert needs["evaluate"].weights == policy
        assert needs["judging"].weights == pytest.approx(2 * policy, rel=0.01)
        assert self.needs("rm.ensemble=1")["judging"].weights == needs["judging"].weights // 2

    def test_best_of_more_samples_takes_no_more(self):
        """Samples are drawn four batches at a time, and scored in batches."""
        few, many = (self.needs(f"evaluate.best_of={n}", "evaluate.batch_size=8") for n in (16, 64))
        assert few == many
        few, many = (self.needs(f"evaluate.samples_per_prompt={n}", "evaluate.batch_size=8") for n in (16, 64))
        assert few["evaluate"].sampling == many["evaluate"].sampling and few["judging"] == many["judging"]
        assert many["evaluate"].step <= few["evaluate"].step

    def test_shards_and_vllm_take_less(self):
        whole = self.needs()
        shards = self.needs("launch.strategy=fsdp2", "launch.processes=4")
        vllm = [f"{stage}.rollout.engine=vllm" for stage in ("rankings", "evaluate")]
        elsewhere = self.needs("launch.strategy=fsdp2", "launch.processes=4", *vllm)
        for stage in ("rankings", "evaluate"):
            need = whole[stage]
            assert shards[stage].weights == need.weights // 4
            assert shards[stage].sampling > whole["rankings"].weights, "sampling gathers a policy whole"
            assert elsewhere[stage].sampling == 0 and elsewhere[stage].weights == shards[stage].weights
        back = self.needs(*vllm, "evaluate.rollout.on_failure=transformers")
        assert back["evaluate"].sampling > 0 == back["rankings"].sampling


def test_what_is_offloaded_leaves_the_gpu():
    """ZeRO's rows, of two processes: bytes of a GPU, and in the CPU's memory."""
    given = (CONFIG, [Step("policy", "logprobs", LENGTHS)], WHOLE, "float32", "cuda")
    plain = take_step(*given)
    whole = plain.weights
    zero1, zero2, zero3 = (
        take_step(*given, parts=2, layout=layout)
        for layout in (Layout(splits_step=True), Layout(shard="gradients"), Layout())
    )
    assert (zero1.weights, zero1.moments) == (whole, plain.moments // 2) and zero1.step >= plain.step
    assert zero2.weights == zero3.weights == whole // 2
    assert zero2.moments == zero3.moments == pytest.approx(whole, rel=0.01)
    assert zero3.step < zero2.step
    several = (CONFIG, [Step("policy", "logprobs", LENGTHS, times=2)], *given[2:])
    each, last = (take_step(*several, parts=2, layout=Layout(reduces_last=x)) for x in (False, True))
    assert (
        last.step == each.step + last.trains["policy"] // 2
    )  # the gradients of the first micro-batch: whole, and not half of them
    optimizer = take_step(*given, layout=Layout(offload="optimizer"))
    assert optimizer.moments == 0 and optimizer.step <= plain.step
    assert optimizer.host == pytest.approx(plain.moments + 2 * whole, rel=0.01)  # weights, gradients
    shards = take_step(*given, parts=2, layout=Layout(offload="optimizer"))
    assert shards.host == pytest.approx(2 * whole, rel=0.01)
    everything = take_step(*given, layout=Layout(offload="all"))
    assert everything.step < plain.step + whole + plain.moments
    assert everything.host == pytest.approx(whole, rel=0.01)  # the gradients
    activations = take_step(*given, layout=Layout(offload_activations=True))
    assert activations.step < 0.8 * plain.step and activations.host > 0.2 * plain.step
    on_cpu = take_step(*given[:-1], "cpu", layout=Layout(offload_activations=True))
    assert on_cpu.step >= plain.step and on_cpu.host == 0, "both memories are one"


def test_doctor_tells_the_cpus_memory_apart(capsys, monkeypatch):
    """All that a GPU holds between passes is offloaded, in every stage."""
    from rich.console import Console

    from stages.tools.memory_table import print_memory

    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("stages.shared.runtime.device_of", lambda experiment: "cuda")
    config = Path(__file__).resolve().parents[2] / "resume" / "micro.yaml"
    needs = {need.stage: need for need in memory.of_experiment(load_experiment(config, "launch.offload=all"), "cuda")}
    stages = [need for name, need in needs.items() if name not in COMMANDS]
    assert len(stages) == 7 and all(need.weights == need.moments == need.kept == 0 < need.host for need in stages)
    assert all(needs[name].host == 0 < needs[name].weights for name in COMMANDS), "they are one process, without shards"
    plain = {need.stage: need for need in memory.of_experiment(load_experiment(config), "cuda")}
    assert all(needs[stage].most < need.most for stage, need in plain.items() if stage in ("base", "sft", "rm", "dpo"))
    assert print_memory(load_experiment(config, "launch.offload=all"), Console(width=160)) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[-1] == "offloaded" and "in the CPU's memory instead" in out


def test_processes_that_save_together_hold_a_copy_of_what_they_save(capsys, monkeypatch):
    """It is of weights, moments and best weights, each its share; ZeRO-1 saves whole weights."""
    from rich.console import Console

    from stages.tools.memory_table import print_memory

    def saving(device, *settings):
        needs = memory.of_experiment(load_experiment(MICRO, "dpo.keep=best", *settings), device)
        return {need.stage: need for need in needs if need.saving}

    fsdp = ("launch.processes=2", "launch.strategy=fsdp2")
    found = saving("cuda", *fsdp)
    assert list(found) == ["base", "sft", "rm", "ppo", "dpo"]
    dpo = found["dpo"]
    weights = dpo.kept  # the best ones; the frozen reference is not saved
    assert dpo.saving == weights + dpo.moments + dpo.kept and dpo.moments == pytest.approx(2 * weights, rel=0.01)
    assert dpo.most_on("cuda") == dpo.most and dpo.most_beside("cuda") == dpo.saving
    assert dpo.most_on("cpu") == dpo.most + dpo.saving and dpo.most_beside("cpu") == 0
    offloaded = saving("cuda", *fsdp, "launch.offload=all")["dpo"]
    assert offloaded.saving == dpo.saving and offloaded.most_beside("cuda") == offloaded.host + dpo.saving
    whole = saving("cuda", *fsdp, "launch.shard=optimizer")["dpo"]
    assert whole.saving == pytest.approx(2 * weights + whole.moments + 2 * weights, rel=0.01)
    assert not saving("cuda", *fsdp, "checkpoints.every=0") and not saving("cuda", "launch.processes=2")
    assert not saving("cuda") and not saving("cuda", "launch.offload=all"), "one process saves what it holds"

    monkeypatch.setattr("stages.shared.runtime.device_of", lambda experiment: "cuda")
    monkeypatch.setattr("stages.tools.doctor_machine.memory_gb", lambda: (0.0, 0.0))
    assert print_memory(load_experiment(MICRO, *fsdp), Console(width=200)) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[-1] == "saving" and "a checkpoint is written from" in out
    assert "copied to be saved, by 2 processes" in " ".join(out.split())


def test_tensor_and_context_parallelism_take_less():
    """Of rows in parts half of the activations, and of fsdp2's gathered layers a share."""
    steps = [Step("policy", "logprobs", LENGTHS)]
    alone, fsdp = (take_step(CONFIG, steps, WHOLE, "float32", "cpu", parts=parts) for parts in (1, 4))
    launch = LaunchSettings(processes=4, context_parallel=2)
    parts = on_axes(alone, launch, CONFIG, steps, "sdpa", 1)
    gradients = alone.trains["policy"]
    assert parts.step == gradients + (alone.step - gradients) // 2 and parts.weights == alone.weights
    launch = LaunchSettings(processes=4, tensor_parallel=2, strategy="fsdp2")
    gathered = whole_layers(CONFIG, {"policy"}, "sdpa")
    head = 2 * CONFIG.vocab_size * CONFIG.hidden_size * 4
    assert on_axes(fsdp, launch, CONFIG, steps, "sdpa", 4).step == fsdp.step - gathered + gathered // 2 + head
    assert on_axes(fsdp, LaunchSettings(processes=4, strategy="fsdp2"), CONFIG, steps, "sdpa", 4) is fsdp


def test_text_is_read_from_whole_logits_where_the_trainer_computes_them():
    """As `make_trainer` decides: trl's tiles read no cut head, and smooth no labels."""
    large = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=150_000))
    for settings, whole in (
        ([], False), (["sft.label_smoothing=0.1"], True), (["launch.processes=2", "launch.context_parallel=2"], True),
        (["launch.processes=2", "launch.strategy=fsdp2"], False),
    ):  # fmt: skip
        experiment = load_experiment(MICRO, *settings)
        assert memory.has_whole_logits(experiment, "sft", experiment.sft, large) == whole


def test_processes_that_compute_a_row_together_sum_gradients():
    """They hold flat copies, though they are one group."""
    wide = ["model.hidden_size=128", "rankings.samples_per_prompt=2", "rm.gradient_accumulation_steps=1"]
    experiment = load_experiment(MICRO, *wide, "launch.processes=2", "launch.context_parallel=2")
    needs = {need.stage: need for need in memory.of_experiment(experiment, "cpu")}
    rm, base = needs["rm"], needs["base"]
    assert rm.step > 1.99 * rm.weights  # gradients, and a flat copy
    assert base.step > 3 * base.weights  # and DDP's buckets


def test_a_checkpointed_step_holds_less():
    given = (CONFIG, [Step("policy", "logprobs", LENGTHS)], WHOLE, "float32", "cpu")
    plain, spared = take_step(*given), take_step(*given, checkpointing=True)
    assert spared.step < 0.6 * plain.step and spared.moments == plain.moments


def test_adalora_keeps_its_averages_beside_the_moments():
    adapter = AdapterSettings(method="adalora", r=4)
    foretold = take_step(CONFIG, [Step("reward_model", "scores", LENGTHS)], adapter, "float32", "cpu")
    model = with_adapter(prepare(LlamaForSequenceClassification(CONFIG)), adapter, scalar=True)
    trainee = make_trainee("model", model, learning_rate=1e-3, max_grad_norm=1.0, steps=100)
    for step in (1, 2):
        for p in trainee.parameters.values():
            p.grad = torch.ones_like(p)
        optimizer_step(trainee, 1e-3, step)
    real = sum(x.nbytes for state in trainee.optimizer.state.values() for x in state.values())
    assert foretold.moments == pytest.approx(real, rel=0.02)
    assert real > 3.5 * foretold.trains["reward_model"]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits, a_weight", [(4, 4 + 8 / 64 + 32 / 64 / 256), (8, 8)])
def test_quantized_weights_have_the_size_of_their_storage(bits, a_weight):
    """Bits per weight with scales, as in real layers and in the papers."""
    adapter = AdapterSettings(method="qlora", bits=bits, r=4)
    foretold = take_step(CONFIG, [Step("reward_model", "scores", LENGTHS)], adapter, "float32", "cpu")
    made = with_adapter(prepare(LlamaForSequenceClassification(CONFIG)), adapter, scalar=True)
    real = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in made.parameters()}
    assert foretold.weights == pytest.approx(sum(real.values()), rel=0.005)
    shapes = [(w.out_features, w.in_features) for n, w in made.named_modules() if n.endswith("_proj.base_layer")]
    held = sum(p.nbytes for n, p in made.named_parameters() if "_proj.base_layer." in n)
    tables = len(shapes) * (4 * 256 + 4) if bits == 4 else 4 * sum(rows for rows, _ in shapes)
    assert held - tables == pytest.approx(sum(a * b for a, b in shapes) * a_weight / 8, rel=0.002) and len(shapes) == 21
    whole = take_step(CONFIG, [Step("reward_model", "scores", LENGTHS)], LORA, "float32", "cpu")
    assert foretold.frozen == whole.frozen and foretold.trains == whole.trains


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_a_step_of_a_soft_prompt(method):
    """The base is frozen and exists once; an encoder has its own weights and moments."""
    soft = SoftPrompt(method, 7, encoder_hidden_size=16)
    adapter = AdapterSettings(method=method, soft_prompt=soft)
    steps = [Step("policy", "logprobs", LENGTHS), Step("value_model", "scores", LENGTHS)]
    foretold = take_step(CONFIG, steps, adapter, "float32", "cpu")
    model = LlamaForCausalLM(CONFIG)
    whole = sum(p.nbytes for p in model.parameters())
    model.config.soft_prompt_ids = list(range(293, 300))
    trains = sum(p.nbytes for p in trainable_parameters(with_adapter(prepare(model), adapter)).values())
    assert foretold.adapted and foretold.shared and foretold.trains["policy"] == trains
    assert foretold.weights == pytest.approx(whole + 2 * trains, rel=0.01)
    assert foretold.moments == pytest.approx(4 * trains, rel=0.2)
    assert sum(foretold.trains.values()) < 0.2 * whole


def of_ppo(config, adapter, device, dtype, **options) -> memory.Need:
    experiment = SimpleNamespace(
        ppo=ppo_settings.PPOSettings(**options), launch=LaunchSettings(),
        rm=SimpleNamespace(ensemble=1), sft=SimpleNamespace(ppo_init=None),
    )  # fmt: skip
    take = lambda steps: take_step(config, steps, adapter, dtype, device)  # noqa: E731
    return memory.of_ppo(experiment, config, take, dtype, device)


def test_with_adapters_ppo_has_one_trunk():
    options = {"total_episodes": 8, "batch_size": 8, "mini_batch_size": 8, "response_length": 16, "max_length": 32}
    whole = of_ppo(CONFIG, WHOLE, "cpu", "float32", **options)
    adapted = of_ppo(CONFIG, LORA, "cpu", "float32", **options)
    trunk = sum(p.nbytes for p in LlamaForCausalLM(CONFIG).parameters())
    assert whole.weights == pytest.approx(4 * trunk, rel=0.01)  # policy, reference, reward and value model
    assert trunk < adapted.weights < 1.3 * trunk and adapted.moments < 0.3 * whole.moments


@pytest.mark.slow
@pytest.mark.parametrize(
    "bench, model, k, p_to_r", [("rm", "135M", 9, "1:1"), ("dpo", "135M", 2, "1:1"), ("ppo", "1.3B", None, None)]
)
def test_what_a_gpu_held_was_foretold(bench, model, k, p_to_r, monkeypatch):
    """The peaks that the benchmarks measured, within 15 %."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    monkeypatch.setattr(memory_step, "castable", lambda model: [])
    from ppo_models import SHAPES

    lines = [json.loads(line) for line in (BENCHMARKS / "results" / f"{bench}.jsonl").read_text().splitlines()]
    line = next(
        x for x in lines
        if x["dtype"] == "bfloat16" and x["model"] == model and x["lengths"] == "fixed" and x.get("k") == k
        and x.get("p_to_r") == p_to_r and x["measure"] in ("step", "update")
    )  # fmt: skip
    config = LlamaConfig(**SHAPES[model], tie_word_embeddings=True, max_position_embeddings=1024)
    if bench == "ppo":
        sizes = {"total_episodes": 128, "batch_size": 128, "mini_batch_size": 128, "response_length": 512}
        sizes |= {"max_length": 1024, "local_rollout_forward_batch_size": 128, "ptx_coef": 0.0}
        foretold = of_ppo(config, WHOLE, "cuda", "bfloat16", **sizes).most
    else:
        name, head = ("reward_model", "scores") if bench == "rm" else ("policy", "logprobs")
        found = take_step(config, [Step(name, head, line["prompts"] * [(128, k * [128])])], WHOLE, "bfloat16", "cuda")
        reference = found.weights * (bench == "dpo")
        foretold = found.weights + reference + found.moments + found.step
    assert foretold == pytest.approx(line["peak_bytes"]["ours"], rel=0.15)


def test_doctor_prints_a_line_a_stage(capsys, monkeypatch):
    from pipeline.cli import main

    monkeypatch.setenv("COLUMNS", "120")
    config = Path(__file__).resolve().parents[2] / "resume" / "micro.yaml"
    assert main(["doctor", "--memory", "-c", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    stages = ["base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate"]
    assert [line.split()[0] for line in lines[1:11]] == [*stages, *COMMANDS]
    assert all(line.split()[-1] in ("MB", "GB") for line in lines[1:11])
    assert main(["doctor", "--memory"]) == 2


@pytest.mark.parametrize("n", [1, 4])
def test_sampling_holds_the_cache_that_is_foretold(n):
    """In float32, of prompts and responses as long as they may be."""
    model = prepare(LlamaForCausalLM(CONFIG)).requires_grad_(False)
    assert can_pack(model, 200)
    prompts = [[i + 3] * 24 for i in range(8 // n) for _ in range(n)]
    decoding = Decoding(response_length=80, eos_id=-1, pad_id=0, batch_size=8)
    sample_with_logprobs(model, prompts[:1], [0], decoding)  # tries the head
    live = memory_step.LiveBytes()
    live.known.update(x.untyped_storage() for x in model.parameters())
    with live:
        sample_with_logprobs(model, prompts, list(range(8)), decoding)
    assert memory.cache_of(CONFIG, 8, 104, "float32") == pytest.approx(live.most, rel=0.1)

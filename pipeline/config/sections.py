"""Define the sections that every experiment has, whatever its stages are.

It also decides whether a path in a config names a local file, a package or a repository on the Hub.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator

from pipeline.config.section import Section, setting
from pipeline.trackers.names import NAMES, TrackerName

KINDS = ("documents", "demonstrations", "prompts", "evaluation_prompts", "rankings")
OF_WORLD = ("documents", "demonstrations", "prompts", "evaluation_prompts")  # the stage `world` writes these

RANKED = "ranked"  # as a path of data.rankings: the snapshot of what people ranked in this experiment

HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
PACKAGE = re.compile(r"package:[A-Za-z0-9._-]+")
FILE_SUFFIXES = (
    *(".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".tab", ".txt", ".md", ".yaml", ".yml"),
    *(".feather", ".text", ".markdown"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".gguf", ".safetensors", ".bin", ".pt"),
)

TemplateValue = bool | int | float | str | list[Any] | dict[str, Any]  # what YAML can hold, except null


class PeftSettings(Section):
    """Choose how adapters are trained instead of all weights."""

    method: Literal[
        "lora",
        "dora",
        "ia3",
        "bitfit",
        "adalora",
        "qlora",
        "prompt_tuning",
        "p_tuning",
        "prefix_tuning",
        "houlsby",
        "pfeiffer",
        "parallel_adapter",
    ] = setting(
        "lora",
        "adapter method: lora, dora, adalora (lora that moves rank between layers), ia3, bitfit (trains only biases), "
        "qlora (lora on a quantized base model), prefix_tuning (keys and values before the text in every layer), "
        "houlsby, pfeiffer or parallel_adapter (bottlenecks behind attention and MLP, behind the MLP, beside the MLP); "
        "prompt_tuning and p_tuning train input vectors that the chat template begins with",
    )
    r: int = setting(
        16, "rank of the adapter matrices (lora, dora, qlora; for adalora the final rank, on average)", ge=1
    )
    lora_alpha: int = setting(
        32, "adapters are scaled by lora_alpha / r (lora, dora, qlora; for adalora by lora_alpha / init_r)", ge=1
    )
    lora_dropout: float = setting(
        0.0,
        "dropout on the input of the adapters in sft; the other stages compute without (lora, dora, qlora, adalora)",
        ge=0,
        lt=1,
    )
    init_r: int | None = setting(
        None, "rank that adalora starts with before it prunes; null: 1.5 × r, rounded up", ge=1
    )
    target_modules: str | list[str] = setting(
        "all-linear",
        "layers that get an adapter: all-linear, a list of names or ends of names ([q_proj, v_proj]), or a regular "
        "expression that matches whole names ('.*layers\\.[0-3]\\..*_proj'); not with ia3 and bitfit, which choose "
        "their own",
    )
    bits: Literal[4, 8] | None = setting(
        None,
        "precision of the frozen linear layers under qlora: 4 (NF4 with quantized scales) or 8 (one scale per row); "
        "null: 4",
        "bits",
    )
    bottleneck_size: int | None = setting(
        None, "units of a bottleneck adapter; null: the model's width / 16, rounded down", "units", ge=1
    )
    bottleneck_activation: Literal["relu", "gelu", "silu", "tanh"] | None = setting(
        None, "nonlinearity of a bottleneck adapter; null: the paper's (gelu for houlsby, otherwise relu)"
    )
    bottleneck_scale: float | None = setting(
        None, "factor of a bottleneck adapter's output; null: 1, and 4 for parallel_adapter as in its paper", gt=0
    )
    prefix_projection: bool | None = setting(
        None,
        "whether the first stage computes the prefix with an MLP (Li & Liang 2021), of which later stages train only "
        "the output; null: false, the keys and values themselves train (P-tuning v2)",
    )
    num_virtual_tokens: int | None = setting(
        None,
        "length of the soft prompt of prompt_tuning and p_tuning, or of the prefix of prefix_tuning; null: 20",
        "tokens",
        ge=1,
    )
    prompt_tuning_init: Literal["text", "sample_vocab", "random"] | None = setting(
        None,
        "what the soft prompt starts as: the embeddings of a text, of tokens drawn from the vocabulary, or random "
        "vectors of their spread; null: text if one is given, otherwise sample_vocab",
    )
    prompt_tuning_init_text: str | None = setting(
        None, "text that the soft prompt starts as, repeated or cut to its length"
    )
    encoder_reparameterization_type: Literal["mlp", "lstm"] | None = setting(
        None, "network whose output p_tuning adds to the soft prompt while it trains; null: mlp"
    )
    encoder_hidden_size: int | None = setting(
        None,
        "width of that network, or of prefix_tuning's MLP; null: the width of the model, or of a layer's keys",
        "units",
        ge=1,
    )
    exclude_modules: str | list[str] | None = setting(
        None, "layers that get no adapter although target_modules names them, in the same notation"
    )
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = setting(
        None, "indices of the decoder layers that get adapters, from 0; null: all of them"
    )
    modules_to_save: list[str] | None = setting(
        None,
        "names or ends of names of modules that train in full beside the adapter, such as [embed_tokens, lm_head]; a "
        "reward model's head always does",
    )
    use_rslora: bool | None = setting(
        None,
        "scale adapters by lora_alpha / √r instead (rsLoRA: higher ranks keep learning as fast; lora, dora, qlora); "
        "null: false",
    )
    init_lora_weights: Literal["pissa", "olora"] | None = setting(
        None,
        "what lora and qlora start from. pissa: the largest singular values and vectors of each weight; olora: its QR "
        "decomposition. The model computes the same as before at the start either way; null: one random matrix and one "
        "of zeros",
    )


class ModelSettings(Section):
    """Choose the base model, or the shape of one that is trained from scratch."""

    name_or_path: str | None = setting(
        None, "base model: a folder, a Hub id or package:NAME; null: train from scratch, with the shape below"
    )
    revision: str | None = setting(
        None, "branch, tag or commit of the Hub id; null: main. The commit it resolves to is recorded"
    )
    chat_template: str | None = setting(
        None, "file with a Jinja chat template that replaces the model's; null: the model's own template"
    )
    chat_template_kwargs: dict[str, TemplateValue] | None = setting(
        None, "variables passed to the chat template every time, such as {enable_thinking: false}; null: none"
    )
    control_tokens: list[str] | None = setting(
        None,
        "new tokens that say how good an answer is, from worst to best, as [<|bad|>, <|good|>]: the chat template's "
        "generation prompt ends with the best one, and none is ever answered. sft.conditional teaches what they mean; "
        "null: none",
    )
    hidden_size: int = setting(128, "width of the model, from scratch", ge=1)
    num_hidden_layers: int = setting(5, "number of layers, from scratch", ge=1)
    num_attention_heads: int = setting(4, "attention heads, from scratch; must divide hidden_size", ge=1)
    intermediate_size: int = setting(384, "width of the feed-forward layers, from scratch", ge=1)
    max_position_embeddings: int = setting(512, "context length, from scratch", "tokens", ge=2)
    vocab_size: int = setting(1024, "largest vocabulary of the tokenizer trained from scratch", "tokens", ge=8)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = setting(
        "float32",
        "precision of the computation; float16: with a gradient scaler, for GPUs without bfloat16 (V100, T4); auto: "
        "bfloat16 where the hardware has it, float16 on other CUDA GPUs, else float32. Trained weights stay in float32",
    )
    publish_dtype: Literal["bfloat16", "float16", "as_given"] | None = setting(
        None,
        "precision of published weights. as_given: that of the model in name_or_path, and the default where one is "
        "named; null or float32: float32. 16 bits halve a folder's size, and round the weights that the next stage "
        "starts from and that evaluate reads: what training changed by less than their last digit is lost. Training, "
        "checkpoints, adapters beside the weights and reward heads stay in float32",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = setting("sdpa", "attention kernel")
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, about a third more compute"
    )
    compile: bool | None = setting(
        False,
        "compile the decoder layers of rm, ppo and dpo with torch.compile, which fuses what lies between their matrix "
        "products. auto or null: on CUDA, where it can be; true: also on a CPU, where it gains nothing. "
        "Not the default, since it has not been run on a GPU yet",
    )
    peft: PeftSettings | None = setting(
        None, "train adapters instead of all weights; null: train all weights. sft, rm, ppo and dpo can change it"
    )
    adapter: str | None = setting(
        None,
        "folder of an adapter that peft saved (adapter_config.json, adapter_model.safetensors); `base` merges it into "
        "the model of name_or_path, which it must have been trained on",
    )

    @model_validator(mode="before")
    @classmethod
    def _publish_as_given(cls, values: Any) -> Any:
        """Set the default of publish_dtype, which depends on whether a model is given."""
        if isinstance(values, dict) and values.get("name_or_path") is not None:
            return {"publish_dtype": "as_given"} | values
        return values

    @field_validator("compile", mode="before")
    @classmethod
    def _auto_is_null(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @field_validator("publish_dtype", mode="before")
    @classmethod
    def _float32_is_null(cls, value: Any) -> Any:
        return None if value == "float32" else value


class DataSource(Section):
    """Name a file or a Hub dataset, which of its records to use, and how to read them."""

    path: str = setting(..., "local file, folder or glob (data/*.jsonl.gz), or Hub id org/name")
    split: str = setting("train", "split of a Hub dataset, or of a folder that save_to_disk wrote")
    subset: str | None = setting(None, "subset (configuration) of a Hub dataset")
    data_dir: str | None = setting(None, "folder inside the repository of a Hub dataset (hh-rlhf: helpful-base)")
    data_files: str | None = setting(None, "file or glob inside the repository of a Hub dataset")
    revision: str | None = setting(
        None, "branch, tag or commit of a Hub dataset; null: main. The commit it resolves to is recorded"
    )
    columns: dict[str, str] | None = setting(
        None, "our key → the key in the rows, dots leading into objects: {prompt: question, completion: answer.text}"
    )
    where: dict[str, Any] | None = setting(
        None, "key in the rows → the value, or the list of values, that a row must have to be read: {lang: en}"
    )
    ignore: list[str] = setting([], "keys to leave unread although they change what a row means: [label]")
    templated: Literal["strip", "keep"] | None = setting(
        None,
        "text that already has a chat template in it ([INST], <|im_start|>, ### Instruction:). strip: take the "
        "template out; keep: read it as plain text; null: such rows are errors",
    )
    by: str | None = setting(
        None, "which of several judgments makes the ranks (data/README.md lists them); null: the form's first"
    )
    tie_within: float = setting(0.0, "largest difference of two scores that are a tie", ge=0)
    min_score_ratio: float = setting(
        1.0, "smallest ratio of the scores of a pair, for forms that count votes (SHP)", ge=1
    )
    tiers: list[str] = setting([], "names of the tiers, the best first, for tools whose labelers sort into buckets")
    wordings: str | None = setting(
        None,
        "YAML file of wordings, by which the rows of a task ({premise, hypothesis, label}) become prompts and "
        "responses (data/README.md); null: rows are read as they are",
    )
    wording_choice: Literal["one", "each"] = setting(
        "one", "one: a wording a row, by a hash of the row and the wordings' weights; each: every row in every wording"
    )
    shots: int | None = setting(
        None,
        "rows that are shown, with their responses, before each prompt (few-shot), in the prompt's own wording; never "
        "the row itself or one that is held out",
        "rows",
        ge=1,
    )
    shots_from: str | None = setting(
        None, "file, folder or glob of rows that shots are drawn from; null: the source itself (demonstrations only)"
    )
    shots_as: Literal["turns", "text"] = setting(
        "turns", "turns: shots are turns of the conversation, which are not learnt; text: a part of the prompt"
    )
    on_bad_row: Literal["error", "drop"] = setting(
        "error", "error: a row with a mistake stops the stage; drop: it is left out and listed in left_out.jsonl"
    )
    max_bad: float = setting(0.01, "largest share of rows that on_bad_row: drop may leave out", ge=0, le=1)
    skip: int = setting(0, "number of records to skip at the start", "records", ge=0)
    limit: int | None = setting(None, "largest number of records to use; null: all", "records", ge=1)
    weight: float | None = setting(
        None,
        "in a list of sources: its share of the mixture, relative to the other weights; no record is taken twice. null "
        "everywhere: all records of all sources",
        gt=0,
    )

    @field_validator("tiers")
    @classmethod
    def _different_tiers(cls, value: list[str]) -> list[str]:
        twice = next((name for name in value if value.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"names {twice!r} twice; should name each tier once, the best first")
        return value


DataValue = str | DataSource | list[str | DataSource] | None
"""Value of a kind of data: where it comes from, or the sources of a mixture."""

_SOURCE = (
    "world: generated by the stage world; or a path; or a Hub id; or {path, split, columns, where, limit, …} "
    "(data/README.md); or a list of them, a mixture; or null: none. Default: world, or none as soon as any data of "
    "your own is set"
)


class DataSettings(Section):
    """Say where each kind of data comes from."""

    documents: DataValue = setting("world", f"text to pretrain on. {_SOURCE}")
    demonstrations: DataValue = setting("world", f"prompts with good responses. {_SOURCE}")
    prompts: DataValue = setting("world", f"prompts whose responses are ranked and that PPO trains on. {_SOURCE}")
    evaluation_prompts: DataValue = setting(
        "world",
        "prompts that only `evaluate` uses; without them it uses the prompts of the demonstrations that sft held out. "
        f"{_SOURCE}",
    )
    rankings: DataValue = setting(
        None,
        "rankings by people (a path, a Hub id, {path, …} or a list of them; ranked, also as a path: what people rank "
        "here with `rlhf rank`). null: if the prompts are the world's, "
        "simulated labelers rank samples of the SFT model; otherwise there are no rankings",
    )
    validation_fraction: float = setting(0.05, "fraction of the records that is held out", gt=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _no_world_beside_own_data(cls, given: Any) -> Any:
        """Set every kind that is not given to null as soon as one kind is the user's own data.

        Otherwise the embedded world's data would be mixed with the user's without a word.
        """
        if not isinstance(given, dict):
            return given
        own = any(given.get(kind) not in (None, "world") for kind in OF_WORLD) or given.get("rankings") not in (
            None,
            RANKED,
        )
        return dict.fromkeys(OF_WORLD) | given if own else given


class TrackingSettings(Section):
    """Choose where metrics are sent besides metrics.jsonl."""

    model_config = ConfigDict(serialize_by_alias=True)

    # `with` is a word of Python's own
    with_: list[TrackerName] = setting(
        [],
        "trackers that get the rows of metrics.jsonl, evaluations.jsonl and samples.jsonl: one or several of "
        f"{', '.join(NAMES)}. A run is one per stage, grouped by experiment. Keys come from the environment",
        alias="with",
    )
    wandb: Literal["off", "online", "offline"] | None = setting(
        None,
        "mode of Weights & Biases; online and offline also add it to `with`. null: online (or what WANDB_MODE says) if "
        "`with` names wandb, otherwise off",
    )
    project: str = setting("rlhf", "project in the trackers (in MLflow and ClearML followed by the experiment's name)")
    options: dict[str, dict[str, Any]] = setting(
        {},
        "further arguments for the start of a tracker, such as {wandb: {entity: my-team, tags: [a, b]}}; no keys or "
        "passwords",
    )

    @field_validator("with_", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def trackers(self) -> tuple[str, ...]:
        """Return the names of all trackers that are asked for."""
        also = ["wandb"] if self.wandb in ("online", "offline") else []
        return tuple(dict.fromkeys([*self.with_, *also]))

    @property
    def wandb_mode(self) -> str:
        """Return how wandb runs, if it does: online or offline."""
        mode = self.wandb or os.environ.get("WANDB_MODE")
        return "offline" if mode == "offline" else "online"


class CheckpointSettings(Section):
    """Choose how often runs are saved and how many checkpoints are kept."""

    every: int | None = setting(
        None,
        "steps between two checkpoints; 0: never save; null: 50, or more where saving would take over 3.5 % of the "
        "time",
        "steps",
        ge=0,
    )
    keep: int = setting(2, "number of checkpoints kept on disk", ge=1)


class SlurmSettings(Section):
    """Choose what `rlhf run --submit slurm` asks the queue for."""

    time: str = setting("04:00:00", "time limit of a job, in sbatch's format", pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")
    partition: str | None = setting(None, "sbatch's --partition")
    account: str | None = setting(None, "sbatch's --account")
    gpus_per_node: int = setting(
        0, "sbatch's --gpus-per-node; launch.processes should usually be the same number", ge=0
    )
    cpus_per_process: int | None = setting(None, "sbatch's --cpus-per-task", ge=1)
    warn_seconds: int = setting(120, "time before its limit at which a job is told to save", "seconds", ge=1)
    max_restarts: int = setting(20, "how often an interrupted job is queued again", ge=0)
    setup: list[str] = setting([], "shell lines to run before the job's work, such as `module load …`")
    options: list[str] = setting([], "further options for sbatch, such as --qos=long")


class SkySettings(Section):
    """Choose the machines that `rlhf run --submit sky` asks SkyPilot for."""

    infra: str | None = setting(
        None, "where the machines are, as SkyPilot names it: aws, gcp/us-central1, k8s; null: where it is cheapest"
    )
    accelerators: str | None = setting(
        None, "GPUs of each machine, such as H100:8; launch.processes should be the same number"
    )
    use_spot: bool = setting(False, "take machines that may be taken away, for less money")
    cluster: str | None = setting(
        None, "run on this cluster (`sky launch -c`); null: as a managed job, which SkyPilot starts again when needed"
    )
    max_restarts: int = setting(3, "how often a managed job that failed is started again", ge=0)
    volumes: dict[str, str] = setting(
        {}, "SkyPilot volumes by where they are mounted, such as {/mnt/rlhf: my-volume}; checkpoints survive there"
    )
    secrets: list[str] = setting(
        [], "environment variables whose values are handed on, such as [HF_TOKEN]; the task holds only their names"
    )
    setup: list[str] | None = setting(
        None, "shell lines that prepare a new machine; null: lines that install this project from constraints.txt"
    )
    resources: dict[str, Any] = setting(
        {}, "further keys of SkyPilot's resources, such as {disk_size: 500, image_id: 'docker:ghcr.io/me/rlhf'}"
    )


class VllmSettings(Section):
    """Choose how vLLM runs (used where `rollout.engine` is vllm: ppo, rankings, evaluate, chat)."""

    python: str | None = setting(
        None,
        "Python of the environment in which vLLM is installed; null: this one. vLLM pins torch and transformers, so "
        "an environment of its own is best",
    )
    devices: str | None = setting(
        None,
        'GPUs that vLLM samples on, by the machine\'s numbering, such as "6,7"; null: those of rank 0',
        pattern=r"^\d+(,\d+)*$",
    )
    tensor_parallel_size: int = setting(1, "number of GPUs that share vLLM's copy of the policy", ge=1)
    gpu_memory_utilization: float = setting(
        0.3, "fraction of its GPUs' memory that vLLM takes (without a GPU: of the machine's memory)", gt=0, le=1
    )
    folder: str | None = setting(
        None,
        "folder through which the policy's weights are handed to vLLM (with bfloat16 half the model's size); null: "
        "the stage's folder; one in memory, such as /dev/shm, is faster",
    )
    hand_over: Literal["files", "memory"] = setting(
        "files",
        "how weights that have changed get to vLLM; memory: it reads them where they are (CUDA IPC), so it must run on "
        "rank 0's GPU alone: devices: null, tensor_parallel_size: 1",
    )
    adapter_alone: bool = setting(
        False,
        "with model.peft.method: lora hand over only the adapter, which vLLM adds to the base model at each step, not "
        "merged weights; fast for large models",
    )
    sleep: bool = setting(
        False,
        "let vLLM free its GPU memory between rollouts (its sleep mode, level 1: its weights wait in the machine's "
        "memory), where it shares a GPU with training",
    )
    options: dict[str, Any] = setting({}, "further arguments for vllm.LLM, such as {enforce_eager: true}")


AXES = ("tensor_parallel", "context_parallel")
"""Settings of `launch` that divide the processes into groups."""


class LaunchSettings(Section):
    """Choose devices, threads and processes."""

    device: Literal["auto", "cpu", "cuda", "mps"] = setting(
        "auto",
        "device to compute on; cuda: NVIDIA's GPUs, and AMD's with a ROCm build of torch; mps: Apple's GPU; auto: the "
        "first of cuda, mps and cpu that is there",
    )
    threads: int | None = setting(
        None, "CPU threads of each process; null: all cores, divided among the processes", ge=1
    )
    processes: int = setting(
        1,
        "number of processes on this machine that share each stage's work; they split each batch, so the result "
        "equals that of one process up to the order of summation",
        ge=1,
    )
    strategy: Literal["ddp", "fsdp2"] = setting(
        "ddp",
        "how several processes hold the models they train: ddp: each holds everything; fsdp2: each holds a shard of "
        "what `shard` names",
    )
    shard: Literal["optimizer", "gradients", "weights"] | None = setting(
        None,
        "what fsdp2 shards: optimizer: the moments (ZeRO-1); gradients: these too, and weights except from a forward "
        "pass to its backward pass (the memory of ZeRO-2); weights: every weight, gradient and moment (torch's "
        "fully_shard, ZeRO-3); null: weights",
    )
    reduce: Literal["each", "last"] | None = setting(
        None,
        "when fsdp2 sums gradients over the processes: each: at every micro-batch, so that shards of them are all that "
        "is kept; last: at the last micro-batch of an optimizer step, so that they are sent once and kept whole until "
        "then, 4 bytes a trained weight. Where gradients are whole anyway (ddp, shard: optimizer), it is the last; "
        "null: each",
    )
    offload: Literal["none", "optimizer", "all"] | None = setting(
        None,
        "what is kept in the CPU's memory: optimizer: Adam's moments, and it steps there; all: weights and gradients "
        "too, with a layer at a time on the GPU (torch's fully_shard, with one process too); null: none",
    )
    offload_activations: bool | None = setting(
        None,
        "whether what a forward pass keeps for its backward pass waits in the CPU's memory; with "
        "model.gradient_checkpointing only the input of each layer is kept; null: false",
    )
    tensor_parallel: int | None = setting(
        None,
        "how many processes hold each model together, cut by transformers' own plan; they read the same rows, and the "
        "other processes share rows and, with fsdp2, each cut again. For models whose layers are too large for one "
        "device; null: 1",
        ge=1,
    )
    context_parallel: int | None = setting(
        None,
        "how many processes compute each row together, each a part of its tokens, where models train; for rows whose "
        "activations are too large for one device; null: 1",
        ge=1,
    )
    nodes: int = setting(1, "number of machines with that many processes each; for --submit", ge=1)
    slurm: SlurmSettings = setting(SlurmSettings(), "what --submit slurm asks the queue for")
    sky: SkySettings = setting(SkySettings(), "what --submit sky asks SkyPilot for")
    vllm: VllmSettings = setting(VllmSettings(), "where and how vLLM runs")
    timeout: float = setting(
        600, "how long a process waits for another process, or for vLLM, before it gives up", "seconds", gt=0
    )

    @property
    def together(self) -> int:
        """Return how many processes read the same rows, and hold or compute a model together."""
        return (self.tensor_parallel or 1) * (self.context_parallel or 1)

    @property
    def shares_state(self) -> bool:
        """Return whether several processes would each hold a share of weights or moments."""
        return self.strategy == "fsdp2" or (self.tensor_parallel or 1) > 1

    @field_validator("strategy", mode="before")
    @classmethod
    def _no_deepspeed(cls, value: Any) -> Any:
        zero = {"zero1": "optimizer", "zero2": "gradients", "zero3": "weights"}
        if value in zero:
            raise ValueError(f"should be 'fsdp2', with launch.shard: {zero[value]} for what {value} shards")
        if value == "deepspeed":
            raise ValueError(
                "should be 'fsdp2', with launch.shard: optimizer, gradients or weights for ZeRO-1, 2 or 3; DeepSpeed "
                "is not supported"
            )
        return value

    @property
    def shards_weights(self) -> bool:
        """Return whether fully_shard holds the weights, for several processes or the CPU."""
        return self.offload == "all" or (self.strategy == "fsdp2" and self.shard != "optimizer")

    @property
    def sharding(self) -> str:
        """Return the setting because of which `shards_weights` is true."""
        return "launch.offload: all" if self.offload == "all" else "launch.strategy: fsdp2"

    def divides_weights(self, processes: int) -> bool:
        """Return whether weights are held in shares: of several processes, or in the CPU's memory.

        Args:
            processes: Number of processes.
        """
        cut = (self.tensor_parallel or 1) > 1
        return self.offload == "all" or (processes > 1 and (self.shards_weights or cut))

    def layout(self, processes: int) -> str | None:
        """Return in words how training is laid out; None for one process that holds everything.

        Args:
            processes: Number of processes.
        """
        parts: list[str] = []
        if processes > 1:
            parts.append(self.strategy)
            if self.strategy == "fsdp2" and self.shard not in (None, "weights"):
                parts.append(f"shard {self.shard}")
        if self.offload not in (None, "none"):
            parts.append(f"offload {self.offload}")
        return ", ".join(parts) or None


class TakenSettings(Section):
    """Take finished stages of another experiment by reference, instead of making them."""

    experiment: str = setting(..., "name of the experiment that made them", pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    stages: list[str] = setting(..., "the stages to take, with all that they were made from: [world, base, sft]")
    artifacts: str | None = setting(None, "folder of that experiment's artifacts; null: the one of --artifacts")


class RoundSettings(Section):
    """Say which round of collecting and training this is; `rlhf round next` writes it."""

    number: int = setting(..., "number of the round; the experiment without this section is round 1", ge=2)
    earlier: list[str] = setting(..., "folders of the artifacts of the rounds before, the first one first")
    folder: str = setting(..., "folder of what was gathered for this round")
    digests: dict[str, str] = setting({}, "stage of the round before → the digest of its manifest, when this was made")

    @model_validator(mode="after")
    def _one_folder_a_round(self) -> "RoundSettings":
        if len(self.earlier) != self.number - 1:
            raise ValueError(f"earlier should name {self.number - 1} folders, one for each round before this one")
        return self


@dataclass(frozen=True)
class ConfigFile:
    """Name the file and the overrides that an experiment was read from."""

    path: Path
    """The YAML file."""
    overrides: tuple[str, ...] = ()
    """Settings given on top of the file, `key=value` each."""


class Common(Section):
    """Hold what every experiment has. The class with the stages' sections derives from this one."""

    name: str = Field(description="name of the experiment and of its folder: letters, digits, `.`, `_`, `-`")
    seed: int = setting(0, "seed of every random choice", ge=0, lt=2**32)
    from_: TakenSettings | list[TakenSettings] | None = Field(
        None,
        alias="from",
        description="finished stages of another experiment, or a list of several experiments, that are used as if "
        "they were made here: {experiment: tiny, stages: [world, base, sft]}. They must be what this config would make",
    )
    round: RoundSettings | None = setting(None, "round 2 and later ones: which it is; `rlhf round next` writes it")
    sweep: dict[str, Any] | None = setting(
        None,
        "values to try, one experiment for each combination: {ppo.kl_coef: [0.05, 0.1], seed: [0, 1]}; used by "
        "`rlhf run` and `rlhf status`, other commands read the config without it",
    )
    model: ModelSettings = Field(default_factory=ModelSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    tracking: TrackingSettings = Field(default_factory=TrackingSettings)
    checkpoints: CheckpointSettings = Field(default_factory=CheckpointSettings)
    launch: LaunchSettings = Field(default_factory=LaunchSettings)

    _file: ConfigFile | None = PrivateAttr(None)
    _ranked: Path | None = PrivateAttr(None)

    @property
    def taken(self) -> list[TakenSettings]:
        """Return what is taken from other experiments, one entry for each mention."""
        if self.from_ is None:
            return []
        return self.from_ if isinstance(self.from_, list) else [self.from_]

    @property
    def file(self) -> ConfigFile | None:
        """Return the source of the experiment; None for one that Python code built."""
        return self._file

    @property
    def ranked(self) -> Path | None:
        """Return the snapshot that `data.rankings: ranked` means; None if there is none.

        It is known once the experiment's artifacts are opened.
        """
        return self._ranked

    @property
    def waits_for_people(self) -> bool:
        """Return whether the config asks for what people rank, and nobody has ranked yet."""
        value = self.data.rankings
        parts = value if isinstance(value, list) else [value]
        named = [part.path if isinstance(part, DataSource) else part for part in parts]
        return RANKED in named and self._ranked is None


COMMON: dict[str, type[Section]] = {
    "from": TakenSettings,
    "round": RoundSettings,
    "model": ModelSettings,
    "data": DataSettings,
    "tracking": TrackingSettings,
    "checkpoints": CheckpointSettings,
    "launch": LaunchSettings,
}


def is_hub_id(text: str) -> bool:
    """Return whether a text names a repository on the Hub.

    It does if it reads `org/name`, unless such a path or a folder `org` exists here, or it has the
    suffix of a file.
    """
    return (
        HUB_ID.fullmatch(text) is not None
        and not text.lower().endswith(FILE_SUFFIXES)
        and not Path(text).exists()
        and not Path(text).parent.is_dir()
    )


def local_folder(name_or_path: str | None) -> Path | None:
    """Return the folder that model.name_or_path names.

    Returns:
        None for a Hub id, a package or a model trained from scratch.
    """
    if name_or_path is None or PACKAGE.fullmatch(name_or_path) or is_hub_id(name_or_path):
        return None
    return Path(name_or_path).expanduser()


MAY_NAME_DATA = {"reward_bench": ("data",), "refusals": ("harmful", "harmless_looking")}
"""Sections besides `data` whose keys name data as it does."""


def names_hub(tree: dict[str, Any]) -> bool:
    """Return whether a config, parsed but not validated, names anything on the Hub.

    If it does not, all libraries are told to stay offline.
    """
    if any(isinstance(text, str) and is_hub_id(text) for text in scorer_models(tree)):
        return True
    data, model = tree.get("data"), tree.get("model")
    named = [path for value in data.values() for path in source_paths(value)] if isinstance(data, dict) else []
    if isinstance(model, dict):
        named.append(model.get("name_or_path"))
    of_rm = tree.get("rm")
    second = of_rm.get("base") if isinstance(of_rm, dict) else None  # a reward model's own base
    named.append(second.get("name_or_path") if isinstance(second, dict) else second)
    for section, keys in MAY_NAME_DATA.items():
        given = tree.get(section)
        if isinstance(given, dict):
            named += [path for key in keys for path in source_paths(given.get(key))]
    tasks = tree.get("lm_eval")
    if isinstance(tasks, dict) and tasks.get("tasks"):
        return True  # which of them have their data here is known only to lm-eval
    return any(isinstance(text, str) and is_hub_id(text) for text in named)


def scorer_models(tree: dict[str, Any]) -> list[Any]:
    """Return the models that lists of scorers name, in any section of a parsed config."""
    lists = [value for section in tree.values() if isinstance(section, dict) for value in section.values()]
    scorers = [one for value in lists if isinstance(value, list) for one in value if isinstance(one, dict)]
    return [one.get("model") for one in scorers]


def source_paths(value: Any) -> list[Any]:
    """Return the paths of a value of the section `data`: a text, a mapping, or a list of them."""
    if isinstance(value, list):
        return [path for part in value for path in source_paths(part)]
    return [value.get("path") if isinstance(value, dict) else value]

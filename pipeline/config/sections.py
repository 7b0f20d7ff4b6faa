"""The sections that every experiment has beside its stages', and what a source of data or a model may be
named."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# What every config model says of itself: stages use it too.
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

KINDS = ("documents", "demonstrations", "prompts", "evaluation_prompts", "rankings")

HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
PACKAGE = re.compile(r"package:[A-Za-z0-9._-]+")
FILE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".md", ".yaml", ".yml")
FILE_SUFFIXES += (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".gguf", ".safetensors", ".bin", ".pt")


class PeftConfig(BaseModel):
    model_config = STRICT
    method: Literal[
        "lora", "dora", "ia3", "bitfit", "adalora", "qlora", "prompt_tuning", "prefix_tuning", "p_tuning"
    ] = Field(
        "lora",
        description="lora, dora, adalora (lora that moves rank between layers), ia3, bitfit (biases alone) or qlora "
        "(lora on a quantized base); the others are refused, with the reason",
    )
    r: int = Field(
        16, ge=1, description="rank of the adapter matrices (lora, dora, qlora; adalora: in the end, on average)"
    )
    lora_alpha: int = Field(
        32, ge=1, description="adapters are scaled by lora_alpha / r (lora, dora, qlora; adalora: / init_r)"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout in front of the adapters (not ia3, bitfit)")
    init_r: int | None = Field(
        None, ge=1, description="rank that adalora begins with and prunes; null = 1.5 × r, rounded up"
    )
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="names of the layers that get an adapter (not ia3, bitfit)"
    )
    bits: Literal[4, 8] | None = Field(
        None,
        description="what qlora holds frozen linear layers in: 4 (NF4 with quantized scales) or 8 (a scale a row); "
        "null = 4",
        json_schema_extra={"unit": "bits"},
    )


TemplateValue = bool | int | float | str | list[Any] | dict[str, Any]  # as YAML has them; no null at the top


class ModelConfig(BaseModel):
    model_config = STRICT
    name_or_path: str | None = Field(
        None, description="folder, Hub id or package:NAME to start from; null = from scratch, in the shape below"
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of that Hub id; null = main. The commit it stands for is recorded"
    )
    chat_template: str | None = Field(
        None, description="file with a Jinja chat template in the place of the model's own; null = the model's own"
    )
    chat_template_kwargs: dict[str, TemplateValue] | None = Field(
        None,
        description="variables of the chat template that are set for good, as {enable_thinking: false}; null = none",
    )
    hidden_size: int = Field(128, ge=1, description="width, from scratch")
    num_hidden_layers: int = Field(5, ge=1, description="layers, from scratch")
    num_attention_heads: int = Field(4, ge=1, description="attention heads, from scratch; they divide hidden_size")
    intermediate_size: int = Field(384, ge=1, description="width of the feed-forward layers, from scratch")
    max_position_embeddings: int = Field(
        512, ge=2, description="context, from scratch", json_schema_extra={"unit": "tokens"}
    )
    vocab_size: int = Field(
        1024,
        ge=8,
        description="upper bound of the tokenizer trained from scratch",
        json_schema_extra={"unit": "tokens"},
    )
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="what products are computed in; auto = bfloat16 where the hardware has it; trained weights stay "
        "float32",
    )
    publish_dtype: Literal["bfloat16", "as_given"] | None = Field(
        None,
        description="what published weights are written in: bfloat16 halves a folder and rounds what the next stage "
        "begins with and what evaluate reads (checkpoints and training stay float32); as_given = as the model of "
        "name_or_path has them; null or float32 = float32",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention kernel")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more compute")
    peft: PeftConfig | None = Field(None, description="train adapters instead of all weights; null = all weights")

    @field_validator("publish_dtype", mode="before")
    @classmethod
    def _float32_is_the_default(cls, value: Any) -> Any:
        return None if value == "float32" else value


class DataSource(BaseModel):
    model_config = STRICT
    path: str = Field(description="local file, or Hub id org/name")
    split: str = Field("train", description="split of a Hub dataset")
    subset: str | None = Field(None, description="subset (configuration) of a Hub dataset")
    revision: str | None = Field(
        None, description="branch, tag or commit of a Hub dataset; null = main. The commit it stands for is recorded"
    )
    skip: int = Field(0, ge=0, description="pass over the first ones", json_schema_extra={"unit": "records"})
    limit: int | None = Field(None, ge=1, description="take only so many", json_schema_extra={"unit": "records"})


_SOURCE = (
    "world = written by the stage world; or a path; or a Hub id; or {path, split, subset, revision, skip, limit}; or "
    "null = none. Not set: world, or none beside data of your own"
)
OF_WORLD = ("documents", "demonstrations", "prompts", "evaluation_prompts")  # kinds that the stage world writes


class DataConfig(BaseModel):
    model_config = STRICT
    documents: str | DataSource | None = Field("world", description=f"text to pretrain on. {_SOURCE}")
    demonstrations: str | DataSource | None = Field("world", description=f"prompts with good answers. {_SOURCE}")
    prompts: str | DataSource | None = Field(
        "world", description=f"prompts to rank responses for and to run PPO on. {_SOURCE}"
    )
    evaluation_prompts: str | DataSource | None = Field(
        "world",
        description="prompts that only `evaluate` sees; without any it takes those of the demonstrations that sft held "
        f"out. {_SOURCE}",
    )
    rankings: str | DataSource | None = Field(
        None,
        description="rankings by people (path or Hub id); null = the simulated labelers rank SFT's samples, if prompts "
        "are the world's, else none",
    )
    validation_fraction: float = Field(0.05, gt=0, lt=1, description="part of the records that is held out")

    @model_validator(mode="before")
    @classmethod
    def _no_world_beside_own_data(cls, given: Any) -> Any:
        """The toy world's data never slip in beside one's own: what is not set is none then."""
        if not isinstance(given, dict):
            return given
        own = any(given.get(kind) not in (None, "world") for kind in OF_WORLD) or given.get("rankings") is not None
        return dict.fromkeys(OF_WORLD) | given if own else given


class TrackingConfig(BaseModel):
    model_config = STRICT
    wandb: Literal["off", "online", "offline"] = Field(
        "off", description="Weights & Biases; metrics.jsonl is always there"
    )
    project: str = Field("rlhf", description="project in Weights & Biases")


class CheckpointsConfig(BaseModel):
    model_config = STRICT
    every: int | None = Field(
        None,
        ge=0,
        description="how often to save; 0 = never; null = every 50, fewer where that would take over 3.5 % of the time",
        json_schema_extra={"unit": "steps"},
    )
    keep: int = Field(2, ge=1, description="how many checkpoints stay on disk")


class SlurmConfig(BaseModel):
    """Read by `rlhf run --submit slurm` alone."""

    model_config = STRICT
    time: str = Field("04:00:00", pattern=r"^(\d+-)?\d+(:\d\d){0,2}$", description="limit of a job, as sbatch reads it")
    partition: str | None = Field(None, description="sbatch's --partition")
    account: str | None = Field(None, description="sbatch's --account")
    gpus_per_node: int = Field(0, ge=0, description="sbatch's --gpus-per-node; launch.processes is best the same")
    cpus_per_process: int | None = Field(None, ge=1, description="sbatch's --cpus-per-task")
    warn_seconds: int = Field(
        120, ge=1, description="how long before its limit a job is told to save", json_schema_extra={"unit": "seconds"}
    )
    max_restarts: int = Field(20, ge=0, description="how often an interrupted job is queued again")
    setup: list[str] = Field([], description="lines of shell before the job's work, as `module load …`")
    options: list[str] = Field([], description="more of sbatch's options, as --qos=long")


class VllmConfig(BaseModel):
    """Read by `ppo` with ppo.rollout.engine: vllm alone."""

    model_config = STRICT
    python: str | None = Field(
        None,
        description="Python of the environment that vLLM is installed in; null = this one. It pins torch and "
        "transformers, and is best one of its own",
    )
    devices: str | None = Field(
        None,
        pattern=r"^\d+(,\d+)*$",
        description='GPUs that vLLM samples on, by the machine\'s numbers, as "6,7"; null = those of the first process',
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share vLLM's copy of the policy")
    gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="share of its GPUs' memory (without one: of the machine's) that vLLM takes"
    )
    folder: str | None = Field(
        None,
        description="where the policy's weights are handed over, half a model of files (with bfloat16); null = the "
        "stage's folder; one in memory, as /dev/shm, is quicker",
    )
    options: dict[str, Any] = Field({}, description="more of vllm.LLM's arguments, as {enforce_eager: true}")


class LaunchConfig(BaseModel):
    model_config = STRICT
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute; auto = cuda if it is there")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a process; null = all cores, divided among its processes"
    )
    processes: int = Field(
        1,
        ge=1,
        description="processes that share each stage's work on this machine; they split a batch, so the result is one "
        "process's to the order of sums",
    )
    strategy: Literal["ddp", "fsdp2"] = Field(
        "ddp",
        description="what each of several processes holds of models that train: all of them (ddp), or its share of "
        "every weight, gradient and moment (fsdp2, torch's fully_shard; others call it ZeRO-3)",
    )
    nodes: int = Field(1, ge=1, description="machines, with so many processes each; for --submit slurm")
    slurm: SlurmConfig = Field(SlurmConfig(), description="what --submit slurm asks of the queue")
    vllm: VllmConfig = Field(VllmConfig(), description="where and how vLLM runs")
    timeout: float = Field(
        600,
        gt=0,
        description="how long a process waits for another, or for vLLM, before it gives up",
        json_schema_extra={"unit": "seconds"},
    )

    @field_validator("strategy", mode="before")
    @classmethod
    def _no_deepspeed(cls, value: Any) -> Any:
        if value in ("zero1", "zero2", "zero3", "deepspeed"):
            raise ValueError(
                "should be 'fsdp2', which shares out what ZeRO-3 does, and so what ZeRO-1 and ZeRO-2 do; there is no "
                "DeepSpeed here"
            )
        return value


def is_hub_id(text: str) -> bool:
    """`org/name`, unless such a path exists, a folder `org` does, or it is named like a file."""
    return (
        HUB_ID.fullmatch(text) is not None
        and not text.lower().endswith(FILE_SUFFIXES)
        and not Path(text).exists()
        and not Path(text).parent.is_dir()
    )


def local_folder(name_or_path: str | None) -> Path | None:
    """The folder that model.name_or_path names; None for a Hub id, a package or a model from scratch."""
    if name_or_path is None or PACKAGE.fullmatch(name_or_path) or is_hub_id(name_or_path):
        return None
    return Path(name_or_path).expanduser()


def names_hub(tree: dict[str, Any]) -> bool:
    """Whether a config (as read, not validated) names anything on the Hub; if not, all libraries are told to
    stay offline."""
    data, model = tree.get("data"), tree.get("model")
    named = [source_path(value) for value in data.values()] if isinstance(data, dict) else []
    named += [model.get("name_or_path")] if isinstance(model, dict) else []
    return any(isinstance(text, str) and is_hub_id(text) for text in named)


def source_path(value: Any) -> Any:
    return value.get("path") if isinstance(value, dict) else value

"""Stand in for vLLM: the parts that `vllm_server.py` uses, computed with transformers.

Its folder goes on PYTHONPATH. It refuses, dies or drifts if launch.vllm.options say so.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

__version__ = "stand-in"


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


sys.modules["vllm.lora.request"] = sys.modules[__name__]  # vLLM's module that has LoRARequest


@dataclass(frozen=True)
class SamplingParams:
    seed: int
    max_tokens: int
    temperature: float
    stop_token_ids: list[int]
    logprobs: int
    detokenize: bool
    ignore_eos: bool = False
    top_k: int = 0
    top_p: float = 1.0
    logit_bias: dict[int, float] | None = None


@dataclass(frozen=True)
class Logprob:
    logprob: float


@dataclass(frozen=True)
class Output:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]


@dataclass(frozen=True)
class Request:
    outputs: list[Output]


class LLM:
    """A model that samples as vLLM does."""

    def __init__(self, model, dtype, refuses=None, dies_at=None, reload_dies_at=None, drift=0.0, **options):
        """Load the model.

        Args:
            model: Its folder.
            dtype: Name of its dtype.
            refuses: The message of an error to raise in place of starting.
            dies_at, reload_dies_at: The generation, or reload, counted from 1, in which the process
                ends.
            drift: Samples come from logits times 1 + drift.
            options: The other arguments of vllm.LLM.
        """
        assert options["logprobs_mode"] == "processed_logprobs" and options["generation_config"] == "vllm"
        assert options["enable_chunked_prefill"] is False
        if refuses is not None:
            raise ValueError(refuses)
        config = AutoConfig.from_pretrained(model, **options.get("hf_overrides", {}))
        self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        self.tied = config.tie_word_embeddings
        self.load(model)
        if self.tied:  # as in vLLM 0.32: a separate weight from here on, which no reload changes
            self.model.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.detach().clone())
        ends = GenerationConfig.from_pretrained(model).eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]
        self.longest, self.dies_at, self.drift = options["max_model_len"], dies_at, drift
        self.llm_engine, self.adapted, self.awake = self, None, True
        self.may_sleep, self.rank = options.get("enable_sleep_mode", False), options.get("max_lora_rank", 0)
        self.reload_dies_at, self.generations, self.reloads, self.stale = reload_dies_at, 0, 0, False

    def collective_rpc(self, method: str, kwargs: dict) -> None:
        assert method == "reload_weights" and self.awake
        self.reloads += 1
        if self.reloads == self.reload_dies_at:
            os._exit(9)
        if "weights_iterator" in kwargs:
            self.take(dict(kwargs["weights_iterator"]))
        else:
            self.load(kwargs["weights_path"])
        self.stale = True

    def load(self, folder: str) -> None:
        files = [load_file(file) for file in Path(folder).glob("*.safetensors")]
        self.take({name: x for file in files for name, x in file.items()})

    def take(self, weights: dict[str, torch.Tensor]) -> None:
        missing, unknown = self.model.load_state_dict(weights, strict=False)
        assert not unknown and missing == ["lm_head.weight"] * self.tied, (missing, unknown)

    def reset_prefix_cache(self) -> None:
        self.stale = False

    def sleep(self, level: int) -> None:
        assert self.may_sleep and self.awake and level == 1
        self.awake = False
        print("asleep", flush=True)

    def wake_up(self) -> None:
        assert not self.awake
        self.awake = True

    def add_lora(self, request: LoRARequest) -> None:
        from peft import PeftModel

        assert self.awake and self.adapted is None
        self.adapted = PeftModel.from_pretrained(self.model, request.lora_path).eval()
        assert self.adapted.peft_config["default"].r <= self.rank
        self.adapter, self.stale = request, True

    def remove_lora(self, number: int) -> None:
        assert number == self.adapter.lora_int_id
        self.adapted.unload()
        self.adapted = None

    @torch.no_grad()
    def generate(self, prompts, params, use_tqdm: bool, lora_request: LoRARequest | None = None) -> list[Request]:
        assert not self.stale, "keys and values of old weights"
        assert self.awake and (lora_request is None) == (self.adapted is None)
        assert lora_request is None or (lora_request == self.adapter and Path(lora_request.lora_path).is_dir())
        self.generations += 1
        if self.generations == self.dies_at:
            print("it dies", flush=True)
            os._exit(9)
        return [self.one(prompt["prompt_token_ids"], p) for prompt, p in zip(prompts, params, strict=True)]

    def one(self, prompt: list[int], p: SamplingParams) -> Request:
        assert len(prompt) + p.max_tokens <= self.longest
        generator, ids, logprobs = torch.Generator().manual_seed(p.seed), [], []
        stops = [*p.stop_token_ids, *([] if p.ignore_eos else self.ends)]  # as vLLM, whatever generation_config it has
        while len(ids) < p.max_tokens and (not ids or ids[-1] not in stops):
            logits = (self.adapted or self.model)(torch.tensor([prompt + ids])).logits[0, -1].float()
            for token, bias in (p.logit_bias or {}).items():
                logits[token] += bias
            logits = logits / (p.temperature or 1e-6)  # 0: the likeliest token
            logits = logits * (1 + self.drift)
            if p.top_k > 0:
                logits[logits < logits.topk(p.top_k).values[-1]] = -torch.inf
            likeliest = logits.argsort(descending=True)
            before = logits.softmax(-1)[likeliest].cumsum(-1) - logits.softmax(-1)[likeliest]
            logits[likeliest[before >= p.top_p]] = -torch.inf
            logp = logits.log_softmax(-1)
            token = int(torch.multinomial(logp.exp(), 1, generator=generator))
            ids.append(token)
            logprobs.append({token: Logprob(float(logp[token]))})
        return Request([Output(ids, logprobs)])

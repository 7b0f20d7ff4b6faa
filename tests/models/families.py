"""The table of families: tiny random models of many of transformers' types go through the whole
chain by the command line, and what it publishes is read by plain transformers.

    python tests/models/families.py [NAME …] [--jobs 1]

For each family: the way its rows are read, and the largest difference of log-probs, of the
sampler's log-probs and of scores, in nats and in reward, between the stages' functions and
transformers alone, a row at a time and unpadded, on the folders of sft, ppo, dpo and rm; or the
line by which `base` refuses it. Without names all of FAMILIES are run and families.md beside this
file is written anew; a NAME may be any causal type of transformers. Exit code 1 if a family differs
by more than 1e-5, or is refused or not refused against FAMILIES.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT = 1e-5
SMALL = {  # whatever a configuration has of these is made small
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "attention_hidden_size": 32, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "intermediate_size_mlp": 48, "ffn_dim": 48, "d_ff": 48, "n_inner": 48,
    "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 2,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_kv": 8,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "state_size": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
}  # fmt: skip
WIDE = 0.1  # initializer_range: wide enough that every token's context shows in the numbers


@dataclass(frozen=True)
class Family:
    """A family of the table. kind: transformers' model_type, by default its name; options: more of
    its configuration; tokenizer: a key of TOKENIZERS; settings: more of the command line; refused:
    part of the line where base refuses it.
    """

    kind: str | None = None
    options: dict = field(default_factory=dict)
    tokenizer: str = "chatml"
    settings: tuple[str, ...] = ()
    refused: str | None = None


EAGER = ("model.attn_implementation=eager",)
FOUR = {"num_key_value_heads": 4}  # as many keys as queries
FAMILIES = {
    "llama": Family(tokenizer="bos"),
    "mistral-window": Family("mistral", {"sliding_window": 16}, "metaspace"),
    "qwen2": Family(options={"tie_word_embeddings": True}),
    "qwen3": Family(),
    "gemma": Family(tokenizer="turns"),
    "gemma2": Family(options={"sliding_window": 16}, tokenizer="turns", settings=EAGER),
    "gemma3_text": Family(
        options={"sliding_window": 16, "num_hidden_layers": 3, "sliding_window_pattern": 3}, tokenizer="turns"
    ),
    "gemma4_text": Family(tokenizer="turns"),
    "phi3": Family(options=FOUR, tokenizer="metaspace"),
    "gpt2": Family(tokenizer="bare"),
    "gpt_neox": Family(tokenizer="bare"),
    "opt": Family(tokenizer="opt"),
    "bloom": Family(tokenizer="opt", settings=EAGER),
    "falcon": Family(tokenizer="bare"),
    "openai-gpt": Family(tokenizer="bare", settings=EAGER),
    "granite": Family(
        options={
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
        }
    ),
    "cohere": Family(options=FOUR | {"logit_scale": 0.25}),
    "olmo2": Family(),
    "smollm3": Family(options={"num_hidden_layers": 4}),
    "glm4": Family(),
    "starcoder2": Family(options={"sliding_window": None}, tokenizer="bare"),
    "modernbert-decoder": Family(options={"cls_token_id": 0, "sep_token_id": 0}, tokenizer="opt"),
    "nanochat": Family(),
    "apertus": Family(),
    # mixtures of experts
    "mixtral": Family(options={"sliding_window": None}, tokenizer="metaspace"),
    "mixtral-router": Family("mixtral", {"output_router_logits": True}, settings=("sft.router_aux_loss_coef=0.02",)),
    "qwen2_moe": Family(),
    "qwen3_moe": Family(),
    "gpt_oss": Family(settings=EAGER),
    "olmoe": Family(),
    "granitemoe": Family(),
    "deepseek_v3": Family(options=FOUR),
    "llama4_text": Family(options={"attention_chunk_size": 16}, tokenizer="bos"),
    "glm4_moe": Family(),
    "minimax_m2": Family(),
    "deepseek_v32": Family(options=FOUR),
    "deepseek_v4": Family(settings=EAGER),
    # linear attention, state spaces, convolutions; caches of their own
    "qwen3_5_text": Family(),
    "qwen3_next": Family(options={"num_hidden_layers": 4}),
    "jamba": Family(
        options={"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        tokenizer="metaspace",
    ),
    "falcon_h1": Family(options={"mamba_d_ssm": 64}),
    "lfm2": Family(options={"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}),
    "recurrent_gemma": Family(options={"num_hidden_layers": 3}, tokenizer="turns"),
    "minimax": Family(),
    "mamba": Family(tokenizer="bare", settings=EAGER),
    "rwkv": Family(tokenizer="bare", settings=EAGER),
    # what is no causal language model
    "bert": Family(tokenizer="opt", refused="reads in both directions"),
    "roberta": Family(tokenizer="opt", refused="reads in both directions"),
    "bart": Family(tokenizer="opt", refused="an encoder-decoder"),
    "t5": Family(tokenizer="opt", refused="an encoder-decoder"),
}

# ── Building ─────────────────────────────────────────────────────────────────────────────────────

COLORS, THINGS = (
    ["red", "blue", "green", "white", "black", "grey"],
    ["fox", "bird", "boat", "lamp", "tree", "stone", "river", "cloud"],
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|neck|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|neck|>\n\n{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\nA:{% else %} {{ m['content'] }}"
    "{{ eos_token }}\n{% endif %}{% endfor %}"
)
TOKENIZERS = {  # special tokens, template, their roles; a Llama 2 kind of words, or bytes
    "chatml": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML,
               {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "bos": (["<|begin|>", "<|end_of_text|>", "<|head|>", "<|neck|>", "<|eot|>"], BOS,
            {"bos_token": "<|begin|>", "eos_token": "<|end_of_text|>"}),  # neither padding nor the end of turns
    "turns": (["<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "<end>"], TURNS,
              {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}),
    "metaspace": (["<unk>", "<s>", "</s>"], INST, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "bare": (["<|endoftext|>"], BARE, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "opt": (["<s>", "<pad>", "</s>", "<unk>"], BARE,
            {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}),
}  # fmt: skip


def question(i: int) -> tuple[str, list[str]]:
    """A question and three answers to it, best first."""
    thing, color = THINGS[i % len(THINGS)], COLORS[(i * 7) % len(COLORS)]
    asked = f"what color is the {thing} number {i} ?"
    return asked, [f"the {thing} is {color} .", f"it may be {color} or not .", f"go away {thing} !"]


def texts() -> list[str]:
    return [" ".join([asked, *answers]) for asked, answers in map(question, range(200))]


def make_tokenizer(name: str):
    """A tokenizer of one of the shapes in TOKENIZERS, trained on the texts above."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials, template, roles = TOKENIZERS[name]
    words = name == "metaspace"
    bpe = Tokenizer(models.BPE(unk_token=roles.get("unk_token"), fuse_unk=words))
    if words:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
        bpe.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
        alphabet = sorted({c for text in texts() for c in text if c != " "} | set("▁QASINT[]/:\n"))
    else:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"vocab_size": 340, "special_tokens": specials, "show_progress": False, "initial_alphabet": alphabet}
    bpe.train_from_iterator(texts(), trainers.BpeTrainer(**options))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **roles)
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(kind: str, **options):
    """A configuration of transformers' type `kind` for a model of some ten thousand weights."""
    from transformers import AutoConfig

    whole = AutoConfig.for_model(kind)

    def small(config) -> dict:
        known = set(config.to_dict())
        found = {name: value for name, value in SMALL.items() if name in known}
        if "layer_types" in known and config.layer_types and "num_hidden_layers" not in options:
            types = list(dict.fromkeys(config.layer_types))[:4]
            found["layer_types"] = types * (2 if len(types) == 1 else 1)
            found["num_hidden_layers"] = len(found["layer_types"])
        for name in ("initializer_range", "init_std"):
            found |= {name: WIDE} if name in known else {}
        return found

    found = small(whole)
    if kind == "t5":
        found["num_decoder_layers"] = 2
    return AutoConfig.for_model(kind, **{**found, **options})


def build(family: str, folder: Path, tokenizer: str | None = None) -> Path:
    """Write a random model of a family of the table (or of any type of transformers) and its
    tokenizer; → the folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    known = FAMILIES.get(family, Family())
    own = make_tokenizer(tokenizer or known.tokenizer)
    ids = {f"{name}_token_id": getattr(own, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"vocab_size": len(own), "vocab_size_per_layer_input": len(own)}
    config = tiny_config(known.kind or family, **{**ids, **sizes, **known.options})
    torch.manual_seed(sum(map(ord, family)))
    auto = {"bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM}.get(family, AutoModelForCausalLM)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else auto
    model = auto.from_config(config).float()
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


# ── The chain ────────────────────────────────────────────────────────────────────────────────────

CONFIG = """\
name: family
model: {name_or_path: %(root)s/model}
data:
  documents: %(root)s/documents.jsonl
  demonstrations: %(root)s/demonstrations.jsonl
  rankings: %(root)s/rankings.jsonl
  prompts: %(root)s/prompts.jsonl
  evaluation_prompts: %(root)s/evaluation_prompts.jsonl
launch: {device: cpu, threads: 1}
sft: {learning_rate: 1e-3, max_steps: 2, per_device_train_batch_size: 8, max_length: 110, sample_tokens: 8}
rankings: {validation_fraction: 0.2}
rm: {learning_rate: 1e-3, max_steps: 2, per_device_train_batch_size: 4, gradient_accumulation_steps: 2, max_length: 110}
ppo:
  total_episodes: 16
  batch_size: 8
  mini_batch_size: 8
  per_device_train_batch_size: 4
  response_length: 16
  max_length: 110
  learning_rate: 1e-3
  warmup_steps: 0
  ptx_coef: 0.1
  ptx_ratio: 0.5
  ptx_length: 48
  missing_eos_score: null
  eval_prompts: 4
dpo: {learning_rate: 1e-3, max_steps: 2, per_device_train_batch_size: 4, max_length: 110, sample_tokens: 8}
evaluate: {missing_eos_score: null, best_of: 2, response_length: 16, max_length: 110, batch_size: 8,
           perplexity_length: 48, perplexity_rows: 4}
"""


def write_data(root: Path) -> None:
    """The experiment's files: 30 demonstrations, 24 rankings, 12 prompts, 6 evaluation prompts, 40
    documents.
    """
    rows = [question(i) for i in range(60)]
    files = {
        "documents": [{"text": text} for text in texts()[:40]],
        "demonstrations": [{"prompt": asked, "completion": answers[0]} for asked, answers in rows[:30]],
        "rankings": [
            {"id": str(i), "prompt": asked, "responses": answers, "ranks": [1, 2, 3]}
            for i, (asked, answers) in enumerate(rows[30:54])
        ],
        "prompts": [{"prompt": f"and the {THINGS[i % 8]} {i} ?"} for i in range(12)],
        "evaluation_prompts": [{"prompt": f"say what the {THINGS[i % 8]} number {i + 70} is"} for i in range(6)],
    }
    for name, records in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    (root / "family.yaml").write_text(CONFIG % {"root": root}, encoding="utf-8")


@dataclass(frozen=True)
class Row:
    """A row of the table. read: packed, padded, or whole rows; the differences; or why there are
    none.
    """

    family: str
    read: str = ""
    logprobs: float | None = None
    sampler: float | None = None
    score: float | None = None
    line: str = ""

    def is_right(self) -> bool:
        known = FAMILIES.get(self.family, Family())
        if self.logprobs is None or known.refused is not None:
            return known.refused is not None and known.refused in self.line
        return max(self.logprobs, self.sampler, self.score) <= LIMIT

    def cells(self) -> list[str]:
        if self.logprobs is None:
            return [self.family, "refused in base" if self.is_right() else "FAILS", "", "", "", self.line]
        figures = [f"{x:.1e}" for x in (self.logprobs, self.sampler, self.score)]
        return [self.family, self.read, *figures, self.line]


def measure(family: str, root: Path) -> Row:
    """Run the chain of a family in `root` and compare what it published."""
    build(family, root / "model")
    write_data(root)
    known = FAMILIES.get(family, Family())
    command = [sys.executable, "-m", "pipeline.cli", "run", "evaluate", "-c", str(root / "family.yaml")]
    command += ["--artifacts", str(root / "artifacts"), *known.settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        errors = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        line = (errors or done.stderr.splitlines()[-1:] or ["no word"])[0].replace(str(root), "…")
        return Row(family, line=line if done.returncode == 2 else f"exit {done.returncode}: {line}")
    command = [sys.executable, str(HERE / "families.py"), "--compare", str(root / "artifacts" / "family")]
    found = subprocess.run([*command, *known.settings], cwd=ROOT, env=environment, capture_output=True, text=True)
    if found.returncode:
        return Row(family, line=f"comparison: {found.stderr.splitlines()[-1]}")
    return Row(family, **json.loads(found.stdout.splitlines()[-1]))


PROMPTS, RESPONSES = (5, 12, 12, 30), (3, 9, 4, 12)  # lengths of the rows that are compared


def draw_rows() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of ordinary ids."""
    import torch

    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(10, 200, (n,), generator=generator).tolist()  # noqa: E731
    return [draw(n) for n in PROMPTS], [draw(n) for n in RESPONSES]


def policy_differences(folder: Path, attention: str = "sdpa") -> tuple[str, float, float]:
    """Of a published policy: how its rows are read; the largest difference of log-probs, and of the
    sampler's, from transformers alone.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data.groups import make_rows
    from stages.models.forward import head_is_linear, response_logprobs
    from stages.models.loading import load_policy
    from stages.models.packing import can_pack
    from stages.rollouts.lanes import WholeLane, lane_for
    from stages.rollouts.transformers import Decoding, sample_with_logprobs

    tokenizer, (prompts, responses) = AutoTokenizer.from_pretrained(folder), draw_rows()
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    model = load_policy(folder, attn_implementation=attention)
    packed = can_pack(model, 110)
    lane = lane_for(model, packed and head_is_linear(model))
    with torch.no_grad():
        found = response_logprobs(model, make_rows(prompts, responses, tokenizer.pad_token_id, packed=packed))
        decoding = Decoding(24, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
        drawn = sample_with_logprobs(model, prompts, range(len(prompts)), decoding)
        differences = apart(plain, prompts, responses, found), apart(plain, prompts, drawn.responses, drawn.logprobs)
    return "packed" if packed else "whole rows" if lane is WholeLane else "padded", *differences


def score_difference(folder: Path, attention: str = "sdpa") -> float:
    """The largest difference of a published reward or value model's scores from its logits in
    transformers alone.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from data.groups import make_rows
    from stages.models.forward import response_scores
    from stages.models.loading import load_scalar_model
    from stages.models.packing import can_pack
    from stages.models.remote_code import forget_remote_classes

    options = {"attn_implementation": attention, "dtype": torch.float32}
    options["trust_remote_code"] = (folder / "scalar_head.py").is_file()
    plain = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    forget_remote_classes(AutoModelForSequenceClassification)
    model, (prompts, responses) = load_scalar_model(folder, attn_implementation=attention), draw_rows()
    with torch.no_grad():
        ours = response_scores(model, make_rows(prompts, responses, 0, packed=can_pack(model, 110)))
        theirs = [
            plain(input_ids=torch.tensor([p + r])).logits[0, 0] - plain.config.reward_bias
            for p, r in zip(prompts, responses, strict=True)
        ]
    return (ours - torch.stack(theirs)).abs().max().item()


def compare(artifacts: Path, attention: str) -> dict:
    """The largest differences between the stages' functions and transformers alone over the
    published folders.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = [policy_differences(artifacts / stage / "model", attention) for stage in ("sft", "ppo", "dpo")]
    scalar = [artifacts / "rm" / "model", artifacts / "ppo" / "value_model"]
    return {
        "read": found[0][0],
        "logprobs": max(logprobs for _, logprobs, _ in found),
        "sampler": max(sampler for _, _, sampler in found),
        "score": max(score_difference(folder, attention) for folder in scalar),
        "line": "scalar_head.py" * (scalar[0] / "scalar_head.py").is_file(),
    }


def apart(plain, prompts, responses, found) -> float:
    """The largest difference of log-probs (B, R) from those of the plain model, a row at a time."""
    import torch

    most = 0.0
    for row, p, r in zip(found, prompts, responses, strict=True):
        logits = plain(input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1].float()
        theirs = logits.log_softmax(-1).gather(-1, torch.tensor(r)[:, None])[:, 0]
        most = max(most, (row[: len(r)] - theirs).abs().max().item())
    return most


# ── The table ────────────────────────────────────────────────────────────────────────────────────

HEAD = ["family", "rows", "log-probs", "sampler", "score", "remarks"]


def page(rows: list[Row]) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "trl", "torch"))
    lines = ["| " + " | ".join(cells) + " |" for cells in [HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)]]
    return (
        f"# Families\n\n{date.today().isoformat()}, {libraries}. Written by `python tests/models/families.py`, whose "
        f"first lines say what the columns mean. scalar_head.py: the family has no sequence classification in "
        f"transformers that serves, and rm publishes the class beside the weights.\n\n" + "\n".join(lines) + "\n"
    )


def run(families: list[str], jobs: int = 1) -> list[Row]:
    """The rows of some families, printed as they are found."""

    def one(family: str) -> Row:
        with tempfile.TemporaryDirectory(prefix="families-") as folder:
            try:
                row = measure(family, Path(folder))
            except Exception as error:  # a type that cannot be built so small, say
                row = Row(family, line=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        print(f"{'      ' if row.is_right() else 'WRONG '}{' | '.join(row.cells())}", flush=True)
        return row

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, families))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--compare", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compare:
        attention = "eager" if EAGER[0] in given.names else "sdpa"
        print(json.dumps(compare(Path(given.compare), attention)))
        return 0
    rows = run(given.names or list(FAMILIES), given.jobs)
    if not given.names:
        (HERE / "families.md").write_text(page(rows), encoding="utf-8")
    return int(not all(row.is_right() for row in rows))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())

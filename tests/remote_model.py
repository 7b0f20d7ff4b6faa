"""Write folders of tiny models that bring their own code.

spread is a Llama with scaled embeddings: its sequence classification is in a file that only
auto_map names, and its scale in a third one. alone is written without transformers' layers, as
Baichuan is: its own attention, no sequence classification, no `generate`.

Each file of code appends its name to the file $TOY_RAN when it is imported.
"""

import json
from pathlib import Path

import torch

RAN = """\
import os
if os.environ.get("TOY_RAN"):
    with open(os.environ["TOY_RAN"], "a") as file:
        file.write(__name__ + "\\n")

"""

SPREAD = {
    "configuration_toy": """\
from transformers import LlamaConfig


class ToyConfig(LlamaConfig):
    model_type = "toy_spread"
""",
    "scale_toy": """\
from torch import nn


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return 3.0 * super().forward(ids)
""",
    "modeling_toy": """\
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_toy import ToyConfig
from .scale_toy import ScaledEmbedding


class ToyModel(LlamaModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)
        self.post_init()


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = ToyModel(config)
        self.post_init()
""",
    "reward_toy": """\
from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from .configuration_toy import ToyConfig
from .modeling_toy import ToyModel


class ToyForSequenceClassification(GenericForSequenceClassification, LlamaPreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = ToyModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
""",
}

ALONE = {
    "configuration_toy": """\
from transformers import PretrainedConfig


class ToyConfig(PretrainedConfig):
    model_type = "toy_alone"

    def __init__(self, vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                 model_max_length=96, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.model_max_length = model_max_length
        super().__init__(**kwargs)
""",
    "modeling_toy": """\
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_toy import ToyConfig


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index, self.heads, self.width = index, config.num_attention_heads, config.hidden_size
        self.W_pack = nn.Linear(self.width, 3 * self.width, bias=False)
        self.o_proj = nn.Linear(self.width, self.width, bias=False)

    def forward(self, x, hidden_from, position_ids, cache):
        rows, tokens, _ = x.shape
        q, k, v = (p.view(rows, tokens, self.heads, -1).transpose(1, 2) for p in self.W_pack(x).chunk(3, -1))
        angle = position_ids[:, None, :, None] * 0.3
        turn = lambda y: y * angle.cos() + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * angle.sin()
        q, k = turn(q), turn(k)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(hidden_from, -1e9).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(rows, tokens, -1))


class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.norm, self.after = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.self_attn = Attention(config, index)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x, *rest):
        x = x + self.self_attn(self.norm(x), *rest)
        return x + self.down_proj(self.up_proj(self.after(x)).relu())


class ToyPreTrainedModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        x = self.embed_tokens(input_ids)
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        columns = torch.arange(before + x.shape[1], device=x.device)
        if position_ids is None:
            position_ids = columns[None, before:]
        hidden_from = (columns[None] > columns[before:, None])[None, None]
        if attention_mask is not None:
            hidden_from = hidden_from | ~attention_mask.bool()[:, None, None]
        for layer in self.layers:
            x = layer(x, hidden_from, position_ids, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class ToyForCausalLM(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = ToyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids, **kwargs}

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
                logits_to_keep=0):
        out = self.model(input_ids, attention_mask, position_ids, past_key_values)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)
""",
}
ROLES = {
    "AutoConfig": "configuration_toy.ToyConfig",
    "AutoModel": "modeling_toy.ToyModel",
    "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM",
}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

TOKENIZER = '''\
from transformers import PreTrainedTokenizerFast


class ToyTokenizer(PreTrainedTokenizerFast):
    """Reads everything in lower case."""

    def _encode_plus(self, text, *args, **kwargs):
        lower = lambda x: x.lower() if isinstance(x, str) else [lower(y) for y in x]
        return super()._encode_plus(lower(text), *args, **kwargs)
'''


def build(folder: Path, tokenizer, kind: str = "spread", changes: dict[str, tuple[str, str]] | None = None) -> Path:
    """Write an untrained model with its code, and return the folder.

    Args:
        folder: A folder that does not exist yet.
        tokenizer: The model's tokenizer.
        kind: "spread" or "alone".
        changes: {file: (old text, new text)} of the code.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    files = {"spread": SPREAD, "alone": ALONE}[kind]
    for name, text in files.items():
        old, new = (changes or {}).get(name, ("", ""))
        assert old in text
        (folder / f"{name}.py").write_text(RAN + text.replace(old, new), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    roles, config = dict(ROLES), {"vocab_size": len(tokenizer), "tie_word_embeddings": False, **SHAPE, **ids}
    if kind == "spread":
        roles["AutoModelForSequenceClassification"] = "reward_toy.ToyForSequenceClassification"
        config |= {"num_key_value_heads": 1, "max_position_embeddings": 96}
    config |= {"model_type": f"toy_{kind}", "architectures": ["ToyForCausalLM"], "auto_map": roles}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights(kind, len(tokenizer)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def give_tokenizer_code(folder: Path) -> None:
    """Turn the tokenizer of a folder into one with its own code."""
    (folder / "tokenization_toy.py").write_text(RAN + TOKENIZER, encoding="utf-8")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    roles = {"AutoTokenizer": [None, "tokenization_toy.ToyTokenizer"]}
    config |= {"tokenizer_class": "ToyTokenizer", "auto_map": roles}
    file.write_text(json.dumps(config), encoding="utf-8")


def weights(kind: str, vocabulary: int) -> dict[str, torch.Tensor]:
    """Return random weights of a model of that kind and vocabulary size."""
    generator = torch.Generator().manual_seed(0)
    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    tensors = {"model.embed_tokens.weight": normal(vocabulary, width), "lm_head.weight": normal(vocabulary, width)}
    for i in range(SHAPE["num_hidden_layers"]):
        layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        tensors[f"{attention}o_proj.weight"] = normal(width, width)
        if kind == "spread":
            tensors |= {f"{attention}q_proj.weight": normal(width, width)}
            tensors |= {f"{attention}{x}_proj.weight": normal(width // 2, width) for x in "kv"}
            tensors |= {f"{layer}mlp.{x}_proj.weight": normal(inner, width) for x in ("gate", "up")}
            tensors |= {f"{layer}mlp.down_proj.weight": normal(width, inner)}
            tensors |= {f"{layer}{x}_layernorm.weight": torch.ones(width) for x in ("input", "post_attention")}
        else:
            tensors |= {f"{attention}W_pack.weight": normal(3 * width, width)}
            tensors |= {f"{layer}up_proj.weight": normal(inner, width), f"{layer}up_proj.bias": normal(inner)}
            tensors |= {f"{layer}down_proj.weight": normal(width, inner), f"{layer}down_proj.bias": normal(width)}
            for x in ("norm", "after"):
                tensors |= {f"{layer}{x}.weight": torch.ones(width), f"{layer}{x}.bias": torch.zeros(width)}
    tensors["model.norm.weight"] = torch.ones(width)
    if kind == "alone":
        tensors["model.norm.bias"] = torch.zeros(width)
    return tensors

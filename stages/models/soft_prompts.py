"""Learn input vectors: prompt tuning (Lester 2021) and P-tuning (Liu 2021).

What is learned are the embeddings of n tokens that the chat template begins with. `base` adds the
tokens, their rows and the template (`add_soft_prompt`), so that every row of every stage has them
and every published folder is an ordinary model. While a stage trains, `SoftEmbedding` stands in for
the embedding and the rest of the model is frozen; `merge_soft_prompt` writes the vectors into its
rows.

These tokens are read and never answered. Their logits are left out of each softmax
(`without_soft_prompt`): in losses, ratios and samples here, and by `suppress_tokens` of the
published generation_config.json in transformers. So a head that is tied to the embedding gives them
no probability either.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.conversations import encode_conversations
from data.templates import has_own_method
from pipeline.errors import UserError
from stages.models.control_tokens import control_ids, control_ids_of
from stages.models.head import EXCLUDED
from stages.models.tokens import add_rows

SOFT_METHODS = ("prompt_tuning", "p_tuning")
COUNT = 20
"""Tokens of a soft prompt, unless the settings say otherwise."""
IDS = "soft_prompt_ids"
"""The entry of a model's config that names the tokens."""


@dataclass(frozen=True)
class SoftPrompt:
    """Say what a soft prompt starts as, and what computes it while it trains."""

    method: str
    """"prompt_tuning" or "p_tuning"."""
    count: int = COUNT
    """Its tokens."""
    init: str = "sample_vocab"
    """What its vectors start as: "text", "sample_vocab" or "random"."""
    init_text: str | None = None
    """The text whose embeddings it starts as, for "text"."""
    encoder: str = "mlp"
    """What computes the vectors of P-tuning: "mlp" or "lstm"."""
    encoder_hidden_size: int | None = None
    """Width of the encoder; None: that of the model."""


class SoftEmbedding(nn.Module):
    """An embedding, (…) → (…, d), in which consecutive ids have vectors that train.

    The vectors of prompt tuning are parameters. Those of P-tuning are the embedding's own rows plus
    the output of a small network, which is 0 at the start: so each stage starts from what the one
    before has published, and after training only the sum is kept."""

    def __init__(self, base_layer: nn.Embedding, ids: Sequence[int], encoder: nn.Module | None):
        super().__init__()
        self.base_layer = base_layer
        self.first, self.count = ids[0], len(ids)
        self.scale = scale_of(base_layer, self.first)
        self.soft_encoder = encoder
        if encoder is None:
            self.soft_rows = nn.Parameter(self._rows().clone())

    @property
    def weight(self) -> nn.Parameter:
        """The embedding's weight, (V, d), without what has been learned."""
        return self.base_layer.weight

    def _rows(self) -> Tensor:
        """Return the rows (n, d) that training began with."""
        return self.base_layer.weight.detach()[self.first : self.first + self.count]

    def vectors(self) -> Tensor:
        """Return the vectors (n, d) in float32, also under autocast: they are what is published."""
        if self.soft_encoder is None:
            return self.soft_rows
        rows = self._rows()
        with torch.autocast(rows.device.type, enabled=False):
            index = torch.arange(self.count, device=rows.device).unsqueeze(0)
            return rows + self.soft_encoder(index).squeeze(0)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings of ids."""
        found = self.base_layer(ids)
        place = ids - self.first
        is_soft = (place >= 0) & (place < self.count)
        soft = F.embedding(place.clamp(0, self.count - 1), self.vectors()) * self.scale
        return torch.where(is_soft.unsqueeze(-1), soft.to(found.dtype), found)

    def get_base_layer(self) -> nn.Embedding:
        """Return the plain embedding, as peft's layers do."""
        return self.base_layer

    @torch.no_grad()
    def merge(self) -> None:
        """Write the vectors into the embedding, whose memory other models may share."""
        weight = self.base_layer.weight
        merged = weight.data.clone()
        merged[self.first : self.first + self.count] = self.vectors().to(merged)
        weight.data = merged


@torch.no_grad()
def scale_of(embedding: nn.Embedding, index: int) -> float:
    """Return what an embedding multiplies its rows by (Gemma: the square root of the width).

    Args:
        embedding: The embedding.
        index: Id of the row to try.

    Raises:
        UserError: It does something else to its rows.
    """
    row = embedding.weight[index]
    if row.is_meta or not row.any():
        return 1.0
    found = embedding(torch.tensor([index], device=row.device))[0]
    if torch.equal(found, row):
        return 1.0
    scale = float(found.norm() / row.norm())
    if found.shape != row.shape or not torch.allclose(found, row * scale, rtol=1e-4, atol=1e-6):
        raise UserError(
            f"model.peft.method: a {type(embedding).__name__} does not return its rows as they are, so no row can be "
            f"learned as an input vector; use lora"
        )
    return scale


# -- a model that has a soft prompt --------------------------------------------------------------


def soft_prompt_ids(model: nn.Module) -> list[int]:
    """Return the ids of a model's soft prompt, in order; [] if it has none."""
    return list(getattr(model.config, IDS, None) or [])


def soft_prompt_of(folder: Path) -> list[int]:
    """Return the ids of the soft prompt of a published model; [] if it has none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return list(config.get(IDS) or [])


def unanswered_ids(model: nn.Module) -> list[int]:
    """Return the ids that a model never answers with: its soft prompt and its control tokens."""
    return soft_prompt_ids(model) + control_ids(model)


def unanswered_ids_of(folder: Path) -> list[int]:
    """Return the ids that a published model never answers with."""
    return soft_prompt_of(folder) + control_ids_of(folder)


def excluded_ids(model: nn.Module, device: Any) -> Tensor | None:
    """Return the ids (n,) that a model never answers with; None if there are none.

    Args:
        model: A causal language model.
        device: Device of the result.
    """
    ids = unanswered_ids(model)
    return torch.tensor(ids, device=device) if ids else None


def without_soft_prompt(model: nn.Module, logits: Tensor) -> Tensor:
    """Return logits (…, V) that give the tokens of its soft prompt, and control tokens, no
    probability."""
    ids = excluded_ids(model, logits.device)
    return logits if ids is None else logits.index_fill(-1, ids, EXCLUDED)


def after_soft_prompt(model: nn.Module, ids: Tensor) -> tuple[Tensor, int]:
    """Put the soft prompt before rows of plain text, which no template begins.

    Args:
        model: The model.
        ids: (N, T).

    Returns:
        (N, n + T), and n.

    Raises:
        UserError: The model's context has no room for both.
    """
    prompt = torch.tensor(soft_prompt_ids(model), dtype=ids.dtype, device=ids.device)
    if not len(prompt):
        return ids, 0
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(prompt) + ids.shape[1] > context:
        raise UserError(
            f"model.peft.num_virtual_tokens: rows of {ids.shape[1] + 1} tokens of documents are read after the soft "
            f"prompt of {len(prompt)}, and the context has {context} tokens; lower ppo.ptx_length, or "
            f"evaluate.perplexity_length"
        )
    return torch.cat([prompt.expand(len(ids), -1), ids], dim=1), len(prompt)


# -- training it ---------------------------------------------------------------------------------


def train_soft_prompt(model: nn.Module, soft: SoftPrompt, seed: int, head: Sequence[nn.Parameter] = ()) -> None:
    """Let the vectors of a model's soft prompt train, and nothing else but a scalar head.

    Args:
        model: A transformers model that has a soft prompt; changed.
        soft: What computes the vectors.
        seed: Seed of the encoder's weights.
        head: Parameters of the scalar head of a reward or value model.

    Raises:
        UserError: The model has no soft prompt of this length.
    """
    ids = soft_prompt_ids(model)
    if len(ids) != soft.count:
        has = f"one of {len(ids)} tokens" if ids else "none"
        raise UserError(
            f"model.peft.method: {soft.method} trains a soft prompt of {soft.count} tokens, and the model has {has}; "
            f"`base` adds it where the section model.peft asks for it"
        )
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or ids != list(range(ids[0], ids[0] + len(ids))):
        raise UserError(
            f"model.peft.method: the embedding of this {model.config.model_type} model is a "
            f"{type(embedding).__name__}, in which {soft.method} cannot train rows; use lora"
        )
    model.requires_grad_(False)
    encoder = None
    if soft.method == "p_tuning":
        encoder = prompt_encoder(soft, embedding.weight.shape[1], seed)
    name = next(name for name, module in model.named_modules() if module is embedding)
    model.set_submodule(name, SoftEmbedding(embedding, ids, encoder))
    for p in head:
        p.requires_grad_(True)


def prompt_encoder(soft: SoftPrompt, width: int, seed: int) -> nn.Module:
    """Return peft's encoder of P-tuning, whose output is 0 until it is trained.

    Args:
        soft: Its kind and size.
        width: Width d of an input vector.
        seed: Seed of its weights.
    """
    from peft import PromptEncoder, PromptEncoderConfig

    torch.manual_seed(seed)
    encoder = PromptEncoder(
        PromptEncoderConfig(
            num_virtual_tokens=soft.count,
            token_dim=width,
            num_transformer_submodules=1,
            encoder_reparameterization_type=soft.encoder.upper(),
            encoder_hidden_size=soft.encoder_hidden_size or width,
        )
    )
    last = encoder.mlp_head[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return encoder


def trains_soft_prompt(model: nn.Module) -> bool:
    """Return whether a transformers model's embedding is a `SoftEmbedding`."""
    return any(isinstance(module, SoftEmbedding) for module in model.modules())


def merge_soft_prompt(model: nn.Module) -> nn.Module:
    """Return a transformers model with what was learned in its own embedding; it is changed."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SoftEmbedding):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    return model


def assume_soft_prompt(config: Any, soft: SoftPrompt | None) -> None:
    """Let a configuration say that its last ids are a soft prompt, to compute shapes only.

    Args:
        config: Changed.
        soft: The soft prompt; None: nothing is changed.
    """
    if soft is not None:
        size = config.get_text_config().vocab_size
        setattr(config, IDS, list(range(size - soft.count, size)))


# -- adding it -----------------------------------------------------------------------------------


def add_soft_prompt(model: nn.Module, tokenizer: Any, soft: SoftPrompt, seed: int) -> str | None:
    """Give a model and its tokenizer a soft prompt, with which the chat template then begins.

    Args:
        model: A causal language model; changed.
        tokenizer: Its tokenizer with its final chat template; changed.
        soft: Its length, and what it starts as.
        seed: Seed of the start.

    Returns:
        A line about what was added; None if the model has a soft prompt of this length already,
        which training then continues.

    Raises:
        UserError: The model or its tokenizer cannot have one, or has one of another length.
    """
    have = soft_prompt_ids(model)
    if len(have) == soft.count:
        return None
    if have:
        raise UserError(
            f"model.peft.num_virtual_tokens: {soft.count}, and the model of model.name_or_path has a soft prompt of "
            f"{len(have)} tokens; use {len(have)}, or a model without one"
        )
    if has_own_method(tokenizer):
        raise UserError(
            f"model.peft.method: {soft.method} begins the chat template with new tokens, and this tokenizer writes "
            f"messages with code of its own; use lora"
        )
    from tokenizers import AddedToken

    table, known = model.get_input_embeddings().weight.detach(), tokenizer.get_vocab().values()
    ordinary = sorted(i for i in {*known} - {*tokenizer.added_tokens_decoder} if i < len(table))
    start = table[start_ids(tokenizer, soft, ordinary, seed)]
    if soft.init == "random":
        start = random_rows(table[ordinary], soft.count, seed)
    names = [f"<|soft_prompt_{i}|>" for i in range(soft.count)]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken(name, special=True, normalized=False) for name in names]},
        replace_extra_special_tokens=False,
    )
    tokenizer.chat_template = "".join(names) + tokenizer.get_chat_template()
    ids = list(tokenizer.convert_tokens_to_ids(names))
    refuse_unread(tokenizer, ids, soft.method)
    try:
        add_rows(model, tokenizer)
    except UserError as problem:
        raise UserError(
            f"model.peft.method: {soft.method} gives the model {soft.count} new tokens, and it cannot have them "
            f"({str(problem).partition(': ')[2].partition(';')[0]}); use lora"
        ) from problem
    write_start(model, ids, start, ordinary)
    setattr(model.config, IDS, ids)
    what = {"text": "a text", "sample_vocab": "random tokens", "random": "random vectors"}[soft.init]
    return f"its chat template begins with a soft prompt of {soft.count} tokens, which starts as {what}"


def start_ids(tokenizer: Any, soft: SoftPrompt, ordinary: list[int], seed: int) -> list[int]:
    """Return the tokens whose embeddings a soft prompt starts as.

    Args:
        tokenizer: The tokenizer.
        soft: Its length, and what it starts as. A text that is shorter than the prompt is repeated.
        ordinary: Tokens to draw from, for another start than a text.
        seed: Seed of the draw.

    Raises:
        UserError: The text has no tokens.
    """
    if soft.init != "text":
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(ordinary), (soft.count,), generator=generator)
        return [ordinary[i] for i in drawn.tolist()]
    ids = tokenizer(soft.init_text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if not ids:
        raise UserError("model.peft.prompt_tuning_init_text: has no tokens; write a sentence, or leave it out")
    return [ids[i % len(ids)] for i in range(soft.count)]


@torch.no_grad()
def write_start(model: nn.Module, ids: list[int], start: Tensor, ordinary: list[int]) -> None:
    """Write the rows of a soft prompt's tokens.

    Args:
        model: A causal language model with a row for each id; changed.
        ids: The tokens.
        start: Their input vectors (n, d).
        ordinary: Tokens with rows that pretraining has seen.
    """
    weight, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    weight[ids] = start
    if head is not None and head.weight is not weight:  # an average token is rare, whoever reads these logits
        head.weight[ids] = head.weight[ordinary].mean(0)


@torch.no_grad()
def random_rows(table: Tensor, count: int, seed: int) -> Tensor:
    """Return random vectors (count, d) with the mean and the spread of a table's rows (V, d)."""
    noise = torch.randn(count, table.shape[1], generator=torch.Generator().manual_seed(seed))
    return table.mean(0) + table.std(0) * noise.to(table)


def refuse_unread(tokenizer: Any, ids: list[int], method: str) -> None:
    """Refuse a tokenizer whose rows do not begin with the soft prompt, once.

    Args:
        tokenizer: With the new tokens, and the template that begins with them.
        ids: Ids of the soft prompt.
        method: For the error line.

    Raises:
        UserError: They do not.
    """
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = encode_conversations(tokenizer, [[asked], [asked, said, asked]], add_generation_prompt=True)
    for row in rows:
        if isinstance(row, Exception) or row[: len(ids)] != ids or {*row[len(ids) :]} & {*ids}:
            raise UserError(
                f"model.peft.method: {method} begins each prompt with {len(ids)} new tokens, and this tokenizer does "
                f"not write them as one token each; use lora"
            )

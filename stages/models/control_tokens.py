"""Tell a policy how good its answer is to be, by a token (Korbak 2023; Zhang 2023; Lu 2022).

`model.control_tokens` names the tokens, from worst to best. `base` adds them, and the generation
prompt of the chat template ends with the best one: so every stage, chat and plain transformers ask
for good answers, and every published folder is an ordinary model. `sft.conditional` puts the
others there in training, where an answer was worse.

The tokens are read and never answered, as those of a soft prompt (`soft_prompts.py`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from data.conversations import encode_conversations
from pipeline.errors import UserError
from stages.models.tokens import add_rows

CONTROL_IDS = "control_token_ids"
"""The entry of a model's config that names the tokens, from worst to best."""


def control_ids(model: nn.Module) -> list[int]:
    """Return the ids of a model's control tokens, from worst to best; [] if it has none."""
    return list(getattr(model.config, CONTROL_IDS, None) or [])


def control_ids_of(folder: Path) -> list[int]:
    """Return the ids of the control tokens of a published model; [] if it has none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return list(config.get(CONTROL_IDS) or [])


def add_control_tokens(model: nn.Module, tokenizer: Any, names: Sequence[str]) -> list[int]:
    """Give a model and its tokenizer control tokens, with the best of which each prompt then ends.

    Args:
        model: A causal language model; changed.
        tokenizer: Its tokenizer with its chat template; changed.
        names: The tokens, from worst to best.

    Returns:
        Their ids; [] if the model has these control tokens already.

    Raises:
        UserError: The model or its tokenizer cannot have them, or has others.
    """
    have = control_ids(model)
    if have:
        known = tokenizer.convert_ids_to_tokens(have)
        if known == list(names):
            return []
        raise UserError(
            f"model.control_tokens: the model of model.name_or_path has {', '.join(known)}; name these, or use a model "
            f"without control tokens"
        )
    if taken := [name for name in names if name in tokenizer.get_vocab()]:
        raise UserError(f"model.control_tokens: {taken[0]!r} is a token of the model already; choose another name")
    from tokenizers import AddedToken

    tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken(name, special=True, normalized=False) for name in names]},
        replace_extra_special_tokens=False,
    )
    # Jinja drops one newline at the end of a template, which is no end any more.
    template = tokenizer.get_chat_template().removesuffix("\n")
    tokenizer.chat_template = f"{template}{{% if add_generation_prompt %}}{names[-1]}{{% endif %}}"
    ids = list(tokenizer.convert_tokens_to_ids(list(names)))
    refuse_unread(tokenizer, ids)
    try:
        add_rows(model, tokenizer)
    except UserError as problem:
        what = str(problem).partition(": ")[2].partition(";")[0]
        raise UserError(f"model.control_tokens: {what}; use another model") from problem
    setattr(model.config, CONTROL_IDS, ids)
    return ids


def refuse_unread(tokenizer: Any, ids: list[int]) -> None:
    """Refuse a tokenizer whose prompts do not end with the best control token, once.

    Args:
        tokenizer: With the new tokens, and the template that ends with the best one.
        ids: Ids of the control tokens, from worst to best.

    Raises:
        UserError: They do not.
    """
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for row in encode_conversations(tokenizer, [[asked], [asked, said, asked]], add_generation_prompt=True):
        if isinstance(row, Exception) or row[-1] != ids[-1] or {*row[:-1]} & {*ids}:
            raise UserError(
                "model.control_tokens: prompts of this tokenizer do not end with such a token; use a model whose "
                "tokenizer renders its chat template with Jinja"
            )

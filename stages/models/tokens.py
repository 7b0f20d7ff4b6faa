"""Settle the tokenizer of a pretrained model for all stages, and say what was changed.

The stages need a chat template that does not change, a token that ends a turn, one that ends a
document, padding, and a row of the model for every token.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import nn

from data.agreement import probe, remedy
from data.conversations import end_of_turn, render
from data.documents import DOCUMENT_END, DOCUMENT_ENDS, document_end
from data.template_text import MOMENTS, asks_for_the_day, at_moment, own_variables, unread_variables, with_variables
from data.templates import is_foreign
from pipeline.errors import UserError
from stages.models.remote_code import is_remote

PADS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")  # usual names, which no text contains
NEW_PAD = "<|pad|>"
CONTROL_END = re.compile(r"\{% if add_generation_prompt %\}[^{}]+\{% endif %\}$")
"""What `add_control_tokens` ends a chat template with."""


@dataclass(frozen=True)
class Settled:
    """Record what `settle_tokens` changed."""

    lines: list[str] = field(default_factory=list)
    """What to tell the user."""
    new_tokens: list[int] = field(default_factory=list)
    """Ids of tokens whose rows in the model are random, except padding's."""
    stopped: datetime | None = None
    """The moment that the template's clock is fixed at; None if it has no clock."""


def settle_tokens(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    *,
    template: str | None = None,
    variables: Mapping[str, object] | None = None,
    moment: datetime,
) -> Settled:
    """Make a pretrained model and its tokenizer ready for all stages; both are changed.

    Args:
        model: A causal language model, as loaded.
        tokenizer: Its tokenizer, as loaded.
        name: What the model is called in errors.
        template: Text of a chat template in place of the tokenizer's own.
        variables: The template's variables to set for good.
        moment: Date and time that the template writes from now on, if it writes any.

    Raises:
        UserError: There is no template, or one that fails, or no end token.
    """
    where = "model.name_or_path" if template is None else "model.chat_template"
    lines, stopped = settle_template(tokenizer, name, template, variables or {}, moment, where)
    given = tokenizer.eos_token
    end_turns_with_eos(tokenizer, where)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name_or_path: the tokenizer of {name!r} names no end token, and its chat template writes none "
            f"after an answer; name one as eos_token in its tokenizer_config.json"
        )
    if given != tokenizer.eos_token:
        was = "and its tokenizer names no end token" if given is None else f"not with its tokenizer's {given}"
        lines.append(f"its chat template ends turns with {tokenizer.eos_token}, {was}: that is EOS from now on")
    ends = settle_document_end(tokenizer, given, end_ids(model), model.get_input_embeddings().weight.shape[0])
    if ends != tokenizer.eos_token:
        lines.append(f"documents end with {ends}, as in pretraining; turns with {tokenizer.eos_token}")
    padded = give_pad_token(tokenizer)
    if padded is not None:
        lines.append(f"its tokenizer has no pad token apart from its end token; {padded}")
    new = add_rows(model, tokenizer)
    if new:
        named = ", ".join(new[:8]) + ", \u2026" * (len(new) > 8)
        rows = f"{len(new)} row{'s' * (len(new) > 1)}"
        lines.append(f"the model had no row for {named}: {rows} added, with random weights")
    lines += agreement_lines(without_control_token(tokenizer, model), variables or {})
    ids = tokenizer.convert_tokens_to_ids(new)
    return Settled(lines, sorted(i for i in ids if i != tokenizer.pad_token_id), moment if stopped else None)


def settle_template(
    tokenizer: Any, name: str, template: str | None, variables: Mapping[str, object], moment: datetime, where: str
) -> tuple[list[str], bool]:
    """Give the tokenizer its final chat template.

    Arguments are those of `settle_tokens`, with `where`: the setting that names the template.

    Returns:
        Lines about what was changed, and whether the template's clock was stopped.
    """
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.chat_template is None:
        raise UserError(
            f"model.name_or_path: the tokenizer of {name!r} has no chat template; choose an instruct or chat variant, "
            f"or give a template as model.chat_template: FILE"
        )
    if not is_foreign(tokenizer, trusted=""):  # its own code renders messages
        if template is not None or variables:
            key = "chat_template" if template is not None else "chat_template_kwargs"
            raise UserError(
                f"model.{key}: the tokenizer of {name!r} writes messages with code of its own, which does not use "
                f"this setting; leave it out"
            )
        return [], False
    try:
        text = tokenizer.get_chat_template()
    except ValueError as problem:
        raise UserError(
            f"model.name_or_path: the tokenizer of {name!r} has several chat templates and none named default; give "
            f"one as model.chat_template: FILE"
        ) from problem
    lines, unread = [], unread_variables(text, variables)
    if unread:
        asked = f" (it asks for {', '.join(own_variables(text))})" if own_variables(text) else ""
        what = "which model.chat_template_kwargs sets: no effect"
        lines.append(f"its chat template reads no {' or '.join(unread)}{asked}, {what}")
        variables = {variable: value for variable, value in variables.items() if variable not in unread}
    text = with_variables(text, variables)
    if variables:
        lines.append(f"its chat template is published with {', '.join(variables)} set")
    if stopped := writes_the_day(tokenizer, text):
        stays = "in this experiment that stays"
        text = at_moment(text, moment)
        lines.append(f"its chat template writes today's date or time; {stays} {moment.day} {moment:%b %Y, %H:%M}")
    if variables or text != tokenizer.get_chat_template():
        tokenizer.chat_template = text
    return lines, stopped


def writes_the_day(tokenizer: Any, template: str) -> bool:
    """Return whether a chat template writes something else at another time."""
    if not asks_for_the_day(template):
        return False
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "b"}
    said = [user, {"role": "assistant", "content": "c"}, user]
    conversations = [[user], said, [system, user], [system, *said]]
    kept, texts = tokenizer.chat_template, []
    try:
        for moment in MOMENTS:
            tokenizer.chat_template = at_moment(template, moment)
            found = render(tokenizer, conversations, tokenize=[False] * 4, add_generation_prompt=True)
            texts.append([str(text) for text in found])
    except Exception:  # a template may raise anything; `end_turns_with_eos` reports it
        return True
    finally:
        tokenizer.chat_template = kept
    return texts[0] != texts[1]


def end_turns_with_eos(tokenizer: Any, where: str = "model.name_or_path") -> None:
    """Make EOS the token that the chat template writes after an assistant's turn.

    It is then taught, ends sampling, and ends earlier turns too. Some models end turns with another
    token than their tokenizer's EOS (Gemma: <end_of_turn>).

    Args:
        tokenizer: Changed.
        where: The setting that names the template, for the error line.

    Raises:
        UserError: The template fails.
    """
    try:
        token = end_of_turn(tokenizer)
    except Exception as problem:  # a template may raise anything
        remedy = "" if where == "model.chat_template" else "; give one that works as model.chat_template: FILE"
        what = f"its chat template fails on one question and answer ({problem}){remedy}"
        raise UserError(f"{where}: {what}") from None
    if token is not None and token != tokenizer.eos_token:
        tokenizer.eos_token = token


def give_pad_token(tokenizer: Any) -> str | None:
    """Give the tokenizer a pad token that is not EOS, and return what was done, or None.

    Anyone can then tell the last real token of a row from padding.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return None
    known = tokenizer.get_vocab()
    spare = [token for token in PADS if token in known and token != tokenizer.eos_token]
    if spare:
        tokenizer.pad_token = spare[0]
        return f"{spare[0]} serves as one"
    tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    return f"{NEW_PAD} is added"


def end_ids(model: nn.Module) -> list[int]:
    """Return the ids that a model's configurations name as ends, in order."""
    found: list[int] = []
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        ids = getattr(config, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [ids]
    return [i for i in dict.fromkeys(found) if isinstance(i, int)]


def settle_document_end(tokenizer: Any, given: str | None, ends: list[int], rows: int) -> str:
    """Find the token that ended a document in pretraining, and record it in the tokenizer.

    It is recorded only if `document_end` would find another one.

    Args:
        tokenizer: Its EOS ends turns.
        given: Its original EOS. If the template ends turns with another token, this one ended
            documents.
        ends: Ids that the model's configurations name as ends. If EOS ends turns only, as
            <|eot_id|> does, documents ended with a special token among these that has a usual name;
            otherwise with the vocabulary's (`document_end`); otherwise with another of these.
        rows: Rows of the original model: a token without one ended nothing in pretraining.

    Returns:
        The token.
    """
    eos = tokenizer.eos_token
    special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    others = [special[i] for i in ends if i in special and special[i] != eos]
    usual = tokenizer.convert_ids_to_tokens(document_end(tokenizer))
    if given is not None and given != eos:
        end = given
    elif eos in DOCUMENT_ENDS:
        end = eos
    else:
        end = next((token for token in others if token in DOCUMENT_ENDS), usual)
        end = others[0] if end == eos and others else end
    if tokenizer.convert_tokens_to_ids(end) >= rows:
        end = eos
    if end != usual or (given is not None and given != eos):
        tokenizer.init_kwargs[DOCUMENT_END] = end
    return end


def add_rows(model: nn.Module, tokenizer: Any) -> list[str]:
    """Give the model a row, and its head an output, for each token of the tokenizer.

    Returns:
        The tokens that had none, ordered by id.

    Raises:
        UserError: The model's class cannot be resized.
    """
    known = tokenizer.get_vocab()
    before, size = model.get_input_embeddings().weight.shape[0], 1 + max(known.values())
    if size <= before:
        return []
    new = [token for token, i in sorted(known.items(), key=lambda item: item[1]) if i >= before]
    torch.manual_seed(0)  # the new rows are random
    model.resize_token_embeddings(size)
    model.eval()
    if (table := unresized_table(model, before, size)) is not None:
        tokens = ", ".join(new[:8]) + ", \u2026" * (len(new) > 8)
        raise UserError(
            f"model.name_or_path: the model has no row for {tokens}, and a {type(model).__name__} cannot be given one "
            f"({table} also has a row for each token); let its tokenizer name tokens that the model has, for example "
            f"as pad_token"
        )
    return new


def unresized_table(model: nn.Module, before: int, after: int) -> str | None:
    """Return the name of a tensor that transformers did not resize, or None.

    Args:
        model: A model with resized embeddings; of one with its own code, nothing is found.
        before: Rows before resizing.
        after: Rows that its configuration now asks for.
    """
    if is_remote(model):
        return None
    with torch.device("meta"):
        asked = type(model)._from_config(copy.deepcopy(model.config)).state_dict()
    pairs = ((name, x.shape, asked[name].shape) for name, x in model.state_dict().items() if name in asked)
    for name, had, wants in pairs:
        # it has as many rows as before where the configuration asks for the new number
        if (before, after) in zip(had, wants, strict=False):
            return name
    return None


def without_control_token(tokenizer: Any, model: nn.Module) -> Any:
    """Return the tokenizer of a model with control tokens with a template that asks for none.

    Rows have one before each answer on purpose (`control_tokens.py`), and no conversation has.

    Args:
        tokenizer: The tokenizer; returned itself where the model has no control tokens.
        model: The model.
    """
    if not getattr(model.config, "control_token_ids", None):
        return tokenizer
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = CONTROL_END.sub("", tokenizer.get_chat_template())
    return plain


def agreement_lines(tokenizer: Any, variables: Mapping[str, object]) -> list[str]:
    """Return a line about where rows differ from what the chat template writes; [] if nowhere.

    Args:
        tokenizer: Has the chat template.
        variables: Of the template, as set.
    """
    found = probe(tokenizer)
    if not found:
        return []
    if "one turn" not in found and "several turns" not in found:
        named = f"rows with {' or '.join(found)} are not what its chat template writes"
        return [f"{named}: {next(iter(found.values())).line()}; `rlhf data check FILE -c CONFIG` finds them in data"]
    first, opens = next(iter(found.values())), next((d.opens for d in found.values() if d.opens), None)
    line = f"rows are not what its chat template writes ({', '.join(found)}): {first.line()}"
    if opens:
        line += f"; its generation prompt opens {opens}, and an answer that does not close it is taught as a thought"
    return [f"{line}; {remedy(tokenizer, list(variables))}"]

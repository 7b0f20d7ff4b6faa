"""Make the base model: train a tokenizer and a small model on text, or convert a pretrained one.

loss = − mean log π(token | before)     over documents, each ended by EOS, packed end to end
"""

from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.documents import pack_documents
from data.text_rows import DocumentRows
from data.tokenizer import train_tokenizer
from pipeline.config.sections import local_folder
from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.stage import Source, StageRun
from stages.models.adapters import refuse_untrained
from stages.models.control_tokens import add_control_tokens
from stages.models.families import REMEDY, WHOLE_ROWS, family_problem
from stages.models.given_adapter import merge_given
from stages.models.loading import code_fails, from_scratch, load_pretrained
from stages.models.publish import given_model, save_model
from stages.models.remote_code import is_remote, scalar_problem, write_scalar_head
from stages.models.soft_prompts import add_soft_prompt
from stages.models.tokens import Settled, settle_tokens
from stages.rollouts.trial import CACHE, reading_problem
from stages.settings.base import BaseSettings, adapter_folder, template_file
from stages.settings.experiment import Experiment
from stages.settings.peft import peft_of
from stages.settings.training import total_steps
from stages.shared.cards import ModelCard, card_text
from stages.shared.inputs import split_documents
from stages.shared.provenance import Provenance, provenance_of
from stages.shared.runtime import Runtime, adapter_settings, runtime_of
from stages.shared.show import parameter_count
from stages.training.session import Session, session_of
from stages.training.text import Optimization, TextTask, train_language_model


def run(ctx: StageRun[BaseSettings, Experiment]) -> dict:
    """Publish model/ with its tokenizer and chat template."""
    session, runtime, provenance = session_of(ctx), runtime_of(ctx), provenance_of(ctx)
    section, is_given = ctx.experiment.model, ctx.experiment.model.name_or_path is not None
    if is_given:
        if not parallel.is_rank_zero():  # rank 0 publishes, and there is no work to share
            return {}
        model, tokenizer, settled = load_given(provenance, runtime)
        ctx.confirm_folders()
        for line in settled.lines:
            session.say(line)
        peft = peft_of(ctx.experiment, "sft")
        refuse_untrained(settled.new_tokens, peft and peft.method, tokenizer)
        check_reading(session, model, section.name_or_path, tokenizer.pad_token_id)
        figures, given_dtype = describe_given(provenance, runtime, model, settled)
    else:
        model, tokenizer, figures = train_from_scratch(
            session, runtime, ctx.config, section, ctx.source("documents"), ctx.experiment.data.validation_fraction
        )
        given_dtype = None
    soft_prompt = adapter_settings(section).soft_prompt
    if soft_prompt is not None and parallel.is_rank_zero():  # which publishes
        line = add_soft_prompt(model, tokenizer, soft_prompt, ctx.seed)
        session.say(line or f"its soft prompt of {soft_prompt.count} tokens is trained on")
    if section.control_tokens is not None and parallel.is_rank_zero():
        if control := add_control_tokens(model, tokenizer, section.control_tokens):
            # sft trains their rows even where it trains an adapter
            figures = {**figures, "new_tokens": [*figures.get("new_tokens", []), *control]}
            peft = peft_of(ctx.experiment, "sft")
            refuse_untrained(control, peft and peft.method, tokenizer)
        session.say(f"its prompts end with {section.control_tokens[-1]}, which asks for a good answer")
    figures = {**figures, "parameters": sum(p.numel() for p in model.parameters()), **session.notes.figures}
    text = card_text(provenance, ModelCard("a pretrained language model", figures=figures))
    dtype = given_dtype if section.publish_dtype == "as_given" else section.publish_dtype
    save_model(model, tokenizer, ctx.publish / "model", card=text, dtype=dtype)
    if is_given:
        check_reward_model(session, model, section.name_or_path, ctx.publish / "model", "rm" in ctx.wanted)
    return figures


# -- from scratch --------------------------------------------------------------------------------


def train_from_scratch(
    session: Session, runtime: Runtime, config: BaseSettings, section: Any, source: Source, fraction: float
) -> tuple[nn.Module, Any, dict]:
    """Train a tokenizer and a model on documents.

    Args:
        session: The run.
        runtime: How the stage computes.
        config: The stage's settings.
        section: The section `model`: the model's shape and vocabulary.
        source: Where the documents are.
        fraction: Fraction of the documents to hold out.

    Returns:
        The model, the tokenizer and the model's figures.

    Raises:
        UserError: There is too little text.
    """
    train, valid = split_documents(source, fraction, session.notes)
    tokenizer = train_tokenizer((document.text for document in train), section.vocab_size)
    train_rows, held_out_rows = (
        DocumentRows(pack_documents(tokenizer, (one.text for one in documents), length=config.max_length))
        for documents in (train, valid)
    )
    if not train_rows or not held_out_rows:
        problem = f"data.documents: do not fill a training and a held-out row of {config.max_length} tokens"
        raise UserError([f"{problem}; give more text, or lower base.max_length"])
    make = partial(
        from_scratch,
        tokenizer,
        hidden_size=section.hidden_size,
        num_hidden_layers=section.num_hidden_layers,
        num_attention_heads=section.num_attention_heads,
        intermediate_size=section.intermediate_size,
        max_position_embeddings=section.max_position_embeddings,
        attn_implementation=section.attn_implementation,
        seed=session.seed,
    )
    with torch.device("meta"):  # no memory, and no random number is drawn
        size = parameter_count(make())
    steps, tokens = total_steps(config, len(train_rows)), len(train_rows) * config.max_length
    session.say(f"{size} parameters, {len(tokenizer)} token ids, {tokens:,} training tokens, {steps} steps")
    task = TextTask(
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        rows_per_device=config.per_device_train_batch_size,
        accumulation_steps=config.gradient_accumulation_steps,
        group_by_length=False,
    )
    model, figures = train_language_model(
        session,
        runtime,
        make,
        tokenizer,
        task,
        Optimization(config.max_grad_norm, config.weight_decay, config.adam_beta2),
        config.schedule(steps),
        config.selection("loss", higher_is_better=False),
    )
    return model, tokenizer, figures


# -- a pretrained model --------------------------------------------------------------------------


def load_given(provenance: Provenance, runtime: Runtime) -> tuple[nn.Module, Any, Settled]:
    """Load the model of `model.name_or_path` and make its tokenizer ready for all stages.

    Args:
        provenance: The run's settings.
        runtime: How the stage computes.

    Returns:
        The model, the tokenizer, and what was changed in them.
    """
    section = provenance.model
    name, template = section.name_or_path, template_file(section)
    model, tokenizer = load_pretrained(
        str(local_folder(name) or name), revision=provenance.model_revision, **runtime.load_options()
    )
    adapter, line = adapter_folder(section), ""
    if adapter is not None:
        model, line = merge_given(model, adapter, name)
    settled = settle_tokens(
        model,
        tokenizer,
        name,
        template=None if template is None else read_template(template),
        variables=section.chat_template_kwargs,
        moment=datetime.now(),
    )
    if line:
        settled = replace(settled, lines=[line, *settled.lines])
    return model, tokenizer, settled


def describe_given(
    provenance: Provenance, runtime: Runtime, model: nn.Module, settled: Settled
) -> tuple[dict[str, Any], str | None]:
    """Return the figures of a pretrained model, and the dtype that it was given in.

    Args:
        provenance: The run's settings.
        runtime: How the stage computes.
        model: The model.
        settled: What was changed in it and its tokenizer.

    Returns:
        Figures for the manifest; the dtype of the given files, None for float32.
    """
    name = provenance.model.name_or_path
    given = given_model(name, revision=provenance.model_revision, trust_remote_code=runtime.trust_remote_code)
    figures: dict[str, Any] = {"pretrained": name}
    if given.rows is not None:
        rows = model.get_input_embeddings().weight.shape[0]
        # with an adapter merged, later adapters are on this model and not on the one of that name
        figures["same_rows_as_given"] = given.rows == rows and provenance.model.adapter is None
    if settled.new_tokens:
        figures["new_tokens"] = settled.new_tokens  # sft trains their embeddings even where it trains an adapter
    if settled.stopped is not None:
        figures["template_moment"] = settled.stopped.isoformat(timespec="seconds")
    return figures, given.dtype


def check_reading(session: Session, model: nn.Module, name: str, pad_id: int) -> None:
    """Check that a pretrained model gives the same results in every way that the stages use it.

    Where only the family's cache is at fault, the model's config says from here on that samples are
    drawn without it.

    Args:
        session: The run.
        model: The model.
        name: Its name.
        pad_id: Id of the padding.

    Raises:
        UserError: It is not a causal language model, or the results differ.
    """
    problem = reading_problem(model, pad_id)
    if problem and problem.startswith(CACHE) and not is_remote(model):
        cache_problem = problem
        setattr(model.config, WHOLE_ROWS, True)
        problem = reading_problem(model, pad_id)
        if problem is None:
            remedy = "whole rows are read for each token: correct, and slower for long responses"
            session.say(f"{name}: {cache_problem}; {remedy}")
    if problem:
        raise UserError(cannot_be_read(name, model, problem))


def cannot_be_read(name: str, model: nn.Module, problem: str) -> str:
    """Return the error line for a model whose results depend on how it is read.

    Args:
        name: Name of the model.
        model: The model.
        problem: What differs.
    """
    if is_remote(model):
        return code_fails(name, problem)
    kind = f"{type(model).__name__}, transformers {version('transformers')}"
    return f"model.name_or_path: {name}: {problem} ({kind}); {REMEDY}"


def read_template(path: Path) -> str:
    """Return the text of a file with a chat template.

    Raises:
        UserError: It cannot be read as UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"model.chat_template: {path} cannot be read ({problem}); should be a text in UTF-8") from None
    if not text.strip():
        raise UserError(f"model.chat_template: {path} is empty; should be a Jinja chat template")
    return text


def check_reward_model(session: Session, model: nn.Module, name: str, folder: Path, is_wanted: bool) -> None:
    """Check that rm can put a scalar head on a published model.

    The class with the head is the family's, that of the code that the model brings, or one of ours,
    which is then written into the folder. sft and dpo need none.

    Args:
        session: The run.
        model: The model.
        name: Its name.
        folder: The folder that it was published in.
        is_wanted: Whether rm is among the stages that the command runs.

    Raises:
        UserError: There is no such class, and rm is wanted; otherwise a line says so.
    """
    if not is_remote(model):
        problem = family_problem(model)
    elif problem := scalar_problem(model, folder):
        session.say(f"{name}'s code has no usable reward model ({problem}); adding a class to the folder")
        write_scalar_head(model, folder)
        problem = scalar_problem(model, folder)
    if not problem:
        return
    if not is_wanted:
        session.say(f"no reward model can be made of {name} ({problem}): rm and ppo will refuse it")
    elif is_remote(model):
        raise UserError(code_fails(name, f"as a reward model: {problem}"))
    else:
        remedy = "dpo needs none, or take another family"
        raise UserError(f"model.name_or_path: {name}: no reward model can be made ({problem}); {remedy}")

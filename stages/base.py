"""base: pretraining text → tokenizer and a small causal language model; or a pretrained model, converted.

loss = − mean log π(token | before)     over documents, each ended by EOS, packed end to end
"""

from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from data.documents import wrap_documents
from data.tokenizer import train_tokenizer
from pipeline.config.sections import local_folder
from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun
from stages.models.adapters import refuse_untrained
from stages.models.families import REMEDY, WHOLE_ROWS, family_problem
from stages.models.loading import code_fails, from_scratch, load_pretrained, save_model
from stages.models.publish import given_model
from stages.models.remote_code import is_remote, scalar_problem, write_scalar_head
from stages.models.tokens import settle_tokens
from stages.rollouts.trial import CACHE, reading_problem
from stages.settings.base import BaseSettings, template_file
from stages.settings.experiment import Experiment
from stages.settings.training import total_steps
from stages.shared.cards import card
from stages.shared.inputs import split_documents
from stages.shared.runtime import device_of, dtype_of
from stages.shared.show import count
from stages.training.text import train_language_model


def run(ctx: StageRun[BaseSettings, Experiment]) -> dict:
    """→ model/ with tokenizer and chat template."""
    m, c = ctx.experiment.model, ctx.config
    if m.name_or_path is not None:
        if not parallel.is_rank_zero():  # which publishes, and there is nothing to share
            return {}
        model, tokenizer = load_pretrained(
            str(local_folder(m.name_or_path) or m.name_or_path),
            attn_implementation=m.attn_implementation,
            trust_remote_code=ctx.trust_remote_code,
            revision=ctx.model_revision,
        )
        given = given_model(m.name_or_path, revision=ctx.model_revision, trust_remote_code=ctx.trust_remote_code)
        template = template_file(m)
        settled = settle_tokens(
            model,
            tokenizer,
            m.name_or_path,
            template=None if template is None else read_template(template),
            variables=m.chat_template_kwargs,
            moment=datetime.now(),
        )
        ctx.confirm_folders()
        for line in settled.lines:
            ctx.tracker.say(f"base: {line}")
        refuse_untrained(settled.new_tokens, m.peft and m.peft.method, tokenizer)
        figures = {"pretrained": m.name_or_path}
        try_reading(ctx, model, tokenizer.pad_token_id)
        if given.rows is not None:
            figures["same_rows_as_given"] = given.rows == model.get_input_embeddings().weight.shape[0]
        dtype = given.dtype if m.publish_dtype == "as_given" else m.publish_dtype
        if settled.new_tokens:
            figures["new_tokens"] = settled.new_tokens  # sft trains their rows, also where it trains an adapter
        if settled.stopped is not None:
            figures["template_moment"] = settled.stopped.isoformat(timespec="seconds")
    else:
        dtype = None if m.publish_dtype == "as_given" else m.publish_dtype
        train, valid = split_documents(ctx)
        tokenizer = train_tokenizer((document.text for document in train), m.vocab_size)
        rows, held = (
            [{"input_ids": r, "labels": r} for r in wrap_documents(tokenizer, documents, length=c.max_length)]
            for documents in (train, valid)
        )
        if not rows or not held:
            problem = f"data.documents: do not fill a training and a held-out row of {c.max_length} tokens"
            raise UserError([f"{problem}; give more text, or lower base.max_length"])
        start = partial(
            from_scratch,
            tokenizer,
            hidden_size=m.hidden_size,
            num_hidden_layers=m.num_hidden_layers,
            num_attention_heads=m.num_attention_heads,
            intermediate_size=m.intermediate_size,
            max_position_embeddings=m.max_position_embeddings,
            attn_implementation=m.attn_implementation,
            seed=ctx.seed,
        )
        with torch.device("meta"):
            size = count(start())
        steps = total_steps(c, len(rows))
        ctx.tracker.say(
            f"base: {size} parameters, {len(tokenizer)} token ids, "
            f"{len(rows) * c.max_length:,} training tokens, {steps} steps"
        )
        model, figures = train_language_model(
            ctx,
            start,
            tokenizer,
            rows,
            held,
            steps=steps,
            group_by_length=False,
            learning_rate=c.learning_rate,
            lr_scheduler_type=c.lr_scheduler_type,
            warmup_steps=c.warmup_steps,
            per_device_train_batch_size=c.per_device_train_batch_size,
            gradient_accumulation_steps=c.gradient_accumulation_steps,
            max_grad_norm=c.max_grad_norm,
            weight_decay=c.weight_decay,
            adam_beta2=c.adam_beta2,
            keep=c.keep,
            patience=c.patience,
            eval_steps=c.eval_steps,
            device=device_of(ctx.experiment),
            dtype=dtype_of(ctx.experiment),
            gradient_checkpointing=m.gradient_checkpointing,
        )
    figures = {**figures, "parameters": sum(p.numel() for p in model.parameters())}
    text = card(ctx, "a pretrained language model", figures=figures)
    save_model(model, tokenizer, ctx.publish / "model", card=text, dtype=dtype)
    if m.name_or_path is not None:
        check_reward_model(ctx, model)
    return figures


def try_reading(ctx: StageRun, model, pad_id: int) -> None:
    """See to it that a pretrained model is read right in every way that the stages read it.

    Where a family's cache alone is at fault, its configuration says from here on that samples are drawn without it.

    Raises:
        UserError: it is no causal language model, or is read otherwise than the stages read it.
    """
    name, problem = ctx.experiment.model.name_or_path, reading_problem(model, pad_id)
    if problem and problem.startswith(CACHE) and not is_remote(model):
        setattr(model.config, WHOLE_ROWS, True)
        at_fault, problem = problem, reading_problem(model, pad_id)
        if problem is None:
            what = "whole rows are read for each token: right, and slower for long responses"
            ctx.tracker.say(f"base: {name}: {at_fault}; {what}")
    if problem:
        raise UserError(cannot_be_read(name, model, problem))


def cannot_be_read(name: str, model, problem: str) -> str:
    """The line for a model that is read otherwise than the stages read it."""
    if is_remote(model):
        return code_fails(name, problem)
    kind = f"{type(model).__name__}, transformers {version('transformers')}"
    return f"model.name_or_path: {name}: {problem} ({kind}); {REMEDY}"


def read_template(path: Path) -> str:
    """The text of a file with a chat template; UserError where it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"model.chat_template: {path} cannot be read ({problem}); should be a text in UTF-8") from None
    if not text.strip():
        raise UserError(f"model.chat_template: {path} is empty; should be a Jinja chat template")
    return text


def check_reward_model(ctx: StageRun, model) -> None:
    """See to it that rm can put its scalar head on a published model: by the class that its family or its code brings,
    or by one of ours, which for code is written beside it.

    Raises:
        UserError: none serves, and rm is among the stages that were asked for. Otherwise a line says so: sft and dpo
            need none.
    """
    folder, name = ctx.publish / "model", ctx.experiment.model.name_or_path
    if not is_remote(model):
        problem = family_problem(model)
    elif problem := scalar_problem(model, folder):
        ctx.tracker.say(f"base: of {name}'s code no reward model can be made ({problem}); a class is written beside it")
        write_scalar_head(model, folder)
        problem = scalar_problem(model, folder)
    if not problem:
        return
    if "rm" in ctx.wanted:
        remedy = "dpo needs none, or take another family"
        line = f"model.name_or_path: of {name} no reward model can be made ({problem}); {remedy}"
        raise UserError(code_fails(name, f"as a reward model: {problem}") if is_remote(model) else line)
    ctx.tracker.say(f"base: of {name} no reward model can be made ({problem}): rm and ppo will refuse it")

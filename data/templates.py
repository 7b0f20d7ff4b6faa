"""Render chat templates; that of a model from outside runs in a separate process.

A template is a program. The process that runs somebody else's has limits of processor time (for one
row, and for rows on average), of memory, and of the length of the text. One such process serves all
rows.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from data.token_ids import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 2.0
"""Processor time that one conversation may take; a usual template takes a thousandth of that."""
USUAL = 0.02
"""Processor time, in seconds a conversation, that a template may take on average …"""
AT_FIRST = 20.0
"""… once it has taken so many seconds: 100,000 rows then take half an hour, not two days."""
PATIENCE = 300.0
"""Seconds to wait for an answer: the machine may be busy."""
AT_ONCE = 64
"""Conversations that are rendered and tokenized together."""


class TemplateOverrun(TemplateError):
    """Report that a template exceeds a limit; it would exceed it on other rows too."""

    index = 0
    """The index of the conversation, among those that were given together."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict]],
    *,
    trusted: str,
    tokenize: Sequence[bool],
    **options: Any,
) -> Iterator[list[int] | str | TemplateError]:
    """Render each conversation as `apply_chat_template` would, without trusting the template.

    Args:
        tokenizer: The tokenizer with its chat template.
        conversations: Lists of {role, content}.
        trusted: A template of ours, which is rendered in this process. So is the template of a
            tokenizer with a method of its own for it: that is code, and was allowed to run.
        tokenize: For each conversation whether token ids are wanted, or text.
        options: Further options of `apply_chat_template`, plain values.

    Yields:
        Token ids or text, or the TemplateError with which the template refuses the conversation.

    Raises:
        TemplateOverrun: The template takes too much time, memory or text.
    """
    requests = zip(conversations, tokenize, strict=True)
    if has_own_method(tokenizer):
        for conversation, wants_ids in requests:
            only_ids: dict[str, Any] = {"return_dict": False} if wants_ids else {}
            yield _render_here(tokenizer, conversation, tokenize=wants_ids, **only_ids, **options)
        return
    is_theirs = is_foreign(tokenizer, trusted)
    done = 0
    while batch := list(islice(requests, AT_ONCE)):
        some = [conversation for conversation, _ in batch]
        try:
            if is_theirs:
                variables = {**tokenizer.special_tokens_map, **options}
                texts = _worker.render(tokenizer.get_chat_template(), some, variables)
            else:
                texts = _render_all(tokenizer, some, **options)
        except TemplateOverrun as error:
            error.index += done
            raise
        done += len(batch)
        wanted = [
            text for text, (_, wants_ids) in zip(texts, batch, strict=True) if wants_ids and isinstance(text, str)
        ]
        ids = iter(token_ids(tokenizer, wanted, is_plain=False))
        for text, (_, wants_ids) in zip(texts, batch, strict=True):
            yield next(ids) if wants_ids and isinstance(text, str) else text


def _render_here(tokenizer: PreTrainedTokenizerBase, conversation: list[dict], **options: Any) -> Any:
    """Return what `apply_chat_template` makes of a conversation, or the TemplateError it raises."""
    try:
        return tokenizer.apply_chat_template(conversation, **options)
    except TemplateError as refusal:
        return refusal


def _render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], **options: Any
) -> list[str | TemplateError]:
    """Return the text of each conversation as of `_render_here`, in one call if none is refused."""
    try:
        return list(tokenizer.apply_chat_template(conversations, tokenize=False, **options))
    except TemplateError:
        return [_render_here(tokenizer, one, tokenize=False, **options) for one in conversations]


def is_foreign(tokenizer: PreTrainedTokenizerBase, trusted: str) -> bool:
    """Return whether a tokenizer renders messages by a template that came from outside.

    Args:
        tokenizer: The tokenizer.
        trusted: The template of ours.
    """
    template = tokenizer.chat_template
    return not has_own_method(tokenizer) and template is not None and template != trusted


def has_own_method(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer has code of its own for messages, in place of a template."""
    from transformers import PreTrainedTokenizerBase

    usual = PreTrainedTokenizerBase.apply_chat_template
    return getattr(type(tokenizer), "apply_chat_template", None) is not usual


@dataclass
class Worker:
    """Run the process that renders: start it when needed, also after a limit has ended it."""

    process: subprocess.Popen | None = None
    """The process, or None before it starts."""
    owner: int = 0
    """The process that started it: a fork of ours must not write to it too."""
    unread: bytes = b""
    """What it has written and is not parsed yet."""
    spent: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Template → (conversations, seconds of processor time) so far."""

    def render(self, template: str, conversations: list[list[dict]], options: dict) -> list[str | TemplateError]:
        """Return the text or the refusal of each conversation.

        Args:
            template: The text of the chat template.
            conversations: Lists of {role, content}.
            options: Further variables of the template.

        Raises:
            TemplateOverrun: One conversation, or all of them, take too much.
        """
        self.refuse_slow(template)
        process = self.process
        if process is None or self.owner != os.getpid() or process.poll() is not None:
            process = self.start()
        request = {"template": template, "conversations": conversations, "options": options}
        answers: list[str | TemplateError] = []
        try:
            assert process.stdin is not None
            # The worker reads the whole request before it answers, so this cannot block both.
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            while len(answers) < len(conversations):
                answer = self.answer()
                if answer is None:
                    self.count(template, SECONDS)
                    raise TemplateOverrun(f"it takes more than {SECONDS:g} s of processor time")
                if "too_much" in answer:
                    raise TemplateOverrun(answer["too_much"])
                self.count(template, answer["seconds"])
                answers.append(answer["text"] if "text" in answer else TemplateError(answer["refused"]))
        except TemplateOverrun as error:
            self.end()
            error.index = len(answers)
            raise
        except BaseException as error:
            # An answer that is still to come must not be taken for the next request's.
            self.end()
            if isinstance(error, BrokenPipeError):
                raise RuntimeError("the process that renders chat templates was ended; run again") from error
            raise
        return answers

    def count(self, template: str, seconds: float) -> None:
        """Count a conversation and its processor time; TemplateOverrun as of `refuse_slow`."""
        rows, before = self.spent.get(template, (0, 0.0))
        self.spent[template] = rows + 1, before + seconds
        self.refuse_slow(template)

    def refuse_slow(self, template: str) -> None:
        """Raise TemplateOverrun if a template has been too slow for a file of rows."""
        rows, total = self.spent.get(template, (0, 0.0))
        if total > AT_FIRST and total > USUAL * rows:
            mean = f"{total / rows:.2g} s of processor time a conversation"
            raise TemplateOverrun(f"it takes {mean} on average; a usual one takes a thousandth of a second")

    def start(self) -> subprocess.Popen:
        """Start the process, and return it once it answers."""
        program = Path(__file__).with_name("template_worker.py")
        process = self.process = subprocess.Popen(
            [sys.executable, "-P", str(program), str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
            env=os.environ | {"USE_TORCH": "0", "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self.owner, self.unread = os.getpid(), b""
        atexit.register(self.end)
        if self.answer() is None:
            self.end()
            raise RuntimeError(f"{program} did not start")
        return process

    def answer(self) -> dict | None:
        """Return the next line that the process writes; None if it has ended."""
        assert self.process is not None and self.process.stdout is not None
        while b"\n" not in self.unread:
            if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
                raise TemplateOverrun(f"it takes more than {PATIENCE:.0f} s")
            more = os.read(self.process.stdout.fileno(), 2**20)
            if not more:
                return None
            self.unread += more
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        """End the process, if this process started it."""
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stdin):
                if pipe is not None:
                    pipe.close()


_worker = Worker()

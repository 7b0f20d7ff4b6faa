"""Chat templates → text. A template that comes with a model is somebody else's program: it runs in a process of its
own, under limits of processor time (of a row, and of rows on average), memory and length; one such process serves all
rows."""

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

from jinja2 import TemplateError

SECONDS = 2.0  # of processor time for one conversation; a usual template takes a thousandth of that
USUAL = 0.02  # seconds of processor time a conversation that a template may take on average …
AT_FIRST = 20.0  # … once it has taken so many in all: 100,000 rows are half an hour then, and not two days
PATIENCE = 300.0  # seconds of the clock for an answer: the machine may be busy
AT_ONCE = 64  # conversations that are sent together


class TemplateOverrun(TemplateError):
    """A template that takes more than the limits allow: it is no use to try it on other rows. index: of the
    conversation, among those that were given together."""

    index = 0


def render(
    tokenizer, conversations: Sequence[list[dict]], *, trusted: str, tokenize: Sequence[bool], **options
) -> Iterator[list[int] | str | TemplateError]:
    """Yield what the tokenizer's `apply_chat_template` makes of each conversation, or the TemplateError with which the
    template refuses it; the template is not trusted.

    Args:
        tokenizer: transformers' tokenizer.
        conversations: lists of {role, content}.
        trusted: a template of ours, which is rendered in this process. So is a tokenizer's that has a method of its
            own for it: that is code, and was allowed to run.
        tokenize: of each conversation, whether token ids are wanted, or text.
        options: more of `apply_chat_template`'s options, plain values.

    Raises:
        TemplateOverrun: the template takes too much time, memory or text.
    """
    wanted = zip(conversations, tokenize, strict=True)
    if not is_foreign(tokenizer, trusted):
        for conversation, ids in wanted:
            more = {"return_dict": False} if ids else {}
            try:
                yield tokenizer.apply_chat_template(conversation, tokenize=ids, **more, **options)
            except TemplateError as refusal:
                yield refusal
        return
    template, options = tokenizer.get_chat_template(), {**tokenizer.special_tokens_map, **options}
    done = 0
    while batch := list(islice(wanted, AT_ONCE)):
        try:
            answers = _worker.render(template, [conversation for conversation, _ in batch], options)
        except TemplateOverrun as problem:
            problem.index += done
            raise
        done += len(batch)
        for answer, (_, ids) in zip(answers, batch, strict=True):
            yield tokenizer(answer, add_special_tokens=False)["input_ids"] if ids and type(answer) is str else answer


def is_foreign(tokenizer, trusted: str) -> bool:
    """Return whether the tokenizer renders messages by a template that came from outside."""
    from transformers import PreTrainedTokenizerBase

    usual = PreTrainedTokenizerBase.apply_chat_template
    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is usual and tokenizer.chat_template is not None and tokenizer.chat_template != trusted


@dataclass
class Worker:
    """The process that renders: started when it is needed, and again where a limit has ended it; it ends with us."""

    process: subprocess.Popen | None = None
    owner: int = 0  # the process that started it: a fork must not write to it, too
    unread: bytes = b""
    spent: dict[str, tuple[int, float]] = field(default_factory=dict)  # template → conversations, seconds so far

    def render(self, template: str, conversations: list[list[dict]], options: dict) -> list[str | TemplateError]:
        """Return a text or a refusal for each conversation; TemplateOverrun where one or all take too much."""
        self.refuse_slow(template)
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            self.start()
        request = {"template": template, "conversations": conversations, "options": options}
        answers: list[str | TemplateError] = []
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")  # all of it is read before any is answered
            self.process.stdin.flush()
            while len(answers) < len(conversations):
                answer = self.answer()
                if answer is None:
                    self.count(template, SECONDS)
                    raise TemplateOverrun(f"it takes more than {SECONDS:g} s of processor time")
                if "too_much" in answer:
                    raise TemplateOverrun(answer["too_much"])
                self.count(template, answer["seconds"])
                answers.append(answer["text"] if "text" in answer else TemplateError(answer["refused"]))
        except TemplateOverrun as problem:
            self.end()
            problem.index = len(answers)
            raise
        except BaseException as problem:  # an interrupt, say: an answer that is yet to come is not another request's
            self.end()
            if isinstance(problem, BrokenPipeError):
                raise RuntimeError("the process that renders chat templates was ended; run again") from problem
            raise
        return answers

    def count(self, template: str, seconds: float) -> None:
        """Add what one conversation took; TemplateOverrun as of `refuse_slow`."""
        rows, before = self.spent.get(template, (0, 0.0))
        self.spent[template] = rows + 1, before + seconds
        self.refuse_slow(template)

    def refuse_slow(self, template: str) -> None:
        """Raise TemplateOverrun where a template has been too slow for a file of rows."""
        rows, total = self.spent.get(template, (0, 0.0))
        if total > AT_FIRST and total > USUAL * rows:
            mean = f"{total / rows:.2g} s of processor time a conversation"
            raise TemplateOverrun(f"it takes {mean} on average; a usual one takes a thousandth of a second")

    def start(self) -> None:
        """Start the process and wait until it answers."""
        program = Path(__file__).with_name("template_worker.py")
        self.process = subprocess.Popen(
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

    def answer(self) -> dict | None:
        """Return the next line that the process writes; None where it has ended."""
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
        """End the process, if this one started it."""
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.wait()
            process.stdout.close()
            process.stdin.close()


_worker = Worker()

"""Render chat templates that come from outside, under limits.

data/templates.py starts this process. It reads a line of JSON, {template, conversations, options},
and writes a line for each conversation: {text}, {refused: why} or {too_much: what}, each with the
`seconds` of processor time that it took; no line if the kernel's limit on processor time ends this
process. The first line out says {ready}.
"""

import json
import os
import resource
import signal
import sys
import time
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

MEBIBYTES = 512
"""Memory that a template may take, beyond what Python and its libraries have taken."""


def answer(template: str, conversation: list[dict], options: dict, seconds: float) -> dict:
    """Render one conversation.

    Args:
        template: The text of the chat template.
        conversation: A list of {role, content}.
        options: Further variables of the template.
        seconds: Processor time after which the kernel ends this process.
    """
    most = 10**6 + 20 * sum(len(str(message)) for message in conversation)
    # SIGPROF ends the process, even in the middle of a single operation.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        rendered: Any = render_jinja_template([conversation], chat_template=template, **options)
    except MemoryError:
        return {"too_much": f"it takes more than {MEBIBYTES} MiB of memory"}
    except TemplateError as error:
        return {"refused": str(error)}
    except Exception as error:  # a template may raise anything
        return {"refused": f"{type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    (text,), _ = rendered  # its annotation says str
    if len(text) > most:
        return {"too_much": f"it gives {len(text):,} characters"}
    return {"text": text}


def limit_memory() -> None:
    """Let this process take MEBIBYTES more than now, where the system has such a limit (Linux).

    Elsewhere, the limits of time and of the text's length still end a template.
    """
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEBIBYTES * 2**20,) * 2)


def main(seconds: float) -> None:
    """Answer requests until standard input ends; `seconds` limits each conversation."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    limit_memory()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A template cannot print, but a library may: only `out` reaches the parent.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        for conversation in request["conversations"]:
            before = time.process_time()
            result = answer(request["template"], conversation, request["options"], seconds)
            result["seconds"] = time.process_time() - before
            print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))

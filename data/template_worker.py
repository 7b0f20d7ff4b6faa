"""A process that renders chat templates of models from outside, under limits; started by data/templates.py.

A line of JSON in: {template, conversations, options}. A line out for each conversation: {text}, {refused: why} or
{too_much: what}, each with the `seconds` of processor time that it took; none where the kernel's limit on processor
time ends this process. The first line out says {ready}.
"""

import json
import os
import resource
import signal
import sys
import time

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

MEBIBYTES = 512  # of memory, beside what Python and its libraries have taken


def answer(template: str, conversation: list[dict], options: dict, seconds: float) -> dict:
    """Render one conversation, in so many seconds of processor time at most."""
    most = 10**6 + 20 * sum(len(str(message)) for message in conversation)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process, also in the middle of one operation
    try:
        (text,), _ = render_jinja_template([conversation], chat_template=template, **options)
    except MemoryError:
        return {"too_much": f"it takes more than {MEBIBYTES} MiB of memory"}
    except TemplateError as problem:
        return {"refused": str(problem)}
    except Exception as problem:  # a template may raise what it likes
        return {"refused": f"{type(problem).__name__}: {problem}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if len(text) > most:
        return {"too_much": f"it gives {len(text):,} characters"}
    return {"text": text}


def main(seconds: float) -> None:
    """Answer until nobody writes any more. seconds: of processor time a conversation."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the other end decides when this one ends
        signal.signal(number, signal.SIG_IGN)
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEBIBYTES * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a template cannot print, but a library may
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        for conversation in request["conversations"]:
            before = time.process_time()
            found = answer(request["template"], conversation, request["options"], seconds)
            found["seconds"] = time.process_time() - before
            print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))

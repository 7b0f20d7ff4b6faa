"""Find turns of tools that were written as text: `<tool_call>{"name": …}</tool_call>`.

Turns of tools are not read (`data/forms/messages.py`). As text they would be learnt as the
assistant's words, and a tool's result as the user's. Markers count only where they frame a text
or its last lines, so a text about tools stays as it is.
"""

import re

MARKER = (
    r"(?P<marker><tool_calls?>|<tool_response>|<\|tool_calls?\|>|<\|python_tag\|>|\[TOOL_CALLS\]|\[TOOL_RESULTS\]"
    r"|<function_calls>|<function_results>|<｜tool▁(?:calls|outputs)▁begin｜>)"
)
"""What a call or a result begins with: Hermes and Qwen, Mistral, Llama 3, Granite, DeepSeek."""
AT_BEGINNING, AT_LINE = re.compile(rf"\s*{MARKER}"), re.compile(rf"\n[ \t]*{MARKER}")
AT_END = re.compile(
    r"(?:</tool_calls?>|</tool_response>|\[/TOOL_RESULTS\]|</function_calls>|</function_results>"
    r"|<｜tool▁(?:calls|outputs)▁end｜>)(?:<\|im_end\|>|</s>|<｜end▁of▁sentence｜>)?\s*$"
)
"""What it ends with: words may stand before a call."""
EDGE = 80
"""Characters at the end of a text in which its last marker is looked for."""


def tool_marker(text: str) -> str | None:
    """Return the marker with which a call or a result begins; None if a text holds none."""
    found = AT_BEGINNING.match(text) if text.lstrip()[:1] in ("<", "[") else None
    if found is None and text.rstrip()[-1:] in (">", "]") and AT_END.search(text[-EDGE:]):
        found = AT_LINE.search(text)
    return None if found is None else found["marker"]

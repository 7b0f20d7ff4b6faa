"""Define error lines for optional packages that are missing; imports no torch."""

MISSING = (
    "model.peft.method: qlora needs the package bitsandbytes, which is not installed; "
    "for that: .venv/bin/pip install -e '.[qlora]'"
)

"""Load shipped configs without the files that their users make first."""

from pathlib import Path

KEYS = {"demonstrations": '{"prompt": "a", "completion": "b"}', "prompts": '{"prompt": "a"}'}
"""Key of `data` → a row of it."""


def settings_for(config: Path, folder: Path) -> list[str]:
    """Return settings that name small files in place of those that a config's user makes first.

    Args:
        config: A shipped config.
        folder: Where the files are written.
    """
    if config.stem != "sentiment":
        return []
    for name, row in KEYS.items():
        (folder / f"{name}.jsonl").write_text(f"{row}\n", encoding="utf-8")
    files = {"demonstrations": "demonstrations", "prompts": "prompts", "evaluation_prompts": "prompts"}
    return [f"data.{key}={folder / name}.jsonl" for key, name in files.items()]

"""Record the bytes that two short chains publish, or compare them with recorded ones.

    python tests/resume/published_bytes.py record FILE
    python tests/resume/published_bytes.py compare FILE

The chains are micro.yaml of this folder (every stage, PPO's initial policy, an ensemble, an average
of the policy) and a short configs/tiny.yaml. Digests are valid for one machine and one set of
library versions, so no recorded file is part of the project. Times are left out, and so are texts
that describe a result without containing its numbers: model cards and the report.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

from pipeline import api, cli

ROOT = Path(__file__).resolve().parents[2]
SHORT_TINY = [
    "world.documents=400",
    "world.demonstrations=200",
    "world.prompts=200",
    "world.evaluation_prompts=24",
    "base.max_steps=60",
    "base.eval_steps=30",
    "sft.num_train_epochs=2",
    "rm.num_train_epochs=0.5",
    "rm.eval_steps=20",
    "rankings.num_prompts=96",
    "ppo.total_episodes=256",
    "dpo.max_steps=12",
    "dpo.eval_steps=6",
    "ppo.eval_steps=2",
    "evaluate.best_of=3",
    "checkpoints.every=7",
    "launch.threads=1",
    "launch.device=cpu",
]
DESCRIPTIONS = ("README.md", "index.html", "timing.jsonl", "report.json")
CLOCK = ("eps", "seconds", "tokens_per_second")


def main() -> int:
    """Run both chains and write their digests, or compare them with those in FILE.

    Returns:
        1 if any of them differs, otherwise 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        digests = chain(ROOT / "tests/resume/micro.yaml", [], root) | chain(
            ROOT / "configs/tiny.yaml", SHORT_TINY, root
        )
    if arguments.action == "record":
        arguments.file.write_text(json.dumps(digests, indent=1, sort_keys=True))
        print(f"{len(digests)} files recorded in {arguments.file}")
        return 0
    recorded = json.loads(arguments.file.read_text())
    differ = sorted(path for path in recorded.keys() | digests.keys() if recorded.get(path) != digests.get(path))
    for path in differ:
        print(f"differs: {path}" if path in recorded and path in digests else f"on one side only: {path}")
    print(f"{len(recorded) - len(differ)} of {len(recorded)} files have the recorded bytes")
    return int(bool(differ))


def chain(config: Path, settings: list[str], root: Path) -> dict[str, str]:
    """Run every stage of a config; return {stage/path: digest} of all that is published."""
    artifacts = root / config.stem
    for stage in api.STAGES:
        if code := cli.main(["run", stage, "-c", str(config), "--artifacts", str(artifacts), *settings]):
            sys.exit(code)
    found = {}
    for manifest in sorted(artifacts.glob("*/*/manifest.json")):
        for path in json.loads(manifest.read_text())["outputs"]:
            if Path(path).name not in DESCRIPTIONS and not path.startswith("plots/"):
                found[f"{config.stem}/{manifest.parent.name}/{path}"] = digest(manifest.parent / path)
    return found


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, and for a journal that of its rows without times."""
    if path.suffix != ".jsonl":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())

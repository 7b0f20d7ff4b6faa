"""Define the arguments of `rlhf data`, and tell the words that say how files are read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipeline.config.sections import KINDS, DataSource

NOT_READING = ("path", "weight")
"""Settings of a source that say nothing about how one file is read."""
READING = tuple(name for name in DataSource.model_fields if name not in NOT_READING)
"""Settings of a source that the command line takes as `key=value`."""
WITH_NAMES = ("columns", "where")
"""Those that are mappings: `where.lang=en`, or `--where lang=en,source=web`."""
HOW_READ = """\
how files are read, as in a config (data/README.md):
  by=safer                    which of several judgments makes the ranks
  columns.prompt=question     our key = the key in the rows
  where.lang=en               only rows with this value
  ignore=label,weight         keys to leave unread on purpose
  templated=strip             take a chat template out of the texts (or: keep)
  tie_within=0.25             scores that differ by no more are a tie
  tiers=good,fair,bad         buckets of a labeling tool, the best first
  wordings=FILE.yaml          write a task's rows as prompts and responses (wording_choice=each)
  shots=3                     show rows before each prompt (shots_from=FILE, shots_as=text)
  on_bad_row=drop             leave rows with mistakes out (max_bad=0.01: at most 1 %)
  skip=100 limit=200          which records
  split=test subset=en        of a data set on the Hub (also data_dir, data_files, revision)
`--by safer` is the same as `by=safer`. Other words key=value are settings on top of CONFIG.

exit codes: 0 done; 2 a mistake in the data, the config or the command."""
INPUT = "a file, a folder, a glob such as 'data/*.jsonl.gz', or the id of a data set on the Hub (org/name)"


def add_actions(actions: Any) -> None:
    """Add the actions of `rlhf data`.

    Args:
        actions: argparse's subparsers.
    """
    add_check(actions)
    add_preview(actions)
    add_stats(actions)
    add_convert(actions)
    add_export(actions)
    add_prepare(actions)


def add_action(actions: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    """Add an action with the arguments that all actions have.

    Args:
        actions: argparse's subparsers.
        name: Name of the action.
        text: What it does.
        examples: Commands, one a line, that the help ends with.
    """
    action = actions.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"examples:\n{examples}\n\n{HOW_READ}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    action.add_argument("-c", "--config", metavar="CONFIG", help="an experiment: its tokenizer, limits and other data")
    action.add_argument("--kind", choices=KINDS, help="kind of the data (default: what CONFIG or the rows say)")
    action.add_argument("--artifacts", default="artifacts", metavar="DIR", help="where the experiment's tokenizer is")
    action.add_argument("--debug", action="store_true", help="show tracebacks")
    action.set_defaults(trust_remote_code=False)
    return action


def add_check(actions: Any) -> None:
    """Add `rlhf data check`."""
    text = "show form, lengths, duplicates, leaks, what labelers agree on, what is left out, and every error"
    examples = """\
  rlhf data check pairs.jsonl
  rlhf data check pairs.jsonl -c mine.yaml        in tokens, with the limits and other files of a config
  rlhf data check -c mine.yaml                    all data of a config
  rlhf data check org/name split=test             the first 200 rows of a data set on the Hub"""
    check = add_action(actions, "check", text, examples)
    check.add_argument("file", metavar="FILE", nargs="*", help=f"{INPUT}; default: all data that CONFIG names")


def add_preview(actions: Any) -> None:
    """Add `rlhf data preview`."""
    text = "show rows as the model sees them: template, special tokens, what is learnt, what is cut"
    examples = """\
  rlhf data preview pairs.jsonl                   turns, responses and ranks
  rlhf data preview pairs.jsonl -c mine.yaml      as the model sees them
  rlhf data preview pairs.jsonl --row 17          the row of line 17 (or of index 17)
  rlhf data preview -c mine.yaml -n 1             a row of each kind of data"""
    preview = add_action(actions, "preview", text, examples)
    preview.add_argument("file", metavar="FILE", nargs="*", help=f"{INPUT}; default: all data that CONFIG names")
    preview.add_argument("-n", type=int, default=3, metavar="N", help="number of rows (default: 3)")
    which = preview.add_mutually_exclusive_group()
    which.add_argument("--seed", type=int, default=None, help="choose the rows at random (default: the first ones)")
    which.add_argument("--row", type=int, default=None, metavar="LINE", help="the row of this line, or of this index")


def add_stats(actions: Any) -> None:
    """Add `rlhf data stats`."""
    text = "count lengths, roles, turns, scripts, K, ties, score gaps and labelers, with histograms"
    examples = """\
  rlhf data stats pairs.jsonl
  rlhf data stats pairs.jsonl -c mine.yaml        lengths in tokens
  rlhf data stats a.jsonl b.parquet --html OUT.html"""
    stats = add_action(actions, "stats", text, examples)
    stats.add_argument("file", metavar="FILE", nargs="*", help=f"{INPUT}; default: all data that CONFIG names")
    stats.add_argument("--html", metavar="OUT.html", help="also write a page, which opens without a network")
    stats.add_argument("--force", action="store_true", help="replace OUT.html if it exists")


def add_convert(actions: Any) -> None:
    """Add `rlhf data convert`."""
    text = "write data of any form as our records, one JSON object a line, and say what was left out and why"
    examples = """\
  rlhf data convert helpsteer3.jsonl --to rankings -o rankings.jsonl
  rlhf data convert pku.jsonl --to rankings -o safer.jsonl by=safer
  rlhf data convert rankings.jsonl --to demonstrations -o best.jsonl     the best responses
  rlhf data convert org/name --to prompts -o prompts.jsonl limit=5000"""
    convert = add_action(actions, "convert", text, examples)
    convert.add_argument("file", metavar="FILE", nargs="+", help=INPUT)
    kinds = ["rankings", "demonstrations", "prompts", "documents"]
    convert.add_argument("--to", required=True, choices=kinds, help="kind of records to write")
    convert.add_argument("-o", "--output", required=True, metavar="OUT.jsonl", help="file to write")
    convert.add_argument("--force", action="store_true", help="replace OUT.jsonl if it exists")


def add_export(actions: Any) -> None:
    """Add `rlhf data export`."""
    text = "write rankings as tasks for people in Label Studio or Argilla, responses in shuffled order"
    examples = """\
  rlhf data export answers.jsonl --to labelstudio -o tasks tiers=great,fine,poor
  rlhf data export answers.jsonl --to argilla -o tasks

What people then rank is read as it comes: rlhf data check export.json tiers=great,fine,poor"""
    export = add_action(actions, "export", text, examples)
    export.add_argument("file", metavar="FILE", nargs="+", help=f"{INPUT}; rankings, judged or not")
    export.add_argument("--to", required=True, choices=["labelstudio", "argilla"], help="the tool")
    export.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    export.add_argument("--seed", type=int, default=0, help="what gives the order of responses (default: 0)")
    export.add_argument("--force", action="store_true", help="replace DIR if it exists")


def add_prepare(actions: Any) -> None:
    """Add `rlhf data prepare`."""
    text = "leave out copies and personal data, and split by user into sft, rm, ppo, validation and test parts"
    examples = """\
  rlhf data prepare log.jsonl -o prepared
  rlhf data prepare 'logs/*.jsonl.gz' -o prepared -c mine.yaml      its evaluation prompts stay out
  rlhf data prepare log.jsonl -o prepared --pii mask --shares sft:1,ppo:1"""
    prepare = add_action(actions, "prepare", text, examples)
    prepare.add_argument("file", metavar="IN", nargs="+", help=INPUT)
    prepare.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write")
    prepare.add_argument(
        "--pii",
        choices=["list", "drop", "mask", "off"],
        default="list",
        help="personal data: list it (default), drop its rows or mask it in the training parts, or do not look for it",
    )
    prepare.add_argument(
        "--region",
        default="US",
        metavar="CC",
        help="country whose telephone numbers are found without +; none: only with + (default: US)",
    )
    prepare.add_argument(
        "--per-user", type=int, default=200, metavar="N", help="prompts kept of a user; 0: all (default: 200)"
    )
    prepare.add_argument(
        "--prefix", type=int, default=100, metavar="N", help="characters of a long common prefix; 0: off (default: 100)"
    )
    prepare.add_argument(
        "--near", type=float, default=0.8, metavar="J", help="Jaccard index of near copies; 0: off (default: 0.8)"
    )
    prepare.add_argument(
        "--shares",
        default="sft:13,rm:33,ppo:31,validation:4,test:4",
        metavar="PART:N,…",
        help="sizes of the parts, relative to each other (default: sft:13,rm:33,ppo:31,validation:4,test:4)",
    )
    prepare.add_argument(
        "--drop-leaks", action="store_true", help="leave evaluation prompts out of the other parts (default: an error)"
    )
    prepare.add_argument("--force", action="store_true", help="replace DIR if it exists")


# ── words that say how files are read ────────────────────────────────────────────────────────────


def split_reading(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the words of a command without those that say how files are read, and those.

    Args:
        argv: The words after `rlhf`. `by=safer`, `--by safer` and `--by=safer` are the same.
    """
    words, reading = [], []
    left = list(argv)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            key = name[2:].replace("-", "_")
            if key not in READING or (not equals and not left):
                words.append(word)
                continue
            reading += from_flag(key, value if equals else left.pop(0))
        elif equals and name.partition(".")[0] in READING and not Path(word).exists():
            reading.append(word)
        else:
            words.append(word)
    return words, reading


def from_flag(key: str, value: str) -> list[str]:
    """Return the words `key=value` of a flag; `--where lang=en,source=web` is two of them."""
    if key in WITH_NAMES and not value.startswith("{"):
        return [f"{key}.{part}" for part in value.split(",")]
    return [f"{key}={value}"]


def parse_reading(words: list[str]) -> dict[str, Any]:
    """Validate the words that say how files are read, as a config's source is validated.

    Args:
        words: `key=value` each; in a list, values are separated by commas.

    Returns:
        {setting of a source: value}, of those that are given.

    Raises:
        UserError: With a line for every mistake.
    """
    import json

    from pydantic import ValidationError

    from pipeline.config.validation import explain
    from pipeline.config.yaml_tree import parse_tree
    from pipeline.errors import UserError

    tree = parse_tree("{}", "command line", words)
    for key in ("ignore", "tiers"):
        value = tree.values.get(key)
        if value is not None and not isinstance(value, list):
            tree.values[key] = [part.strip() for part in str(value).split(",")]
    for key in ("by", "subset", "revision", "split", "wordings", "shots_from"):  # a number there is a name
        if isinstance(tree.values.get(key), int | float):
            tree.values[key] = str(tree.values[key])
    lines = list(tree.problems)
    try:
        source = DataSource.model_validate_json(json.dumps({**tree.values, "path": "FILE"}))
    except ValidationError as error:
        lines += explain(error, tree, DataSource)
    if lines:
        raise UserError([line.replace("override ", "command line: ", 1) for line in lines])
    return {name: getattr(source, name) for name in tree.values}

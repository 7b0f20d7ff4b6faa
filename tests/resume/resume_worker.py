"""Run `rlhf` in child processes that die at a chosen step, and compare the artifacts."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.forked import process

CONFIG = Path(__file__).with_name("micro.yaml")
DERIVED = ("eps", "val/explained_variance")  # rates; and a ratio whose denominator can almost vanish


def rlhf(
    *argv: str,
    die: tuple[str, int | str] | None = None,
    term: tuple[str, int] | None = None,
    term_at_token: int | None = None,
    takes: Path | None = None,
    output: Path | None = None,
) -> int:
    """Run `rlhf` in a new process that is forked after the libraries were imported.

    Args:
        argv: its arguments.
        die: (stage, step) after whose row of metrics.jsonl it kills itself with SIGKILL (rankings,
            evaluate: after whose checkpoint); or (stage, file of its cache), before that file is
            put in place; or (stage, "writing STEP"), when a thread has written one of its files of
            the checkpoint of that step.
        term: the same with SIGTERM.
        term_at_token: which of the tokens that it samples (counted in rows at a time) brings
            SIGTERM. If it samples another one after that, the exit code is 99.
        takes: a file for each draw from a data.streams.Stream, as a line [size, seed, [index, …]].
        output: a file for what it prints.

    Returns:
        The exit code, −9 for SIGKILL.
    """
    child = start(argv, die=die, term=term, term_at_token=term_at_token, takes=takes, output=output)
    return end([child])[0]


def rlhf_together(
    *argv: str,
    die: tuple[int, str, int | str] | None = None,
    term: tuple[int, str, int] | None = None,
    seconds: float = 300,
    one_reads: bool = False,
    size: int = 2,
) -> list[int]:
    """Run one `rlhf` command in two or more processes, and return their exit codes.

    Args:
        size: how many processes.
        die, term: (rank, stage, step), as for `rlhf`.
        one_reads: the second process fails if it loads a model.
    """
    return end(start_together(argv, die, size, term=term, one_reads=one_reads), seconds)


def start_together(
    argv,
    die: tuple[int, str, int | str] | None = None,
    size: int = 2,
    tokens: Path | None = None,
    term: tuple[int, str, int] | None = None,
    one_reads: bool = False,
) -> list[multiprocessing.Process]:
    """Start the processes of `rlhf_together` as a launcher does.

    Args:
        tokens: a folder where each process writes how many tokens went through its embedding.
    """
    from pipeline.launch.launcher import process_environments

    return [
        start(
            argv,
            place,
            die=die[1:] if die and die[0] == i else None,
            term=term[1:] if term and term[0] == i else None,
            tokens=tokens and tokens / str(i),
            reads=not (one_reads and i),
        )
        for i, place in enumerate(process_environments(size))
    ]


def start(
    argv, environment: dict[str, str] | None = None, die=None, term=None, term_at_token=None, tokens=None, reads=True,
    takes=None, output=None,
):  # fmt: skip
    variables = environment or {}
    child = process(_main, list(argv), variables, die, term, term_at_token, tokens, reads, takes, output)
    child.start()
    return child


def end(children: list[multiprocessing.Process], seconds: float = 300) -> list[int]:
    """Return the exit codes of processes that must end within so many seconds."""
    deadline = time.monotonic() + seconds
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert None not in codes, f"did not end within {seconds} s: {codes}"
    return codes


def _main(argv: list[str], environment: dict[str, str], die, term, term_at_token, tokens, reads, takes, output) -> None:
    from pipeline import cli

    if output is not None:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, 1), os.dup2(handle, 2)
    os.environ.update(environment)
    arm(die, term)
    if takes is not None:
        record_takes(takes)
    if not reads:
        refuse_to_read()
    if tokens is not None:
        read = count_tokens()
        code = cli.main(argv)
        tokens.write_text(str(read[0]))
        os._exit(code)
    if term_at_token is None:
        os._exit(cli.main(argv))
    from stages.rollouts import transformers

    pick, drawn = transformers.pick, [0]

    def pick_and_count(*args):
        drawn[0] += 1
        if drawn[0] == term_at_token:
            os.kill(os.getpid(), signal.SIGTERM)
        return pick(*args)

    transformers.pick = pick_and_count
    code = cli.main(argv)
    os._exit(99 if drawn[0] > term_at_token else code)


def record_takes(file: Path) -> None:
    """Append what this process draws from streams of rows to a file, from now on."""
    from data.streams import Stream

    take = Stream.take

    def recording(self, count):
        drawn = take(self, count)
        with file.open("a") as lines:
            lines.write(json.dumps([self.size, self.seed, drawn]) + "\n")
        return drawn

    Stream.take = recording


def refuse_to_read() -> None:
    """Make loading a model in this process an error, from now on."""
    from peft import PeftModel
    from transformers import PreTrainedModel

    def refuse(*args, **kwargs):
        raise AssertionError("this process reads a model")

    PeftModel.from_pretrained = PreTrainedModel.from_pretrained = refuse


def count_tokens() -> list[int]:
    """Return [the tokens that go through an embedding of this process from now on]."""
    from torch.nn import Embedding

    forward, read = Embedding.forward, [0]

    def counting(self, ids):
        read[0] += ids.numel()
        return forward(self, ids)

    Embedding.forward = counting
    return read


def arm(die: tuple[str, int | str] | None, term: tuple[str, int] | None) -> None:
    """Make this process die, or get SIGTERM, at a step or before a file is put in place."""
    from pipeline import tracking
    from pipeline.store import checkpoints, shares

    sent: list[tuple[str, int]] = []

    def at(stage: str, step: int | str) -> None:
        if (stage, step) == die:
            os.kill(os.getpid(), signal.SIGKILL)
        if (stage, step) == term and not sent:  # the save that follows may be of the same step
            sent.append(term)
            os.kill(os.getpid(), signal.SIGTERM)

    write = shares.write_shares
    log, save, replace = tracking.Tracker.log, checkpoints.CheckpointStore.save, os.replace

    def dying_log(self, step, metrics, *times):
        log(self, step, metrics, *times)
        at(self.stage, step)

    def dying_save(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        stage = Path(self.folder).parent.name
        if stage in ("rankings", "evaluate"):
            at(stage, step)

    def dying_replace(source, target, **options):
        target = Path(target)
        if target.parent.name == ".cache":
            at(target.parent.parent.name, target.name)
        replace(source, target, **options)

    def dying_write(path, parts):
        write(path, parts)
        at(path.parents[2].name, f"writing {int(path.parent.name.removeprefix('.tmp-step-'))}")

    shares.write_shares = dying_write
    os.replace = dying_replace
    tracking.Tracker.log = dying_log
    checkpoints.CheckpointStore.save = dying_save


def published(folder):
    """Return {path: SHA-256} of what a stage published, metrics.jsonl without its rate."""
    outputs = json.loads((folder / "manifest.json").read_text())["outputs"]
    found = {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in outputs}
    assert found == {path: entry["sha256"] for path, entry in outputs.items()}
    if "metrics.jsonl" in found:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        found["metrics.jsonl"] = [{key: value for key, value in row.items() if key != "eps"} for row in rows]
    return found


def copy_without(oracle, tmp_path, stage):
    """Copy the oracle's artifacts, without `stage`."""
    root = tmp_path / "artifacts"
    shutil.copytree(oracle, root)
    shutil.rmtree(root / "micro" / stage)
    return root


def rows_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).open()]


def assert_same_figures(found, expected, first=1e-5, later=1e-3):
    """Check that two journals agree up to rounding.

    Args:
        first: the largest difference of losses in the first three steps.
        later: the largest difference of any figure after them; for large figures, a few times that
            share.
    """
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for i, (row, other) in enumerate(zip(found, expected, strict=True)):
        assert row.keys() == other.keys()
        for key in row.keys() - set(DERIVED):
            tight = i < 3 and "loss" in key
            within = {"abs": first, "rel": 0} if tight else {"abs": later, "rel": 3 * later}
            assert row[key] == pytest.approx(other[key], **within), (i, key)

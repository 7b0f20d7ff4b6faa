"""Run the fault matrix: kill, starve and damage stages, and compare the resulting bytes.

    python tests/resume/faults.py [--kills 200] [--cases C1 C2:40 …] [--stages rm ppo …] [--only
    C1/rm/rename.3] [--artifacts FOLDER]

Each try starts from the finished artifacts of a small chain (micro.yaml) in which one stage has not
run, and must end with the same bytes. Prints a table with the tries of each case and how many
passed; for each failure, what was wrong and the command that repeats it. The letters: C crashes and
storage, D changed inputs, E bad data, S hostile input, M an item of the checkpoint that is left out
of the load, which must be noticed by other bytes or a refusal. E, S and some others are tests of
the suite, run by name. System calls are interrupted with strace.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import fault_damage as damage  # noqa: E402
from fault_worker import Call, Ended, Fault, Running, instants, killed_after, preload, run, two_together  # noqa: E402

CONFIG = HERE / "micro.yaml"
STAGES = ("sft", "rm", "ppo", "dpo")
GRACE = 10.0  # seconds from a signal to the end
PARTED = 15.0  # seconds in which a process ends after its peer
EVERY = 2  # checkpoints.every of micro.yaml
BEST_EARLY = {"ppo": ("ppo.learning_rate=0.3", "ppo.kl_coef=1.0")}  # the best evaluation comes before the interruption
BEFORE_HANDLERS = 0.5  # seconds within which a signal may come before the handlers are installed


class TryFailed(Exception):
    """Report a try that did not end as it should."""


class NotPossibleHere(Exception):
    """Report a try that is impossible on this machine."""


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise TryFailed(otherwise)


@dataclass
class Chain:
    """Finished artifacts, and for each stage measurements of a run of its own.

    These are its duration in seconds, its system calls, those that change something below the
    artifacts, and the newest checkpoint of an interrupted run.
    """

    root: Path
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    traces: dict[str, tuple[Call, ...]] = field(default_factory=dict)
    saved: dict[str, Path] = field(default_factory=dict)
    together: dict[str, tuple[dict, float]] = field(default_factory=dict)  # bytes and seconds of two processes

    def folder(self, stage: str) -> Path:
        return self.root / "micro" / stage


def published(folder: Path) -> dict:
    """Return {path: digest} of what a stage published, metrics.jsonl as rows without `eps`."""
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {path: entry["sha256"] for path, entry in manifest["outputs"].items()}
    if "metrics.jsonl" in found:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        found["metrics.jsonl"] = [{k: v for k, v in row.items() if k != "eps"} for row in rows]
    return found


@dataclass
class Try:
    """A copy of the chain without `stage`, and the commands to run that stage."""

    chain: Chain
    stage: str
    folder: Path
    settings: tuple[str, ...] = ()  # of every run

    def __post_init__(self):
        self.root = self.folder / "artifacts"
        if not self.root.exists():
            shutil.copytree(self.chain.root, self.root)
            shutil.rmtree(self.work)

    @property
    def work(self) -> Path:
        return self.root / "micro" / self.stage

    def argv(self, *more: str) -> list[str]:
        place = ["-c", str(CONFIG), "--artifacts", str(self.root), "--only"]
        return ["run", self.stage, *place, *self.settings, *more]

    def run(self, fault: Fault | None = None, *more: str) -> Ended:
        return run(self.argv(*more), self.folder, fault)

    def interrupt(self, step: int = 5) -> None:
        """Kill a run after a step's row of metrics.jsonl; for step 5 it has checkpoints 2 and 4."""
        code = self.run(Fault(die=(self.stage, step))).code
        expect(code == -9, f"exit code {code}; it should have been killed at step {step}")

    def checkpoints(self) -> list[Path]:
        return sorted((self.work / "checkpoints").glob("step-*"))

    def unsaved_steps(self) -> int:
        """Return how many steps are in the journal and not in a checkpoint."""
        if not (self.work / "metrics.jsonl").exists() or (self.work / "manifest.json").exists():
            return 0
        lines = (self.work / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line)["step"] for line in lines if line.endswith("}")]
        saved = [int(path.name.removeprefix("step-")) for path in self.checkpoints()]
        return max(rows, default=0) - max(saved, default=0)

    def is_trained(self) -> bool:
        """Return whether the last step is done."""
        right = self.chain.folder(self.stage) / "metrics.jsonl"
        rows = [len(file.read_text().splitlines()) if file.exists() else 0 for file in (self.work / right.name, right)]
        return rows[0] >= rows[1] or (self.work / "manifest.json").exists()

    def resume(self, at_most: int = EVERY) -> Ended:
        """Resume, check that no more than a save interval is recomputed, and `finish`."""
        lost = self.unsaved_steps()
        expect(lost <= at_most, f"{lost} steps are recomputed; at most {at_most} expected")
        return self.finish()

    def finish(self) -> Ended:
        """Run to the end; check for the chain's bytes and that nothing unfinished is left."""
        ended = self.run()
        expect(ended.code == 0, f"the resumed run ended with {ended.code}: {last_line(ended.output)}")
        self.check_bytes()
        return ended

    def check_bytes(self) -> None:
        ours, right = published(self.work), published(self.chain.folder(self.stage))
        odd = sorted(path for path in {*ours, *right} if ours.get(path) != right.get(path))
        expect(not odd, f"different bytes in {', '.join(odd)}")
        left = [p.name for p in self.work.rglob(".tmp-*")]
        expect(not left, f"left behind: {left}")


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "(no output)"


def refused(ended: Ended, *names: str) -> None:
    """Check for exit code 2 and error lines that contain each of the names."""
    expect(ended.code == 2, f"exit code {ended.code} instead of 2: {last_line(ended.output)}")
    lines = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    expect(bool(lines) and "Traceback" not in ended.output, "no error line, or a traceback")
    missing = [name for name in names if not any(name in line for line in lines)]
    expect(not missing, f"the error does not name {missing}: {lines[0]}")


def measure(chain: Chain, stage: str) -> None:
    """Measure a stage's duration and system calls, and check that it gives the same bytes twice."""
    if stage in chain.calls:
        return
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        one = Try(chain, stage, Path(folder))
        ended = one.run(Fault(trace=True))
        expect(ended.code == 0, f"{stage} does not run: {last_line(ended.output)}")
        one.check_bytes()
        inside = str(one.root)
        chain.traces[stage] = ended.calls
        chain.calls[stage] = [c for c in ended.calls if not c.failed and any(p.startswith(inside) for p in c.paths)]
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        chain.seconds[stage] = Try(chain, stage, Path(folder)).finish().seconds
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        one = Try(chain, stage, Path(folder))
        one.interrupt()
        chain.saved[stage] = chain.root.parent / "saved" / stage / one.checkpoints()[-1].name
        shutil.copytree(one.checkpoints()[-1], chain.saved[stage])


def spread(items: list, count: int) -> list:
    """Return at most `count` of the items, evenly spaced."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


# -- crashes and storage: (chain, stage, kills) → pairs of a name and a function of a Try ----------

Trial = Callable[[Try], None]
Case = Callable[[Chain, str, int], Iterator[tuple[str, Trial]]]


def crash_points(chain: Chain, stage: str, kills: int):
    """Send SIGKILL at calls that change something: all of them, or `kills` evenly spaced ones."""
    for call in spread(chain.calls[stage], kills):

        def trial(t: Try, call=call):
            ended = t.run(Fault(at=(call.name, call.number)))
            expect(ended.code == -9, f"exit code {ended.code}; it should have been killed at {call.name}")
            t.resume()

        yield f"{call.name}.{call.number}", trial


def random_kills(chain: Chain, stage: str, kills: int):
    """Send SIGKILL at random moments, also while loading and publishing."""
    for i, after in enumerate(instants(kills, 0.0, chain.seconds[stage], seed=1)):

        def trial(t: Try, after=after):
            killed_after(t.argv(), t.folder, after)
            t.resume()

        yield str(i), trial


def kills_in_one_run(chain: Chain, stage: str, kills: int):
    """Kill one run twenty times, also while it loads its checkpoint."""

    def trial(t: Try):
        landed = 0
        for after in instants(20, 0.1, 0.5 * chain.seconds[stage], seed=2):
            landed += killed_after(t.argv(), t.folder, after).code == -9
        expect(landed >= 10, f"only {landed} kills hit a running process")
        t.resume()

    yield "0", trial


def one_of_two(chain: Chain, stage: str, kills: int):
    """Send SIGKILL to one of two processes at a random moment.

    The other one must end in time and leave no half checkpoint, and two more must end with the
    bytes of two undisturbed ones. (Those differ from one process's, since sums have another order.)
    """

    def whole(t: Try) -> float:
        running = two_together(t.argv(), t.folder)
        ended = [process.wait() for process in running]
        output = " / ".join(last_line(one.output) for one in ended)
        expect([one.code for one in ended] == [0, 0], f"two processes ended with {[e.code for e in ended]}: {output}")
        return max(one.seconds for one in ended)

    if stage not in chain.together:
        with tempfile.TemporaryDirectory(prefix="faults_") as folder:
            one = Try(chain, stage, Path(folder))
            seconds = whole(one)
            chain.together[stage] = (published(one.work), seconds)
    right, seconds = chain.together[stage]
    for i, after in enumerate(instants(max(4, kills // 4), 0.0, seconds, seed=8)):

        def trial(t: Try, who=i % 2, after=after):
            running = two_together(t.argv("launch.timeout=5"), t.folder)  # also the time limit for meeting
            running[who].child.join(after)
            running[who].signal(signal.SIGKILL)
            killed, began = running[who].wait().code == -9, time.monotonic()
            other = running[1 - who].wait(PARTED + 5)
            seconds = time.monotonic() - began
            expect(seconds <= PARTED, f"the other one took {seconds:.0f} s to end")
            done = (t.work / "manifest.json").exists()
            expect(other.code in (1, 4) or done or not killed, f"the other one ended with {other.code} and no artifact")
            half = [path.name for path in t.checkpoints() if not (path / "manifest.json").exists()]
            expect(not half, f"half a checkpoint: {half}")
            whole(t)
            ours = published(t.work)
            odd = sorted(path for path in {*ours, *right} if ours.get(path) != right.get(path))
            expect(not odd, f"different bytes in {', '.join(odd)}")

        yield f"{i}", trial


def signals(chain: Chain, stage: str, kills: int):
    """Send SIGTERM, SIGINT or SIGUSR1 at a random moment.

    The run must end in time with 75 and without an artifact, and a resumed one with the same bytes;
    or it had ended before the signal.
    """
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    for i, after in enumerate(instants(max(3, kills // 4), 0.0, chain.seconds[stage], seed=3)):

        def trial(t: Try, after=after, number=numbers[i % 3]):
            running = Running(t.argv(), t.folder)
            running.child.join(after)
            asked, over = time.monotonic(), t.is_trained()
            running.signal(number)
            ended = running.wait()
            took = time.monotonic() - asked
            if ended.code == 0:
                expect(over, "it ignored the signal")
                t.check_bytes()
                return
            begun = after >= BEFORE_HANDLERS and ended.output.strip()  # a busy machine takes longer to say a word
            early = ended.code in (-number, 130, 1) and not begun  # before the handlers are installed
            expect(ended.code == 75 or early, f"exit {ended.code} after signal {number}: {last_line(ended.output)}")
            expect(took <= GRACE, f"{took:.1f} s from the signal to the end")
            expect(not (t.work / "manifest.json").exists(), "it was stopped, but there is an artifact")
            t.resume(at_most=0)

        yield str(i), trial


def two_signals(chain: Chain, stage: str, kills: int):
    """Send SIGTERM, then SIGTERM or SIGKILL during the save: a valid checkpoint survives."""
    for i, after in enumerate(instants(max(2, kills // 10), BEFORE_HANDLERS, chain.seconds[stage], seed=4)):

        def trial(t: Try, after=after, second=(signal.SIGTERM, signal.SIGKILL)[i % 2]):
            running = Running(t.argv(), t.folder)
            running.child.join(after)
            running.signal(signal.SIGTERM)
            running.child.join(0.05)
            running.signal(second)
            ended = running.wait()
            expect(ended.code in (0, 75, -second), f"exit {ended.code}: {last_line(ended.output)}")
            t.resume()

        yield str(i), trial


def failing_call(errors: tuple[str, ...], names: tuple[str, ...]) -> Case:
    """Make a system call fail: one line names a path, files stay, a rerun gives the same bytes."""

    def case(chain: Chain, stage: str, kills: int):
        calls = [call for call in chain.calls[stage] if call.name in names]
        for call, error in zip(spread(calls, kills), itertools.cycle(errors), strict=False):

            def trial(t: Try, call=call, error=error):
                ended = t.run(Fault(at=(call.name, call.number), error=error))
                if ended.code == 0:  # a call whose failure costs nothing, such as the last one of a clean-up
                    expect(call.name != "fsync", "an fsync failed unnoticed")
                else:
                    # The memory of digests is not written in each run: without it, the call of that
                    # number may write to standard output.
                    inside = any(p.startswith(str(t.root)) for c in ended.calls if c.failed for p in c.paths)
                    refused(ended, str(t.root) if inside else "standard output")
                    damaged = [str(p) for p in t.checkpoints() if damage.problems(p)]
                    expect(not damaged, f"damaged: {damaged}")
                t.finish()

            yield f"{call.name}.{call.number}.{error}", trial

    return case


def full_disk(chain: Chain, stage: str, kills: int):
    """Fill the disk: one line has path and free bytes; with room, the bytes are the same."""
    for name, room, names in (("bytes", 40_000, 10_000), ("names", 2**25, 14), ("more names", 2**25, 30)):

        def trial(t: Try, room=room, names=names):
            there = list(t.root.rglob("*"))
            size, count = sum(p.stat().st_size + 4096 for p in there), len(there) + 1
            with damage.small_disk(t.root, size + room, count + names, NotPossibleHere) as grow:
                refused(t.run(), "bytes", str(t.root))
                grow()
                t.finish()

        yield name, trial


def small_files(chain: Chain, stage: str, kills: int):
    """Limit the size of files: one line; without the limit, the bytes are the same."""

    def trial(t: Try):
        refused(t.run(Fault(file_size=20_000)), str(t.root))
        t.finish()

    yield "20000", trial


def damaged_checkpoint(spoils: Callable[[Path], Iterator[tuple[str, Callable[[Path], None]]]]) -> Case:
    """Damage the newest checkpoint: this is reported, and the one before it is loaded."""

    def case(chain: Chain, stage: str, kills: int):
        for name, spoil in spoils(chain.saved[stage]):

            def trial(t: Try, spoil=spoil):
                t.interrupt()
                spoil(t.checkpoints()[-1])
                ended = t.finish()
                expect("set aside" in ended.output, "the damage was not reported")
                expect("resuming from step 2" in ended.output, "it did not resume from the checkpoint before")

            yield name, trial

    return case


def every_flip(chain: Chain, stage: str, kills: int):
    """Flip a bit at a hundred positions of each file of a checkpoint: the check finds every one."""
    sample = chain.saved[stage]
    for name in damage.file_names(sample):

        def trial(t: Try, name=name):
            copy = t.folder / sample.name
            shutil.copytree(sample, copy)
            missed = damage.missed_flips(copy, name, 100)
            expect(not missed, f"flipped bits that were not noticed: {missed}")

        yield name, trial


def damaged_input(chain: Chain, stage: str, kills: int):
    """Flip, truncate or remove a file of an upstream artifact: exit code 2 names the file."""
    for need in json.loads((chain.folder(stage) / "manifest.json").read_text())["inputs"]:
        if not (chain.folder(need) / "manifest.json").exists():
            continue
        for name in json.loads((chain.folder(need) / "manifest.json").read_text())["outputs"]:
            for how, spoil in (("flip", damage.flip), ("cut", damage.cut(0.5)), ("gone", Path.unlink)):

                def trial(t: Try, need=need, name=name, spoil=spoil):
                    spoil(t.root / "micro" / need / name)
                    refused(t.run(), name)

                yield f"{need}/{name}.{how}", trial


def other_user(chain: Chain, stage: str, kills: int):
    """Use artifacts that this user must not write: one line, before a model is loaded."""

    def trial(t: Try):
        if os.geteuid() != 0:
            raise NotPossibleHere("only root can run as another user")
        library = Path(os.__file__)
        if not all(path.stat().st_mode & 0o005 == 0o005 for path in (library.parent, *library.parent.parents)):
            raise NotPossibleHere("another user cannot read this Python")
        for path in (t.folder, *t.folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        ended = t.run(Fault(user=65534))
        if "Permission denied" in ended.output and str(ROOT) in ended.output:
            raise NotPossibleHere("another user cannot read this project")
        refused(ended, str(t.root))
        expect(ended.seconds < 5, f"it took {ended.seconds:.1f} s")

    yield "0", trial


def two_runs(chain: Chain, stage: str, kills: int):
    """Start a second run: it is refused and names the first, whose kill frees the lock."""

    def trial(t: Try):
        first = Running(t.argv(), t.folder)
        while not (t.work / "run.json").exists() and first.child.is_alive():
            time.sleep(0.01)
        first.signal(signal.SIGSTOP)  # it holds its lock for as long as this test needs
        (t.folder / "second").mkdir()
        try:
            refused(run(t.argv(), t.folder / "second"), f"process {first.child.pid}")
        finally:
            first.signal(signal.SIGKILL)
            code = first.wait().code
        expect(code == -9, "the first had ended")
        t.finish()

    yield "0", trial


def other_clock(chain: Chain, stage: str, kills: int):
    """Reverse the times of checkpoints: steps decide which is newest and which are pruned."""

    def trial(t: Try):
        t.interrupt()
        for i, path in enumerate(t.checkpoints()):
            for file in (path, *path.rglob("*")):
                os.utime(file, (1e9 - i * 1e6,) * 2)
        output = t.finish().output
        expect("damaged" not in output and "resuming from step 4" in output, "the newest checkpoint was not loaded")

    yield "0", trial


def kept_one(chain: Chain, stage: str, kills: int):
    """Kill with checkpoints.keep: 1 at removals and renames: one is always valid."""
    calls = [c for c in chain.calls[stage] if c.name.startswith(("unlink", "rmdir", "rename"))]
    for call in spread(calls, max(4, kills // 2)):

        def trial(t: Try, call=call):
            t.settings = ("checkpoints.keep=1",)
            first = t.run(Fault(at=(call.name, call.number)))
            expect(first.code in (-9, 0), f"exit {first.code}: {last_line(first.output)}")
            journal = t.work / "metrics.jsonl"
            if first.code == -9 and journal.exists() and len(journal.read_text().splitlines()) > EVERY:
                expect(any(not damage.problems(p) for p in t.checkpoints()), "there is no valid checkpoint")
            t.resume()

        yield f"{call.name}.{call.number}", trial


def little_memory(chain: Chain, stage: str, kills: int):
    """Run out of memory: one line names settings; without the limit, the bytes are the same."""

    def trial(t: Try):
        ended = t.run(Fault(exhaust=5))
        expect(ended.code == 1 and "Traceback" not in ended.output, f"exit {ended.code}: {last_line(ended.output)}")
        expect("error: out of memory; lower" in ended.output, f"it names no setting: {last_line(ended.output)}")
        expect(not damage.problems(t.checkpoints()[-1]), "the newest checkpoint is damaged")
        t.finish()

    yield "0", trial


def synced(chain: Chain, stage: str, kills: int):
    """Check that each rename comes after an fsync of the file and before one of the folder."""

    def trial(t: Try):
        wrong = damage.not_synced(chain.traces[stage])
        expect(not wrong, "; ".join(wrong[:3]))

    yield "0", trial


# -- changed inputs --------------------------------------------------------------------------------


def changed_settings(chain: Chain, stage: str, kills: int):
    """Change a setting of an interrupted run: it is refused with key, old and new value.

    With the old setting it resumes.
    """
    changes = {
        f"{stage}.learning_rate": "1.5e-3",
        "seed": "2",
        f"{stage}.per_device_train_batch_size": "1",
        f"{stage}.gradient_accumulation_steps": "1",
        f"{stage}.{ {'dpo': 'beta', 'ppo': 'lam', 'rm': 'label_smoothing', 'sft': 'weight_decay'}[stage] }": "0.3",
    }
    for key, value in changes.items():
        if stage == "ppo" and "accumulation" in key:
            key, value = "ppo.mini_batch_size", "8"

        def trial(t: Try, key=key, value=value):
            t.interrupt()
            refused(t.run(None, f"{key}={value}"), key, "→")
            t.finish()

        yield key, trial


def harmless_settings(chain: Chain, stage: str, kills: int):
    """Change a setting that cannot change the result: it resumes to the same bytes."""
    for setting in ("checkpoints.every=3", "checkpoints.keep=3"):

        def trial(t: Try, setting=setting):
            t.interrupt()
            t.settings = (setting,)
            t.finish()

        yield setting, trial


def rebuilt_input(chain: Chain, stage: str, kills: int):
    """Rebuild an upstream artifact with another seed: the refusal names both digests."""
    need = {"sft": "base", "rm": "rankings", "ppo": "rm", "dpo": "rankings"}[stage]
    key = {"base": "base.learning_rate=2e-3", "rankings": "rankings.temperature=0.9", "rm": "rm.learning_rate=2e-3"}

    def trial(t: Try):
        t.interrupt()
        place = ["-c", str(CONFIG), "--artifacts", str(t.root), "--only"]
        (t.folder / "other").mkdir()
        made = run(["run", need, *place, "--force", key[need]], t.folder / "other")
        expect(made.code == 0, f"{need} does not run: {last_line(made.output)}")
        refused(t.run(None, key[need]), need, "→")

    yield need, trial


def other_threads(chain: Chain, stage: str, kills: int):
    """Resume with another number of threads: this is reported once and recorded."""

    def trial(t: Try):
        t.interrupt()
        ended = t.run(None, "launch.threads=2")
        expect(ended.code == 0, f"exit {ended.code}: {last_line(ended.output)}")
        expect(ended.output.count("last bits may differ") == 1, "it was not reported exactly once")
        expect(json.loads((t.work / "manifest.json").read_text())["threads"] == 2, "it is not in the manifest")

    yield "0", trial


def done_again(chain: Chain, stage: str, kills: int):
    """Run a finished stage with new file times, or without its checkpoints: nothing happens."""
    for name in ("touched", "no checkpoints"):

        def trial(t: Try, name=name):
            shutil.copytree(chain.folder(stage), t.work)
            if name == "touched":
                for file in t.root.rglob("*"):
                    os.utime(file)
            else:
                shutil.rmtree(t.work / "checkpoints")
            ended = t.run()
            expect(ended.code == 0 and "running" not in ended.output, f"it ran: {last_line(ended.output)}")
            t.check_bytes()

        yield name, trial


def forgotten_items(chain: Chain, stage: str, kills: int):
    """Leave each item of the checkpoint out of the load, at the moments at which it matters.

    At one of them the bytes must differ or the run be refused. owes_look matters only where a
    signal cut a held-out evaluation short.
    """
    newest, moments = chain.saved[stage], {"sft": (5, 11), "rm": (5, 13)}.get(stage, (5,))
    items = [f"state.{key}" for key in json.loads((newest / "state.json").read_text())]
    items += [f"tensors.{path.stem}" for path in sorted(newest.glob("*.safetensors"))]
    items += ["trainer.model", "trainer.optimizer", "trainer.trainer_state"] * (newest / "trainer").is_dir()
    # guards: against another number of steps (rm, sft) or device (ppo), for alarms during an
    # evaluation that a signal ended, and for what ppo has drawn, which follows from its updates if
    # no setting has changed
    guards = ("state.steps", "state.place", "state.raised", "state.drawn")
    items = [item for item in items if item not in guards]
    for item in [*items, "journals"]:

        def trial(t: Try, item=item):
            right = published(chain.folder(stage))
            if item == "tensors.best" and stage in BEST_EARLY:
                t.settings = BEST_EARLY[stage]
                expect(t.run().code == 0, f"{t.settings} do not run")
                right = published(t.work)
            for moment in moments:
                shutil.rmtree(t.work, ignore_errors=True)
                if item == "state.owes_look":
                    fault = Fault(term=(stage, {"sft": 5}.get(stage, 6)))  # trl logs a step after its evaluation
                    expect(t.run(fault).code == 75, "the signal during the evaluation at step 6 did not end in 75")
                else:
                    t.interrupt(moment)
                ended = t.run(Fault(forget=item))
                if ended.code != 0 or published(t.work) != right:
                    return
            raise TryFailed("its absence was not noticed")

        yield item, trial


CASES: dict[str, tuple[str, Case]] = {
    "C1": ("killed at a call that changes the disk", crash_points),
    "C2": ("killed at a random moment", random_kills),
    "C3": ("killed twenty times in one run", kills_in_one_run),
    "C4": ("SIGTERM, SIGINT, SIGUSR1 at a random moment", signals),
    "C5": ("two signals", two_signals),
    "C6": ("no space left at a write", failing_call(("ENOSPC",), ("write", "pwrite64", "mkdir"))),
    "C6d": ("a disk that fills up", full_disk),
    "C7": ("a sync or rename fails", failing_call(("EIO", "EROFS"), ("fsync", "fdatasync", "rename"))),
    "C7f": ("a limit on file sizes", small_files),
    "C8": ("truncated checkpoint file", damaged_checkpoint(damage.cuts)),
    "C9": ("checkpoint file with a flipped bit", damaged_checkpoint(damage.flips)),
    "C9b": ("a hundred bit flips per file, detected", every_flip),
    "C10": ("missing or stray checkpoint file, a link, an empty folder", damaged_checkpoint(damage.misfits)),
    "C8i": ("input file damaged or missing", damaged_input),
    "C11": ("artifacts of another user", other_user),
    "C12": ("two runs at once", two_runs),
    "C13": ("reversed file times", other_clock),
    "C14": ("one checkpoint kept, killed at removals", kept_one),
    "C15": ("out of memory", little_memory),
    "C16": ("one of two processes killed at a random moment", one_of_two),
    "C18": ("synced before and after each rename", synced),
    "D1": ("settings changed before a resume", changed_settings),
    "D2": ("harmless settings changed", harmless_settings),
    "D4": ("an input rebuilt", rebuilt_input),
    "D6": ("a finished stage run again", done_again),
    "D7": ("another number of threads", other_threads),
    "M": ("an item left out of the load", forgotten_items),
}
TESTS = {  # of the suite: the subject, the files, and the -k expression for their tests
    "C17": ("another number of processes, one that hangs", ["resume/test_processes.py"], "another_number or hangs"),
    "D3": ("data file changed", ["pipeline/test_plan.py"], "changed_data_file or data_counts"),
    "D5": ("checkpoint of another version or shape",
           ["stages/training/test_engine.py", "pipeline/store/test_checkpoints.py"],
           "another_model or another_shape or another_run"),
    "E1": ("malformed rows", ["data/test_records.py", "data/test_sources.py", "data/test_check.py"],
           "faults_of or misshapen or damaged_files"),
    "E5": ("leaks and repetitions", ["data/test_check.py", "data/test_sources.py"], "leaks or come_again"),
    "E6": ("too long, empty, only EOS", ["data/test_encode.py", "data/test_check.py"], "long or truncate or left"),
    "E7": ("ties, unjudged, identical, K = 9", ["data/test_groups.py", "data/test_records.py"],
           "ties or identical or pair or verdicts"),
    "E9": ("reward model that does not fit", ["models/test_loading.py", "models/test_roles.py"],
           "refused or no_reward_model"),
    "E10": ("reference differs from the policy, forward passes differ", ["objectives/test_ppo_step.py"], "preflight"),
    "E11": ("numbers that are not finite",
            ["objectives/test_ppo_step.py", "stages/training/test_engine.py"], "finite or nan"),
    "E12": ("alarms", ["stages/ppo/test_alarms.py"], ""),
    "S1": ("pickles, remote code, damaged headers",
           ["pipeline/store/test_artifacts.py", "pipeline/store/test_checkpoints.py", "models/test_loading.py"],
           "pickle or remote or hostile or outside"),
    "S3": ("paths that leave the folder", ["pipeline/store/test_artifacts.py"], "outside or link"),
    "S4": ("YAML", ["pipeline/config/test_config.py"], "hostile or scalars or one_mistake"),
    "S8": ("no network, no wandb", ["pipeline/test_tracking.py", "pipeline/test_cli.py"], "wandb or offline"),
}  # fmt: skip


def suite(name: str) -> tuple[int, int, str]:
    """Return (tries, passed, what failed) of the suite's tests for a fault."""
    _, files, words = TESTS[name]
    report = Path(tempfile.mkdtemp(prefix="faults_")) / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", f"--junitxml={report}"]
    command += [str(HERE.parent / file) for file in files] + (["-k", words] if words else [])
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    from xml.etree import ElementTree

    found = ElementTree.parse(report).getroot().find("testsuite").attrib
    total, skipped = int(found["tests"]), int(found["skipped"])
    bad = int(found["failures"]) + int(found["errors"])
    shutil.rmtree(report.parent)
    return total - skipped, total - skipped - bad, last_line(ended.stdout) if bad or ended.returncode else ""


# -- the program -----------------------------------------------------------------------------------


def make_chain(folder: Path, artifacts: Path | None = None) -> Chain:
    """Return a finished chain.

    Args:
        folder: A folder for it.
        artifacts: Artifacts of the whole chain, which are copied; None: it is run.

    Raises:
        TryFailed: It does not run.
    """
    preload()
    chain = Chain(folder / "artifacts")
    if artifacts is not None:
        shutil.copytree(artifacts, chain.root)
        return chain
    ended = run(["run", "evaluate", "-c", str(CONFIG), "--artifacts", str(chain.root)], folder)
    expect(ended.code == 0, f"the chain does not run: {last_line(ended.output)}")
    return chain


def attempt(chain: Chain, stage: str, label: str, trial: Trial, keep: bool = False) -> str | None:
    """Perform one try in a folder of its own.

    Returns:
        What was wrong; None if nothing was; "not here: …" if this machine cannot perform it.
    """
    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    try:
        trial(Try(chain, stage, folder))
    except NotPossibleHere as reason:
        return f"not here: {reason}"
    except TryFailed as wrong:
        return str(wrong)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    finally:
        if keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return None


def trials_of(chain: Chain, case: str, stage: str, kills: int) -> list[tuple[str, Trial]]:
    """Return a case's tries for a stage: at most `kills`, with damaged files four times as many."""
    measure(chain, stage)
    most = max(3, kills * (4 if case in ("C8", "C8i", "C10", "M") else 1))
    return spread([(f"{case}/{stage}/{name}", trial) for name, trial in CASES[case][1](chain, stage, kills)], most)


def case_and_kills(text: str) -> tuple[str, int | None]:
    """Read CASE or CASE:KILLS from the command line."""
    name, _, kills = text.partition(":")
    if name not in (*CASES, *TESTS) or (kills and not kills.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text}: no such case; there are {', '.join((*CASES, *TESTS))}")
    return name, int(kills) if kills else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N",
                        help="random kills in all, and crash points at most; other cases take their share")  # fmt: skip
    parser.add_argument("--cases", nargs="+", type=case_and_kills, metavar="CASE[:KILLS]",
                        help="CASE:KILLS has a number of its own; " + ", ".join((*CASES, *TESTS)))  # fmt: skip
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, metavar="STAGE")
    parser.add_argument("--only", metavar="CASE/STAGE/NAME", help="one try, its folder kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="tries at a time")
    parser.add_argument(
        "--artifacts", type=Path, metavar="FOLDER", help="finished artifacts of micro.yaml to start from"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table there, as Markdown")
    asked = parser.parse_args()
    if asked.only:
        asked.cases, asked.stages = [(asked.only.split("/")[0], None)], [asked.only.split("/")[1]]
    kills_of = {c: kills or asked.kills for c, kills in asked.cases or [(c, None) for c in (*CASES, *TESTS)]}
    each = {case: max(1, kills // len(asked.stages)) for case, kills in kills_of.items()}
    began, rows, failures = time.monotonic(), [], []

    def book(case: str, what: str, stage: str, tries: int, passed: int, note: str) -> None:
        rows.append((case, what, stage, tries, passed, note))
        print(f"{case:4} {what:55} {stage:5} {passed:4} of {tries}  {note}", flush=True)

    with tempfile.TemporaryDirectory(prefix="faults_chain_") as folder, ThreadPoolExecutor(asked.workers) as pool:
        try:
            chain = make_chain(Path(folder), asked.artifacts)
            for case, stage in ((c, s) for c in kills_of if c in CASES for s in asked.stages):
                trials = trials_of(chain, case, stage, each[case])
                trials = [(label, trial) for label, trial in trials if asked.only in (None, label)]
                wrongs = list(pool.map(lambda one, s=stage: attempt(chain, s, *one, bool(asked.only)), trials))
                absent = [w for w in wrongs if w and w.startswith("not here")]
                bad = [(label, w) for (label, _), w in zip(trials, wrongs, strict=True) if w and w not in absent]
                for label, wrong in bad:
                    print(f"FAILED {label}: {wrong}", flush=True)
                failures += bad
                tries = len(trials) - len(absent)
                if not trials and asked.only is None:
                    failures.append((f"{case}/{stage}", "no try was made"))
                if trials:
                    book(case, CASES[case][0], stage, tries, tries - len(bad), absent[0] if absent else "")
        except TryFailed as wrong:
            print(f"error: {wrong}", file=sys.stderr)
            return 2
        for name in (c for c in kills_of if c in TESTS):
            tries, passed, wrong = suite(name)
            book(name, TESTS[name][0], "suite", tries, passed, wrong)
            failures += [(f"{name} (make test)", wrong)] if wrong or not tries else []
    minutes, total, good = (time.monotonic() - began) / 60, sum(r[3] for r in rows), sum(r[4] for r in rows)
    print(f"\n{good} of {total} tries passed in {minutes:.0f} min")
    for label, wrong in failures:
        case = label.split()[0].partition("/")[0]
        again = f"--cases {case}" if "(make test)" in label else f"--only '{label}' --kills {each[case]}"
        print(f"  {label}: {wrong}\n    python tests/resume/faults.py {again}")
    if asked.table:
        asked.table.write_text(table(rows, minutes), encoding="utf-8")
    return 1 if failures or not total else 0


def table(rows: list[tuple], minutes: float) -> str:
    sys.path.append(str(HERE.parent / "benchmarks"))
    from pairs import stamp

    facts = stamp()
    lines = ["# The fault matrix, as `make faults` found it", ""]
    lines += [f"{facts['date']}, commit {facts['commit']}, {facts['machine']}; {minutes:.0f} minutes.", ""]
    lines += ["| case | what | stage | tries | passed | |", "| --- | --- | --- | --- | --- | --- |"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows]) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())

"""Run sft many times in forked processes and count those that die of a signal, such as SIGSEGV.

    nice -n 19 taskset -c 1 python tests/resume/segfaults.py --runs 3000

In the fault matrix, sft died of a segmentation fault twice in about 700 runs, once in an
undisturbed run and once in a resumed one. Each child here is forked, as there, from a process that
has imported the libraries, and takes `rlhf run sft` from the command line to the published folder:
config and plan, demonstrations, tokenizer, the model's threaded loading, the Arrow table, trl's
trainer, checkpoints, publication. Every second run is killed after a step, and the next one resumes
from its checkpoint.

To make a run short there are only two optimizer steps on a tiny model, no ppo_init and no samples;
nothing is damaged and no system call is intercepted. The parent imports more than the matrix's
server does, and excludes what it imported from the children's garbage collections, except in every
fifth run. Artifacts are in memory if there is a /dev/shm.

--before runs as the matrix did when the fault was seen: without a run's environment at import, so
that the parent has a second thread (Arrow's jemalloc) when it forks, children share Arrow's
mimalloc with it, and tqdm's bars have threads.

Prints runs, deaths and seconds. The output of a run that died and its native backtraces (gdb's,
from the core) stay in --keep. Exits with 1 if a run died or failed.
"""

import argparse
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from fault_worker import LIBRARIES  # noqa: E402

from pipeline.launch.environment import set_environment  # noqa: E402

CONFIG = HERE / "micro.yaml"
SMALL = ("sft.max_steps=2", "sft.ppo_init=null", "sft.sample_tokens=0", "sft.eval_steps=2",
         "sft.gradient_accumulation_steps=1", "checkpoints.every=1")  # fmt: skip
KILLED_AT = ("sft", 2)  # after that step's row of metrics.jsonl: there is a checkpoint of step 1
WHOLE_HEAP_EVERY = 5  # runs
AS_BEFORE = {"ARROW_DEFAULT_MEMORY_POOL": "mimalloc", "JE_ARROW_MALLOC_CONF": "background_thread:true"}


def import_libraries() -> None:
    """Import what a run of sft imports, so that a child does not have to."""
    import importlib

    for name in (*LIBRARIES, "trl.trainer.sft_trainer", "wandb"):
        importlib.import_module(name)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from pipeline import api

    api.stages()
    get_checkpoint_conversion_mapping("llama")  # it is computed once per process


def fork_run(argv: list[str], folder: Path, die: tuple[str, int] | None = None, whole_heap: bool = False) -> int:
    """Run `rlhf argv` in a forked child whose output and core go to `folder`.

    Args:
        die: stage and step after whose row of metrics.jsonl the child kills itself.
        whole_heap: whether garbage collections in the child also visit what the parent imported.

    Returns:
        The child's exit code, or minus the number of the signal that it died of.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.chdir(folder)
        out = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(out, 1), os.dup2(out, 2)
        if whole_heap:
            gc.unfreeze()
        if die is not None:
            from resume_worker import arm

            arm(die, None)
        from pipeline import cli

        code = cli.main(argv)
        sys.stdout.flush()
        os._exit(code)
    finally:
        os._exit(99)  # an exception must not continue in the parent's code


def save_backtraces(folder: Path) -> None:
    """Replace each core in `folder` by a file with the native frames of all threads."""
    for core in folder.glob("core*"):
        command = ["gdb", "-batch", "-ex", "thread apply all bt", "-ex", "info registers", "-ex", "x/8i $pc"]
        with (folder / f"backtraces-{core.name}.txt").open("w") as file:
            subprocess.run([*command, sys.executable, str(core)], stdout=file, stderr=subprocess.STDOUT)
        core.unlink()


def threads() -> int:
    """Return how many threads this process has, including those that Python does not know."""
    return len(os.listdir("/proc/self/task"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3000, metavar="N", help="runs of sft (3000)")
    parser.add_argument("--before", action="store_true", help="as it was when the fault was seen")
    parser.add_argument("--keep", type=Path, default=Path("segfaults"), metavar="FOLDER", help="for what died")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if asked.before:
        os.environ.update(AS_BEFORE)
    else:
        set_environment({})
    import_libraries()
    import pyarrow

    pool = pyarrow.default_memory_pool().backend_name
    print(f"forked from a process with {threads()} thread(s); Arrow's memory pool: {pool}", flush=True)
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ended, died, failed, began = Counter(), 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="segfaults_", dir=memory) as folder:
        folder = Path(folder)
        artifacts = folder / "artifacts"
        place = ["-c", str(CONFIG), "--artifacts", str(artifacts)]
        if fork_run(["run", "base", *place], folder) != 0:
            print((folder / "said.txt").read_text(), file=sys.stderr)
            return 2
        gc.collect()
        gc.freeze()
        for number in range(asked.runs):
            die = KILLED_AT if number % 2 == 0 else None
            whole_heap = number % WHOLE_HEAP_EVERY == 0
            code = fork_run(["run", "sft", *place, "--only", *SMALL], folder, die, whole_heap)
            ended[code] += 1
            said = (folder / "said.txt").read_text(errors="replace")
            right = code == -signal.SIGKILL if die else code == 0 and "resuming from step 1" in said
            if not right:
                died, failed = (died + 1, failed) if code < 0 else (died, failed + 1)
                kept = asked.keep / f"run-{number}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("artifacts"))
                save_backtraces(kept)
                print(f"run {number} ended with {code}: {kept}", flush=True)
            if die is None or not right:
                shutil.rmtree(artifacts / "micro" / "sft", ignore_errors=True)
            for core in folder.glob("core*"):
                core.unlink()
            if (number + 1) % 100 == 0:
                print(f"{number + 1} runs, {time.monotonic() - began:.0f} s, exit codes {dict(ended)}", flush=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{asked.runs} runs, {died} died of a signal, {failed} failed otherwise; {time.monotonic() - began:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} of them on a processor"
    )
    return 1 if died or failed else 0


if __name__ == "__main__":
    sys.exit(main())

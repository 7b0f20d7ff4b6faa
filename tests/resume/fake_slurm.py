"""Imitate SLURM on one machine: `sbatch`, `srun` and `scontrol` as far as our scripts use them.

`install` puts them under these names into a folder for the PATH. FAKE_SLURM names the folder of the
queue, and `run_jobs` runs it.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path


def install(folder: Path) -> dict[str, str]:
    """Write the three commands below `folder` and return the environment to use them with."""
    commands, spool = folder / "bin", folder / "spool"
    commands.mkdir(parents=True)
    spool.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        text = f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {name} "$@"\n'
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "FAKE_SLURM": str(spool)}


def sbatch(spool: Path, argv: list[str]) -> int:
    number = str(len(list(spool.glob("*.json"))) + 101)
    text = Path(argv[-1]).read_text()
    after = [a.split(":")[1:] for a in argv if a.startswith("--dependency=afterok:")]
    tasks = int(re.search(r"--ntasks-per-node=(\d+)", text)[1]) * int(re.search(r"--nodes=(\d+)", text)[1])
    log = re.search(r'--output="(.+)"', text)[1].replace("%j", number)
    job = {"script": text, "after": after[0] if after else [], "tasks": tasks, "log": log}
    job["environment"] = dict(os.environ)
    (spool / f"{number}.json").write_text(json.dumps(job))
    print(number)
    return 0


def srun(argv: list[str]) -> int:
    """Run every task, pass signals on to all of them, and return the largest exit code."""
    command = argv[next(i for i, word in enumerate(argv) if not word.startswith("-")) :]
    count = int(os.environ["SLURM_NTASKS"])
    places = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]
    tasks: list[subprocess.Popen] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
    tasks += [subprocess.Popen(command, env=os.environ | place) for place in places]
    return max(task.wait() % 256 for task in tasks)


def scontrol(spool: Path, argv: list[str]) -> int:
    if argv[:2] == ["show", "hostnames"]:
        print("127.0.0.1")
    if argv[0] == "requeue":
        (spool / f"{argv[1]}.again").touch()
    return 0


def run_jobs(environment: dict[str, str], preempt=None) -> list[tuple[str, int]]:
    """Run the queue in order, as the dependencies allow.

    Args:
        preempt: called with (job, start); returns when to send the job its warning, as a function
            that is polled, or None.

    Returns:
        (job, exit code) of every start.
    """
    spool = Path(environment["FAKE_SLURM"])
    ended: dict[str, int] = {}
    starts: list[tuple[str, int]] = []
    for file in sorted(spool.glob("*.json")):
        number, job, restarts = file.stem, json.loads(file.read_text()), 0
        if any(ended.get(before) != 0 for before in job["after"]):
            continue
        while True:
            known = {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": str(job["tasks"])}
            known |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
            with open(job["log"], "a") as log:
                process = subprocess.Popen(
                    ["bash", "-c", job["script"]], env=job["environment"] | known, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
                due = preempt(number, restarts) if preempt is not None else None
                while process.poll() is None:
                    if due is not None and due():
                        subprocess.run(["pkill", "-USR1", "-f", "fake_slurm.py srun", "-s", str(process.pid)])
                        due = None
                    try:
                        process.wait(0.05)
                    except subprocess.TimeoutExpired:
                        continue
            starts.append((number, process.returncode))
            if not (spool / f"{number}.again").exists():
                break
            (spool / f"{number}.again").unlink()
            restarts += 1
        ended[number] = process.returncode
    return starts


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    here = Path(os.environ["FAKE_SLURM"])
    sys.exit(srun(words) if name == "srun" else {"sbatch": sbatch, "scontrol": scontrol}[name](here, words))

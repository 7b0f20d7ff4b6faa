"""The stages of an experiment as SLURM jobs: one each, chained by afterok, queued again when it is interrupted.

A job is warned by SIGUSR1 ahead of its time limit (and when it is pre-empted), saves and ends with 75; then it asks to
be queued again and goes on from its checkpoint. 2 and 3 need a person: they end the chain.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import UserError

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}-{stage}
#SBATCH --output={folder}/{stage}-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={processes}
#SBATCH --time={time}
#SBATCH --signal=USR1@{warn_seconds}
#SBATCH --requeue
{more}
# {stage} of {name}, written by `rlhf run --submit slurm`. Ends with 0: done; 2, 3: look at the log; else the job is
# queued again and goes on from its newest checkpoint, at most {max_restarts} times.
cd {cwd} || exit 2
{setup}
restarts=${{SLURM_RESTART_COUNT:-0}}
flags={flags}
[ "$restarts" -gt 0 ] && flags={flags_again}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
srun --kill-on-bad-exit=0 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \\
  LOCAL_WORLD_SIZE={processes} exec "$@"' rlhf {command} $flags
code=$?
case $code in 0 | 2 | 3) exit $code ;; esac
[ "$restarts" -lt {max_restarts} ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
"""


def script(stage: str, experiment: Any, folder: Path, argv: list[str], once: list[str], is_offline: bool) -> str:
    """The batch script of one stage. argv: what comes after `rlhf run STAGE --only`; once: flags of the first start
    that a job which was queued again must not repeat (--restart, --force); folder: where the log goes."""
    launch = experiment.launch
    slurm = launch.slurm
    asked = {
        "partition": slurm.partition,
        "account": slurm.account,
        "gpus-per-node": slurm.gpus_per_node or None,
        "cpus-per-task": slurm.cpus_per_process,
    }
    more = [f"#SBATCH --{key}={value}" for key, value in asked.items() if value is not None]
    command = [sys.executable, "-m", "pipeline.cli", "run", stage, "--only", *argv]
    return SCRIPT.format(
        name=experiment.name,
        stage=stage,
        folder=folder,
        nodes=launch.nodes,
        processes=launch.processes,
        time=slurm.time,
        warn_seconds=slurm.warn_seconds,
        max_restarts=slurm.max_restarts,
        more="\n".join([*more, *(f"#SBATCH {line}" for line in slurm.options)]),
        cwd=shlex.quote(os.getcwd()),
        setup="\n".join([*slurm.setup, *["export HF_HUB_OFFLINE=1"] * is_offline]),
        flags=shlex.quote(" ".join(once)),
        flags_again='""',
        command=shlex.join(command),
    )


def submit(scripts: dict[str, str], needs: dict[str, list[str]], folder: Path) -> dict[str, str]:
    """Writes each stage's script below `folder` and hands it to sbatch, after the jobs of the stages it needs.
    → job numbers. UserError where sbatch refuses; what was submitted before is named."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, str] = {}
    for stage, text in scripts.items():
        path = folder / f"{stage}.sbatch"
        with files.naming(path):
            path.write_text(text, encoding="utf-8")
        command = ["sbatch", "--parsable"]
        if before := [jobs[need] for need in needs[stage] if need in jobs]:
            command += [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"]
        try:
            ended = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise UserError("--submit slurm: sbatch is not on the PATH; submit from a login node") from None
        except subprocess.CalledProcessError as error:
            first = (error.stderr or error.stdout).strip().splitlines() or ["it said nothing"]
            sent = "".join(f"; {name} is job {number}" for name, number in jobs.items())
            raise UserError(f"--submit slurm: sbatch refused {path}: {first[0]}{sent}") from None
        jobs[stage] = ended.stdout.strip().split(";")[0]
    return jobs

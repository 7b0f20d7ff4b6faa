"""Submit the stages of an experiment as SLURM jobs: one job per stage, chained by afterok.

SLURM warns a job by SIGUSR1 before its time limit, and by SIGTERM when it preempts it with a grace
period. The job then saves, ends with exit code 75 and puts itself back in the queue, to resume from
its checkpoint. Exit codes 2 and 3 need a person: they end the chain.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store import files

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}-{stage}
#SBATCH --output="{log}"
#SBATCH --open-mode=append
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={processes}
#SBATCH --time={time}
#SBATCH --signal=USR1@{warn_seconds}
#SBATCH --requeue
{more}
# {stage} of {name}, written by `rlhf run --submit slurm`. Exit code 0: done; 2, 3: see the log.
# After a signal (75) or a kill the job is queued again and resumes from its newest checkpoint;
# after other errors, three times at most.
cd {cwd} || exit 2
{setup}
restarts=${{SLURM_RESTART_COUNT:-0}}
restart={restart}
[ "$restarts" -gt 0 ] && restart=
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
[ -n "${{SLURM_CPUS_PER_TASK:-}}" ] && export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}}"
code=0
srun --kill-on-bad-exit=0{cpus} bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \\
  LOCAL_WORLD_SIZE={processes} exec "$@"' rlhf {command} $restart || code=$?
case $code in
0 | 2 | 3) exit $code ;;
1 | 4) most=3 ;;
*) most={max_restarts} ;;
esac
[ "$restarts" -lt "$most" ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
"""


def script(stage: str, experiment: Any, folder: Path, argv: list[str], *, restart: bool, shared: bool) -> str:
    """Return the batch script of one stage.

    Args:
        stage: the stage to run.
        experiment: the validated config.
        folder: where the log goes.
        argv: what follows `rlhf run STAGE --only`.
        restart: drop an interrupted run, but only at the job's first start, not when it was queued
            again.
        shared: whether several processes work on the stage; otherwise it gets one process and no
            GPUs.
    """
    launch, slurm = experiment.launch, experiment.launch.slurm
    requests = {
        "partition": slurm.partition,
        "account": slurm.account,
        "gpus-per-node": (slurm.gpus_per_node or None) if shared else None,
        "cpus-per-task": slurm.cpus_per_process,
    }
    more = [f"#SBATCH --{key}={value}" for key, value in requests.items() if value is not None]
    command = [sys.executable, "-m", "pipeline.cli", "run", stage, "--only", *argv]
    if not shared:
        command += ["launch.nodes=1", "launch.processes=1"]
    return SCRIPT.format(
        name=experiment.name,
        stage=stage,
        # % begins a placeholder in SLURM's file names
        log=f"{str(folder).replace('%', '%%')}/{stage}-%j.log",
        nodes=launch.nodes if shared else 1,
        processes=launch.processes if shared else 1,
        time=slurm.time,
        warn_seconds=slurm.warn_seconds,
        max_restarts=slurm.max_restarts,
        more="\n".join([*more, *(f"#SBATCH {line}" for line in slurm.options)]),
        cwd=shlex.quote(os.getcwd()),
        setup="\n".join(slurm.setup),
        restart="--restart" if restart else "",
        cpus=f" --cpus-per-task={slurm.cpus_per_process}" if slurm.cpus_per_process else "",
        command=shlex.join(command),
    )


def submit(
    scripts: dict[str, str], needs: dict[str, list[str]], folder: Path, environment: dict[str, str]
) -> dict[str, str]:
    """Write the batch scripts and submit them, each after the jobs of the stages that it needs.

    Args:
        scripts: the text of each stage's script, in the order of the stages.
        needs: the stages that each stage needs.
        folder: where the scripts go.
        environment: the variables that the jobs inherit.

    Returns:
        The job number of each stage.

    Raises:
        UserError: there is no sbatch, or it refuses; the message names the jobs that were
            submitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, str] = {}
    for stage, text in scripts.items():
        path = folder / f"{stage}.sbatch"
        with files.name_in_errors(path):
            path.write_text(text, encoding="utf-8")
        command = ["sbatch", "--parsable"]
        if before := [jobs[need] for need in needs[stage] if need in jobs]:
            command += [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"]
        command.append(str(path))
        try:
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise UserError("--submit slurm: sbatch is not on the PATH; submit from a login node") from None
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or error.stdout).strip().splitlines() or ["it gave no reason"]
            submitted = "".join(f"; {name} is job {number}" for name, number in jobs.items())
            raise UserError(f"--submit slurm: sbatch refused {path}: {lines[0]}{submitted}") from None
        jobs[stage] = ended.stdout.strip().split(";")[0]
    return jobs

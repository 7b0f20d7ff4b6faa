"""Open a run in each kind of tracker, new or continued, through accelerate's tracker classes.

A run that is resumed must not be written twice. Where a tracker keeps files of its own here, they
are written again from the journals. A server says which figures it has, and they are left out.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.trackers.rows import Entry
from pipeline.trackers.run import TrackedRun

Figure = tuple[str, int]  # a name and a step


@dataclass
class OpenRun:
    """A run that is open in one tracker."""

    tracker: Any
    """accelerate's GeneralTracker, started."""
    has: set[Figure] = field(default_factory=set)
    """Figures that the tracker has from before."""
    has_until: int = -1
    """A step up to which it has all figures, for one that says no more."""
    skip: int = 0
    """How many entries it has from before, for one that counts entries."""
    counts: bool = False
    """Whether it numbers entries itself: the step is then a figure among the others (wandb)."""
    write_samples: Callable[[int, tuple[dict[str, Any], ...]], None] | None = None
    """Writes the samples of a step; None if the tracker shows no text."""

    def send(self, entry: Entry) -> None:
        """Send an entry, or what the tracker does not have of it."""
        if self.skip > 0:
            self.skip -= 1
            return
        if entry.step <= self.has_until:
            return
        if entry.texts:
            if self.write_samples is not None and ("samples", entry.step) not in self.has:
                self.write_samples(entry.step, entry.texts)
            return
        if self.counts:
            self.tracker.log({**entry.figures, "step": entry.step})
            return
        figures = {key: value for key, value in entry.figures.items() if (key, entry.step) not in self.has}
        if figures:
            self.tracker.log(figures, step=entry.step)

    def takes(self, entry: Entry) -> bool:
        """Return whether the tracker shows an entry of its kind."""
        return not entry.texts or self.write_samples is not None


def open_run(name: str, run: TrackedRun) -> OpenRun:
    """Open a run in a tracker and show its settings there.

    Raises:
        Exception: Whatever the tracker raises.
    """
    return OPENERS[name](run)


def start(name: str, title: str, run: TrackedRun, folder: str | None = None, /, **arguments: Any) -> Any:
    """Start one of accelerate's trackers.

    Args:
        name: The tracker.
        title: Its project, experiment or run, whichever accelerate's class takes first.
        run: The run.
        folder: Where it keeps its files, for those that accelerate gives a folder.
        **arguments: Of the tracker itself; the user's options are added.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    places = [folder] if tracker_class.requires_logging_directory else []
    tracker = tracker_class(title, *places, **(run.options.get(name, {}) | arguments))
    tracker.start()
    return tracker


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return nested settings as one level of dotted names, with values that every tracker takes."""
    result: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            result[prefix + key] = value
        else:
            result[prefix + key] = json.dumps(value, ensure_ascii=False)
    return result


def tags(run: TrackedRun) -> dict[str, str]:
    """Return the tags of a run, by which it is found again."""
    return {"run_id": run.run_id, "experiment": run.experiment, "stage": run.stage}


def markdown(texts: tuple[dict[str, Any], ...]) -> str:
    """Return samples as Markdown, which shows their texts as they are."""
    parts = []
    for number, row in enumerate(texts, 1):
        figures = [f"{key} {value}" for key, value in row.items() if key not in ("step", "prompt", "response")]
        parts.append(f"**{number}** {' · '.join(figures)}".rstrip())
        for key in ("prompt", "response"):
            text = row.get(key, "")
            text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
            parts.append(f"{key}:\n\n" + "\n".join("    " + line for line in text.splitlines() or [""]))
    return "\n\n".join(parts)


def columns_and_rows(texts: tuple[dict[str, Any], ...]) -> tuple[list[Any], list[list[str]]]:
    """Return samples as a table: the keys of any row, and the values as text."""
    columns = list(dict.fromkeys(key for row in texts for key in row))
    return columns, [[str(row.get(column, "")) for column in columns] for row in texts]


# -- trackers that keep files here: written again from the journals ------------------------------


def open_tensorboard(run: TrackedRun) -> OpenRun:
    """Open tensorboard/STAGE, which holds the newest run of the stage, whole."""
    shutil.rmtree(run.file("tensorboard", run.stage), ignore_errors=True)
    tracker = start("tensorboard", run.stage, run, str(run.file("tensorboard")))
    writer = tracker.tracker
    lines = [f"    {key}: {value}" for key, value in flat(run.config).items()]
    writer.add_text("settings", "\n".join(lines), global_step=0)
    if type(writer).__module__.startswith("torch."):
        from torch.utils.tensorboard.summary import hparams

        # accelerate's own method would show them as a run of their own, named by the time of day
        for summary in hparams(flat(run.config), {}):
            writer.file_writer.add_summary(summary)
    writer.flush()

    def write_samples(step: int, texts: tuple[dict[str, Any], ...]) -> None:
        tracker.log({"samples": markdown(texts)}, step=step)

    return OpenRun(tracker, write_samples=write_samples)


def open_dvclive(run: TrackedRun) -> OpenRun:
    """Open dvclive/STAGE; Live removes what an earlier run left there."""
    quiet = {"save_dvc_exp": False, "dvcyaml": False} | run.options.get("dvclive", {})  # it would write into git
    tracker = start("dvclive", run.stage, run, dir=str(run.file("dvclive", run.stage)), resume=False, **quiet)
    tracker.store_init_configuration(flat(run.config))
    return OpenRun(tracker)


# -- Weights & Biases ----------------------------------------------------------------------------


def open_wandb(run: TrackedRun) -> OpenRun:
    """Open a run online, continued by its id, or write an offline run again from the journals."""
    import wandb

    is_offline = run.wandb_mode == "offline"
    if is_offline:  # wandb cannot continue an offline run
        for folder in run.file("wandb").glob(f"offline-run-*-{run.run_id}"):
            shutil.rmtree(folder)
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", 30)),
        x_stats_pid=os.getppid(),  # the machine's figures are those of training, not of this process
    )
    tracker = start(
        "wandb",
        run.project,
        run,
        name=f"{run.experiment}/{run.stage}",
        group=run.experiment,
        job_type=run.stage,
        id=run.run_id,
        resume=None if is_offline else "allow",
        mode=run.wandb_mode,
        dir=run.base,
        config=run.config,
        settings=settings,
    )
    # wandb drops what is logged for an earlier step, as an evaluation after a resume can be. So it
    # numbers entries itself, and its charts take our steps.
    tracker.tracker.define_metric("step", hidden=True)
    tracker.tracker.define_metric("*", step_metric="step")

    def write_samples(step: int, texts: tuple[dict[str, Any], ...]) -> None:
        columns, rows = columns_and_rows(texts)
        tracker.log({"samples": wandb.Table(columns=columns, data=rows), "step": step})

    return OpenRun(tracker, skip=tracker.tracker.starting_step, counts=True, write_samples=write_samples)


# -- trackers that say which figures they have ---------------------------------------------------


def open_mlflow(run: TrackedRun) -> OpenRun:
    """Open a run of the experiment PROJECT/NAME, found again by its tag."""
    # its own waits are minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow

    files = None
    if "MLFLOW_TRACKING_URI" not in os.environ:
        folder = run.file("mlflow")
        folder.mkdir(exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        files = (folder / "files").as_uri()
    title = os.environ.get("MLFLOW_EXPERIMENT_NAME", f"{run.project}/{run.experiment}")  # as accelerate does
    client = mlflow.MlflowClient()
    known = client.get_experiment_by_name(title)
    found = [] if known is None else client.search_runs([known.experiment_id], f"tags.run_id = '{run.run_id}'")
    own_tags = run.options.get("mlflow", {}).get("tags", {}) | tags(run)
    run_id = found[0].info.run_id if found else None
    tracker = start("mlflow", title, run, logging_dir=files, run_id=run_id, run_name=run.stage, tags=own_tags)
    if not found:
        tracker.store_init_configuration(flat(run.config))
    run_id = tracker.tracker.info.run_id
    names = client.get_run(run_id).data.metrics
    has = {(name, point.step) for name in names for point in client.get_metric_history(run_id, name)}

    def write_samples(step: int, texts: tuple[dict[str, Any], ...]) -> None:
        client.log_text(run_id, markdown(texts), f"samples/step-{step:08d}.md")

    return OpenRun(tracker, has, write_samples=write_samples)


def open_trackio(run: TrackedRun) -> OpenRun:
    """Open a run by its name; one that is in a Space or on a server says only its last step."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{run.experiment}-{run.stage}-{run.run_id[:8]}"
    quiet = {"embed": False, "auto_log_cpu": False} | run.options.get("trackio", {})
    # before it starts: a run of this name is then an earlier one's
    has = {(key, row["step"]) for row in SQLiteStorage.get_logs(run.project, name) for key in row}
    given = {"name": name, "group": run.experiment, "resume": "allow", "config": flat(run.config)}
    tracker = start("trackio", run.project, run, **(quiet | given))
    is_remote = any(quiet.get(key) for key in ("space_id", "server_url"))
    is_remote |= any(key in os.environ for key in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
    has_until = tracker.tracker._next_step - 1 if is_remote else -1  # the one place where trackio says it

    def write_samples(step: int, texts: tuple[dict[str, Any], ...]) -> None:
        columns, rows = columns_and_rows(texts)
        tracker.log({"samples": trackio.Table(columns=columns, data=rows)}, step=step)

    return OpenRun(tracker, has, has_until=has_until, write_samples=write_samples)


def open_comet_ml(run: TrackedRun) -> OpenRun:
    """Open an experiment by its key; start an offline one anew, since it cannot be asked."""
    import comet_ml

    is_offline = run.options.get("comet_ml", {}).get("online") is False
    key = f"{run.run_id}x{run.resumes}" if is_offline and run.resumes else run.run_id
    # what comet would read of this process, which is not the one that trains
    automatic = ("log_code", "log_git_patch", "auto_output_logging", "auto_param_logging", "auto_metric_logging")
    details = comet_ml.ExperimentConfig(
        name=f"{run.experiment}/{run.stage}", tags=[run.experiment, run.stage], **dict.fromkeys(automatic, False)
    )
    given: dict[str, Any] = {"experiment_config": details} | run.options.get("comet_ml", {})
    tracker = start("comet_ml", run.project, run, **(given | {"experiment_key": key, "mode": "get_or_create"}))
    experiment = tracker.tracker
    tracker.store_init_configuration(flat(run.config))
    has = set()
    if run.resumes and not is_offline:
        points = comet_ml.APIExperiment(previous_experiment=key).get_metrics() or []
        has = {(point["metricName"], int(point["step"])) for point in points if point["step"] is not None}

    def write_samples(step: int, texts: tuple[dict[str, Any], ...]) -> None:
        experiment.log_text(markdown(texts), step=step)

    return OpenRun(tracker, has, write_samples=write_samples if not run.resumes else None)


def open_clearml(run: TrackedRun) -> OpenRun:
    """Open a task of the project PROJECT/NAME, continued by its id."""
    from clearml import Task

    project = f"{run.project}/{run.experiment}"
    own_tags = list(tags(run).values())
    given: dict[str, Any] = {"project_name": project, "task_name": run.stage, "tags": own_tags}
    # all that would hook into libraries or read this process, which is not the one that trains
    automatic = ("auto_connect_arg_parser", "auto_connect_frameworks", "auto_resource_monitoring")
    given |= dict.fromkeys((*automatic, "auto_connect_streams"), False)
    earlier = []
    if run.resumes and not Task.is_offline():  # an offline one cannot be asked, and is made anew
        earlier = Task.get_tasks(project_name=project, task_name=f"^{run.stage}$", tags=[run.run_id])
    if earlier:
        given |= {"continue_last_task": earlier[0].id}
    else:
        given |= {"reuse_last_task_id": False}
    tracker = start("clearml", project, run, **given)
    task = tracker.tracker
    has: set[Figure] = set()
    if earlier:
        task.set_initial_iteration(0)  # otherwise steps would be counted from the last one on
        for title, series in task.get_all_reported_scalars().items():
            for kind, points in series.items():
                name = title if kind == "train" else f"{kind}_{title}"  # as accelerate takes names apart
                has |= {(name, int(step)) for step in points["x"]}
    tracker.store_init_configuration(run.config)

    def write_samples(step: int, texts: tuple[dict[str, Any], ...]) -> None:
        columns, rows = columns_and_rows(texts)
        tracker.log_table("samples", columns=columns, data=rows, step=step)

    return OpenRun(tracker, has, write_samples=write_samples)


# -- trackers that keep one value of a name and a step -------------------------------------------


def open_aim(run: TrackedRun) -> OpenRun:
    """Open a run of the repository aim/; a figure that is tracked again replaces itself.

    aim chooses the names of runs, and finds only those that it has indexed: a file remembers them.
    """
    folder = run.file("aim")
    folder.mkdir(exist_ok=True)
    known = folder / f"run-{run.run_id}.txt"
    given: dict[str, Any] = {"experiment": run.experiment, "system_tracking_interval": None}
    if known.exists():
        given |= {"run_hash": known.read_text(), "force_resume": True}  # a kill leaves aim's own lock behind
    tracker = start("aim", run.stage, run, str(folder), capture_terminal_logs=False, **given)
    known.write_text(tracker.tracker.hash)
    tracker.store_init_configuration(run.config)
    tracker.tracker["tags"] = tags(run)
    return OpenRun(tracker)


def open_swanlab(run: TrackedRun) -> OpenRun:
    """Open an experiment by its id; SwanLab ignores a step that a figure has already.

    One that is not online cannot be continued, and is made anew.
    """
    is_online = run.options.get("swanlab", {}).get("mode", "online") in ("online", "cloud")
    run_id = run.run_id if is_online or not run.resumes else f"{run.run_id}x{run.resumes}"
    given: dict[str, Any] = {"id": run_id, "resume": "allow", "group": run.experiment}
    given |= {"name": f"{run.experiment}/{run.stage}", "config": flat(run.config)}
    folder = run.file("swanlab")
    folder.mkdir(exist_ok=True)
    return OpenRun(start("swanlab", run.project, run, log_dir=str(folder), **given))


OPENERS: dict[str, Callable[[TrackedRun], OpenRun]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "mlflow": open_mlflow,
    "trackio": open_trackio,
    "comet_ml": open_comet_ml,
    "aim": open_aim,
    "clearml": open_clearml,
    "dvclive": open_dvclive,
    "swanlab": open_swanlab,
}

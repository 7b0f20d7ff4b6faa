"""Stand-ins for trackers whose packages are not installed, as modules in a folder.

Each writes what it is told as lines of `calls.jsonl` beside it, and keeps what a server would keep,
so that a second process finds it. `TROUBLE` makes one fail: `TROUBLE=aim.track:raise` or `:hang`.
"""

import json
from textwrap import dedent

COMMON = """\
import json, os, time
from pathlib import Path

HERE = Path(__file__).parent

def note(tracker, call, **values):
    with open(HERE / "calls.jsonl", "a") as file:
        file.write(json.dumps({"tracker": tracker, "call": call, **values}, default=str) + "\\n")
    place, _, trouble = os.environ.get("TROUBLE", "").partition(":")
    if place == f"{tracker}.{call}":
        if trouble == "hang":
            time.sleep(600)
        if trouble == "die":
            os.kill(os.getpid(), 9)
        if trouble == "full":
            raise OSError(28, "No space left on device")
        raise RuntimeError(trouble)

def noted(tracker, call):
    path = HERE / "calls.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["tracker"] == tracker and row["call"] == call]
"""

MODULES = {
    "aim": """
        from standin import note, noted

        class Run:
            def __init__(self, run_hash=None, *, repo, experiment, force_resume=False, **quiet):
                assert not any(quiet.values()) and len(quiet) == 2
                self.hash = run_hash or f"hash-{len(noted('aim', 'run'))}"
                note("aim", "run", hash=self.hash, repo=repo, experiment=experiment)
            def __setitem__(self, key, value):
                note("aim", "set", hash=self.hash, key=key, value=value)
            def track(self, value, name, step):
                note("aim", "track", run=self.hash, key=name, step=step, value=value)
            def close(self):
                note("aim", "finish", run=self.hash)
    """,
    "comet_ml": """
        from standin import note, noted
        __version__ = "3.50.0"

        class Experiment:
            def __init__(self, key):
                self.key = key
            def set_step(self, step): pass
            def log_parameters(self, values): note("comet_ml", "parameters", values=values)
            def log_metric(self, key, value, step):
                note("comet_ml", "track", run=self.key, key=key, step=step, value=value)
            def log_text(self, text, step): note("comet_ml", "text", text=text, step=step)
            def end(self): note("comet_ml", "finish", run=self.key)

        def ExperimentConfig(name, tags, **automatic):
            assert not any(automatic.values())
            return {"name": name, "tags": tags}

        def start(project_name, experiment_key, mode, experiment_config, online=True):
            note("comet_ml", "tags", **experiment_config)
            note("comet_ml", "start", project=project_name, run=experiment_key)
            return Experiment(experiment_key)

        class APIExperiment:
            def __init__(self, previous_experiment): self.key = previous_experiment
            def get_metrics(self):
                rows = [row for row in noted("comet_ml", "track") if row["run"] == self.key]
                return [{"metricName": row["key"], "step": row["step"]} for row in rows] or None
    """,
    "clearml": """
        from standin import note, noted

        class Logger:
            def __init__(self, run): self.run = run
            def report_scalar(self, title, series, value, iteration):
                note("clearml", "track", run=self.run, key=title, series=series, step=iteration, value=value)
            def report_table(self, title, series, table_plot, iteration):
                note("clearml", "text", step=iteration)

        class Task:
            def __init__(self, task_id): self.id = task_id
            @staticmethod
            def current_task(): return None
            @staticmethod
            def is_offline(): return False
            @staticmethod
            def get_tasks(project_name, task_name, tags):
                return [Task(row["run"]) for row in noted("clearml", "init") if tags[0] in row["tags"]][:1]
            @staticmethod
            def init(project_name, task_name, tags, reuse_last_task_id=True, continue_last_task=None, **automatic):
                assert not any(automatic.values()) and len(automatic) == 4
                task = Task(continue_last_task or f"task-{len(noted('clearml', 'init'))}")
                note("clearml", "init", run=task.id, tags=tags, project=project_name)
                return task
            def set_initial_iteration(self, number): assert number == 0
            def get_all_reported_scalars(self):
                found = {}
                for row in noted("clearml", "track"):
                    if row["run"] == self.id:
                        series = found.setdefault(row["key"], {})
                        series.setdefault(row["series"], {"x": []})["x"].append(row["step"])
                return found
            def connect_configuration(self, values): note("clearml", "parameters", values=values)
            def get_logger(self): return Logger(self.id)
            def close(self): note("clearml", "finish", run=self.id)
    """,
    "swanlab": """
        from standin import note, noted
        config = {}

        class Run:
            def __init__(self, run): self.run = run
            def log(self, values, step):
                have = {(row["key"], row["step"]) for row in noted("swanlab", "track") if row["run"] == self.run}
                for key, value in values.items():
                    if (key, step) not in have:  # as the real one
                        note("swanlab", "track", run=self.run, key=key, step=step, value=value)
            def finish(self): note("swanlab", "finish", run=self.run)

        def init(project, id, resume, group, name, config, log_dir, mode="online"):
            note("swanlab", "init", run=id, group=group, name=name, config=config)
            return Run(id)
    """,
    "dvclive": """
        from standin import note
        from dvclive import plots

        class Live:
            def __init__(self, dir, resume, save_dvc_exp, dvcyaml):
                assert not resume and not save_dvc_exp
                note("dvclive", "live", dir=dir)
                self.step = 0
            def log_params(self, values): note("dvclive", "parameters", values=values)
            def log_metric(self, key, value): note("dvclive", "track", run="", key=key, step=self.step, value=value)
            def next_step(self): self.step += 1
            def end(self): note("dvclive", "finish")
    """,
}
PLOTS = """
    class Metric:
        @staticmethod
        def could_log(value): return isinstance(value, (int, float))
"""


def install(folder, names):
    """Write the stand-ins of some trackers into a folder that is on the path of Python."""
    folder.mkdir()
    (folder / "standin.py").write_text(COMMON)
    for name in names:
        package = folder / name
        package.mkdir()
        (package / "__init__.py").write_text(dedent(MODULES[name]))
        if name == "dvclive":
            (package / "plots.py").write_text(dedent(PLOTS))


def calls(folder, tracker, call):
    """Return what a stand-in was told."""
    path = folder / "calls.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["tracker"] == tracker and row["call"] == call]

"""Test the house rules: who may import whom, nothing at import time, the README's tree, the
configs.

Imports are read from syntax trees, so that late imports count, too.
"""

import ast
import importlib
import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

from pipeline.trackers.names import PACKAGES
from tests.shipped import settings_for

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data", "pipeline", "stages")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
STAGES = ("world", "base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate", "report")


def name_of(path):
    """Return a file's module: stages/ppo/run.py → stages.ppo.run, data/__init__.py → data."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """Return all modules that a file imports anywhere; `from a import b` gives a and a.b."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            modules.add(ast.unparse(node.args[0]).strip("'\"f").split("{")[0].rstrip("."))
    return modules


def ours(path):
    """Return the modules of the three rooms that a file imports."""
    return {name for name in imports(path) if name.split(".")[0] in ROOMS}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_between_rooms(path):
    name, room = name_of(path), name_of(path).split(".")[0]
    own = {other for other in ours(path) if other.split(".")[0] == room}
    foreign = ours(path) - own
    # these name the stages, and inspect data files
    if name in ("pipeline.api", "pipeline.commands", "pipeline.data_commands", "pipeline.init"):
        return
    if room == "data":  # of the pipeline, data may import the class of errors
        foreign -= {"pipeline.errors", "pipeline.errors.UserError"}
    if room in ("data", "pipeline"):
        assert not foreign, f"{name} imports {foreign}"
    if name.startswith("stages.objectives"):
        outside = {other.split(".")[0] for other in imports(path)} - sys.stdlib_module_names - {"torch", "stages"}
        assert not outside and all(other.startswith("stages.objectives") for other in ours(path)), f"{name}: {outside}"
    if room == "data" or name.startswith(("stages.objectives", "stages.models", "stages.rollouts", "stages.scorers")):
        configs = {other for other in imports(path) if re.match(r"(pydantic|pipeline\.(config|sections))\b", other)}
        assert not configs, f"{name} imports {configs}: config objects stop at the stage files"
    if room == "stages":
        others = {f"stages.{stage}" for stage in STAGES} - {name}
        met = {
            other
            for other in own
            if not name.startswith("stages.ppo.") or not other.startswith("stages.ppo.")
            if not name.startswith("stages.settings.")  # a declaration imports its stage when that runs
            if any(other == stage or other.startswith(f"{stage}.") for stage in others)
        }
        assert not met, f"{name} imports {met}: stages meet in the artifact folder"


def test_the_minimal_chain_stands_on_the_formulas_and_the_data():
    """Of stages, minimal.py imports objectives and the loading of models; nothing of pipeline."""
    allowed = ("data", "stages.objectives", "stages.models.loading")
    modules = ours(ROOT / "stages/minimal.py")
    assert not [name for name in modules if not name.startswith(allowed)]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_trackers_only_where_runs_are_opened(path):
    modules = {module for package in PACKAGES.values() for module in package.modules}
    names = {name.split(".")[0] for name in imports(path)}
    assert not names & modules or name_of(path) == "pipeline.trackers.kinds"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_can_be_imported_and_has_a_docstring(path):
    module = importlib.import_module(name_of(path))
    assert (module.__doc__ or "").strip(), f"{path}: no docstring"


def test_nothing_happens_at_import_time():
    """All modules can be imported without network and devices, and use nothing deprecated."""
    names = [name_of(path) for path in MODULES]
    code = f"""\
import importlib, socket, sys, warnings
warnings.filterwarnings("error", category=DeprecationWarning, module="(data|pipeline|stages)[.]")
def refuse(*_, **__): raise AssertionError("at import time")
socket.socket.connect = socket.create_connection = refuse
import torch
torch.cuda.is_available = torch.cuda.init = torch.cuda.device_count = refuse
for name in {names!r}:
    importlib.import_module(name)
print(sorted({{"wandb", "tensorboard", "trl", "datasets", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", "heavy libraries are imported where they are used"


def test_packages_are_named():
    import tomllib

    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    real = {name_of(path) for path in MODULES if path.name == "__init__.py"}
    assert named == real
    assert {path.parent for path in MODULES} == {path.parent for path in MODULES if path.name == "__init__.py"}


PATH_LIKE = re.compile(r"[\w.-]+/|[\w.-]+\.(py|md|yaml|toml|txt|j2)|Makefile|LICENSE|\.ci/run|\.gitignore")


def tree_block():
    """Return the README's fenced block whose first line is `rlhf-pipeline/`, without that line."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    starts = [i for i in range(1, len(lines)) if lines[i] == "rlhf-pipeline/" and lines[i - 1].startswith("```")]
    assert len(starts) == 1, "README.md has no fenced block that begins with the line `rlhf-pipeline/`"
    end = next(i for i in range(starts[0], len(lines)) if lines[i].startswith("```"))
    return lines[starts[0] + 1 : end]


def tree_paths():
    """Return every path in the README's tree; folders end with a slash.

    A line has an indentation (spaces or drawn branches), one or more names, and after two spaces
    their description. A line without a name continues the description.
    """
    paths, parents = [], []  # parents: (indentation, folder/)
    for line in tree_block():
        bare = re.sub("[│├└─]", " ", line)
        indent = len(bare) - len(bare.lstrip())
        names = list(takewhile(PATH_LIKE.fullmatch, re.split(r"\s{2,}", bare.strip())[0].split()))
        if not names:
            continue
        while parents and parents[-1][0] >= indent:
            parents.pop()
        paths += ["".join(folder for _, folder in parents) + name for name in names]
        if names[0].endswith("/"):
            parents.append((indent, names[0]))
    return paths


def test_the_readmes_tree_is_the_real_one():
    named = tree_paths()
    for path in named:
        real = ROOT / path
        assert real.is_dir() if path.endswith("/") else real.is_file(), f"README.md names {path}"
    for room in ROOMS:
        assert f"{room}/" in named, f"README.md's tree leaves out {room}/"
        listed = {
            path.rstrip("/").rsplit("/", 1)[0] for path in named if path.startswith(f"{room}/") and path != f"{room}/"
        }
        for folder in sorted(listed):  # the tree lists all of a folder, or nothing
            contents = [path for path in (ROOT / folder).iterdir() if not path.name.startswith("__")]
            names = {
                f"{path.relative_to(ROOT)}/" if path.is_dir() else str(path.relative_to(ROOT)) for path in contents
            }
            assert names <= set(named), f"README.md's tree leaves out {sorted(names - set(named))}"


CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.y*ml") if "launch" not in path.parts)


def test_there_are_shipped_configs():
    assert CONFIGS, "configs/ is empty"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_validates(path, tmp_path, monkeypatch):
    from pipeline import api

    monkeypatch.chdir(ROOT)
    assert api.load_experiment(path, *settings_for(path, tmp_path)).name == path.stem


def test_every_setting_says_what_it_means():
    from pipeline import api
    from pipeline.config.help import describe

    assert not [row.key for row in describe(api.experiment_class(), "") if not row.meaning]


def test_stages_declare_what_the_pipeline_needs():
    from pipeline import api

    declared = api.stages()
    assert tuple(name for name, stage in declared.items() if stage.section) == api.OPTIONAL
    stages = {name: stage for name, stage in declared.items() if name not in api.OPTIONAL}
    assert tuple(stages) == api.STAGES
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = re.search(r"^STAGES +:= (.*)$", makefile, re.MULTILINE)
    assert listed is not None and tuple(listed[1].split()) == api.STAGES, "STAGES in the Makefile"
    assert all(re.search(rf"^{name}: ", makefile, re.MULTILINE) for name in stages), "a target for each stage"
    for name, stage in stages.items():
        assert name == stage.name and stage.summary.endswith(".")
        assert api.experiment_class().model_fields[name].annotation is stage.settings
        assert all(sentence.strip() for sentence in stage.metrics.values())
        earlier = list(declared)[: list(declared).index(name)]
        late = [need for need in stage.needs(api.experiment_class()(name="a")) if need not in earlier]
        assert not late, f"{name} needs {late}, which come after it"


TORCH_FREE = ("torch", "transformers", "datasets", "trl", "accelerate", "peft")


def imported_by(code, *words):
    """Run code in a new process; return which of TORCH_FREE it imported, and its output."""

    code += f"\nimport sys; print('IMPORTED', sorted(set({TORCH_FREE!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("IMPORTED ")[2].strip(), done.stdout + done.stderr


def test_declarations_import_no_torch():
    names = [name for name in map(name_of, MODULES) if name.startswith("stages.settings")]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)"
    code += "\nassert 'data.sources' not in sys.modules, 'a tenth of the time of `rlhf status`'"
    imported, _ = imported_by(code)
    assert imported == "[]" and "stages.settings.experiment" in names


@pytest.mark.parametrize(
    "words, code",
    [
        ("--version", 0),
        ("run --help", 0),
        ("run ppo --help", 0),
        ("status -c configs/tiny.yaml", 0),
        ("status -c configs/tiny.yaml ppo.kl_coef=high", 2),
        ("status -c configs/tiny.yaml ppo.kl_coef=[0.05,0.1] seed=[0,1]", 0),
        ("run sft -c configs/tiny.yaml sft.max_length=1000", 2),
        ("run sft -c configs/none.yaml", 2),
        ("data check FILE", 0),
        ("data preview FILE", 0),
        ("data stats FILE", 0),
        ("data convert FILE --to prompts -o FOLDER/out.jsonl", 0),
        ("init -o FOLDER/my.yaml --model org/model --data FILE", 0),
    ],
)
def test_quick_commands_import_no_torch(words, code, tmp_path):
    (tmp_path / "demonstrations.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = words.replace("FILE", str(tmp_path / "demonstrations.jsonl")).replace("FOLDER", str(tmp_path))
    call = f"from pipeline.cli import main\nassert main({[*words.split()]!r}) == {code}"
    assert imported_by(call)[0] == "[]"

"""Test what commands read: an up-to-date chain by its times, and inputs whole before their use."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.store import digest_memory, digests
from pipeline.store.artifacts import ArtifactStore
from tests.pipeline import fakes


@pytest.fixture
def commands(world, tmp_path, monkeypatch):
    """Return the fake experiment, each of whose commands is a new one, with rows that `fit` reads.

    `world.read` lists the files that the last command read; times are distinct after 0.02 s.
    """
    monkeypatch.setattr(digests, "TIMESTAMP_STEP", 0.0)
    world.stages, world.read = fakes.stages(reads=["prompts"]), []
    world.rows = tmp_path / "rows.jsonl"
    world.rows.write_text('{"prompt": "a"}\n')
    world.at = f"data.prompts={world.rows}"
    read_file = digests.read_file
    monkeypatch.setattr(digests, "read_file", lambda path: (world.read.append(path), read_file(path))[1])

    def begin(trusts=True):
        time.sleep(0.02)
        world.read.clear()
        world.store = ArtifactStore(tmp_path / "artifacts", "small")
        world.store.digests.trusts = trusts

    world.begin = begin
    world.run("page", world.at)
    begin()
    world.states(world.at)  # files whose rename changed their ctime are read once more
    return world


def flip(path, world, is_told=True):
    """Flip a bit of a file and restore its mtime.

    Args:
        path: The file.
        world: The experiment.
        is_told: Whether its ctime shows it, as after any write. A damaged disk changes no times:
            the memory is then made to name the new ctime with the old digest.
    """
    memory = world.store.digests.memory
    name = digest_memory.name_of(os.path.abspath(path), memory)
    before, stamp = digest_memory.load(memory)[name], path.stat()
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    if not is_told:
        digest_memory.add(memory, {name: before._replace(identity=digest_memory.identity(path))})


def kinds(states):
    return {name: state.kind for name, state in states.items()}


def test_status_and_a_run_with_nothing_to_do_read_nothing(commands):
    commands.begin()
    assert set(kinds(commands.states(commands.at)).values()) == {"done"} and commands.read == []
    commands.begin()
    commands.run("page", commands.at)
    assert commands.read == [] and commands.console.text.count("up to date") == 3


def test_a_run_with_nothing_to_do_imports_no_torch(tmp_path):
    (tmp_path / "small.yaml").write_text(fakes.CONFIG)
    code = "import sys; from tests.pipeline import fakes; code = fakes.install().main(sys.argv[1:]); "
    code += "print('with torch' if 'torch' in sys.modules else 'without torch'); sys.exit(code)"
    root = str(Path(__file__).resolve().parents[2])

    def run(*words):
        command = [sys.executable, "-c", code, "run", "text", "-c", "small.yaml", *words]
        environment = os.environ | {"PYTHONPATH": root}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert run().endswith("with torch\n") and "text: up to date" in (again := run())
    assert again.endswith("without torch\n") and run("--force").endswith("with torch\n")


def test_verify_reads_every_file_once(commands):
    commands.begin(trusts=False)
    commands.states(commands.at)
    published = [path for stage in commands.stages for path in commands.store.published(stage)]
    assert sorted(commands.read) == sorted([*published, commands.rows])


def test_a_start_reads_each_of_its_inputs_once(commands):
    commands.begin()
    commands.run("fit", commands.at, "fit.steps=3")
    folder = commands.store.folder("fit")
    inputs = [path for path in commands.read if folder not in path.parents]
    assert sorted(inputs) == sorted([*commands.store.published("text"), commands.rows])


def test_a_later_start_does_not_read_again_what_the_command_has_read(commands):
    commands.begin()
    commands.run("page", commands.at, "fit.steps=3", force=True)
    assert [commands.read.count(path) for path in commands.store.published("text")] == [1]


def test_a_flipped_bit_that_times_show_is_found_by_status(commands):
    [path] = commands.store.published("text")
    flip(path, commands)
    commands.begin()
    assert kinds(commands.states(commands.at))["text"] == "damaged" and commands.read == [path]


def test_a_flipped_bit_that_no_times_show_is_found_before_its_use(commands):
    [path] = commands.store.published("text")
    flip(path, commands, is_told=False)
    commands.begin()
    assert kinds(commands.states(commands.at))["text"] == "done"  # what times cannot show
    commands.begin()
    with pytest.raises(UserError) as error:
        commands.run("fit", commands.at, "fit.steps=3")
    assert error.value.lines[0].startswith(f"{path}: sha256 is ")
    assert commands.store.run("fit") is None, "refused before it began"
    commands.begin()
    assert kinds(commands.states(commands.at))["text"] == "damaged", "and remembered"


def test_a_flipped_bit_that_no_times_show_is_found_by_verify(commands):
    [path] = commands.store.published("text")
    flip(path, commands, is_told=False)
    commands.begin(trusts=False)
    assert kinds(commands.states(commands.at))["text"] == "damaged"


def test_a_flipped_data_file_is_recorded_as_what_it_is(commands):
    old = commands.store.manifest("fit")["inputs"]["data:prompts"]
    flip(commands.rows, commands, is_told=False)
    commands.begin()
    commands.run("fit", commands.at, "fit.steps=3")
    new = commands.store.manifest("fit")["inputs"]["data:prompts"]
    assert new == digests.Digests().facts(commands.rows).sha256 != old


def test_a_memory_that_is_wrong_says_no_file_is_damaged(commands):
    [path] = commands.store.published("text")
    memory = commands.store.digests.memory
    name = digest_memory.name_of(os.path.abspath(path), memory)
    entry = digest_memory.load(memory)[name]
    digest_memory.add(memory, {name: entry._replace(facts=digest_memory.FileFacts("0" * 64, None))})
    commands.begin()
    assert kinds(commands.states(commands.at))["text"] == "done" and commands.read == [path]


def test_what_is_taken_from_another_experiment_is_read_before_its_use_too(commands, tmp_path):
    commands.path.write_text(
        commands.path.read_text().replace("small", "other") + "from: {experiment: small, stages: [text]}\n"
    )
    from pipeline import api

    def open_store():
        commands.begin()
        commands.store = api.open_store(commands.load(), api.Location(tmp_path / "artifacts"))

    [path] = commands.store.published("text")
    open_store()
    commands.run("fit", commands.at)
    assert commands.read.count(path) == 1
    open_store()
    commands.states(commands.at)
    open_store()
    assert kinds(commands.states(commands.at))["fit"] == "done" and commands.read == []

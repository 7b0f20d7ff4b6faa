"""Test object storage with fsspec's memory file system, and with moto's S3 if that is installed."""

import importlib.util
import json

import fsspec
import pytest

from pipeline import cli
from pipeline.errors import UserError
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.integrity import seal
from pipeline.store.remote import Remote, is_url, local_folder


@pytest.fixture(params=["memory", "s3"])
def url(request, monkeypatch):
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        yield "memory://bucket/rlhf"
        fsspec.filesystem("memory").store.clear()
        return
    if not all(map(importlib.util.find_spec, ("moto", "s3fs"))):
        pytest.skip("moto[server] and s3fs are not installed")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "k",
                        "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{port}"  # moto's contents outlive its server
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    yield f"s3://{bucket}/rlhf"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def machines(world, url, tmp_path):
    """Return machine(name), which switches the world to one machine's folder."""

    def machine(name):
        world.store = ArtifactStore(tmp_path / name, "small")
        world.remote = Remote(url, world.store)
        return world

    return machine


def there(world):
    """Return {path below the experiment: content} of the storage."""
    files, base = world.remote.files, world.remote.base.lstrip("/")
    files.invalidate_cache()
    return {path.lstrip("/").removeprefix(base + "/"): files.cat_file(path) for path in files.find(world.remote.base)}


def test_a_finished_stage_is_fetched_instead_of_run(machines):
    one = machines("one")
    one.run("fit")
    made, names = one.store.verify("fit"), set(there(one))
    assert "fit/manifest.json" in names and {f"fit/{name}" for name in made["outputs"]} < names
    assert not any("checkpoints" in name or "run.json" in name for name in names)
    two = machines("two")
    two.run("fit")
    assert "fetched from" in two.console.text and "fit: up to date" in two.console.text
    assert "running" not in two.console.text
    assert two.store.verify("fit") == made
    two.run("fit")
    assert "fetched" not in two.console.text


def test_the_local_artifact_stays_and_the_later_one_stays_in_the_storage(machines):
    """Two machines with different settings do not undo each other's work."""
    one = machines("one")
    one.run("fit")
    old = one.store.verify("fit")
    two = machines("two")
    two.run("fit")
    two.remote.files.pipe_file(f"{two.remote.base}/fit/left-over", b"x")
    age(two, "fit")
    two.run("fit", "fit.steps=3", force=True)
    new = two.store.verify("fit")
    assert new["digest"] != old["digest"] and "fit/left-over" not in there(two)
    assert json.loads(there(two)["fit/manifest.json"])["digest"] == new["digest"]
    one = machines("one")
    one.run("fit")
    assert "running" not in one.console.text and "fetched" not in one.console.text
    assert one.store.verify("fit") == old
    assert json.loads(there(one)["fit/manifest.json"])["digest"] == new["digest"]
    three = machines("three")
    three.run("fit", "fit.steps=3")
    assert three.store.manifest("fit")["digest"] == new["digest"] and "running" not in three.console.text


def age(world, stage):
    """Date the stage in the storage back to 2020."""
    files, path = world.remote.files, f"{world.remote.base}/{stage}/manifest.json"
    manifest = json.loads(files.cat_file(path)) | {"finished_at": "2020-01-01T00:00:00+00:00"}
    manifest.pop("digest")
    files.pipe_file(path, json.dumps(seal(manifest)).encode())


def test_a_stale_stage_is_not_fetched(machines):
    one = machines("one")
    one.run("fit", "fit.steps=3")
    two = machines("two")
    two.run("fit")
    assert "text: missing; fetched" in two.console.text and "fit: running" in two.console.text


def test_an_interrupted_upload_is_no_artifact_and_is_repeated(machines, monkeypatch):
    """The next stage still runs, and the command reports the failure at its end."""
    one = machines("one")
    put, count = one.remote.files.put_file, []

    def breaking(*args, **kwargs):
        count.append(args)
        if len(count) == 1:
            raise OSError("the line is dead")
        return put(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(one.remote.files, "put_file", breaking)
        with pytest.raises(UserError) as caught:
            one.run("fit")
    assert "the line is dead; check the address" in caught.value.lines[0] and "run again" in caught.value.lines[0]
    assert "fit/manifest.json" in there(one) and "text/manifest.json" not in there(one)
    one.run("fit")
    assert "running" not in one.console.text and "text/manifest.json" in there(one)
    two = machines("two")
    two.run("fit")
    assert "running" not in two.console.text


@pytest.mark.parametrize("damage", ["a file", "a missing file", "the manifest", "a path", "a name", "a field"])
def test_a_damaged_stage_in_the_storage_is_not_fetched(damage, machines):
    """Damage in the storage is one line with the remedy.

    A machine that has the stage itself does not care, and --force repairs the storage too.
    """
    one = machines("one")
    one.run("fit")
    files, base = one.remote.files, f"{one.remote.base}/fit"
    manifest = json.loads(files.cat_file(f"{base}/manifest.json"))
    name = sorted(manifest["outputs"])[0]
    if damage == "a file":
        files.pipe_file(f"{base}/{name}", files.cat_file(f"{base}/{name}")[:-1] + b"?")
    elif damage == "a missing file":
        files.rm_file(f"{base}/{name}")
    elif damage == "the manifest":
        files.pipe_file(f"{base}/manifest.json", files.cat_file(f"{base}/manifest.json")[:-9])
    else:
        if damage == "a field":
            manifest.pop("finished_at")
        else:
            other = "../../escaped" if damage == "a path" else ".lock"
            manifest["outputs"][other] = manifest["outputs"].pop(name)
        manifest.pop("digest")
        files.pipe_file(f"{base}/manifest.json", json.dumps(seal(manifest)).encode())
    two = machines("two")
    with pytest.raises(UserError) as caught:
        two.run("fit")
    assert len(caught.value.lines) == 1
    assert caught.value.lines[0].startswith(f"{two.remote.url}: fit/")
    assert "`rlhf run fit -c CONFIG --force` rebuilds it" in caught.value.lines[0]
    assert not (two.store.folder("fit") / "manifest.json").exists()
    assert not list(two.store.root.rglob("escaped"))
    machines("one").run("fit")
    assert "running" not in one.console.text
    two = machines("two")
    two.run("fit", force=True)
    three = machines("three")
    three.run("fit")
    assert "fit: running" not in three.console.text


def test_a_damaged_local_stage_is_fetched(machines):
    one = machines("one")
    one.run("fit")
    made = one.store.verify("fit")
    name = sorted(made["outputs"])[0]
    (one.store.folder("fit") / name).write_bytes(b"?")
    one.run("fit")
    assert name in one.console.text and "fetched from" in one.console.text and "running" not in one.console.text
    assert one.store.verify("fit") == made


def test_an_interrupted_local_run_is_not_fetched_over(machines):
    one = machines("one")
    one.run("fit")
    two = machines("two")
    two.run("text")
    with two.store.lock("fit"):
        run = {"run_id": "x", "stage": "fit", "world_size": 1, "threads": 1, "device": "cpu", "resumes": 0}
        two.store.begin("fit", run | {"config": {}, "inputs": {}, "fingerprint": ""})
    two.run("fit")
    assert "fit: fetched" not in two.console.text and "fit: running" in two.console.text


@pytest.mark.parametrize("how", ["done", "begun"])
def test_a_concurrent_local_run_is_not_fetched_over(machines, how):
    """The other process finishes or begins the stage between the first check and the lock."""
    one = machines("one")
    one.run("fit")
    there = one.remote.manifest("fit")
    two = machines("two")
    two.run("text")
    remote, manifest = two.remote, two.remote.manifest

    def looked(stage):
        if stage == "fit" and two.store.run("fit") is None and two.store.manifest("fit") is None:
            if how == "done":
                two.remote, console = None, two.console
                two.run("fit")
                two.remote, two.console = remote, console
            else:
                with two.store.lock("fit"):
                    run = {"run_id": "x", "stage": "fit", "world_size": 1, "threads": 1, "device": "cpu", "resumes": 0}
                    two.store.begin("fit", run | {"config": {}, "inputs": {}, "fingerprint": ""})
        return manifest(stage)

    remote.manifest = looked
    two.run("fit")
    assert "fit: missing; fetched" not in two.console.text
    assert two.store.verify("fit")["run_id"] != there["run_id"]
    assert ("fit: running" in two.console.text) == (how == "begun")


def test_an_unreachable_storage_matters_only_if_it_is_needed(machines, monkeypatch):
    one = machines("one")
    one.run("fit")
    two = machines("two")

    def dead(*args, **kwargs):
        raise ConnectionError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(two.remote.files, "cat_file", dead)
        with pytest.raises(UserError) as caught:
            two.run("fit")
    what = "no route; check the address, the permissions and the connection"
    assert caught.value.lines == [f"--artifacts {two.remote.url}: {what}"]
    with monkeypatch.context() as patch:
        patch.setattr(two.remote.files, "cat_file", dead)
        with pytest.raises(UserError) as caught:
            machines("one").run("fit")
    assert "running" not in one.console.text and all("run again" in line for line in caught.value.lines)


def test_addresses(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "here"))
    assert is_url("s3://b/x") and not is_url("artifacts") and not is_url("/a/b")
    folder = local_folder("s3://bucket/some/../where")
    assert folder.parent == tmp_path / "here" and folder != local_folder("s3://bucket/some/where")
    assert local_folder("s3://bucket/x/") == local_folder("s3://bucket/x")
    with pytest.raises(UserError) as caught:
        Remote("nosuch://x", ArtifactStore(folder, "small"))
    assert "nosuch" in caught.value.lines[0]
    (tmp_path / "e.yaml").write_text("name: small\n")
    for address, what in (("file:///tmp/x", "give only its path"), ("ftp://me:secret@host/x", "out of the address")):
        assert cli.main(["clean", "-c", "e.yaml", "--artifacts", address]) == 2
        said = capsys.readouterr().err
        assert what in said and "secret" not in said and said.count("\n") == 1


def test_commands_accept_addresses(tmp_path, monkeypatch, capsys):
    """The commands use this machine's folder for the address."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "here"))
    (tmp_path / "e.yaml").write_text("name: small\n")
    assert cli.main(["clean", "-c", "e.yaml", "--artifacts", "memory://bucket/x"]) == 0
    assert str(local_folder("memory://bucket/x") / "small") in capsys.readouterr().out

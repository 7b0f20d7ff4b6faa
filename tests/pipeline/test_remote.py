"""Artifacts on object storage: fsspec's storage in memory, and S3 as moto plays it where that is installed."""

import importlib.util
import json

import fsspec
import pytest

from pipeline import cli
from pipeline.artifacts import ArtifactStore
from pipeline.errors import UserError
from pipeline.remote import Remote, is_url, local_folder


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
    bucket = f"bucket-{port}"  # what moto holds outlives its server
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    yield f"s3://{bucket}/rlhf"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def machines(world, url, tmp_path):
    """machine(name) → the world as of one machine, whose artifacts are also at the address."""

    def machine(name):
        world.store = ArtifactStore(tmp_path / name, "small")
        world.remote = Remote(url, world.store)
        return world

    return machine


def there(world):
    """{path below the experiment: content} of the storage."""
    files, base = world.remote.files, world.remote.base.lstrip("/")
    files.invalidate_cache()
    return {path.lstrip("/").removeprefix(base + "/"): files.cat_file(path) for path in files.find(world.remote.base)}


def test_what_one_machine_made_another_does_not_make_again(machines):
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


def test_the_later_one_wins_and_old_files_go(machines, url):
    one = machines("one")
    one.run("fit")
    old = one.store.verify("fit")
    two = machines("two")
    two.run("fit")
    manifest = json.loads(there(two)["fit/manifest.json"])
    (extra := two.remote.files).pipe_file(f"{two.remote.base}/fit/left-over", b"x")
    assert extra.exists(f"{two.remote.base}/fit/left-over") and manifest == old
    two.run("fit", "fit.steps=3", force=True)
    new = two.store.verify("fit")
    new["finished_at"] = max(new["finished_at"], old["finished_at"])
    assert new["digest"] != old["digest"] and "fit/left-over" not in there(two)
    assert json.loads(there(two)["fit/manifest.json"])["digest"] == new["digest"]
    again = machines("three")
    again.run("fit", "fit.steps=3")
    assert again.store.manifest("fit")["digest"] == new["digest"] and "running" not in again.console.text


def test_an_upload_that_broke_off_is_no_artifact_and_is_made_good(machines, monkeypatch):
    one = machines("one")
    put, count = one.remote.files.put_file, []

    def breaking(*args, **kwargs):
        count.append(args)
        if len(count) == 3:
            raise OSError("the line is dead")
        return put(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(one.remote.files, "put_file", breaking)
        with pytest.raises(UserError) as caught:
            one.run("fit")
    assert "the line is dead; check the address" in caught.value.lines[0]
    broken = {name.split("/")[0] for name in there(one)} - {
        name.split("/")[0] for name in there(one) if name.endswith("manifest.json")
    }
    assert len(broken) == 1  # begun, and without a manifest
    one.run("fit")
    two = machines("two")
    two.run("fit")
    assert "running" not in two.console.text


@pytest.mark.parametrize("damage", ["a file", "a missing file", "the manifest", "a path"])
def test_what_does_not_hold_is_not_taken(damage, machines):
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
        from pipeline.files import seal

        manifest["outputs"]["../../escaped"] = manifest["outputs"].pop(name)
        manifest.pop("digest")
        files.pipe_file(f"{base}/manifest.json", json.dumps(seal(manifest)).encode())
    two = machines("two")
    with pytest.raises(UserError) as caught:
        two.run("fit")
    assert len(caught.value.lines) == 1 and two.remote.url.split("://")[1].split("/")[0] in caught.value.lines[0]
    assert not (two.store.folder("fit") / "manifest.json").exists()
    assert not list(two.store.root.rglob("escaped"))


def test_an_interrupted_run_here_is_not_replaced(machines):
    one = machines("one")
    one.run("fit")
    two = machines("two")
    with two.store.lock("fit"):
        two.store.begin("fit", {"run_id": "x", "stage": "fit"})
    assert "was interrupted here" in two.remote.fetch("fit")
    assert not (two.store.folder("fit") / "manifest.json").exists()


def test_addresses(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "here"))
    assert is_url("s3://b/x") and not is_url("artifacts") and not is_url("/a/b")
    folder = local_folder("s3://bucket/some/../where")
    assert folder.parent == tmp_path / "here" and folder != local_folder("s3://bucket/some/where")
    assert local_folder("s3://bucket/x/") == local_folder("s3://bucket/x")
    store = ArtifactStore(folder, "small")
    for address, what in (("nosuch://x", "nosuch"), ("file:///tmp/x", "give its path alone")):
        with pytest.raises(UserError) as caught:
            Remote(address, store)
        assert what in caught.value.lines[0]


def test_the_commands_know_addresses(tmp_path, monkeypatch, capsys):
    """status looks at this machine's folder of the address."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "here"))
    (tmp_path / "e.yaml").write_text("name: small\n")
    assert cli.main(["clean", "-c", "e.yaml", "--artifacts", "memory://bucket/x"]) == 0
    assert str(local_folder("memory://bucket/x") / "small") in capsys.readouterr().out

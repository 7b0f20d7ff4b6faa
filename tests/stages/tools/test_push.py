"""Test `rlhf push` against a stand-in for the Hub's server, through huggingface_hub itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from pipeline.cli import main
from stages.tools import push_card
from tests.stages.tools.stand_in_hub import running_hub

ROOT = Path(__file__).resolve().parents[3]
FILES = {
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
    *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture
def hub(monkeypatch):
    """Run a Hub of this machine, with a token that may write."""
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield hub


@pytest.fixture
def push(finished_base, capsys, monkeypatch):
    """Return a function that runs `rlhf push base` and returns (exit code, output, errors)."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # the command changes them

    def run(repository="me/small", *words, stage="base", artifacts=finished_base.artifacts):
        place = ["-c", str(finished_base.config), "--artifacts", str(artifacts)]
        code = main(["push", stage, repository, *place, *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def refusal(result):
    """Return the one line of a refusal, without "error: "."""
    code, _, errors = result
    lines = errors.splitlines()
    assert code == 2 and len(lines) == 1, errors
    assert "hf_" not in errors
    return lines[0].removeprefix("error: ")


def test_a_new_repository_is_private_and_gets_one_commit(hub, push, finished_base):
    code, out, errors = push()
    assert code == 0, errors
    there = hub.repositories["me/small"]
    assert there["private"] and there["commits"] == ["Upload small/base/model"]
    assert set(there["branches"]["main"]) == FILES
    folder = finished_base.artifacts / "small/base/model"
    for name in FILES - {"README.md"}:
        assert there["branches"]["main"][name] == (folder / name).read_bytes()
    assert "hf_writer" not in out + errors


def test_the_card_names_nothing_of_this_machine(hub, push, finished_base):
    assert push()[0] == 0
    card = hub.repositories["me/small"]["branches"]["main"]["README.md"].decode()
    assert "my_secret" in (finished_base.artifacts / "small/base/model/README.md").read_text()
    assert "my_secret" not in card and str(finished_base.root) not in card and "manifest.json" not in card
    assert "| documents | a local file | 120 | base |" in card


def test_a_dry_run_asks_nobody(hub, push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, out, _ = push("me/small", "--dry-run", "--public")
    assert code == 0 and hub.asked == []
    assert "me/small (public, branch main): 7 files of small/base/model" in out
    assert all(f"  {name} " in out for name in FILES) and "nothing was sent" in out


def test_an_update_keeps_strange_files_and_removes_old_weights(hub, push):
    content = {"model-00001-of-00002.safetensors": b"old", "LICENSE": b"mine", ".gitattributes": b""}
    there = hub.add("me/small", **content)
    assert refusal(push()).startswith("me/small: exists already; add a commit to it with --update")
    code, out, _ = push("me/small", "--update", "--message", "More steps=2")
    assert code == 0 and "removes model-00001-of-00002.safetensors" in out
    assert set(there["branches"]["main"]) == FILES | {"LICENSE", ".gitattributes"}
    assert there["commits"] == ["More steps=2"]


def test_an_empty_repository_is_taken(hub, push):
    hub.add("me/small", **{".gitattributes": b""})
    assert push()[0] == 0


def test_the_visibility_of_a_repository_is_not_changed(hub, push):
    hub.add("me/open", private=False, **{"README.md": b""})
    assert refusal(push("me/open", "--update")).startswith("me/open: is public; give --public")
    assert push("me/open", "--update", "--public")[0] == 0
    hub.add("me/closed", private=True, **{"README.md": b""})
    assert refusal(push("me/closed", "--update", "--public")).startswith("me/closed: is private;")


def test_a_branch_is_made_and_main_is_left_alone(hub, push):
    there = hub.add("me/small", **{"README.md": b"old"})
    assert push("me/small", "--update", "--revision", "v2")[0] == 0
    assert set(there["branches"]["v2"]) == FILES and there["branches"]["main"] == {"README.md": b"old"}


def test_tokens_and_rights(hub, push, monkeypatch):
    assert "may not write there (403)" in refusal(push("other/small"))
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert "does not know the token (401)" in refusal(push())
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    hub.add("me/open", private=False, **{"README.md": b"old"})
    line = refusal(push("me/open", "--update", "--public"))
    assert "(403)" in line and "nothing was changed there" in line
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert refusal(push()).startswith("the Hub: there is no token; log in")
    assert not hub.repositories.get("me/small")


def test_no_network_is_one_line(hub, push, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached; check the network" in refusal(push())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(push()).startswith("HF_HUB_OFFLINE: is set")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["small"], "small: is no repository on the Hub"),
        (["me/sm all"], "me/sm all: is no repository on the Hub"),
        (["me/small", "--revision", "../x"], "--revision: '../x' is no name of a branch"),
        (["me/small", "--message", " "], "--message: is empty"),
        (["me/small", "--ema"], "base: has published no model_ema; it has model"),
        (["me/small", "base.max_steps=3"], "base: is stale because base.max_steps 2 → 3;"),
    ],
)
def test_what_is_refused_before_anybody_is_asked(hub, push, words, line):
    assert refusal(push(*words)).startswith(line)
    assert hub.asked == []


def test_missing_and_damaged_stages_are_refused(hub, push, finished_base, tmp_path):
    assert refusal(push(artifacts=tmp_path / "none")).startswith("base: is missing; ")
    copy = tmp_path / "artifacts"
    shutil.copytree(finished_base.artifacts, copy)
    with open(copy / "small/base/model/model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    code, _, errors = push(artifacts=copy)
    assert code == 2 and "model.safetensors" in errors and hub.asked == []


def test_the_command_itself_goes_online_without_a_name_on_the_hub(finished_base, tmp_path):
    """A process of its own reads the environment as a user's does."""
    with running_hub() as hub:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
        place = ["-c", str(finished_base.config), "--artifacts", str(finished_base.artifacts)]
        command = [sys.executable, "-m", "pipeline.cli", "push", "base", "org/small", *place]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(hub.repositories["org/small"]["branches"]["main"]) == FILES
    assert f"uploaded: {hub.address}" in done.stdout and "hf_writer" not in done.stdout + done.stderr


# -- the card ------------------------------------------------------------------------------------


def test_examples_load_the_repository_and_paths_are_left_out(tmp_path):
    card = (
        'Made. `manifest.json` beside it records settings, inputs and digests.\n\n```python\nfolder = "model"  # where '
        f"this folder is\n```\n\n## Adapter\n\nIts base model is `../x`.\n\n## Data\n\n| `x` | `{tmp_path}/a.jsonl` |\n"
        '| `rewards` | `[{"python": "judge.py:score"}]` |\nSee https://huggingface.co/docs/hub and `org/set`.\n'
    )
    text = push_card.text_for_hub(card, "me/x", {"judge.py"}, has_adapter=False)
    assert 'folder = "me/x"\n' in text and "## Adapter" not in text and "## Data" in text
    assert "judge.py" not in text and str(tmp_path) not in text and "manifest" not in text
    assert "https://huggingface.co/docs/hub" in text and "`org/set`" in text


def test_local_names_are_those_of_files_and_folders(tmp_path):
    config = {
        "data": {"rankings": {"path": "/data/team/labels.jsonl"}, "documents": {"path": "world"}},
        "model": {"name_or_path": "meta-llama/Llama-3.2-1B"},
        "ppo": {"rewards": [{"python": "code/judge.py:score"}, {"url": "http://127.0.0.1:80/x"}], "keep": "best"},
        "launch": {"vllm": {"python": "/opt/vllm/bin/python"}},
    }
    assert push_card.local_names({"ppo": {"config": config}}) == {"labels.jsonl", "labels", "judge.py", "judge"}


def test_a_path_in_a_config_is_found(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": str(tmp_path / "given")}))
    assert push_card.path_in(tmp_path / "config.json") == str(tmp_path / "given")
    (tmp_path / "chat_template.jinja").write_text("{{ '</s>' }} 1/2/3 https://huggingface.co/a/b and/or/not")
    assert push_card.path_in(tmp_path / "chat_template.jinja") is None


@pytest.mark.parametrize(("base", "is_folder"), [("../../sft/model", True), ("org/name", False), ("", True)])
def test_which_bases_of_an_adapter_are_folders(base, is_folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert push_card.names_folder(push_card.base_of(tmp_path / "adapter_config.json")) == is_folder

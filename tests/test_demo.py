"""Test configs/tiny.yaml as `make demo` runs it: every policy improves, nothing is done twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("world", "base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate", "report")


def rlhf(*argv: str) -> subprocess.CompletedProcess:
    """Run `rlhf` in a new process, and check that it succeeds."""
    code = "import sys; from pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Return the artifacts of all stages."""
    root = tmp_path_factory.mktemp("demo")
    rlhf("run", "report", "-c", "configs/tiny.yaml", "--artifacts", str(root))
    return root


@pytest.mark.slow
def test_each_policy_is_better_than_the_one_before(artifacts):
    results = json.loads((artifacts / "tiny/evaluate/results.json").read_text())
    for part in ("gold", "gold_known_tasks", "gold_held_out_tasks"):  # also on tasks outside the training data
        gold = {name: policy[part]["overall"] for name, policy in results["policies"].items()}
        assert gold["base"] < gold["sft"] < gold["dpo"] and gold["sft"] < gold["ppo"], part
    assert results["policies"]["base"]["asked"] == "plain"
    assert results["policies"]["base"]["win_rate_vs_sft"]["ci95"][1] < 0.5
    assert results["policies"]["ppo"]["win_rate_vs_sft"]["ci95"][0] > 0.5
    page = (artifacts / "tiny/report/index.html").read_text()
    assert "<script" not in page and 'src="http' not in page and 'href="http' not in page


@pytest.mark.slow
def test_a_second_run_does_nothing_and_a_changed_setting_makes_later_stages_stale(artifacts):

    before = {s: (artifacts / "tiny" / s / "manifest.json").read_bytes() for s in STAGES}
    again = rlhf("run", "report", "-c", "configs/tiny.yaml", "--artifacts", str(artifacts)).stdout
    assert all(f"{s}: up to date" in again for s in STAGES)
    assert before == {s: (artifacts / "tiny" / s / "manifest.json").read_bytes() for s in STAGES}
    status = rlhf("status", "-c", "configs/tiny.yaml", "--artifacts", str(artifacts), "ppo.kl_coef=0.3").stdout
    lines = {line.split("│")[1].strip(): line for line in status.splitlines() if line.count("│") > 3}
    assert "done" in lines["rm"] and "done" in lines["dpo"]
    assert "stale" in lines["ppo"] and "stale" in lines["evaluate"] and "stale" in lines["report"]

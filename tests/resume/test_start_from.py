"""Test that training that starts from an earlier round's model resumes by bytes."""

import pytest
from resume_worker import CONFIG, copy_without, published, rlhf


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_killed_and_resumed_it_gives_the_same_bytes(stage, oracle, tmp_path):
    start = f"{stage}.start_from={oracle}/micro/{stage}/model"
    roots = [copy_without(oracle, tmp_path / name, stage) for name in ("whole", "killed")]
    whole, killed = (("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only", start) for root in roots)
    assert rlhf(*whole) == 0
    assert rlhf(*killed, die=(stage, 5)) == -9
    assert rlhf(*killed) == 0
    straight, resumed = (published(root / "micro" / stage) for root in roots)
    assert resumed == straight != published(oracle / "micro" / stage)

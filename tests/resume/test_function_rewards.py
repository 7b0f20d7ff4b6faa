"""Test that PPO by a function in workers and by a rule, killed and resumed, is the same run."""

import json

from resume_worker import CONFIG, copy_without, published, rlhf

FUNCTION = """
import near_by

def score(prompts, responses):
    print("scored", len(responses))
    return [{"score": near_by.share(p, r), "length": len(r)} for p, r in zip(prompts, responses)]
"""
NEAR_BY = """
def share(prompt, response):
    words = response.split()
    return sum(word in prompt for word in words) / max(1, len(words))
"""


def test_killed_and_resumed_it_gives_the_same_bytes(oracle, tmp_path):
    """Where a file that the function imports has changed meanwhile, it is refused."""
    (tmp_path / "reward.py").write_text(FUNCTION)
    (tmp_path / "near_by.py").write_text(NEAR_BY)
    rewards = (
        f"[{{python: '{tmp_path}/reward.py:score', workers: 2, timeout: 60}}, {{rule: words, at_most: 4, weight: 0.5}}]"
    )
    settings = [f"ppo.rewards={rewards}", "ppo.reward_ensemble=mean", "evaluate.reward_ensemble=mean", "--only"]
    folders = {}
    for name in ("straight", "resumed", "changed"):
        root = copy_without(oracle, tmp_path / name, "ppo")
        folders[name] = root / "micro" / "ppo"
        run = ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), *settings)
        if name != "straight":
            assert rlhf(*run, die=("ppo", 5)) == -9
        if name == "changed":
            (tmp_path / "near_by.py").write_text(NEAR_BY + "\n# another content\n")
            assert rlhf(*run) == 2
        else:
            assert rlhf(*run) == 0
    assert published(folders["straight"]) == published(folders["resumed"])
    rows = [json.loads(line) for line in (folders["straight"] / "metrics.jsonl").open()]
    assert len(rows) == 8 and {"rewards/score", "rewards/score/length", "rewards/words"} <= set(rows[0])

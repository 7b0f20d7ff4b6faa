"""Turn prompts into rollouts: one rollout engine a file, `engines.py` lists them."""

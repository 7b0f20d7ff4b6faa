"""Runs stages: configuration, artifacts, checkpoints, the plan, tracking. Knows no RLHF and imports nothing
else of ours (but `cli.py`, which names the stages)."""

"""Train a policy by PPO-ptx: `run` is the story, each other file one of its steps."""

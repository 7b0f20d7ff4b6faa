"""The training loops that base, sft, rm, dpo and ppo share."""

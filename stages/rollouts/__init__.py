"""Prompts → responses → Rollout; one engine a file."""

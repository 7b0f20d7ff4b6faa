"""The stage ppo: run (the seven steps), sampling, alarms."""

"""Measure policies and reward models on tests from outside: lm-eval, RewardBench, refusals."""

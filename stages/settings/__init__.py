"""Declare each stage: its settings, metrics, inputs and checks. Nothing in here imports torch."""

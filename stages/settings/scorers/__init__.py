"""Declare the scorers that settings can name: one kind a file, `scorer.py` lists them."""

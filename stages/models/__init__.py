"""Load, wrap, run and publish models in their roles."""

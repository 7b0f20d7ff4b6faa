"""The YAML of an experiment: reading, validation, help."""

"""Parse, validate and describe the YAML of an experiment."""

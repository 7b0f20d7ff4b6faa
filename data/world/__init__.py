"""The embedded world: a grammar, tasks, writers and labelers that need no download."""

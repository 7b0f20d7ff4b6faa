"""Check texts by rules: pure functions without torch, one subject a file."""

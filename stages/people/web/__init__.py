"""Hold what the servers for people share: addresses and tokens, security, errors, the lock."""

"""What lies on disk: artifacts, checkpoints, caches, and copies on object storage."""

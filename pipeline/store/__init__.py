"""Keep what stages write on disk: artifacts, checkpoints, caches, and copies on object storage."""

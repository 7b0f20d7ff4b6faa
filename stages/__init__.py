"""The RLHF stages: one story a file; they meet in the artifact directory and never import each other."""

"""The stages of RLHF, one file each. They meet in the artifact directory, never by imports."""

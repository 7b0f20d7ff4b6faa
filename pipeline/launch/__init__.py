"""Start the processes of a run and let them work together."""

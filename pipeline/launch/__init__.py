"""How processes start and work together: environment, data parallelism, SLURM."""

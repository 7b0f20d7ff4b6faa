"""Share experiments, points, estimates and a page among benchmarks that compare settings."""

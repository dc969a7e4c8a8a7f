"""The performance table, one file per row; ``python -m benchmarks`` prints it."""

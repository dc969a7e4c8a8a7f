"""One file a row of the performance table; ``python -m benchmarks`` prints them."""

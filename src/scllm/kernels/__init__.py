"""Floor 0: numba kernels on plain arrays."""

"""Floor 0: numba kernels, arrays in and arrays out."""

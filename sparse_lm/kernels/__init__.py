"""Pure functions on arrays: attention, matmul, top-k, masks. Each operation chooses its backend."""

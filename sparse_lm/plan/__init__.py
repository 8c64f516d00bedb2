"""What a model consists of, read in one trace: matmuls, gates, units, and FLOPs."""

"""The plan of a model, from one trace: matmuls, gates, units, and FLOPs."""

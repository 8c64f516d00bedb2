"""Stack methods: what spans all layers, such as early exits."""

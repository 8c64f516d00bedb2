"""Site methods: what is done to an activation at a named site."""

"""A run on disk: config, workdir, checkpoints, the training loop, loading, and locks."""

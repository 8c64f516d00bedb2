"""Weight methods: which weights are kept, and when masks change."""

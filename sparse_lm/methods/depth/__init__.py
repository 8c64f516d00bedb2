"""Depth methods: which layers run for a token."""

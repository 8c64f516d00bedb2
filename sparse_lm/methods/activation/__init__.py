"""Activation methods: which hidden units of an MLP are active."""

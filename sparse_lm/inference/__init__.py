"""Packed models: formats, shrinking, decoding, sampling, and speculation."""

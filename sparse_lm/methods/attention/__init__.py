"""Attention methods: which keys a query reads."""

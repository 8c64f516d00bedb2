"""Configs: `base.py` holds every default, and each other file changes some of them."""

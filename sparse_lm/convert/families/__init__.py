"""Families of pretrained models: each file defines one subclass of `convert.family.Family`."""

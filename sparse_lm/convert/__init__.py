"""Pretrained models of other libraries, both ways: Hugging Face folders, and GGUF files inwards.

`families/` has one file for each model family: its config, its names of tensors, and their layouts.
"""

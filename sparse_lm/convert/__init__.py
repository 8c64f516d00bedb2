"""Imports Hugging Face folders and GGUF files as workdirs, and exports workdirs as Hugging Face folders.

`families/` has one file for each model family, which converts its config and the names and layouts of its
tensors.
"""

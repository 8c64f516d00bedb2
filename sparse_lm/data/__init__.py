"""Text: sources, tokenizers, windows of tokens, mixtures, and the input pipeline."""

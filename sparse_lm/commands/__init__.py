"""What commands share: the command-line parser, and one-line errors."""

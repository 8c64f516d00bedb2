"""The parts that all commands share: argument parsing, and error messages of one line."""

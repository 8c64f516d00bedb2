"""The parts that all commands share: parsing of arguments, and errors of one line."""

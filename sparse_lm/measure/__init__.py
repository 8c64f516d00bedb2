"""Clocks and meters: device and machine, timing in turns, energy, and what layers report."""

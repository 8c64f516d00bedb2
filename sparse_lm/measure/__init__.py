"""Clocks and meters: device and machine, timing in turns, energy, and statistics of layers."""

"""The vocabulary: trees, paths, units, selection, distributions, schedules, estimators, and errors."""

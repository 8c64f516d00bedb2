"""The compiled training program: state, objective, optimizer, step, and budget controller."""

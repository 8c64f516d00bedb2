"""Studies, and the code that trains and reports them. `python -m experiments.run --list` lists them."""

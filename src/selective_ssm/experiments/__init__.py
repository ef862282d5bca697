"""The paper's experiments: grids of small runs that can be interrupted, and their tables beside the paper's."""

"""What a reader sees: the report of a run, and the comparison of several."""

"""What is timed: one module for each family of contenders, chosen from by :mod:`benchmarks.rivals`."""

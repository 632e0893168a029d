"""Rivals and shapes as data, a correctness gate before every timing, entries with provenance.

`python -m benchmarks` runs suites; `python -m benchmarks report FILES` makes a table and plots from saved entries.
"""

"""Measurements, not tests: `python -m tests.benchmarks.<name>` prints a table; the knobs are at the top of each."""

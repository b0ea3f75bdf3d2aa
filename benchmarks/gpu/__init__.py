"""Benchmarks for the day there is a GPU; `run.py` runs them in order."""

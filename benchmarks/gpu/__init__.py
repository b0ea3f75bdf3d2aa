"""Benchmarks for the day there is a GPU; `acceptance.sh` runs them in order."""

"""Joules and watts: `pytest benchmarks/power [--quick]`; see ../README.md."""

"""Seconds: `pytest benchmarks/throughput [--quick]`; see ../README.md."""

"""The contests: each file has `cases(setup)`, which both `benchmarks/throughput` and `benchmarks/power` run."""

"""What the benchmarks share: layers, networks, contests, timing."""

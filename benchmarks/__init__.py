"""Throughput of the kernels against dense torch; every figure in the documentation comes from here."""

"""Triton kernels, one file per op. Import them as ``sparsekd.kernels``; the top-level name ``kernels`` is never installed."""

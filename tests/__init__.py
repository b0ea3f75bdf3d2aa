"""Tests mirror the package: one file per module, ``cases.py`` shared with benchmarks."""

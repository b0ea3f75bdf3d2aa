"""Tests of benchmarks/: what it computes is right, and every script starts."""

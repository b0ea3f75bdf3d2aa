"""Tests of sparsekd.report."""

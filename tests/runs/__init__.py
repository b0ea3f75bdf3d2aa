"""Tests of sparsekd.runs, one file for each of its source files."""

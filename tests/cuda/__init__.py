"""Tests of sparsekd.backends.cuda and of the kernels it chooses among; a file for each of its files."""

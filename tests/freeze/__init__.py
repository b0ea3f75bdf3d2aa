"""Tests of sparsekd.freeze, one file for each of its source files or subjects; networks.py has the models."""

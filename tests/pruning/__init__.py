"""Tests of sparsekd.pruning, one file for each of its subjects; common.py has the network."""

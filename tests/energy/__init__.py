"""Tests of sparsekd.energy, one file for each of its source files; hardware.py has the made-up machines."""

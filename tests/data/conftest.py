"""Tests of readers do not see the data folders of whoever runs them."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_data_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SPARSEKD_DATA")]:
        monkeypatch.delenv(name)

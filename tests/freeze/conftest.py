"""One thread, so that what is measured is quiet; and a machine without the compiled module."""

import sys
from types import SimpleNamespace

import pytest

from ..cases import torch_threads


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


@pytest.fixture
def take_kernels_away(monkeypatch):
    """A function after which freeze sees a machine without the compiled module."""
    gone = SimpleNamespace(native=None, missing="sparsekd._C is not there", isa=lambda: None)

    def take() -> None:
        for name in ("freeze", "load", "measure", "packed"):
            monkeypatch.setattr(sys.modules[f"sparsekd.freeze.{name}"], "cpu", gone)

    return take

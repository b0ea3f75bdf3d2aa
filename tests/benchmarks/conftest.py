"""One thread: what is built here is small, and only that it runs is asked."""

import pytest

from ..cases import torch_threads


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield

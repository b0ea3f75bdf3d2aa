import pytest

from .hardware import Board


@pytest.fixture
def board() -> Board:
    return Board()

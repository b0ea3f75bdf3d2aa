"""Seeds, and outputs that start as NaN so that an element no kernel wrote cannot pass."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# Every way in which torch gives memory that nobody has written to; the library may use any of them.
ALLOCATORS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
]


@pytest.fixture(autouse=True)
def _outputs_start_as_nan(monkeypatch):
    """Fill with NaN what Python code allocates; what torch allocates inside its C++ operators is its own business."""
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, _nan_filled(getattr(owner, name)))


@pytest.fixture
def fresh_compiler():
    """Nothing that another test compiled is there, and nothing of this one stays."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _nan_filled(allocate):
    def nan_filled(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and not _is_traced(tensor) else tensor

    return nan_filled


def _is_traced(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or type(tensor) is not torch.Tensor or torch.compiler.is_compiling()

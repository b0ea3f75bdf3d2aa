"""What the fixtures of conftest.py promise to every other test."""

import pytest
import torch

from .conftest import ALLOCATORS

ARGUMENTS = {
    "empty": ((2, 3),),
    "empty_strided": ((2, 3), (3, 1)),
    "empty_permuted": ((2, 3), (0, 1)),
    "new_empty": ((2, 3),),
    "new_empty_strided": ((2, 3), (3, 1)),
}


@pytest.mark.parametrize(("owner", "name"), ALLOCATORS, ids=lambda each: each if isinstance(each, str) else "")
def test_memory_that_nobody_wrote_to_is_nan(owner, name):
    given = torch.zeros(2, 3)
    first = (given,) if owner is torch.Tensor or name == "empty_like" else ()
    allocate = getattr(owner, name)
    tensor = allocate(*first, *ARGUMENTS.get(name, ()))
    assert tensor.shape == (2, 3) and tensor.isnan().all()
    assert not given.isnan().any()
    whole = allocate(*first, *ARGUMENTS.get(name, ()), dtype=torch.int32)
    assert whole.dtype == torch.int32  # integers have no NaN


def test_every_test_begins_with_the_same_random_numbers():
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))

"""Pairs of a user and an item that the user chose, as two vectors of numbers: checked, and as one number each."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_numbers", "checked", "once"]


def checked(what: str, users: Tensor, items: Tensor, num_users: int, num_items: int) -> tuple[Tensor, Tensor]:
    """The two as int64; ``what`` was called with them.

    Raises ValueError for numbers out of range, TypeError for those that are no integers.
    """
    if users.shape != items.shape or users.dim() != 1:
        raise ValueError(
            f"sparsekd.{what}: users and items must be two equally long vectors, got {tuple(users.shape)} and "
            f"{tuple(items.shape)}"
        )
    for name, values, end in (("users", users, num_users), ("items", items, num_items)):
        check_numbers(what, name, values, end)
    return users.long(), items.long()


def check_numbers(what: str, name: str, values: Tensor, end: int) -> None:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"sparsekd.{what}: {name} must be integers, got {values.dtype}; use .long()")
    values = values.long()  # torch has no min of most unsigned ones
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) < end:
        raise ValueError(
            f"sparsekd.{what}: {name} must lie in 0..{end - 1}, got {int(values.min())}..{int(values.max())}; number "
            "them from 0"
        )


def once(users: Tensor, items: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Every pair once, by users and then by items. As rows of two, pairs would take much longer to sort."""
    numbers = torch.unique(users.long() * num_items + items.long())
    return numbers // num_items, numbers % num_items

"""Sizes of trained networks, and scores that are clipped to what a target can be."""

import numpy as np
import torch

from sparsekd.runs import evaluate

from .made_up import errors, part, student_of


def test_predictions_are_clipped(task):
    far = torch.full((128,), 99.0)
    at_the_end = torch.full((128,), 10.0)
    assert errors(far, task, task.test) == errors(at_the_end, task, task.test)


def test_kept_share_leaves_out_what_is_not_pruned(task):
    model = student_of(task)
    assert evaluate.kept_share(model) == 1.0
    assert evaluate.count_parameters(model) == sum(p.numel() for p in model.parameters())
    assert isinstance(part(4, 0).features, np.ndarray)

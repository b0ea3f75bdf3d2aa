"""Sizes of trained networks, and scores that are clipped to what a target can be."""

import torch
from torch import nn

from sparsekd import BlockPattern, sparsify
from sparsekd.runs import evaluate

from .made_up import errors


def test_predictions_are_clipped(task):
    far = torch.full((128,), 99.0)
    at_the_end = torch.full((128,), 10.0)
    assert errors(far, task, task.test) == errors(at_the_end, task, task.test)


def test_kept_share_leaves_out_what_is_not_pruned():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    model.not_pruned = ("1",)
    assert evaluate.kept_share(model) == 1.0
    assert evaluate.count_parameters(model) == 8 * 16 + 16 + 16 * 4 + 4
    sparsify(model, BlockPattern(4, 1), 0.25, exclude=["1"])
    assert evaluate.kept_share(model) == 0.25  # of 8 x 16; with the other layer it would be half
    assert evaluate.count_parameters(model) == 8 * 16 / 4 + 16 + 16 * 4 + 4


def test_a_model_of_embeddings_alone_keeps_all_of_nothing():
    assert evaluate.kept_share(nn.Embedding(5, 3)) == 1.0

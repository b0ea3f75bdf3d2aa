"""A recommender of two tastes, small enough for exact expectations."""

import torch

from sparsekd import models
from sparsekd.data import Pairs, histories
from sparsekd.distill import Plain
from sparsekd.goals import Ranking

SIZES = {"users": 24, "items": 30}


def pairs():
    """Users of one half choose items of one half, and few others."""
    generator = torch.Generator().manual_seed(3)
    likes = torch.rand(24, 30, generator=generator) < 0.05
    likes[:12, :15] |= torch.rand(12, 15, generator=generator) < 0.5
    likes[12:, 15:] |= torch.rand(12, 15, generator=generator) < 0.5
    users, items = likes.nonzero(as_tuple=True)
    return Pairs(users, items, 30, *histories(users, items, 24, 30))


PART = pairs()
CHOSEN = (PART.users, PART.items)


def learner(method, *, kind=models.MF, density=0.25, dim=8, seed=0, **options):
    """(model, method, optimizer), the method made by `method(distiller, **options)`."""
    torch.manual_seed(seed)
    model = kind(SIZES, dim, density=density)
    made = method(Plain(model, Ranking()), **options)
    optimizer = torch.optim.Adam([*model.parameters(), *made.parameters()], lr=0.05)
    made.attach(optimizer)
    return model, made, optimizer


def epoch(method, optimizer, number, after=lambda: None):
    """Train for one epoch of small batches; `after` is called after every step.  The last loss."""
    method.student.train()
    for inputs, target in PART.batches(16, torch.Generator().manual_seed(number)):
        optimizer.zero_grad()
        loss = method.loss(inputs, target).total
        loss.backward()
        optimizer.step()
        method.after_step()
        after()
    return float(loss.detach())

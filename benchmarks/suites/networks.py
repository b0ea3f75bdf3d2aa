"""Networks to measure: the project's student, the paper's CIFAR student, or the one given with --model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.lib.contest import Setup
from benchmarks.lib.models import wrn_16_2
from sparsekd.bench import load
from sparsekd.models import STUDENT, RatingCNN


@dataclass(frozen=True)
class Source:
    """A network to build and what to call it with. exclude: layers that stay dense (fnmatch on module names)."""

    id: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    exclude: tuple[str, ...] = ()


def sources(setup: Setup) -> list[Source]:
    """The network of --model, or the built-in ones, at each batch size."""
    if setup.model:
        return [_own(setup.model, batch, setup) for batch in setup.layer_batches or (1,)]
    found = []
    for batch in setup.batches:
        rows = partial(_random, *((batch, columns) for columns in _RATING_SIZES.values()), (batch,))  # the prior
        found.append(Source(f"rating-cnn-n{batch}", _rating_cnn, rows, RatingCNN.not_pruned))
        if not setup.quick and batch <= 64:
            images = partial(_random, (batch, 3, 32, 32))
            found.append(Source(f"wrn-16-2-n{batch}", _wide_resnet, images, ("stem", "head")))
    return found


def _own(model: str, batch: int, setup: Setup) -> Source:
    inputs = partial(_random, *((batch, *shape) for shape in setup.input_shapes))
    return Source(f"{model.replace(':', '.')}-n{batch}", partial(load, model), inputs, setup.exclude)


# The columns of MovieTweetings' inputs.
_RATING_SIZES = {"user_features": 31, "item_features": 65}


def _rating_cnn() -> nn.Module:
    return randomised(RatingCNN(_RATING_SIZES, STUDENT))


def _wide_resnet() -> nn.Module:
    return randomised(wrn_16_2())


def _random(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape) for shape in shapes)


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Give numbers to what starts as zeros and ones, so that comparing outputs says something."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model

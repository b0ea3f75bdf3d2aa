"""One file per op: what it means on any device (schema, checks, fake, reference, autograd). Kernels: backends/."""

from importlib import import_module

from . import embedding_bags, embedding_int8, embedding_rows, embedding_update  # noqa: F401 (their ops)
from .attention import feature_stats
from .conv2d import conv2d
from .conv_transpose2d import conv_transpose2d
from .embedding import embedding, embedding_absent_, embedding_bag, embedding_top_k
from .linear import linear
from .norm_relu import norm_relu

__all__ = [
    "conv2d",
    "conv_transpose2d",
    "embedding",
    "embedding_absent_",
    "embedding_bag",
    "embedding_top_k",
    "feature_stats",
    "linear",
    "norm_relu",
]

# The ops are defined; now the kernels that run them here. By name, since this is the one arrow that points up: whoever
# imports an op or a layer, by whatever room, must not get the reference where there are kernels.
import_module("sparsekd.backends")

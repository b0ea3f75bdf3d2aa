"""One file per op: what it means on any device (schema, checks, fake, reference, autograd). Kernels: backends/."""

from .attention import feature_stats
from .conv2d import conv2d
from .conv_transpose2d import conv_transpose2d
from .linear import linear

__all__ = ["conv2d", "conv_transpose2d", "feature_stats", "linear"]

"""Losses between a student and its teacher: SAD (AFD) feature matching, attention transfer, and KD of outputs.

Names in this file: B batch, T teacher layers, S student layers, q the width of queries and keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import Features, check_rank, common_depth, feature_shapes, map_sizes, stats, without_graph
from .ops.attention import kd, match_maps

__all__ = [
    "SAD",
    "AttentionTransfer",
    "at_least_float32",
    "attention_transfer_loss",
    "check_same_shape",
    "kd_loss",
    "kd_regression_loss",
]


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Knowledge distillation on class logits (Hinton et al., arXiv 1503.02531): T^2 * KL(teacher || student) / B.

    student_logits, teacher_logits: [B, classes]. Returns a scalar, summed over classes and averaged over the batch,
    in float32 for half types. The teacher gets no gradient.
    """
    check_same_shape("kd_loss", student_logits, teacher_logits)
    if student_logits.dim() != 2:
        raise ValueError(
            f"sparsekd.kd_loss: logits must be [B, classes], got {tuple(student_logits.shape)}; reshape them"
        )
    if not temperature > 0:
        raise ValueError(f"sparsekd.kd_loss: temperature must be positive, got {temperature}; 4 is usual")
    dtype = torch.float64 if torch.float64 in (student_logits.dtype, teacher_logits.dtype) else torch.float32
    return kd(student_logits.to(dtype), teacher_logits.to(dtype), temperature)


def kd_regression_loss(student_output: Tensor, teacher_output: Tensor) -> Tensor:
    """Mean squared error to the teacher's output, a scalar: what logit KD becomes for a regression.

    Both outputs have the same shape, usually [B]. The teacher gets no gradient.
    """
    check_same_shape("kd_regression_loss", student_output, teacher_output)
    return F.mse_loss(at_least_float32(student_output), at_least_float32(teacher_output.detach()))


def attention_transfer_loss(student_features: Sequence[Tensor], teacher_features: Features) -> Tensor:
    """Attention transfer (Zagoruyko & Komodakis, arXiv 1612.03928): one student layer beside one teacher layer.

    Features: equally long lists of [B, C, H, W], or of 2 to 5 dimensions as `features.py` reads them; the channels of a
    pair may differ, B, H and W may not. Returns

        sum_g mean_{b,hw} (a(student_g) - a(teacher_g))^2,   a(F) = mean_C F^2 as a vector, L2-normalised

    The usual weight with this mean is 1000. The teacher gets no gradient; its `FeatureStats` do for its features.
    """
    student_shapes, teacher_shapes = feature_shapes(student_features), feature_shapes(teacher_features)
    if len(student_shapes) != len(teacher_shapes) or not student_shapes:
        raise ValueError(
            "sparsekd.attention_transfer_loss: expected equally many student and teacher features (at least one), "
            f"got {len(student_shapes)} and {len(teacher_shapes)}; tap one teacher layer for each student layer"
        )
    for index, (student, teacher) in enumerate(zip(student_shapes, teacher_shapes, strict=True)):
        check_rank("attention_transfer_loss", f"student feature {index}", student)
        check_rank("attention_transfer_loss", f"teacher feature {index}", teacher)
        positions = [shape[1:] if len(shape) == 2 else shape[2:] for shape in (student, teacher)]
        if student[0] != teacher[0] or positions[0] != positions[1]:
            raise ValueError(
                f"sparsekd.attention_transfer_loss: pair {index} must agree in B, H and W, got student "
                f"{student} and teacher {teacher}; tap layers of the same size, or use SAD, which pools"
            )
    depth = common_depth(student_features)
    student_energy = stats(student_features, depth)[1]
    teacher_energy = stats(without_graph(teacher_features), depth)[1]
    sizes = map_sizes(student_features, depth)
    return match_maps(None, teacher_energy.to(student_energy.dtype), student_energy, sizes, sizes)


class AttentionTransfer(nn.Module):
    """`attention_transfer_loss` as a module that a `Distiller` can take for its `matching`."""

    takes_stats: ClassVar[bool] = True  # of the teacher, in place of its features

    def forward(self, teacher_features: Features, student_features: Sequence[Tensor]) -> Tensor:
        return attention_transfer_loss(student_features, teacher_features)


def check_same_shape(function: str, student: Tensor, teacher: Tensor) -> None:
    # torch would broadcast [B] against [B, 1] to [B, B] and train on nonsense.
    if student.shape != teacher.shape:
        raise ValueError(
            f"sparsekd.{function}: student and teacher must have the same shape, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}; squeeze or reshape one of them"
        )


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class SAD(nn.Module):
    """Show, Attend and Distill: attention-based feature distillation (AFD, Ji et al., AAAI 2021, arXiv 2102.02973).

    Every teacher layer t asks with a query, every student layer s answers with a key, and a softmax over the student
    layers says how much of the pair's distance counts (`match_maps` has the distance):

        Q[b,t]  = BN(Linear(mean_hw teacher_t))                     one Linear and BN a teacher layer
        K[b,s]  = relu(BN(Linear(mean_hw student_s)))               one Linear and BN a student layer
        K'[b,s] = BN(Linear(K[b,s])) as [T, q]                      one Linear and BN shared by all student layers
        attention[b,t,s] = softmax_s((<K'[b,s,t], Q[b,t]> + <P_teacher[t], P_student[s]>) / sqrt(q))

    Use features after their ReLU. The module's parameters train with the student's; the teacher gets no gradient. It
    computes in float32 (float64 after `.double()`) whatever the type of the features, also under autocast. Training
    needs a batch of 2 or more.

    >>> sad = SAD(teacher_channels=[32, 64], student_channels=[16, 32])
    >>> teacher = [torch.rand(4, 32, 8, 8), torch.rand(4, 64, 4, 4)]
    >>> student = [torch.rand(4, 16, 8, 8), torch.rand(4, 32, 4, 4)]
    >>> sad(teacher, student).shape
    torch.Size([])
    """

    takes_stats: ClassVar[bool] = True  # of the teacher, in place of its features

    def __init__(self, teacher_channels: Sequence[int], student_channels: Sequence[int], dim: int = 128) -> None:
        super().__init__()
        self.teacher_channels = _checked_channels("teacher_channels", teacher_channels)
        self.student_channels = _checked_channels("student_channels", student_channels)
        if dim < 1:
            raise ValueError(f"sparsekd.SAD: dim must be at least 1, got {dim}; the paper uses 128")
        self.dim = dim
        layers = len(self.teacher_channels)
        self.queries = _LayerLinearNorm(self.teacher_channels, dim)
        self.keys = _LayerLinearNorm(self.student_channels, dim)
        self.bilinear = nn.Sequential(nn.Linear(dim, dim * layers), nn.BatchNorm1d(dim * layers))
        self.teacher_position = nn.Parameter(nn.init.xavier_normal_(torch.empty(layers, dim)))
        self.student_position = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(self.student_channels), dim)))

    @classmethod
    def from_features(
        cls, teacher_features: Sequence[Tensor], student_features: Sequence[Tensor], dim: int = 128
    ) -> SAD:
        """A SAD for features like these (see :meth:`forward`), on the student's device; only their channels matter."""
        for side, features in (("teacher", teacher_features), ("student", student_features)):
            for index, feature in enumerate(features):
                check_rank("SAD", f"{side} feature {index}", feature.shape)
        sad = cls([f.shape[1] for f in teacher_features], [f.shape[1] for f in student_features], dim)
        return sad.to(student_features[0].device)

    def forward(self, teacher_features: Features, student_features: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar, of T teacher features [B, C_t, H_t, W_t] and S student features [B, C_s, H_s, W_s].

        Each may have 2 to 5 dimensions instead, channels second: see `features.py`. The teacher's `FeatureStats` do for
        its features.
        """
        self._check(teacher_features, student_features)
        # Differences of unit vectors do not survive bfloat16, and full precision costs little beside the networks.
        with torch.autocast(student_features[0].device.type, enabled=False):
            depth = common_depth(teacher_features, student_features)
            teacher_means, teacher_energy = stats(without_graph(teacher_features), depth)
            student_means, student_energy = stats(student_features, depth)
            attention = self.attention(teacher_means, student_means)
            teacher_energy, student_energy = (maps.to(attention.dtype) for maps in (teacher_energy, student_energy))
            sizes = map_sizes(teacher_features, depth), map_sizes(student_features, depth)
            return match_maps(attention, teacher_energy, student_energy, *sizes)

    def attention(self, teacher_means: Tensor, student_means: Tensor) -> Tensor:
        """How much each teacher layer t listens to each student layer s: [B, T, S], each row over s sums to 1.

        Both are means over pixels [B, sum of C], layers side by side: what `ops.attention.layer_stats` returns.
        """
        dtype = self.teacher_position.dtype
        query, key = self.queries(teacher_means.to(dtype)), F.relu(self.keys(student_means.to(dtype)))
        position = self.teacher_position @ self.student_position.T  # [T, S]
        logits = self._content(query, key) + position
        return torch.softmax(logits / math.sqrt(self.dim), dim=2)

    def _content(self, query: Tensor, key: Tensor) -> Tensor:
        """<K'[b,s,t], Q[b,t]> as [B, T, S], of Q [B, T, q] and K [B, S, q]."""
        linear, norm = self.bilinear
        if type(linear) is nn.Linear and type(norm) is nn.BatchNorm1d and _are_as_made(linear, norm):
            return _project_queries(query, key, linear, norm)
        bilinear = self.bilinear(key.flatten(0, 1)).view(*key.shape[:2], *query.shape[1:])  # [B, S, T, q]
        return torch.einsum("bstq,btq->bts", bilinear, query)

    def extra_repr(self) -> str:
        return f"teacher_channels={self.teacher_channels}, student_channels={self.student_channels}, dim={self.dim}"

    def _check(self, teacher_features: Features, student_features: Sequence[Tensor]) -> None:
        if self.teacher_position.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"sparsekd.SAD: its parameters must be float32 or float64, got {self.teacher_position.dtype}; "
                "call .float() on it (the features may be of half type)"
            )
        sides = feature_shapes(teacher_features), feature_shapes(student_features)
        _check_shapes("teacher", sides[0], self.teacher_channels)
        _check_shapes("student", sides[1], self.student_channels)
        batches = {shape[0] for shapes in sides for shape in shapes}
        if len(batches) > 1:
            raise ValueError(
                f"sparsekd.SAD: all features must have the same batch size, got {sorted(batches)}; "
                "feed both networks the same batch"
            )
        if self.training and student_features[0].shape[0] < 2:
            raise ValueError(
                f"sparsekd.SAD: training needs a batch of at least 2 (batch norm), got {student_features[0].shape[0]}; "
                "drop the last partial batch (DataLoader(drop_last=True)) or call .eval()"
            )


def _are_as_made(linear: nn.Linear, norm: nn.BatchNorm1d) -> bool:
    """Whether these are set up as `SAD` did; without a momentum, for one, a norm computes something else."""
    return linear.bias is not None and norm.affine and norm.track_running_stats and norm.momentum is not None


def _project_queries(query: Tensor, key: Tensor, linear: nn.Linear, norm: Any) -> Tensor:
    """`SAD._content` at less than half of its cost, without K' [B*S, T*q].

    A linear layer's mean and variance over a batch follow from the mean and covariance of its inputs. With these known,
    K' is linear in K, and the queries go through the transposed weight instead: there are T of each image, not S * T.
    """
    rows, weight = key.shape[0] * key.shape[1], linear.weight
    if norm.training:
        mean = key.mean((0, 1))
        key = key - mean
        covariance = key.flatten(0, 1).T @ key.flatten(0, 1) / rows
        variance = ((weight @ covariance) * weight).sum(1).clamp_min(0)  # rounding may make it negative
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(linear(mean), norm.momentum)
            norm.running_var.lerp_(variance * (rows / (rows - 1)), norm.momentum)
        # The mean takes the bias away. It stays in the graph, so that its gradient is 0, as behind any batch norm, and
        # not None.
        offset = linear.bias - linear.bias
    else:
        variance, offset = norm.running_var, linear.bias - norm.running_mean
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shape = query.shape[1:]  # [T, q]
    scaled = (query * scale.view(shape)).transpose(0, 1)  # [T, B, q]
    projected = torch.bmm(scaled, weight.view(*shape, -1)).transpose(0, 1)  # [B, T, q]
    constant = (query * (norm.bias + scale * offset).view(shape)).sum(2, keepdim=True)  # [B, T, 1]
    return projected @ key.transpose(1, 2) + constant


class _LayerLinearNorm(nn.Module):
    """A Linear and a batch norm for each tapped layer: [B, sum of C], layers side by side, to [B, layers, q].

    Neighbours of one width are one batched product and all layers one batch norm: as modules of their own, 24 layers
    cost several times what they compute.
    """

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        runs = [(width, len(list(run))) for width, run in itertools.groupby(channels)]
        self.weights = nn.ParameterList(torch.empty(count, width, dim) for width, count in runs)
        self.bias = nn.Parameter(torch.empty(len(channels), 1, dim))
        self.norm = nn.BatchNorm1d(len(channels) * dim)
        biases = self.bias.detach().split([count for _, count in runs])
        for weight, bias in zip(self.weights, biases, strict=True):  # as nn.Linear initialises its own
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, means: Tensor) -> Tensor:
        shapes = [weight.shape[:2] for weight in self.weights]
        parts = means.split([count * width for count, width in shapes], 1)
        inputs = [part.unflatten(1, shape).transpose(0, 1) for part, shape in zip(parts, shapes, strict=True)]
        products = [torch.bmm(x, weight) for x, weight in zip(inputs, self.weights, strict=True)]  # [layers, B, q]
        rows = (torch.cat(products) + self.bias).transpose(0, 1)
        return self.norm(rows.flatten(1)).view(rows.shape)


def _checked_channels(name: str, channels: Sequence[int]) -> tuple[int, ...]:
    channels = tuple(channels)
    if not channels or min(channels) < 1:
        raise ValueError(
            f"sparsekd.SAD: {name} must be one positive channel count for each tapped layer, got {list(channels)}; "
            "SAD.from_features reads them off example features"
        )
    return channels


def _check_shapes(side: str, shapes: Sequence[tuple[int, ...]], channels: tuple[int, ...]) -> None:
    if len(shapes) != len(channels):
        raise ValueError(
            f"sparsekd.SAD: expected {len(channels)} {side} features, got {len(shapes)}; "
            "pass them as (teacher_features, student_features), one for each tapped layer"
        )
    for index, (shape, expected) in enumerate(zip(shapes, channels, strict=True)):
        check_rank("SAD", f"{side} feature {index}", shape)
        if shape[1] != expected:
            raise ValueError(
                f"sparsekd.SAD: {side} feature {index} must have {expected} channels, got {shape[1]} in "
                f"{shape}; keep the order of layers, or build a new SAD.from_features"
            )

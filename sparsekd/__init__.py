"""Prune and distil PyTorch models into block-sparse students that really run faster.

blocks     BlockPattern, BlockSparse: which blocks of a weight exist, and their values
ops        linear, conv2d, conv_transpose2d, feature_stats: what each op means on any device
backends   which kernel runs an op here, and why
nn         SparseLinear, SparseConv2d and others: drop-in layers
convert    densify, and sparsify by density: swap a model's layers in place; conversion: what stays dense and why
losses     SAD, AT and KD: what a student can learn from a teacher
goals      Regression, Classification, Ranking, Click: what a network learns and how it is judged
taps       FeatureTap: the outputs of inner modules
distill    Distiller: the loss of a student, with its teacher or without
pruning    scores, schedules, budgets, Pruner; sparsify
distributed  one mask and one gradient on every rank
optim      SGD, Adagrad and Adam that touch the rows of a batch alone
serving    ServingModel: answers while it is replaced
methods    SP-SAD, LTH-SAD, SS-SAD; D2S for streams
freeze     the inference network: folded, fused, each layer as fast as this machine can run it
energy     EnergyMeter: joules with the name of the counter they come from
runs       the main job: distil, prune, freeze, measure (``sparsekd run``)
"""

from . import backends, nn, ops, optim
from .blocks import BlockPattern, BlockSparse
from .conversion import ConversionReport
from .convert import conversion_report, densify
from .distill import Distiller
from .energy import EnergyMeter
from .freeze import FrozenModel, freeze, load_frozen
from .goals import Classification, Click, Ranking, Regression
from .losses import SAD, attention_transfer_loss, kd_loss, kd_regression_loss
from .methods import D2S, LTHSAD, SPSAD, SSSAD
from .pruning import CostTable, LinearSchedule, Pruner, sparsify
from .serving import ServingModel
from .taps import FeatureTap
from .version import __version__

__all__ = [
    "D2S",
    "LTHSAD",
    "SAD",
    "SPSAD",
    "SSSAD",
    "BlockPattern",
    "BlockSparse",
    "Classification",
    "Click",
    "ConversionReport",
    "CostTable",
    "Distiller",
    "EnergyMeter",
    "FeatureTap",
    "FrozenModel",
    "LinearSchedule",
    "Pruner",
    "Ranking",
    "Regression",
    "ServingModel",
    "__version__",
    "attention_transfer_loss",
    "backends",
    "conversion_report",
    "densify",
    "freeze",
    "kd_loss",
    "kd_regression_loss",
    "load_frozen",
    "nn",
    "ops",
    "optim",
    "sparsify",
]

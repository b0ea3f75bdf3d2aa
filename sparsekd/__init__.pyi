# The names of sparsekd/__init__.py, which loads them when they are asked for.
from . import backends as backends
from . import nn as nn
from . import ops as ops
from . import optim as optim
from . import runtime as runtime
from .blocks import BlockPattern, BlockSparse
from .conversion import ConversionReport
from .convert import conversion_report, densify
from .distill import Distiller
from .energy import EnergyMeter
from .freeze import FrozenModel, LoadedNetwork, export_onnx, freeze, load_frozen
from .goals import Classification, Click, Ranking, Regression
from .losses import SAD, attention_transfer_loss, kd_loss, kd_regression_loss
from .methods import D2S, LTHSAD, SPSAD, SSSAD, SparseRec
from .pruning import CostTable, LinearSchedule, Pruner, sparsify
from .serving import ServingModel
from .taps import FeatureTap
from .teacher_cache import TeacherCache
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
    "LoadedNetwork",
    "Pruner",
    "Ranking",
    "Regression",
    "ServingModel",
    "SparseRec",
    "TeacherCache",
    "__version__",
    "attention_transfer_loss",
    "conversion_report",
    "densify",
    "export_onnx",
    "freeze",
    "kd_loss",
    "kd_regression_loss",
    "load_frozen",
    "sparsify",
]

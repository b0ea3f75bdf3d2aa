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
teacher_cache  TeacherCache: what a teacher says and sees, once a row
pruning    scores, schedules, budgets, Pruner; sparsify
distributed  one mask and one gradient on every rank
optim      SGD, Adagrad and Adam that touch the rows of a batch alone
serving    ServingModel: answers while it is replaced
methods    SP-SAD, LTH-SAD, SS-SAD; SparseRec for tables of embeddings, D2S for streams
freeze     the inference network: folded, fused, each layer as fast as this machine can run it
runtime    Session: an exported network without torch
energy     EnergyMeter: joules with the name of the counter they come from
runs       the main job: distil, prune, freeze, measure (``sparsekd run``)
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from .version import __version__

# Where each name is: loaded when it is first asked for, so that what needs no torch (`sparsekd.runtime`, `--help`) does
# not wait for it, and works where it is not installed. Type checkers read the same in __init__.pyi.
_HOMES = {
    "blocks": ("BlockPattern", "BlockSparse"),
    "conversion": ("ConversionReport",),
    "convert": ("conversion_report", "densify"),
    "distill": ("Distiller",),
    "energy": ("EnergyMeter",),
    "freeze": ("FrozenModel", "LoadedNetwork", "export_onnx", "freeze", "load_frozen"),
    "goals": ("Classification", "Click", "Ranking", "Regression"),
    "losses": ("SAD", "attention_transfer_loss", "kd_loss", "kd_regression_loss"),
    "methods": ("D2S", "LTHSAD", "SPSAD", "SSSAD", "SparseRec"),
    "pruning": ("CostTable", "LinearSchedule", "Pruner", "sparsify"),
    "serving": ("ServingModel",),
    "taps": ("FeatureTap",),
    "teacher_cache": ("TeacherCache",),
}
_TRAINING = ("torch", "safetensors")  # what the extra [train] installs
# Not in __all__: `from sparsekd import *` would put `sparsekd.nn` in the place of torch's.
_MODULES = ("backends", "nn", "ops", "optim", "runtime")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

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


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        try:
            value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
        except ModuleNotFoundError as error:
            if error.name not in _TRAINING:
                raise
            raise ModuleNotFoundError(
                f"sparsekd.{name} needs {error.name}: pip install 'sparsekd[train]'; sparsekd.runtime needs it not",
                name=error.name,
            ) from error
        globals()[name] = value
        return value
    if not name.startswith("__"):
        try:
            return import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _Door(ModuleType):
    """`sparsekd.freeze` is the function, whenever the room of that name is loaded: the import system would put the room
    in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door

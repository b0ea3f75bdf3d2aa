"""The inference network: folded, fused, and each layer as fast as this machine can run it.

    frozen = sparsekd.freeze(student, x)      # a copy; the student stays as it is
    print(frozen.plan)                        # per layer: dense us, sparse us, which one was kept, why
    y = frozen(x)                             # any batch size, images of the example's size
    frozen.save("student.frozen")
    frozen = sparsekd.load_frozen("student.frozen", build_student())
    frozen.export("student.skd")              # for sparsekd.runtime, which needs neither torch nor the model

freeze.py says how it is done, file.py what a file of save holds, docs/file-format.md what one of export does.
"""

from .cuda import FrozenCudaModel
from .deploy import LoadedNetwork
from .freeze import freeze
from .load import load_frozen
from .network import FrozenModel
from .onnx import export_onnx
from .plan import Geometry, LayerPlan, Plan

__all__ = [
    "FrozenCudaModel",
    "FrozenModel",
    "Geometry",
    "LayerPlan",
    "LoadedNetwork",
    "Plan",
    "export_onnx",
    "freeze",
    "load_frozen",
]

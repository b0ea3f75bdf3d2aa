"""The inference network: folded, fused, and each layer as fast as this machine can run it.

    frozen = sparsekd.freeze(student, x)      # a copy; the student stays as it is
    print(frozen.plan)                        # per layer: dense us, sparse us, which one was kept, why
    y = frozen(x)                             # any batch size, images of the example's size
    frozen.save("student.frozen")
    frozen = sparsekd.load_frozen("student.frozen", build_student())

freeze.py says how it is done, file.py what a file holds.
"""

from .cuda import FrozenCudaModel
from .freeze import freeze
from .load import load_frozen
from .network import FrozenModel
from .plan import Geometry, LayerPlan, Plan

__all__ = ["FrozenCudaModel", "FrozenModel", "Geometry", "LayerPlan", "Plan", "freeze", "load_frozen"]

"""Exported networks without torch: numpy arrays in and out, the whole graph in C++.

    session = sparsekd.runtime.Session("student.skd", threads=2)
    y = session(x)                              # arrays in the order of session.inputs, any batch size
    results = session.run({"x": x})             # by name

The file comes from ``FrozenModel.export`` or ``sparsekd export``. What it holds: docs/file-format.md.
"""

from .session import Session, Tensor

__all__ = ["Session", "Tensor"]

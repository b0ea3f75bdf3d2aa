"""One file that says everything: `FrozenModel.export` writes it, `sparsekd.runtime.Session` runs it without torch.

graph.py puts a file together, lowering.py walks the frozen graph, layers.py, plain.py and shapes.py say what its nodes
become, source.py finds the graph of a network that runs its own forward, loaded.py runs a file inside torch.
"""

from .export import export
from .graph import CannotExport
from .loaded import LoadedNetwork, is_exported, load

__all__ = ["CannotExport", "LoadedNetwork", "export", "is_exported", "load"]

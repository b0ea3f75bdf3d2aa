"""Methods that distil and prune together, each in one file, all used alike in any training loop (see ``Method``)."""

from .base import Method, PruneEvent
from .lth_sad import LTHSAD
from .paper import PAPER, PaperRecipe
from .sp_sad import SPSAD
from .ss_sad import SSSAD
from .staged import Round, Stage, Staged

METHODS: dict[str, type[Staged]] = {method.name: method for method in (SPSAD, LTHSAD, SSSAD)}

__all__ = [
    "LTHSAD",
    "METHODS",
    "PAPER",
    "SPSAD",
    "SSSAD",
    "Method",
    "PaperRecipe",
    "PruneEvent",
    "Round",
    "Stage",
    "Staged",
]

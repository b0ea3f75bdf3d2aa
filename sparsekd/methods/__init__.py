"""Methods that distil and prune together, each in one file, all used alike in any training loop (see ``Method``)."""

from .base import Method, PruneEvent
from .d2s import D2S
from .lth_sad import LTHSAD
from .online import OnlinePruned
from .paper import PAPER, PaperRecipe
from .sp_sad import SPSAD
from .sparserec import SparseRec
from .ss_sad import SSSAD
from .staged import Round, Stage, Staged
from .tables import TableMethod
from .tickets import PEP, TableTickets

METHODS: dict[str, type[Staged]] = {method.name: method for method in (SPSAD, LTHSAD, SSSAD)}
TABLE_METHODS: dict[str, type[TableMethod]] = {method.name: method for method in (SparseRec, TableTickets, PEP)}

__all__ = [
    "D2S",
    "LTHSAD",
    "METHODS",
    "PAPER",
    "PEP",
    "SPSAD",
    "SSSAD",
    "TABLE_METHODS",
    "Method",
    "OnlinePruned",
    "PaperRecipe",
    "PruneEvent",
    "Round",
    "SparseRec",
    "Stage",
    "Staged",
    "TableMethod",
    "TableTickets",
]

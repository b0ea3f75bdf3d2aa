"""Prune a model while it trains: scores, the choice of what goes, and the surgery on layers, optimizers and batch norm.

    pruner = Pruner(student, scope="global", example_inputs=(x,))   # converts the layers of `student` in place
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    pruner.attach(optimizer)
    ...                                                             # after every optimizer.step(): pruner.after_step()
    pruner.prune_to(0.5)                                            # half of the original weights are gone
    pruner.rewind()                                                 # lottery ticket: survivors back to where they began
    pruner.grow_to(0.4)                                             # a tenth is back, as zeros
    pruner.exchange(0.3)                                            # 30 % of what is kept make room for as many others

A *unit* is what stays or goes as a whole: a block, an output filter or a single weight. Counts are weights of the
pruned convolutions and linear layers (no biases, no batch norm), shares are of their ORIGINAL count.
"""

from .budget import UNITS, Budget, check_unit
from .choice import SCOPES
from .cost import CostTable, LayerCost
from .entries import drop_entries, exchange_entries, grow_entries
from .gradients import DenseGradients
from .grouping import Grouping
from .observe import count_macs, count_weights
from .pruner import Pruner
from .schedule import LinearSchedule, ListedSchedule, Schedule
from .scores import choose_units, lamp_scores, layer_ranks, magnitude_scores, random_scores
from .sensitivity import Sensitivity, sensitivity
from .sparsify import sparsify
from .surgery import drop_blocks, grow_blocks

__all__ = [
    "SCOPES",
    "UNITS",
    "Budget",
    "CostTable",
    "DenseGradients",
    "Grouping",
    "LayerCost",
    "LinearSchedule",
    "ListedSchedule",
    "Pruner",
    "Schedule",
    "Sensitivity",
    "check_unit",
    "choose_units",
    "count_macs",
    "count_weights",
    "drop_blocks",
    "drop_entries",
    "exchange_entries",
    "grow_blocks",
    "grow_entries",
    "lamp_scores",
    "layer_ranks",
    "magnitude_scores",
    "random_scores",
    "sensitivity",
    "sparsify",
]

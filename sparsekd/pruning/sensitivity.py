"""How much a network loses when one of its layers is pruned: measured layer by layer, on validation data.

scan = sensitivity(model, lambda network: accuracy(network, validation), densities=(0.5, 0.2))
print(scan)                                                 # a table: layers by densities
pruner.prune_to(macs=0.7, scores=scan.scores(pruner))       # what a layer's energy is worth, by what was lost
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BlockSparse, check_density
from ..conversion import SPARSE_TYPES, Pattern, named_layers
from ..convert import densify, sparsify
from ..nn import BlockSparseLayer
from .pruner import Pruner
from .scores import energies, picture


@dataclass(frozen=True)
class Sensitivity:
    """Scores of a network with one layer pruned.

    whole: with none. layers: name -> (score at each of ``densities``). energy_lost: name -> the sum of squared weights
    that went with the blocks, at each density.
    """

    whole: float
    densities: tuple[float, ...]
    layers: Mapping[str, tuple[float, ...]]
    energy_lost: Mapping[str, tuple[float, ...]]

    def worth(self) -> dict[str, float]:
        """Layer -> what is lost with each squared weight, at the density where that is most.

        A layer loses at least a tenth of what the median layer loses at the same density, since one whose loss drowns
        in the noise of the validation data is not worth nothing. All are worth 1 if none loses anything.
        """
        worth = dict.fromkeys(self.layers, 0.0)
        for place in range(len(self.densities)):
            losses = {name: max(self.whole - scores[place], 0.0) for name, scores in self.layers.items()}
            least = 0.1 * sorted(losses.values())[len(losses) // 2]
            for name, loss in losses.items():
                worth[name] = max(worth[name], max(loss, least) / self.energy_lost[name][place])
        least_worth = min((each for each in worth.values() if each > 0), default=1.0)
        return {name: each or least_worth for name, each in worth.items()}

    def scores(self, pruner: Pruner) -> dict[str, Tensor]:
        """For ``prune_to(scores=)``: squared weights of every block, each as its layer is worth."""
        worth = self.worth()
        missing = [name for name in pruner.layers() if name not in worth]
        if missing:
            raise ValueError(
                f"Sensitivity.scores: the scan did not see {', '.join(missing)}; scan with the include and exclude of "
                "the Pruner"
            )
        return {name: worth[name] * _energy(layer) for name, layer in pruner.layers().items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "whole": self.whole,
            "densities": list(self.densities),
            "layers": {name: list(scores) for name, scores in self.layers.items()},
            "energy_lost": {name: list(lost) for name, lost in self.energy_lost.items()},
        }

    def __str__(self) -> str:
        head = ["layer", *(f"at {density:g}" for density in self.densities)]
        rows = [head, *([name, *(f"{score:.4g}" for score in scores)] for name, scores in self.layers.items())]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"whole: {self.whole + 0.0:.4g}"])


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    *,
    densities: Sequence[float] = (0.5, 0.2),
    pattern: Pattern = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Sensitivity:
    """Prune one layer after another to each density, the others left whole, and ask ``score`` every time.

    Args:
        model: left as it is; its sparse layers count as dense ones with zeros.
        score: network in eval mode -> a number, higher is better: accuracy, or minus an error, on validation data.
        densities, pattern, include, exclude: as in ``sparsify``.

    Raises:
        ValueError: for a score that is no finite number, or a model without a layer to prune.
    """
    for density in densities:
        check_density("sparsekd.sensitivity", density)
    dense = densify(copy.deepcopy(model)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = sparsify(copy.deepcopy(dense), pattern, 1.0, include, exclude)
    layers = dict(named_layers(sparse, SPARSE_TYPES))
    if not layers:
        raise ValueError("sparsekd.sensitivity: the model has no layer to prune; look at include and exclude")
    whole = _finite(score(dense), "the whole model")
    scores: dict[str, tuple[float, ...]] = {}
    lost: dict[str, tuple[float, ...]] = {}
    for name, layer in layers.items():
        measured = []
        for density in densities:
            pruned = copy.deepcopy(dense)
            sparsify(pruned, layer.pattern, density, include=[name])
            twin: Any = pruned.get_submodule(name)
            left = float(energies(twin.values).sum())
            measured.append((_finite(score(pruned), name), float(energies(layer.values).sum()) - left))
        scores[name] = tuple(one for one, _ in measured)
        lost[name] = tuple(max(energy, torch.finfo(torch.float64).tiny) for _, energy in measured)
    return Sensitivity(whole, tuple(densities), scores, lost)


def _energy(layer: Any) -> Tensor:
    """Mean squared weight of every block that is kept, 0 elsewhere, in the shape of the mask; of single weights where
    there are no blocks."""
    if not isinstance(layer, BlockSparseLayer):
        return layer.weight.detach().double().square()
    blocks: BlockSparse = layer.blocks
    return picture(energies(blocks.values) / blocks.block_sizes().cpu(), blocks)


def _finite(score: float, of: str) -> float:
    if not torch.isfinite(torch.tensor(float(score))):
        raise ValueError(f"sparsekd.sensitivity: expected a finite score of {of}, got {score}")
    return float(score)

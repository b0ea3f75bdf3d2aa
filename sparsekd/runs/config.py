"""What a run is asked to do: every setting with its default, which stands here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..blocks import BlockPattern, check_density
from ..pruning import SCOPES, Budget, check_unit
from .plans.network import AT_ONCE, KNOWN_METHODS, RANKING_METHODS_ALL


@dataclass(frozen=True)
class RunConfig:
    """What `run` does.

    task       a name out of `tasks.TASKS`; `options` are those that the task has for itself, as {"group": "social"}.
    data_dir   folder of the data files, None for the embedded ones.
    methods    names out of METHODS and ABLATIONS; None: those that the task is usually run with.
    densities  shares to keep of what `unit` counts in the layers that are pruned, in (0, 1]; each below 1 makes a
               student of every method (1 is the SAD row that every run has). None: those that the task is usually run
               with.
    budgets    instead of unit and densities, texts as in "macs=0.3" or "latency_us=80": above 1 a number that stays.
    unit       what the densities count: multiply-adds ("macs"), "weights", "bytes", or the predicted time of the frozen
               network at batch 1 ("latency_us"). None: multiply-adds, or weights by the published recipe.
    scope      how the methods choose, as in `Pruner`: "cost", "global" or "layer"; None: by cost, but where weights are
               counted as each method has it in the paper.
    at_once    prune before the first step of training, by what: the first weights ("magnitude", or LAMP where the plan
               of the task has it), or saliencies of some batches, "snip", "taylor" or "fisher", where a teacher takes
               part from the first step: not in SS-SAD. None: while they train, when the plan of the task says so.
    costs      a file of `CostTable.save` for the student, for `unit` "latency_us"; None: measured now, kept in `out`.
    seeds      how many; seed s initialises all students of that seed alike.
    quick      fewer rows, fewer epochs, short timings: to see it work, not to quote.
    pattern    blocks that are pruned, outputs x inputs: "16x1", on every device, so that they can be compared. GPU
               tensor cores want "64x32", other blocks run dense there.
    out        folder of everything that is written; default runs/<task>, with the options that differ.
    threads    of torch and of the kernels; None leaves torch's choice.
    jobs       networks that are trained at once, each with its share of the threads, and not more than there are: small
               ones are ready sooner. The joules of each are not known then, and training seconds say little. A script
               that asks for it calls `run` under `if __name__ == "__main__":`, since each process imports it again.
    device     "cpu" or "cuda" for training; None: what suits the task. Frozen networks are for the CPU.
    bf16       autocast; None: what suits the task on this device.
    compiled   torch.compile every training step.
    measure    freeze and time the networks; False leaves that to a later call with `remeasure`.
    fresh      throw away what an earlier run left in `out`, instead of going on with it.
    remeasure  score finished networks on test, freeze and time them again, as they are: on a quiet machine, or with
               other threads. Without `measure` the scores alone: soon done, and timings stay as they were.
    stop_after minutes after which `run` raises OutOfTime; the same call goes on from there.
    command    what the report says was called.
    """

    task: str = "movietweetings"
    data_dir: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] | None = None
    densities: tuple[float, ...] | None = None
    budgets: tuple[str, ...] | None = None
    unit: str | None = None
    scope: str | None = None
    at_once: str | None = None
    costs: str | None = None
    seeds: int = 1
    quick: bool = False
    pattern: str = "16x1"
    out: str | None = None
    threads: int | None = None
    jobs: int = 1
    device: str | None = None
    bf16: bool | None = None
    compiled: bool = False
    measure: bool = True
    fresh: bool = False
    remeasure: bool = False
    stop_after: float | None = None
    command: str = "sparsekd.runs.run"

    def __post_init__(self) -> None:
        for name in ("densities", "budgets", "methods"):  # each once, in the order given
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for density in self.densities or ():
            check_density("sparsekd run", density)
        self._check_budgets()
        if self.unit is not None:
            check_unit("sparsekd run", self.unit)
        if self.costs is not None and self.unit != "latency_us":
            raise ValueError(
                f"sparsekd run: a table of costs belongs to the unit latency_us, got unit {self.unit} and costs "
                f"{self.costs}; leave one of them out"
            )
        if self.scope not in (None, *SCOPES):
            raise ValueError(f"sparsekd run: scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.at_once not in (None, *AT_ONCE):
            raise ValueError(f"sparsekd run: at_once must be one of {', '.join(AT_ONCE)}, got {self.at_once!r}")
        BlockPattern.parse(self.pattern)
        known = (*KNOWN_METHODS, *RANKING_METHODS_ALL)
        for method in self.methods or ():
            if method not in known:
                raise ValueError(f"sparsekd run: method must be one of {', '.join(known)}, got {method!r}")
        for name, number in (("seeds", self.seeds), ("threads", self.threads), ("jobs", self.jobs)):
            if number is not None and number < 1:
                raise ValueError(f"sparsekd run: {name} must be at least 1, got {number}")
        if self.stop_after is not None and not self.stop_after > 0:
            raise ValueError(f"sparsekd run: stop_after must be more than 0 minutes, got {self.stop_after}")

    def asked(self) -> tuple[float, ...]:
        """Shares, and numbers above 1, of what a complete run counts."""
        if self.budgets is not None:
            return tuple(Budget.parse("sparsekd run", text).number for text in self.budgets)
        return self.densities or ()

    def _check_budgets(self) -> None:
        if self.budgets is None:
            return
        units = sorted({Budget.parse("sparsekd run", text).unit for text in self.budgets})
        if len(units) > 1:
            raise ValueError(f"sparsekd run: all budgets of a run count the same, got {' and '.join(units)}")
        if self.densities is not None or self.unit not in (None, *units):
            raise ValueError(
                f"sparsekd run: a budget says unit and density, got unit {self.unit} and densities {self.densities} "
                f"beside {', '.join(self.budgets)}; leave them out"
            )
        object.__setattr__(self, "unit", units[0])

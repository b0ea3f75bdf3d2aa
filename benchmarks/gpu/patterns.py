"""What blocks that a GPU likes cost in accuracy: SP-SAD on the main job, one density, block patterns side by side.

    python -m benchmarks.gpu.patterns --density 0.45 0.2 --seeds 1

All students of a seed start alike, learn from one teacher and train as `sparsekd run movietweetings` has it. Rows are
kept in --out as they finish; a run that was stopped goes on. MAE and MSE are those of the test part, at the epoch of
smallest validation MSE.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsekd import BlockPattern, checkpoint
from sparsekd.data import Task
from sparsekd.pruning import Grouping
from sparsekd.runs import RunConfig, tasks
from sparsekd.runs.epochs import fit
from sparsekd.runs.evaluate import kept_share
from sparsekd.runs.plans.network import Network
from sparsekd.runs.record import fresh

LAYOUTS = {
    "16x1 (CPU)": (BlockPattern(16, 1), Grouping()),
    "16x1, rows shared": (BlockPattern(16, 1), Grouping(rows=128, equal=True)),
    "16x16": (BlockPattern(16, 16), Grouping()),
    "64x32 (GPU)": (BlockPattern.for_device("cuda"), Grouping()),
    "64x32, rows shared": (BlockPattern.for_device("cuda"), Grouping.for_device("cuda")),
    "16x1, whole taps": (BlockPattern(16, 1), Grouping(taps=True)),
}


def trained(task: Task, network: Network, seed: int, teacher: nn.Module | None, folder: Path) -> nn.Module:
    """The best epoch's network; trained now unless an earlier run has."""
    path = folder / "model.safetensors"
    if not path.is_file() or (folder / "state.safetensors").is_file():
        fit(fresh(network, seed), task, network, teacher=teacher, seed=seed, folder=folder)
        (folder / "state.safetensors").unlink()
    return checkpoint.load(fresh(network, seed), path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, nargs="*", default=[0.45, 0.2])
    parser.add_argument("--layout", nargs="*", default=list(LAYOUTS), choices=LAYOUTS, help="only these")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few rows: to see it work, not to quote")
    parser.add_argument("--work", default="runs/gpu-patterns", help="folder of the networks")
    parser.add_argument("--out", default="benchmarks/results/gpu_patterns.json")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = tasks.complete(
        RunConfig("movietweetings", methods=("sp-sad",), options={"recipe": "paper"}, quick=options.quick)
    )
    task = tasks.entry_of(config.task).load(config)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        work = Path(options.work) / f"seed{seed}"
        for density in options.density:
            plan = tasks.plan_of(task, dataclasses.replace(config, densities=(density,)))
            teacher = trained(task, plan.teacher, seed, None, work / "teacher")
            student = plan.students[-1]  # the pruned one
            for name in options.layout:
                pattern, grouping = LAYOUTS[name]
                network = dataclasses.replace(
                    student, name=name, pattern=str(pattern), options={**student.options, "grouping": grouping}
                )
                model = trained(task, network, seed, teacher, work / f"{name} {density}")
                scores = {f"test_{metric}": value for metric, value in task.goal.scores(model, task.test).items()}
                row = {"layout": name, "density": density, "seed": seed, "kept": kept_share(model)}
                rows.append(row | {"pattern": str(pattern), **scores})
                print(rows[-1], flush=True)
                record = {"task": task.name, "data": task.meta.get("sha256"), "method": "SP-SAD", "rows": rows}
                record["command"] = shlex.join(["python", "-m", "benchmarks.gpu.patterns", *argv])
                record["versions"] = {"torch": torch.__version__, "quick": options.quick}
                Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

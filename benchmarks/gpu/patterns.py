"""What blocks that a GPU likes cost in accuracy: SP-SAD on the main job, one density, block patterns side by side.

    python -m benchmarks.gpu.patterns --density 0.45 0.2 --seeds 1

All students of a seed start alike, learn from one teacher and train as `sparsekd run movietweetings` has it. Rows are
kept in --out as they finish; a run that was stopped goes on. MAE and MSE are those of the test part, at the epoch of
smallest validation MSE.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path

import torch

from sparsekd import SPSAD, BlockPattern, checkpoint, data
from sparsekd.methods import METHODS
from sparsekd.pruning import Grouping
from sparsekd.runs import run as train
from sparsekd.runs.epochs import Network, fit
from sparsekd.runs.evaluate import errors, kept_share, predict

LAYOUTS = {
    "16x1 (CPU)": (BlockPattern(16, 1), Grouping()),
    "16x1, rows shared": (BlockPattern(16, 1), Grouping(rows=128, equal=True)),
    "16x16": (BlockPattern(16, 16), Grouping()),
    "64x32 (GPU)": (BlockPattern.for_device("cuda"), Grouping()),
    "64x32, rows shared": (BlockPattern.for_device("cuda"), Grouping.for_device("cuda")),
    "16x1, whole taps": (BlockPattern(16, 1), Grouping(taps=True)),
}


def trained(task, network, seed, teacher, folder):
    """The best epoch's network; trained now unless an earlier run has."""
    path = folder / "model.safetensors"
    if not path.is_file() or (folder / "state.safetensors").is_file():
        fit(train._fresh(task, network, seed), task, network, teacher=teacher, seed=seed, folder=folder)
        (folder / "state.safetensors").unlink()
    return checkpoint.load(train._fresh(task, network, seed), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, nargs="*", default=[0.45, 0.2])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few rows: to see it work, not to quote")
    parser.add_argument("--work", default="runs/gpu-patterns", help="folder of the networks")
    parser.add_argument("--out", default="benchmarks/results/gpu_patterns.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = data.load("movietweetings", None)
    task = train._shortened(task) if options.quick else task
    teacher_recipe, recipe = train._recipes(task, options.quick)
    rows: list[dict] = []
    for seed in range(options.seeds):
        work = Path(options.work) / f"seed{seed}"
        teacher = trained(task, Network("teacher", "teacher", teacher_recipe), seed, None, work / "teacher")
        for density in options.density:
            for name, (pattern, grouping) in LAYOUTS.items():
                METHODS[name] = partial(SPSAD, pattern=pattern, grouping=grouping)  # type: ignore[assignment]
                network = Network(name, name, recipe, train.ALPHA, train.BETA, name, density)
                model = trained(task, network, seed, teacher, work / f"{name} {density}")
                mae, mse = errors(predict(model, task.test), task, task.test)
                row = {"layout": name, "density": density, "seed": seed, "kept": kept_share(model)}
                rows.append(row | {"pattern": str(pattern), "test_mae": mae, "test_mse": mse})
                print(rows[-1], flush=True)
                record = {"task": task.name, "data": task.meta.get("sha256"), "method": "SP-SAD", "rows": rows}
                record["command"] = shlex.join(["python", "-m", "benchmarks.gpu.patterns", *sys.argv[1:]])
                record["versions"] = {"torch": torch.__version__, "quick": options.quick}
                Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

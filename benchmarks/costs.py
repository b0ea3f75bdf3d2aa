"""Is the time that a table of costs predicts the time that a frozen network takes?

    python -m benchmarks.costs --out benchmarks/results/costs.json
    python -m benchmarks.costs --network resnet50 --budget macs=0.3 latency_us=0.5 --threads 1 2

For each network: its table is measured, then the network is pruned to each budget, by each scope, frozen, and timed in
turns with the dense one. `drift` is the time of the dense network now over that in the table, less one: by how much the
machine has become slower. `error` is predicted over measured, less one, both as shares of the dense network, so that
the drift is not in it; for a budget of microseconds `arrived` is the measured share over the one asked for, less one.
Random weights: the time of a layer does not depend on which blocks it keeps.
"""

from __future__ import annotations

import argparse
import copy
import os
import shlex
import sys
import time
from functools import partial
from typing import Any

import torch

import sparsekd
from benchmarks.lib.models import NETWORKS, Network, settle
from benchmarks.lib.timing import write_json
from sparsekd import timing
from sparsekd.pruning import SCOPES, Budget, CostTable

BUDGETS = ("macs=0.5", "macs=0.3", "macs=0.15", "latency_us=0.5", "latency_us=0.3")


@torch.no_grad()
def rows_of(
    name: str, network: Network, batch: int, budgets: list[Budget], scopes: list[str], seconds: float, layer_ms: float
) -> list[dict[str, Any]]:
    build, inputs_of, exclude = network
    torch.manual_seed(0)
    inputs = inputs_of(batch)
    model = settle(build(), *inputs_of(8))
    began = time.perf_counter()
    costs = CostTable.measure(model, inputs, exclude=exclude, layer_ms=layer_ms)
    table_seconds = time.perf_counter() - began
    dense = sparsekd.freeze(model, inputs)
    common = {"network": name, "batch": batch, "threads": torch.get_num_threads(), "table_seconds": table_seconds}
    rows = []
    for asked in budgets:
        for scope in scopes:
            began = time.perf_counter()
            options: dict[str, Any] = {asked.unit: asked.number, "exclude": exclude, "scope": scope, "costs": costs}
            try:
                sparse = sparsekd.sparsify(copy.deepcopy(model), example_inputs=inputs, **options)
            except ValueError as error:  # less than what has to stay takes
                rows.append({**common, "budget": str(asked), "scope": scope, "refused": str(error)})
                print(f"{name} n{batch} {asked} {scope}: {error}", flush=True)
                continue
            seconds_to_prune = time.perf_counter() - began
            frozen = sparsekd.freeze(sparse, inputs)
            calls = {"dense": partial(dense, *inputs), "frozen": partial(frozen, *inputs)}
            took = {name: 1e6 * median for name, median in timing.medians(calls, seconds).items()}
            predicted, drift = costs.predict(sparse), took["dense"] / costs.dense_us
            measured = took["frozen"]
            wanted = asked.number * costs.dense_us if asked.is_share else asked.number
            rows.append(
                {
                    **common,
                    "budget": str(asked),
                    "scope": scope,
                    "dense_us": costs.dense_us,
                    "predicted_us": predicted,
                    "measured_us": measured,
                    "measured_dense_us": took["dense"],
                    "drift": drift - 1,
                    "error": predicted * drift / measured - 1,
                    "arrived": measured / (wanted * drift) - 1 if asked.unit == "latency_us" else None,
                    "prune_seconds": seconds_to_prune,
                }
            )
            print(in_one_line(rows[-1]), flush=True)
    return rows


def in_one_line(row: dict[str, Any]) -> str:
    arrived = "" if row["arrived"] is None else f", {row['arrived']:+.1%} beside what was asked for"
    return (
        f"{row['network']} n{row['batch']} t{row['threads']} {row['budget']} {row['scope']}: predicted "
        f"{row['predicted_us']:.0f} of {row['dense_us']:.0f} us, measured {row['measured_us']:.0f} of "
        f"{row['measured_dense_us']:.0f} ({row['error']:+.1%}){arrived}; the table took {row['table_seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--budget", nargs="+", default=list(BUDGETS), metavar="UNIT=N")
    parser.add_argument("--scope", nargs="+", choices=SCOPES, default=["cost", "layer"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", nargs="+", type=int, default=[os.cpu_count() or 1])
    parser.add_argument("--layer-ms", type=float, default=20.0, help="to measure a layer for, at each density (20)")
    parser.add_argument("--seconds", type=float, default=2.0, help="to time a network for (2)")
    parser.add_argument("--out", metavar="FILE", help="JSON to write")
    options = parser.parse_args()
    budgets = [Budget.parse("benchmarks.costs", text) for text in options.budget]
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in options.network:
            for batch in options.batch:
                rows += rows_of(name, NETWORKS[name], batch, budgets, options.scope, options.seconds, options.layer_ms)
    if options.out:
        write_json(options.out, shlex.join(["python", "-m", "benchmarks.costs", *sys.argv[1:]]), rows)
    sys.exit(0)


if __name__ == "__main__":
    main()

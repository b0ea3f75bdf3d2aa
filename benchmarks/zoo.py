"""Public architectures through the whole of sparsekd: converted, frozen, compared, saved, read back and timed.

    pip install -e '.[bench,zoo]'
    python -m benchmarks.zoo --check --out benchmarks/results/zoo.jsonl
    python -m benchmarks.zoo --time --out benchmarks/results/zoo.jsonl --threads 2
    python -m benchmarks.zoo --check --out zoo.jsonl --network timm/resnet18 --network hf/bert
    python -m benchmarks.zoo --out benchmarks/results/zoo.jsonl --page docs/zoo.md

Random weights, nothing is downloaded; batch norms get the statistics of some random inputs. `--check` runs every
block-sparse layer sparse, whatever that costs, and times nothing; `--time` freezes by measurement, as a user does. Each
network has a process of its own. A row is written as soon as it is there, with its machine. Rows that are there are not
made again, but for times that other processes disturbed, which no table shows. Eager is the dense network in PyTorch;
frozen / eager is the median of rounds in which they take turns; OpenVINO runs the dense network afterwards, when the
threads of torch sleep.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsekd
from benchmarks.lib import zoo_page
from benchmarks.lib.architectures import LARGE, NETWORKS, Example, build, call, preload
from benchmarks.lib.timing import Elsewhere, machine
from sparsekd import timing
from sparsekd.freeze import outputs

DENSITIES = (1.0, 0.3)
LIMIT = 3e-3  # largest difference from the model, relative to the largest output
KINDS = ("check", "time")  # of rows

# ---- One network


def checked(name: str) -> Iterator[dict[str, Any]]:
    """What each stage finds, one after the other; an exception is the stage's that would have come next."""
    model, example = build(name, small=True)
    want = call(model, example)
    norms = sum(isinstance(getattr(one, "running_var", None), Tensor) for one in model.modules())
    yield {"stage": "built", "parameters": sum(p.numel() for p in model.parameters()), "norms": norms}
    sparse = sparsekd.sparsify(copy.deepcopy(model))
    layers = [one for one in sparse.modules() if isinstance(one, sparsekd.nn.BlockSparseLayer)]
    parity = _agreed("the block-sparse network", call(sparse, example), want)
    yield {"stage": "converted", "converted": len(layers), "parity_sparse": parity}
    for density in DENSITIES:
        pruned = _pruned(model, density)
        frozen = sparsekd.freeze(pruned, example, min_gain=0, layer_ms=1)
        parity = _agreed("the frozen network", call(frozen, example), call(pruned, example))
        folded = sum(one.geometry.batch_norm or one.geometry.kind == "norm" for one in frozen.plan)
        found = {"traced": frozen.record["traced"] or "no", "sites": len(frozen.plan), "folded": folded}
        yield _of(density, {"stage": "frozen", **found, "parity": parity, "notes": list(frozen.plan.notes)})
        _read_back(name, frozen, example)
        yield _of(density, {"stage": "read back"})


def timed(name: str, seconds: float, layer_ms: float) -> Iterator[dict[str, Any]]:
    """The network as freeze chooses it by time, beside eager."""
    model, example = build(name)
    for density in DENSITIES:
        pruned = _pruned(model, density)
        with Elsewhere() as elsewhere:
            frozen = sparsekd.freeze(pruned, example, layer_ms=layer_ms)
            calls = {"eager": partial(call, model, example), "frozen": partial(call, frozen, example)}
            taken = timing.samples(calls, seconds)
        _agreed("the frozen network", call(frozen, example), call(pruned, example))
        ratios = [ours / theirs for ours, theirs in zip(taken["frozen"], taken["eager"], strict=True)]
        us = {f"{which}_us": 1e6 * statistics.median(column) for which, column in taken.items()}
        low, middle, high = statistics.quantiles(ratios, n=4)
        ratio = {"frozen/eager": middle, "frozen/eager_quartiles": [low, high]}
        found = {"eager_kept": frozen.plan.eager, "elsewhere": elsewhere.share}
        yield _of(density, {"stage": "timed", **us, **ratio, **found})


def _pruned(model: nn.Module, density: float) -> nn.Module:
    return model if density == 1.0 else sparsekd.sparsify(copy.deepcopy(model), density=density)


def _agreed(what: str, got: Any, want: Any) -> float:
    parity = outputs.deviation(got, want, 1.0)
    if not parity <= LIMIT:
        raise RuntimeError(f"{what} differs by {parity:.2g}")
    return parity


def _read_back(name: str, frozen: sparsekd.FrozenModel, example: Example) -> None:
    with tempfile.TemporaryDirectory() as folder:
        frozen.save(f"{folder}/frozen")
        again = sparsekd.load_frozen(f"{folder}/frozen", NETWORKS[name]()[0])
        if not outputs.deviation(call(again, example), call(frozen, example), 1e-5) <= 1.0:
            raise RuntimeError("the network that was read back answers otherwise")


def _of(density: float, found: dict[str, Any]) -> dict[str, Any]:
    return {key if key == "stage" else f"{key}@{density:g}": value for key, value in found.items()}


def openvino(name: str, seconds: float) -> dict[str, Any]:
    """Of the dense network, while torch has nothing to do: their threads would stall each other."""
    import openvino as ov

    model, example = build(name)
    example_input: Any = example if isinstance(example, dict) else example[0]
    network = ov.convert_model(model, example_input=example_input)
    threads = torch.get_num_threads()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(network, "CPU", options).create_infer_request()
    given = [x.contiguous().numpy() for x in (example.values() if isinstance(example, dict) else example)]
    time.sleep(0.2)  # torch's threads wait for more for a moment, then sleep
    taken = timing.medians({"openvino": lambda: request.infer(given)}, seconds)
    return {"openvino_us": 1e6 * taken["openvino"]}


def measure(name: str, kind: str, seconds: float, layer_ms: float, threads: int) -> dict[str, Any]:
    """The row of one network; "failed" says why the stage after the last one named stopped."""
    torch.set_num_threads(threads)
    row: dict[str, Any] = {"network": name, "kind": kind, "failed": None}
    if kind == "time":
        row["machine"] = machine()
    row["stages"] = []
    try:
        for found in checked(name) if kind == "check" else timed(name, seconds, layer_ms):
            row["stages"].append(found.pop("stage"))
            row |= found
    except Exception as error:
        row["failed"] = _said(error)
    if kind == "time":
        try:
            row |= openvino(name, seconds)
        except Exception as error:
            row |= {"openvino_us": None, "openvino_failed": _said(error)}
    return row


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


# ---- All of them


def rows_in(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By network and kind; of two the later one counts."""
    if not path.exists():
        return {}
    return {(row["network"], row["kind"]): row for row in map(json.loads, path.read_text().splitlines())}


def in_a_process(name: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times are of a process that is started anew, as a user's is: one that was forked cannot share torch's threads."""
    try:
        return (in_a_new_process if kind == "time" else in_a_fork)(name, kind, options)
    except (TimeoutError, subprocess.TimeoutExpired):
        why = f"took more than {options.minutes:g} minutes"
    except ChildProcessError as ended:
        why = f"its process ended with status {ended}"
    return {"network": name, "kind": kind, "failed": why}


def in_a_new_process(name: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.zoo", "--one", kind, "--network", name]
    for option in ("seconds", "layer_ms", "threads"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60 * options.minutes)
    if done.returncode:
        raise ChildProcessError(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def in_a_fork(name: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """A copy of this process, which has imported everything and computed nothing: that saves seconds for each."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    given = (name, kind, options.seconds, options.layer_ms, options.threads)
    process = context.Process(target=lambda: sender.send(measure(*given)))
    process.start()
    sender.close()
    try:
        if not receiver.poll(60 * options.minutes):
            raise TimeoutError
        return receiver.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(process.exitcode) from None
    finally:
        process.kill()
        process.join()


def make_rows(
    names: list[str], kind: str, options: argparse.Namespace, make: Callable[..., dict[str, Any]] = in_a_process
) -> None:
    """The rows that are missing; make: one of them."""
    there = {} if options.again else rows_in(options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for number, name in enumerate(names, 1):
        if (name, kind) in there and not zoo_page.disturbed(there[name, kind]):
            continue
        if time.monotonic() - began > 60 * options.stop_after:
            print("stopped; the same command goes on")
            return
        row = make(name, kind, options)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number}/{len(names)} {name}: {row['failed'] or 'all stages'}", flush=True)


def in_any_order(names: Iterable[str]) -> list[str]:
    """The same order at every call, in which the first few are of all kinds; the largest come last."""
    return sorted(names, key=lambda name: (name in LARGE, zlib.crc32(name.encode())))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="make the rows of what is right and what is folded")
    parser.add_argument("--time", action="store_true", help="make the rows of what it takes")
    parser.add_argument("--page", type=Path, help="write the table of all rows into this page")
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"), help="rows are appended here")
    parser.add_argument("--network", action="append", help="one of those that --list names; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="to time each density of a network for")
    parser.add_argument("--layer-ms", type=float, default=60.0, help="of freeze")
    parser.add_argument("--minutes", type=float, default=20.0, help="that one network may take")
    parser.add_argument("--stop-after", type=float, default=1e9, metavar="MINUTES", help="begin no network later")
    parser.add_argument("--again", action="store_true", help="make also the rows that are in the file")
    parser.add_argument("--list", action="store_true", help="name the networks")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.network[0], options.one, options.seconds, options.layer_ms, options.threads)))
        return 0
    names = options.network or in_any_order(NETWORKS)
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        parser.error(f"unknown network {', '.join(unknown)}; --list names them")
    if options.list:
        print("\n".join(names))
    else:
        preload()
        for kind in KINDS:
            if getattr(options, kind):
                make_rows(names, kind, options)
        table = zoo_page.table(rows_in(options.out))
        if options.page:
            zoo_page.write(options.page, table)
        elif not (options.check or options.time):
            print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

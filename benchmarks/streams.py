"""What a model that learns a stream costs: serving its sparse copy, keeping it, and the memory of a long stream.

    python -m benchmarks.streams serving --out benchmarks/results/streams_serving.json
    python -m benchmarks.streams cost --out benchmarks/results/streams_cost.json
    python -m benchmarks.streams memory --out benchmarks/results/streams_memory.json

serving  microseconds of a click model at one batch: dense and eager, dense and frozen, and frozen, and exported, with
         shares of its hidden layers removed. Random weights: the time of a layer does not depend on which blocks it
         keeps.
cost     seconds and bytes of learning a stream with D2S, over those of the full model alone.
memory   resident size after every tenth of a stream of many events, learnt with D2S, and read from files.
"""

from __future__ import annotations

import argparse
import copy
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sparsekd
from benchmarks.lib.timing import write_json
from sparsekd import energy
from sparsekd.data import Period
from sparsekd.data.streams import DriftingClicks, EventStream
from sparsekd.data.streams.drift import write_csv
from sparsekd.distill import Plain
from sparsekd.goals import Click
from sparsekd.methods import D2S, Method
from sparsekd.models import WideAndDeep
from sparsekd.pruning import Pruner
from sparsekd.runs.stream import Learner, Online
from sparsekd.runtime import Session

NUMERIC, IDS = 64, 8
WIDTHS = ((512, 512, 512), (1024, 1024), (1024, 1024, 1024))
Row = dict[str, Any]


def serving(options: argparse.Namespace) -> list[Row]:
    rows = []
    for widths in WIDTHS if not options.quick else WIDTHS[:1]:
        torch.manual_seed(0)
        model = WideAndDeep(NUMERIC, IDS, rows=10_000, hidden=widths).eval()
        inputs = (torch.randn(options.batch, NUMERIC), torch.randint(2**40, (options.batch, IDS)))
        frozen = sparsekd.freeze(model, inputs)
        calls: dict[str, Any] = {"dense eager": partial(model, *inputs), "dense frozen": partial(frozen, *inputs)}
        for share in options.remove:
            pruned: Any = copy.deepcopy(model)
            Pruner(pruned, scope="layer", exclude=pruned.not_pruned, example_inputs=inputs).prune_to(share)
            frozen = sparsekd.freeze(pruned.eval(), inputs)
            calls[f"sparse frozen @ {share:g}"] = partial(frozen, *inputs)
            calls[f"sparse exported @ {share:g}"] = partial(session_of(frozen), *(x.numpy() for x in inputs))
        seconds, rounds = (0.05, 6) if options.quick else (0.5, 9)
        with torch.inference_mode():
            compared = energy.compare(calls, seconds=seconds, warmup=seconds, rounds=rounds, device="cpu")
        us = {name: 1e6 * measured.seconds_per_call for name, measured in compared.measurements.items()}
        for name, measured in us.items():
            row = {"widths": list(widths), "batch": options.batch, "network": name, "us": measured}
            rows.append(
                {**row, "over_eager": us["dense eager"] / measured, "over_frozen": us["dense frozen"] / measured}
            )
            print(f"{widths}  {name:20}  {measured:9.1f} us  {us['dense eager'] / measured:5.2f} x eager"
                  f"  {us['dense frozen'] / measured:5.2f} x frozen")  # fmt: skip
    return rows


def session_of(frozen: Any) -> Session:
    """The network of a file, as it is served without torch."""
    with tempfile.TemporaryDirectory() as folder:
        frozen.export(Path(folder) / "model.skd")
        return Session(Path(folder) / "model.skd", threads=torch.get_num_threads())


def cost(options: argparse.Namespace) -> list[Row]:
    count, size = (2, 1_000) if options.quick else (options.windows, options.rows)
    rows = []
    for widths in WIDTHS[:1] if options.quick else WIDTHS:
        windows = list(DriftingClicks("none", windows=count + 1, rows=size))
        arms = {"full": None, **{f"d2s-4 @ {share:g}": share for share in options.remove}}
        learners = {
            name: _learner(DriftingClicks("none", windows=1, rows=size), widths, share) for name, share in arms.items()
        }
        for learner in learners.values():
            learner.learn(1, windows[0])  # the first copy is made after it: from here on every four windows cost alike
        seconds = dict.fromkeys(arms, 0.0)
        for number, window in enumerate(windows[1:], 2):
            for name, learner in learners.items():  # in turns
                began = time.perf_counter()
                learner.learn(number, window)
                seconds[name] += time.perf_counter() - began
        held = {name: _bytes(learner) for name, learner in learners.items()}
        for name in arms:
            row: Row = {"arm": name, "widths": list(widths), "windows": count, "rows": size, "seconds": seconds[name]}
            row |= {"over_full": seconds[name] / seconds["full"], "bytes": held[name]}
            rows.append({**row, "bytes_over_full": held[name] / held["full"]})
            print(rows[-1], flush=True)
    return rows


def _learner(stream: Any, widths: tuple[int, ...], share: float | None, batch_size: int = 128) -> Learner:
    torch.manual_seed(0)
    model: Any = WideAndDeep(stream.sizes["numeric"], stream.sizes["ids"], rows=10_000, hidden=widths)
    plain, examples = Plain(model, Click()), next(iter(stream)).examples(8)
    stream.load_state_dict({"number": 0})
    method = Method(plain) if share is None else D2S(plain, share, exclude=model.not_pruned, example_inputs=examples)
    return Learner(method, Click(), Online(lr=1e-3, batch_size=batch_size))


def _bytes(learner: Learner) -> int:
    """Of parameters, buffers and optimizer states; what is shared counts once."""
    holders: list[Any] = [learner.method.student]
    optimizers = [learner.stepper.optimizer]
    if isinstance(learner.method, D2S):
        for one in filter(None, (learner.method.sparse, learner.method.beside)):
            holders.append(one.model)
            optimizers.append(one.optimizer)
    tensors = [t for holder in holders for t in (*holder.parameters(), *holder.buffers())]
    tensors += [
        v for optimizer in optimizers for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)
    ]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def memory(options: argparse.Namespace) -> list[Row]:
    events = 40_000 if options.quick else options.events
    size = max(100, events // 200)
    stream = DriftingClicks("gradual", windows=events // size, rows=size, features=16, active=6)
    rows = _watched("learnt with D2S", _learner(stream, (64, 64), 0.9, batch_size=2_500), stream, events // size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clicks.csv"
        read = events // 10
        write_csv(DriftingClicks("gradual", windows=20, rows=read // 20, features=8, active=4), file)
        files = EventStream([file], rows=max(50, read // 50))
        rows += _watched("read from CSV", None, files, 50)
    return rows


def _watched(name: str, learner: Learner | None, windows: Iterable[Period], count: int) -> list[Row]:
    rows: list[Row] = []
    events = 0
    for number, window in enumerate(windows, 1):
        events += len(window)
        if learner is not None:
            learner.learn(number, window)
        if number % max(1, count // 10) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            row = {"what": name, "events": events, "resident_bytes": pages * resource.getpagesize(), "peak_bytes": peak}
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("serving", "cost", "memory"))
    parser.add_argument("--remove", nargs="+", type=float, default=[0.7, 0.9])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4, help="of cost: a multiple of 4")
    parser.add_argument("--rows", type=int, default=20_000, help="of a window of cost")
    parser.add_argument("--events", type=int, default=10_000_000, help="of memory")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="to see it work")
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = {"serving": serving, "cost": cost, "memory": memory}[options.what](options)
    if options.out:
        write_json(options.out, shlex.join(["python", "-m", "benchmarks.streams", *sys.argv[1:]]), rows)
    sys.exit(0)


if __name__ == "__main__":
    main()

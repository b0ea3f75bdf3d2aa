"""The regression gate: `python -m benchmarks.gate` measures a handful of layers and fails where one got slower.

    python -m benchmarks.gate                              # against benchmarks/results/gate.json
    python -m benchmarks.gate --update                     # measure, and store this CPU's figures (on a quiet machine)
    python -m benchmarks.gate --run new.json old.json      # two --benchmark-json files of the throughput suite

What is compared is the speedup over the dense column of the same run, never a time: each kernel alone (forward as
frozen, gradient of the input, gradient of the weight), on one thread in CPU time, so that what other processes take
does not count; dense, ours and dense again in turns, so that the two dense columns say how far two equal things are
apart here: the noise.

A case is slower if its speedup is below stored * (1 - TOLERANCE) in every one of ATTEMPTS measurements, spread over the
run and each with new tensors. Exit status: 0 fine, 1 slower, 2 cannot tell (noise, or nothing stored).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import shapes
from benchmarks.lib.contest import Case, Setup
from benchmarks.lib.timing import machine
from benchmarks.suites import layers
from sparsekd import _C, timing
from sparsekd.energy import median_interval

RESULTS = Path(__file__).parent / "results"
# Between the noise and the third that a kernel loses which got 1.5x slower. One measurement moved by 10 % at most on a
# machine with or without other work, by 13 % with four busy processes on its two cores.
TOLERANCE = 0.22
# For figures of another processor or another torch, whose dense column has other caches and other oneDNN loops: from
# Zen 5 to Zen 4 speedups of the same kernels fell by up to 43 %. Scalar code where there were vectors still fails.
TOLERANCE_ELSEWHERE = 0.60
NOISE_LIMIT = 0.15
ATTEMPTS = 4
PROCESSES = 5
REPEATS = 31

DENSITY = 0.3
LAYERS = [layers.at(id, n, shape) for id, (n, shape) in shapes.GATE.items()]


@dataclass(frozen=True)
class Figure:
    """A speedup over dense (median of interleaved ratios), and how far two equal columns of the run are from 1."""

    speedup: float
    noise: float = 0.0


Figures = Mapping[str, Figure]


@dataclass(frozen=True)
class Verdict:
    """What the gate says about one case: status is "ok", "slower", "faster", "noisy" or "missing"."""

    name: str
    status: str
    now: Figure | None
    stored: Figure
    floor: float

    def __str__(self) -> str:
        now = "not measured" if self.now is None else f"{self.now.speedup:5.2f}x  noise {self.now.noise:5.1%}"
        return f"{self.status:8} {self.name:38} {now}  stored {self.stored.speedup:5.2f}x  floor {self.floor:5.2f}x"


def judge(name: str, now: Figure | None, stored: Figure, tolerance: float = TOLERANCE) -> Verdict:
    """Compare one case."""
    floor = stored.speedup * (1 - tolerance)
    if now is None:
        status = "missing"
    elif now.speedup < floor:
        status = "noisy" if max(now.noise, stored.noise) > NOISE_LIMIT else "slower"
    else:
        status = "faster" if now.speedup > stored.speedup * (1 + tolerance) else "ok"
    return Verdict(name, status, now, stored, floor)


def best(tried: Sequence[Verdict]) -> Verdict:
    """The largest speedup of several attempts: a disturbance passes, a slow kernel stays. Noisy ones count last."""
    decided = [verdict for verdict in tried if verdict.status != "noisy"]
    return max(decided or tried, key=lambda verdict: verdict.now.speedup if verdict.now else 0.0)


def judge_all(measures: Mapping[str, Callable[[], Figure]], stored: Figures, tolerance: float) -> Iterator[Verdict]:
    """Every case once; then those below their floor again, until they are fine or have had ATTEMPTS."""
    tried: dict[str, list[Verdict]] = {name: [] for name in stored}
    for attempt in range(1, ATTEMPTS + 1):
        for name in list(tried):
            now = measures[name]() if name in measures else None
            tried[name].append(judge(name, now, stored[name], tolerance))
            verdict = best(tried[name])
            if verdict.status in ("ok", "faster", "missing") or attempt == ATTEMPTS:
                del tried[name]
                yield verdict


def exit_status(verdicts: Sequence[Verdict]) -> int:
    """1 if anything is slower, else 2 if anything is undecided or missing (or there is nothing), else 0."""
    found = {verdict.status for verdict in verdicts}
    if "slower" in found:
        return 1
    return 2 if not found or found & {"noisy", "missing"} else 0


def figure_of(ours: Sequence[float], dense: Sequence[float], again: Sequence[float]) -> Figure:
    """Speedup and noise from seconds per call of neighbouring samples.

    noise: the far end of the 95 % interval of median(dense / dense again), as a distance from 1.
    """
    equal = median_interval([a / b for a, b in zip(dense, again, strict=True)])
    ratios = [d / o for d, o in zip(dense, ours, strict=True)]
    return Figure(statistics.median(ratios), max(abs(equal.low - 1), abs(equal.high - 1)))


def gate_cases() -> dict[str, tuple[Case, str]]:
    """Name -> (case, which contestant is ours)."""
    setup, found = Setup(), dict[str, tuple[Case, str]]()
    for layer in LAYERS:
        forward = Case(layer.id, ("dense", "ours_frozen"), partial(layers.forward, setup, layer, DENSITY))
        found[f"forward-{layer.id}"] = (forward, "ours_frozen")
        for of in ("input", "weight"):
            gradient = Case(layer.id, ("dense", "ours"), partial(layers.gradient, setup, layer, DENSITY, of))
            found[f"grad-{of}-{layer.id}"] = (gradient, "ours")
    return found


def measure_case(case: Case, name: str, seconds: float) -> Figure:
    """Build a case, its outputs compared, and measure it."""
    torch.manual_seed(0)
    calls = case.build().calls
    columns = {"dense": calls["dense"], "ours": calls[name], "again": calls["dense"]}
    taken = timing.samples(columns, seconds, rounds=REPEATS, clock=time.thread_time)
    return figure_of(taken["ours"], taken["dense"], taken["again"])


def measures_of(seconds: float) -> dict[str, Callable[[], Figure]]:
    return {name: partial(measure_case, *case, seconds) for name, case in gate_cases().items()}


def read_run(path: Path) -> dict[str, Figure]:
    """Every contestant of a --benchmark-json file that has a speedup. Raises FileNotFoundError and ValueError.

    The suites have no second dense column; half the width of the interval stands for the noise.
    """
    return {
        bench["fullname"]: Figure(info["speedup"], (info["speedup_high"] - info["speedup_low"]) / 2 / info["speedup"])
        for bench in _read(path, "benchmarks")
        if "speedup" in (info := bench["extra_info"])
    }


def _read(path: Path, key: str) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"benchmarks.gate: {path} does not exist; --update writes it")
    data = json.loads(path.read_text())
    if key not in data:
        kind = {"machines": "a stored gate", "benchmarks": "a --benchmark-json file"}[key]
        raise ValueError(f"benchmarks.gate: {path} is not {kind}: it has no {key!r}")
    return data[key]


def vector_bits() -> int:
    """Width of a multiply-add that this CPU does as fast as a narrower one, measured: AVX-512 may be done in halves."""
    chosen = _C.isa()
    if not chosen.startswith("avx512"):
        return 256 if chosen == "avx2" else 128
    rates = {}
    for isa in ("avx2", "avx512"):
        _C.use_isa(isa)
        rates[isa] = _C.peak_gflops(1, 0.1)
    _C.use_isa(chosen)
    return 512 if rates["avx512"] > 1.25 * rates["avx2"] else 256


def _machine() -> dict[str, Any]:
    return {**machine(), "vector_bits": vector_bits()}


def _kind(machine: Mapping[str, Any]) -> tuple[str, str, str]:
    """What has to be the same for ratios to be the same: the processor, the float32 kernels (avx512_bf16 has those of
    avx512), and whose dense layers they are against."""
    return machine["cpu"], machine["isa"].partition("_")[0], machine["torch"]


def _width(machine: Mapping[str, Any]) -> tuple[str, int | None]:
    """What decides most about ratios on another processor: the float32 kernels, and the width that the CPU has."""
    return machine["isa"].partition("_")[0], machine.get("vector_bits")


def stored_for(path: Path, here: Mapping[str, Any]) -> tuple[dict[str, Figure], float]:
    """Stored figures and the tolerance: this processor's, else the lowest of each case among processors of the same
    vectors, else among all. Raises as `read_run`."""
    entries = _read(path, "machines")
    same = [entry for entry in entries if _kind(entry["machine"]) == _kind(here)]
    alike = [entry for entry in entries if _width(entry["machine"]) == _width(here)]
    lowest: dict[str, Figure] = {}
    for entry in same or alike or entries:
        for name, figure in entry["cases"].items():
            lowest[name] = min(Figure(**figure), lowest.get(name, Figure(**figure)), key=lambda each: each.speedup)
    return lowest, TOLERANCE if same else TOLERANCE_ELSEWHERE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("baseline", nargs="?", type=Path, help="stored figures; default results/gate.json")
    parser.add_argument("--run", type=Path, help="judge this --benchmark-json file instead of measuring")
    parser.add_argument("--update", action="store_true", help="measure and store")
    parser.add_argument("--measure", action="store_true", help="print the figures of this process as JSON")
    parser.add_argument("--tolerance", type=float, help=f"default {TOLERANCE}; {TOLERANCE_ELSEWHERE} on another CPU")
    parser.add_argument("--seconds", type=float, default=0.6, help="to measure one case for (default 0.6)")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # CPU time is the time of one thread
    try:
        return _run(args)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> int:
    if args.run:
        if not args.baseline:
            raise ValueError("benchmarks.gate: --run needs the stored file to compare with: --run new.json old.json")
        run, stored = read_run(args.run), read_run(args.baseline)
        return _say([judge(name, run.get(name), stored[name], args.tolerance or TOLERANCE) for name in stored])
    if args.measure:
        print(json.dumps({name: asdict(measure()) for name, measure in measures_of(args.seconds).items()}))
        return 0
    here = _machine()
    path = args.baseline or RESULTS / "gate.json"
    if args.update:
        return _update(path, args.seconds, here)
    stored, tolerance = stored_for(path, here)
    tolerance = args.tolerance or tolerance
    vectors = f"{here['isa']} on {here['vector_bits']} bits"
    print(f"{here['cpu']}, {vectors}, torch {here['torch']}: tolerance {tolerance:.0%}, stored in {path.name}")
    if tolerance == TOLERANCE_ELSEWHERE:
        print("nothing is stored for this processor and torch: only gross losses fail; `--update` stores its figures")
    return _say(judge_all(measures_of(args.seconds), stored, tolerance))


def _update(path: Path, seconds: float, here: Mapping[str, Any]) -> int:
    """Store what PROCESSES fresh processes agree on, in place of this processor's earlier figures."""
    command = [sys.executable, "-m", "benchmarks.gate", "--measure", "--seconds", str(seconds)]
    runs = []
    for _ in range(PROCESSES):
        done = subprocess.run(command, cwd=RESULTS.parents[1], stdout=subprocess.PIPE, text=True, check=True)
        runs.append({name: Figure(**figure) for name, figure in json.loads(done.stdout).items()})
    kept, left_out = agreed(runs)
    for name, figure in kept.items():
        print(f"{name:38} {figure.speedup:5.2f}x  noise {figure.noise:5.1%}")
    for name, noise in left_out.items():
        print(f"{name:38} left out: noise {noise:.1%}, the gate could not tell")
    known = _read(path, "machines") if path.exists() else []
    others = [entry for entry in known if _kind(entry["machine"])[:2] != _kind(here)[:2]]
    entry = {"machine": here, "cases": {name: asdict(figure) for name, figure in kept.items()}, "left_out": left_out}
    stored = {"command": "python -m benchmarks.gate --update", "density": DENSITY, "machines": [*others, entry]}
    path.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


def agreed(runs: Sequence[Figures]) -> tuple[dict[str, Figure], dict[str, float]]:
    """Median speedup and noise of several runs, and the cases (with their noise) on which they do not agree.

    noise is the largest of the runs' own and of their distances from the median: where memory comes to lie differs
    from process to process, and no number of repeats inside one shows it.
    """
    kept, left_out = {}, {}
    for name in runs[0]:
        figures = [run[name] for run in runs]
        middle = statistics.median(figure.speedup for figure in figures)
        apart = max(abs(figure.speedup / middle - 1) for figure in figures)
        noise = round(max(apart, statistics.median(figure.noise for figure in figures)), 4)
        if noise > NOISE_LIMIT:
            left_out[name] = noise
        else:
            kept[name] = Figure(round(middle, 3), noise)
    return kept, left_out


def _say(verdicts: Iterator[Verdict] | Sequence[Verdict]) -> int:
    said = []
    for verdict in verdicts:
        print(verdict, flush=True)
        said.append(verdict)
    status = exit_status(said)
    slower, faster = ([v.name for v in said if v.status == word] for word in ("slower", "faster"))
    if faster:
        print(f"faster than stored, worth an --update: {', '.join(faster)}")
    print(["no case is slower", f"slower: {', '.join(slower)}", "cannot tell: too noisy, or cases are missing"][status])
    return status


if __name__ == "__main__":
    sys.exit(main())

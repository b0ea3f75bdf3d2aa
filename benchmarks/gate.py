"""The regression gate: `python -m benchmarks.gate` measures a handful of layers and fails where one got slower.

    python -m benchmarks.gate                              # against benchmarks/results/gate-<isa>.json
    python -m benchmarks.gate --update                     # measure, and store that file anew (on a quiet machine)
    python -m benchmarks.gate --run new.json old.json      # two --benchmark-json files of the throughput suite

What is compared is the speedup over the dense column of the same run, never a time. One thread, CPU time, so that what
other processes take does not count; dense, ours and dense again in turns, so that the two dense columns say how far two
equal things are apart here: the noise.

A case is slower if its speedup is below stored * (1 - TOLERANCE - noise) in every one of ATTEMPTS measurements. Noise
beyond NOISE_LIMIT decides nothing. Exit status: 0 fine, 1 slower, 2 cannot tell (noise, or nothing stored).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import Case, Setup
from benchmarks.suites import layers
from benchmarks.timing import interleaved, machine
from sparsekd.energy import median_interval

RESULTS = Path(__file__).parent / "results"
# Shared caches, clocks and memory move the ratio of two unlike loops by up to about 10 % between runs of one build on a
# shared machine. A kernel that lost its vectorisation, blocking or fusion loses a third or more. Between the two lies:
TOLERANCE = 0.20
# (Cases in which that movement is larger are not stored at all, see `agreed`.)
# Another processor with the same instruction set has other caches and another oneDNN choice for the dense column.
TOLERANCE_ELSEWHERE = 0.40
NOISE_LIMIT = 0.15
ATTEMPTS = 4
PROCESSES = 5
REPEATS = 31

DENSITY = 0.3
LAYERS = [
    layers.conv("conv-64-64-4x4", 64, 64, 64, 4),
    layers.conv("conv-128-128-8x8", 8, 128, 128, 8),
    layers.conv("conv-256-256-14x14", 1, 256, 256, 14),
    layers.conv("conv-256-64-14x14-1x1", 4, 256, 64, 14, kernel=1),
    layers.linear("linear-512-512", 64, 512, 512),
    layers.linear("linear-256-1024", 128, 256, 1024),
]


@dataclass(frozen=True)
class Figure:
    """A speedup over dense (median of interleaved ratios), and how far two equal columns of the run are from 1."""

    speedup: float
    noise: float = 0.0


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
    """Compare one case. The stored noise counts as well: that run was no better than it says."""
    noise = max(now.noise if now else 0.0, stored.noise)
    floor = stored.speedup * (1 - min(tolerance + noise, 0.99))
    if now is None:
        status = "missing"
    elif now.speedup >= floor:
        status = "faster" if now.speedup > stored.speedup * (1 + tolerance + noise) else "ok"
        if noise > NOISE_LIMIT and now.speedup < stored.speedup * (1 - tolerance):
            status = "noisy"  # only noise saved it
    else:
        status = "noisy" if noise > NOISE_LIMIT else "slower"
    return Verdict(name, status, now, stored, floor)


def judge_with_retries(
    name: str, measure: Callable[[], Figure], stored: Figure, tolerance: float = TOLERANCE, attempts: int = ATTEMPTS
) -> Verdict:
    """The first attempt that is fine, else the one with the largest speedup: a disturbance passes, a slow kernel stays.

    The largest of `attempts` medians is biased upwards, by less than the noise that each of them has.
    """
    tried = []
    for _ in range(attempts):
        tried.append(judge(name, measure(), stored, tolerance))
        if tried[-1].status in ("ok", "faster"):
            return tried[-1]
    decided = [verdict for verdict in tried if verdict.status == "slower"]
    return max(decided or tried, key=lambda verdict: verdict.now.speedup if verdict.now else 0.0)


def exit_status(verdicts: list[Verdict]) -> int:
    """1 if anything is slower, else 2 if anything is undecided or missing (or there is nothing), else 0."""
    found = {verdict.status for verdict in verdicts}
    if "slower" in found:
        return 1
    return 2 if not found or found & {"noisy", "missing"} else 0


def figure_of(ours: list[float], dense: list[float], again: list[float]) -> Figure:
    """Speedup and noise from seconds per call of neighbouring samples.

    noise: the far end of the 95 % interval of median(dense / dense again), as a distance from 1.
    """
    equal = median_interval([a / b for a, b in zip(dense, again, strict=True)])
    ratios = [d / o for d, o in zip(dense, ours, strict=True)]
    return Figure(statistics.median(ratios), max(abs(equal.low - 1), abs(equal.high - 1)))


def gate_cases() -> dict[str, tuple[Case, str]]:
    """Name -> (case, which contestant is ours); inference as frozen, and forward with both gradients."""
    setup, found = Setup(), dict[str, tuple[Case, str]]()
    for layer in LAYERS:
        forward = Case(layer.id, ("dense", "ours_frozen"), partial(layers.forward, setup, layer, DENSITY))
        step = Case(layer.id, ("dense", "ours"), partial(layers.step, setup, layer, DENSITY))
        found |= {f"forward-{layer.id}": (forward, "ours_frozen"), f"step-{layer.id}": (step, "ours")}
    return found


def measure_case(case: Case, name: str, seconds: float) -> Callable[[], Figure]:
    """Build a case, its outputs compared, and return what measures it."""
    torch.manual_seed(0)
    calls = case.build().calls

    def measure() -> Figure:
        dense, ours, again = interleaved(
            [calls["dense"], calls[name], calls["dense"]], repeats=REPEATS, seconds=seconds, clock=time.thread_time
        )
        return figure_of(ours, dense, again)

    return measure


def read_figures(path: Path) -> dict[str, Figure]:
    """Figures of a stored gate, or of a --benchmark-json file: every contestant of it that has a speedup.

    Raises FileNotFoundError, and ValueError for a file that is neither.
    """
    if not path.is_file():
        raise FileNotFoundError(f"benchmarks.gate: {path} does not exist; --update writes it")
    data = json.loads(path.read_text())
    if "cases" in data:
        return {name: Figure(**figure) for name, figure in data["cases"].items()}
    if "benchmarks" not in data:
        raise ValueError(f"benchmarks.gate: {path} is neither a stored gate nor a --benchmark-json file")
    return {
        bench["fullname"]: _from_interval(bench["extra_info"])
        for bench in data["benchmarks"]
        if "speedup" in bench["extra_info"]
    }


def _from_interval(info: Mapping[str, Any]) -> Figure:
    """The suites have no second dense column; half the width of the interval stands for the noise."""
    return Figure(info["speedup"], (info["speedup_high"] - info["speedup_low"]) / 2 / info["speedup"])


def compare_runs(run: Mapping[str, Figure], stored: Mapping[str, Figure], tolerance: float) -> list[Verdict]:
    return [judge(name, run.get(name), figure, tolerance) for name, figure in stored.items()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("baseline", nargs="?", type=Path, help="stored figures; default results/gate-<isa>.json")
    parser.add_argument("--run", type=Path, help="judge this --benchmark-json file instead of measuring")
    parser.add_argument("--update", action="store_true", help="measure and store")
    parser.add_argument("--measure", action="store_true", help="print the figures of this process as JSON")
    parser.add_argument("--tolerance", type=float, help=f"default {TOLERANCE}; {TOLERANCE_ELSEWHERE} on another CPU")
    parser.add_argument("--seconds", type=float, default=0.6, help="to measure one case for (default 0.6)")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if args.run:
        if not args.baseline:
            raise ValueError("benchmarks.gate: --run needs the stored file to compare with: --run new.json old.json")
        stored = read_figures(args.baseline)
        return _say(compare_runs(read_figures(args.run), stored, args.tolerance or TOLERANCE))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # CPU time is the time of one thread
    try:
        if args.measure:
            figures = {name: measure_case(*case, args.seconds)() for name, case in gate_cases().items()}
            print(json.dumps({name: asdict(figure) for name, figure in figures.items()}))
            return 0
        here = machine()
        path = args.baseline or RESULTS / f"gate-{here['isa']}.json"
        if args.update:
            return _update(path, args.seconds, here)
        stored, tolerance = read_figures(path), args.tolerance or _tolerance_for(path, here)
        print(f"{here['cpu']}, {here['isa']}, tolerance {tolerance:.0%} + noise, stored in {path.name}", flush=True)
        cases = gate_cases()
        verdicts = []
        for name, figure in stored.items():
            if name in cases:
                verdicts.append(judge_with_retries(name, measure_case(*cases[name], args.seconds), figure, tolerance))
            else:
                verdicts.append(judge(name, None, figure, tolerance))
            print(verdicts[-1], flush=True)
        return _say(verdicts, show=False)
    finally:
        torch.set_num_threads(threads)


def _tolerance_for(path: Path, here: Mapping[str, Any]) -> float:
    cpu = json.loads(path.read_text()).get("machine", {}).get("cpu")
    if cpu == here["cpu"]:
        return TOLERANCE
    print(f"stored on {cpu}: the tolerance is wider; `--update` stores this machine's figures")
    return TOLERANCE_ELSEWHERE


def _update(path: Path, seconds: float, here: Mapping[str, Any]) -> int:
    """Store what PROCESSES fresh processes agree on."""
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
    stored = {"command": "python -m benchmarks.gate --update", "machine": here, "density": DENSITY}
    cases = {name: asdict(figure) for name, figure in kept.items()}
    path.write_text(json.dumps({**stored, "cases": cases, "left_out": left_out}, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


def agreed(runs: Sequence[Mapping[str, Figure]]) -> tuple[dict[str, Figure], dict[str, float]]:
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


def _say(verdicts: list[Verdict], show: bool = True) -> int:
    for verdict in verdicts if show else ():
        print(verdict)
    status = exit_status(verdicts)
    slower = [verdict.name for verdict in verdicts if verdict.status == "slower"]
    faster = [verdict.name for verdict in verdicts if verdict.status == "faster"]
    if faster:
        print(f"faster than stored, worth an --update: {', '.join(faster)}")
    said = ["no case is slower", f"slower: {', '.join(slower)}", "cannot tell: too much noise, or cases are missing"]
    print(said[status])
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Options, parametrisation and table columns of `pytest benchmarks/throughput` and `pytest benchmarks/power`."""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.lib.contest import Case, Contest, Pace, Setup, energy_info, measure, replay, report, seconds_info
from benchmarks.lib.shapes import BATCHES
from sparsekd import __version__, energy, processor
from sparsekd.backends import cpu

_CASES: pytest.StashKey[dict[str, tuple[Case, str]]] = pytest.StashKey()
_FOUND: pytest.StashKey[dict[str, Any]] = pytest.StashKey()  # what the case that ran last gave: one in memory at a time


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparsekd benchmarks")
    group.addoption("--quick", action="store_true", help="few cases, short windows: does it run, and is it right")
    group.addoption("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    group.addoption("--threads", type=int, help="threads of torch and of the CPU kernels (default: torch's)")
    group.addoption("--density", type=float, action="append", help="share of weights kept; repeat for several")
    group.addoption("--batch", type=int, action="append", help="batch size of networks and of --layers; repeatable")
    group.addoption(
        "--layers", action="append", default=[], choices=["all", *BATCHES], help="all layers of a network; repeatable"
    )
    group.addoption("--model", metavar="MODULE:FACTORY", help="your network instead of the built-in ones")
    group.addoption(
        "--input-shape",
        action="append",
        default=[],
        metavar="C,H,W",
        help="of --model, without the batch, which --batch says (1); once for each input",
    )
    group.addoption("--exclude", action="append", default=[], help="layers of --model to leave dense (fnmatch)")
    group.addoption("--compile", action="store_true", help="losses: torch.compile as a contestant too")
    group.addoption("--seconds", type=above_zero, help="length of one window")
    group.addoption("--rounds", type=int, help="windows of each contestant")
    group.addoption("--idle-seconds", type=float, default=0.0, help="power: measure idling first and subtract it")


def above_zero(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return float(text)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.option.benchmark_columns:  # fewer than the default, so that ours fit on a line
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds"]
    if config.option.threads:
        torch.set_num_threads(config.option.threads)
    config.stash[_CASES], config.stash[_FOUND] = {}, {}


def setup_of(config: pytest.Config) -> Setup:
    option = config.option
    if bool(option.model) != bool(option.input_shape):
        raise pytest.UsageError("--model and --input-shape go together: --model pkg.mod:factory --input-shape 3,8,8")
    try:
        shapes = tuple(tuple(int(size) for size in shape.split(",")) for shape in option.input_shape)
        device = torch.device(option.device)
    except (ValueError, RuntimeError) as error:
        expected = "--input-shape takes integers, as in 3,224,224, and --device cpu or cuda"
        raise pytest.UsageError(f"{expected}: {error}") from None
    default = Setup()
    return Setup(
        device=device,
        quick=option.quick,
        densities=tuple(option.density or ((0.3,) if option.quick else default.densities)),
        batches=tuple(option.batch or ((64,) if option.quick else default.batches)),
        layers=tuple(BATCHES if "all" in option.layers else option.layers),
        layer_batches=tuple(option.batch or ()),
        model=option.model,
        input_shapes=shapes,
        exclude=tuple(option.exclude),
        compile=option.compile,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contestant" not in metafunc.fixturenames:
        return
    setup, known = setup_of(metafunc.config), metafunc.config.stash[_CASES]
    suite = metafunc.module.SUITE.__name__.split(".")[-1]
    params = []
    for case in metafunc.module.SUITE.cases(setup):
        group = f"{suite}: {case.id}-{option_id(setup.device)}"
        for name in case.names:
            key = f"{case.id}-{option_id(setup.device)}-{name}"
            known[f"{suite}:{key}"] = (case, name)
            # A string as parameter: it lands in the JSON, where an object would be its address.
            mark = pytest.mark.benchmark(group=group, timer=replay)
            params.append(pytest.param(f"{suite}:{key}", id=key, marks=mark))
    metafunc.parametrize("contestant", params, indirect=True)


def option_id(device: torch.device) -> str:
    return str(device).replace(":", "")


@dataclass
class Contestant:
    """One contestant of a case that is built, and the pytest request it belongs to."""

    case: Case
    name: str
    contest: Contest
    config: pytest.Config
    found: dict[str, Any]

    def time(self, benchmark: Any) -> None:
        self._report(benchmark, with_energy=False)

    def time_and_meter(self, benchmark: Any) -> None:
        self._report(benchmark, with_energy=True)

    def _report(self, benchmark: Any, with_energy: bool) -> None:
        """Measure the whole case with its first contestant, report this one."""
        if benchmark.disabled:  # --benchmark-disable: built and compared is all
            return report(benchmark, [])
        if "comparison" not in self.found:
            # For seconds alone a window may be as short as the counter, if there is one, can tell.
            ticks, idle = (50, self.config.option.idle_seconds) if with_energy else (1, 0.0)
            with closing(energy.EnergyMeter(self.config.option.device, idle_seconds=idle, min_ticks=ticks)) as meter:
                pace = pace_of(self.config, with_energy)
                self.found["comparison"] = measure(self.contest, self.case.names, pace, meter)
        found = self.found["comparison"]
        benchmark.extra_info |= {"device": self.config.option.device, **self.contest.info.get(self.name, {})}
        benchmark.extra_info |= seconds_info(found, self.name)
        if with_energy:
            benchmark.extra_info |= energy_info(found, self.name)
        report(benchmark, found.measurements[self.name].round_seconds)


def pace_of(config: pytest.Config, with_energy: bool) -> Pace:
    quick, option = config.option.quick, config.option
    if with_energy:
        seconds, rounds = (0.1, 6) if quick else (1.0, 9)
    else:
        seconds, rounds = (0.01, 6) if quick else (0.1, 15)
    seconds = option.seconds or seconds
    return Pace(seconds, warmup=seconds if quick else 2 * seconds, rounds=option.rounds or rounds)


@pytest.fixture
def contestant(request: pytest.FixtureRequest) -> Contestant:
    """The contestant of this test; its case is built, and its outputs compared, once for all of them."""
    if torch.device(request.config.option.device).type == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"no CUDA device: torch {torch.__version__} sees none")
    case, name = request.config.stash[_CASES][request.param]
    found = request.config.stash[_FOUND]
    if found.get("case") is not case:
        found.clear()
        torch.manual_seed(0)
        found |= {"contest": case.build(), "case": case}
    contest = found["contest"]
    if name in contest.absent:
        pytest.skip(contest.absent[name])
    return Contestant(case, name, contest, request.config, found)


@pytest.fixture(scope="session")
def counter(request: pytest.FixtureRequest) -> str:
    """Label of the energy counter in use; the test is skipped, with the reason, where none can be read."""
    with closing(energy.EnergyMeter(request.config.option.device)) as meter:
        with meter.window() as window:
            pass
        if meter.source == "unavailable":
            pytest.skip(f"no energy counter: {window.reading.reason}")
        return meter.source


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_group_stats(config: pytest.Config, benchmarks: list[dict[str, Any]], group_by: str) -> Any:
    """Put ratio, joules, watts and source beside the name: pytest-benchmark has no columns of others."""
    groups = yield
    for _, rows in groups:
        for row in rows:
            if row["group"] and row["params"] and row["path"] is None:  # a stored run has no such columns of its own
                row["name"] = columns(row["param"].rsplit("-", 1)[-1], row["extra_info"])
    return groups


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Every reason for a skip, once and without -rs: what is not measured must not look like nothing to measure."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped if report.longrepr)
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} skipped: {reason}")


def columns(name: str, info: dict[str, Any]) -> str:
    """`ours           1.84x [1.79, 1.90]   0.00123 J   31.2 W rapl`; x is speed against the baseline."""
    text = f"{name:<16}"
    if "speedup" in info:
        text += f" {info['speedup']:5.2f}x [{info['speedup_low']:.2f}, {info['speedup_high']:.2f}]"
    elif info.get("baseline"):
        text += " baseline"
    if "source" in info:
        measured = info["joules"] is not None
        text = f"{text:<40}" + (f" {info['joules']:.4g} J  {info['watts']:.1f} W" if measured else " not measured")
        text += f" {info['source']}" + ("" if info["idle_subtracted"] is None else ", idle subtracted")
    return text


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What ratios depend on. Only what stays, so that two runs on one machine compare without a warning."""
    for name in ("node", "release"):  # host and kernel names
        machine_info.pop(name, None)
    for name in ("flags", "hz_actual", "hz_actual_friendly"):
        machine_info.get("cpu", {}).pop(name, None)
    machine_info["sparsekd"] = {
        "version": __version__,
        "torch": torch.__version__,
        "isa": None if cpu.native is None else cpu.native.isa(),
        "cpu": processor.name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for name in ("project", "branch", "author_time"):  # names of folders and of work in progress
        commit_info.pop(name, None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """The command that made it."""
    output_json["command"] = " ".join(["pytest", *map(str, config.invocation_params.args)])

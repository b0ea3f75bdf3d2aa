"""`sparsekd run stream`: several arms on one stream of clicks, side by side, and what is written down of them.

    results, folder = run(StreamConfig(data=("clicks.csv",), remove=(0.9,)))

    runs/stream-movietweetings/
      windows.jsonl                a line a window, as it goes: the scores of every arm before it learnt the window
      results.json report.md report.html
      <arm>/serving.safetensors    what serves now of this arm: always there and whole, see `load_serving`
      state.safetensors            where to go on

All arms see the same windows one after the other, so a stream that cannot be read twice will do. Memory does not grow
with the stream: what is known of earlier windows is in the sums (tally.py) and in windows.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoint, models, processor, report
from ..blocks import BlockPattern
from ..data import Period
from ..data.streams import STREAMS, ClickStream, Columns, EventStream, known
from ..distill import Plain
from ..goals import Click
from ..methods import D2S, Method, OnlinePruned
from ..pruning import Budget, CostTable
from ..version import __version__
from .folder import claimed
from .memory import keep_freed_memory
from .state import StateFile
from .stream import Learner, Online
from .tally import relative_gap

__all__ = ["ARMS", "MODELS", "StreamConfig", "load_serving", "run"]

MODELS: dict[str, type[nn.Module]] = {"dlrm": models.DLRM, "wide-deep": models.WideAndDeep}
ARMS = ("full", "once", "random", "rigl", "d2s-1", "d2s-2", "d2s-4", "d2s-8")
_LOG, _SERVING = "windows.jsonl", "serving.safetensors"


@dataclass(frozen=True)
class StreamConfig:
    """What `run` does.

    stream       a name of `data.streams.STREAMS`, read from `data_dir` where it is not embedded.
    data         files and directories instead, with `columns`; follow: seconds to wait for further files in the last.
    window       of files: seconds of a window; rows: of any stream, the events of one.
    negatives    of files without a label: rows without a click for each click.
    limit        windows after which to stop; None: all.
    model        "dlrm" or "wide-deep", with `widths` of its network, and tables of `table_rows` rows of `dim` numbers
                 that are "dense" or "sparse", for ids that are "hashed" or "listed".
    arms         of ARMS: the full model (always there), pruned once and trained on, a random pattern, RigL, and D2S
                 with a new copy every so many windows.
    remove       shares to be gone; unit: of weights, macs or bytes, or the predicted time (latency_us, measured first).
    start        window after which is pruned.
    batch_size, lr, weight_decay, seed    of all arms.
    pattern      blocks, outputs x inputs.
    out          folder; default runs/stream-<name>. fresh: begin anew.
    threads      of torch and of the kernels.
    """

    stream: str = "movietweetings"
    data_dir: str | None = None
    data: tuple[str, ...] = ()
    columns: Columns = field(default_factory=Columns)
    window: float | None = None
    rows: int | None = None
    negatives: int = 1
    follow: float = 0.0
    limit: int | None = None
    model: str = "wide-deep"
    widths: tuple[int, ...] = (512, 512)
    table: str = "dense"
    ids: str = "hashed"
    table_rows: int = 20_000
    dim: int = 16
    arms: tuple[str, ...] = ("full", "once", "d2s-4")
    remove: tuple[float, ...] = (0.9,)
    unit: str = "weights"
    start: int = 2
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0
    pattern: str = "16x1"
    out: str | None = None
    fresh: bool = False
    threads: int | None = None
    command: str = "sparsekd.runs.streaming.run"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("model", self.model, tuple(MODELS)),
            ("table", self.table, ("dense", "sparse")),
            ("ids", self.ids, ("hashed", "listed")),
            ("unit", self.unit, ("weights", "macs", "bytes", "latency_us")),
            *(("arm", arm, ARMS) for arm in self.arms),
        ):
            if value not in allowed:
                raise ValueError(f"sparsekd run stream: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if not self.data and self.stream not in STREAMS:
            raise ValueError(
                f"sparsekd run stream: the stream must be one of {', '.join(STREAMS)}, got {self.stream!r}; or give "
                "files with --data"
            )
        for share in self.remove:
            if not 0.0 < share < 1.0:
                raise ValueError(f"sparsekd run stream: remove takes shares between 0 and 1, got {share}")
        numbers = {"start": self.start, "batch_size": self.batch_size, "widths": min(self.widths, default=0)}
        numbers |= {"dim": self.dim, "table_rows": self.table_rows}
        numbers |= {name: of for name, of in (("limit", self.limit), ("threads", self.threads)) if of is not None}
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"sparsekd run stream: {name} must be at least 1, got {number}")
        if not 0.0 < self.lr < math.inf or not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(
                "sparsekd run stream: lr must be a finite number above 0, and weight_decay one of 0 or more, got "
                f"{self.lr} and {self.weight_decay}"
            )
        BlockPattern.parse(self.pattern)

    def settings(self) -> dict[str, Any]:
        """What the numbers hang on."""
        aside = (
            "out",
            "fresh",
            "command",
            "follow",
            "limit",
            "threads",
            "data_dir",
            "data",
            "columns",
            "arms",
            "remove",
        )
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in aside}


def _print(line: str) -> None:
    print(line, file=sys.stderr)


def run(config: StreamConfig, say: Callable[[str], None] = _print) -> tuple[dict[str, Any], Path]:
    """Score and learn the whole stream with every arm; returns the contents of results.json and its folder.

    After a kill the same call goes on behind the last window that was finished, to the same bits; what serves is whole
    at any moment. Raises what the source, the methods and `Learner.learn` do.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    source = _source(config)
    name = "files" if config.data else config.stream
    out = Path(config.out or f"runs/stream-{name}")
    file = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise NotADirectoryError(f"sparsekd run stream: --out needs a folder, and {file} is a file; give another one")
    with claimed(out):
        arms = _arms(config, source)
        if config.fresh:
            _clear(out, [*arms])
        work = _Run(config, source, arms, out)
        number = work.resume()
        if config.data and isinstance(source, EventStream):
            say(f"sparsekd: columns: {source.columns_in_words()}")
        if number:
            say(f"sparsekd: going on after window {number} of {out}")
        with _bar(source, number, config.limit) as bar:
            for window in work.coming():
                line = work.learn(window)
                bar.clear()
                say(line)
                bar.update()
        results = work.results()
        if results["windows"]:
            report.write(results, out)
        else:
            say("sparsekd: the stream has no window (yet): nothing was learnt")
        return results, out


class _Run:
    """A run under way."""

    def __init__(self, config: StreamConfig, source: ClickStream, arms: dict[str, Method], out: Path) -> None:
        self.config, self.source, self.out = config, source, out
        torch.manual_seed(2_000 + config.seed)  # dropout
        online = Online(config.lr, config.weight_decay, config.batch_size)
        self.learners = {name: Learner(method, Click(), online, seed=config.seed) for name, method in arms.items()}
        parts: dict[str, Any] = {"source": source}
        for name, learner in self.learners.items():
            parts |= {f"{name}.{part}": value for part, value in learner.parts().items()}
        settings = {**config.settings(), "stream": source.describe(), "arms": list(arms)}
        self.file = StateFile(out / "state.safetensors", parts, settings)
        self.number, self.end = 0, -math.inf

    def resume(self) -> int:
        """Go on where the state says; the number of windows that have been learnt."""
        for last in self.file.resume():
            self.number, self.end = last["window"], last["end"]
        path = self.out / _LOG
        lines = path.read_bytes().splitlines(keepends=True)[: self.number] if path.is_file() else []
        if len(lines) < self.number:
            raise ValueError(
                f"sparsekd run stream: {path} has {len(lines)} windows and the state {self.number}; put the file back, "
                "or begin anew with --fresh"
            )
        checkpoint.write_atomically(path, b"".join(lines))  # a window whose state was not written comes again
        return self.number

    def coming(self) -> Iterator[Period]:
        for window in self.source if self.config.limit is None or self.number < self.config.limit else ():
            if window.start < self.end:
                raise ValueError(
                    f"sparsekd run stream: window {self.number + 1} begins at {window.start:g}, before the end of the "
                    f"one before it, {self.end:g}; give the files in the order of time"
                )
            yield window
            if self.number == self.config.limit:
                return

    def learn(self, window: Period) -> str:
        """Score and learn one window with every arm, write it down; what to say of it."""
        number = self.number + 1
        records = {name: learner.learn(number, window) for name, learner in self.learners.items()}
        line = {"window": number, "start": window.start, "end": window.end, "rows": len(window), "arms": records}
        with (self.out / _LOG).open("ab") as file:
            file.write((json.dumps(line) + "\n").encode())
        for name, learner in self.learners.items():
            _publish(learner.method, self.out / name, number, self.config, self.source)
        self.number, self.end = number, window.end
        self.file.save([{"window": number, "end": window.end}])
        return _in_one_line(line)

    def results(self) -> dict[str, Any]:
        with (self.out / _LOG).open("rb") as file:
            windows = [json.loads(line) for line in file]
        return {
            "kind": "stream",
            "command": self.config.command,
            "stream": self.source.describe(),
            "protocol": self._protocol(),
            "arms": {name: _summary(name, windows) for name in self.learners} if windows else {},
            "windows": [_short(line) for line in windows],
        }

    def _protocol(self) -> dict[str, Any]:
        return {
            **self.config.settings(),
            "scores": "every window is scored before it is learnt; the gap is the relative difference of normalised "
            "entropies to the full model",
            "threads": torch.get_num_threads(),
            "machine": f"{processor.name()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
            "versions": {"sparsekd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }


def _source(config: StreamConfig) -> ClickStream:
    if not config.data:
        return known(config.stream, config.data_dir, rows=config.rows, seed=config.seed)
    rows = config.rows or (10_000 if config.window is None else None)
    return EventStream(
        config.data,
        config.columns,
        window=config.window,
        rows=rows,
        negatives=config.negatives,
        follow=config.follow,
        seed=config.seed,
    )


def _model(config: dict[str, Any], sizes: dict[str, int]) -> nn.Module:
    torch.manual_seed(config["seed"])
    options: dict[str, Any] = {"rows": config["table_rows"], "dim": config["dim"], "ids_by": config["ids"]}
    options["table"] = config["table"]
    options["top" if config["model"] == "dlrm" else "hidden"] = tuple(config["widths"])
    return MODELS[config["model"]](sizes["numeric"], sizes["ids"], **options)


def _arms(config: StreamConfig, source: ClickStream) -> dict[str, Method]:
    """Name -> method; the full model first."""
    sizes = source.sizes
    examples = (torch.zeros(64, sizes["numeric"]), torch.zeros(64, sizes["ids"], dtype=torch.int64))
    arms: dict[str, Method] = {"full": Method(Plain(_model(config.settings(), sizes), Click()))}
    costs: CostTable | None = None
    for share in config.remove:
        for arm in config.arms:
            if arm == "full":
                continue
            model: Any = _model(config.settings(), sizes)
            options: dict[str, Any] = {"start": config.start, "exclude": model.not_pruned, "example_inputs": examples}
            options["pattern"] = BlockPattern.parse(config.pattern)
            if config.unit == "latency_us":
                if costs is None:
                    costs = CostTable.measure(model, examples, pattern=options["pattern"], exclude=model.not_pruned)
                options |= {"costs": costs, "scope": "cost"}
            budget, plain = Budget(config.unit, share, removed=True), Plain(model, Click())
            arms[f"{arm} @ {share:g}"] = _method(arm, plain, budget, options)
    return arms


def _method(arm: str, plain: Plain, budget: Budget, options: dict[str, Any]) -> Method:
    kind, _, every = arm.partition("-")
    if kind == "d2s":
        return D2S(plain, budget, every=int(every), **options)
    own: dict[str, dict[str, Any]] = {"once": {}, "random": {"criterion": "random"}, "rigl": {"exchange": 0.3}}
    return OnlinePruned(plain, budget, **own[kind], **options)


def _publish(method: Method, folder: Path, number: int, config: StreamConfig, source: ClickStream) -> None:
    """What serves from now on, in one file that replaces the one before when it is whole."""
    model = method.standalone() if isinstance(method, D2S) else method.serving_student
    folder.mkdir(exist_ok=True)
    checkpoint.save(model, folder / _SERVING, window=number, sizes=source.sizes, settings=config.settings())


def load_serving(folder: str | os.PathLike[str]) -> nn.Module:
    """The model that serves now of one arm of a run, in evaluation mode: `load_serving("runs/stream-x/d2s-4 @ 0.9")`.

    `sparsekd.freeze` makes it fast. Raises FileNotFoundError and ValueError as `checkpoint.load`.
    """
    path = Path(folder) / _SERVING
    about = checkpoint.metadata(path)
    return checkpoint.load(_model(about["settings"], about["sizes"]), path).eval()


def _short(line: dict[str, Any]) -> dict[str, Any]:
    """A window as results.json has it."""
    names = (
        "normalised_entropy",
        "log_loss",
        "auc",
        "calibration",
        "cumulated",
        "density",
        "pruned",
        "seconds",
        "joules",
    )
    arms = {name: {key: record[key] for key in names} for name, record in line["arms"].items()}
    return {**line, "arms": arms}


def _summary(name: str, windows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a whole stream, and of its last quarter: the gap at the end says whether an arm falls behind."""
    records = [line["arms"][name] for line in windows]
    last, full = records[-1], windows[-1]["arms"]["full"]
    quarter = windows[-max(1, len(windows) // 4) :]
    losses = [sum(line["rows"] * line["arms"][arm]["log_loss"] for line in quarter) for arm in (name, "full")]
    return {
        **last["cumulated"],
        "gap": relative_gap(last["cumulated"]["normalised_entropy"], full["cumulated"]["normalised_entropy"]),
        "gap_at_the_end": relative_gap(losses[0], losses[1]),
        "density": last["density"],
        "hand_overs": sum(record["pruned"] for record in records),
        "seconds": sum(record["seconds"] for record in records),
        "joules": None if any(r["joules"] is None for r in records) else sum(r["joules"] for r in records),
    }


def _in_one_line(line: dict[str, Any]) -> str:
    full = line["arms"]["full"]["normalised_entropy"]
    parts = [f"window {line['window']}  {_moment(line['start'])}  {line['rows']} rows"]
    parts.append("NE of the full model " + ("not defined (one class only)" if full is None else f"{full:.4f}"))
    for name, record in line["arms"].items():
        gap = relative_gap(record["normalised_entropy"], full)
        if name != "full" and gap is not None:
            parts.append(f"{name} {100 * gap:+.2f} %" + (" ↺" if record["pruned"] else ""))
    return "  ".join(parts)


def _moment(seconds: float) -> str:
    """A date where it can be one."""
    if not 1e8 < seconds < 1e11:
        return f"from {seconds:g}"
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M")


def _bar(source: ClickStream, done: int, limit: int | None) -> Any:
    """A progress bar over windows, where tqdm is there and somebody looks."""
    sized: Any = source
    count = len(sized) if hasattr(sized, "__len__") else None
    total = count if limit is None else min(limit, count or limit)
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, initial=done, unit="window", disable=None, leave=False)


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self) -> None: ...

    def clear(self) -> None: ...


def _clear(out: Path, arms: list[str]) -> None:
    """Remove what runs write, and nothing else."""
    for name in (_LOG, "state.safetensors", "results.json", "report.md", "report.html"):
        (out / name).unlink(missing_ok=True)
    for serving in out.glob(f"*/{_SERVING}"):
        shutil.rmtree(serving.parent)

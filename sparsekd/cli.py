"""The command `sparsekd`: parses, calls one library function, prints what it returns.

sparsekd run [TASK] ...                     train, prune, freeze, measure; see runs/
sparsekd run stream ...                     learn a stream of clicks, and what serves it sparse; see runs/streaming.py
sparsekd bench package.module:factory ...   your own networks, dense and frozen; see bench.py
sparsekd export package.module:factory ...  one file that runs without torch; see exporting.py
sparsekd recommend --model FILE --user ID   the best items for a user, from the file of a recommender
sparsekd report DIR ...                     one page about one or several runs
sparsekd doctor                             what this machine offers, and why not more
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .broken_pipe import nobody_reads
from .version import __version__

if TYPE_CHECKING:
    from .runs import RunConfig

# Bad input, or a machine that cannot: one line and exit code 2. Anything else is our fault and shows its traceback.
_EXPECTED = (ValueError, RuntimeError, OSError)
STREAM = "run stream"
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: --stop-after came first


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 where nobody reads the output any more, 2 for bad input, 75 when
    --stop-after came first, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"run": _run, STREAM: _stream, "bench": _bench, "export": _export, "report": _report}
    commands |= {"recommend": _recommend, "doctor": _doctor}
    try:
        parser = _parser(arguments)
        if not arguments:
            parser.print_help()
            return 0
        options = parser.parse_args(_joined(arguments))
    except ModuleNotFoundError as error:  # the options of `run` follow from its tasks
        return _lacking(error, "run")
    try:
        code = commands[options.command](options, arguments)
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        return _lacking(error, options.command)
    except _EXPECTED as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            return 1
        if options.debug:
            raise
        print(f"sparsekd: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "windows" if options.command == STREAM else "epochs"
        print(f"\nsparsekd: stopped. Finished {kept} are kept: the same command goes on from there.", file=sys.stderr)
        return 130


def _lacking(error: ModuleNotFoundError, command: str) -> int:
    """Of an installation for exported networks alone."""
    if error.name not in ("torch", "safetensors"):
        raise error
    print(f"sparsekd: error: `sparsekd {command}` needs {error.name}; pip install 'sparsekd[train]'", file=sys.stderr)
    return 2


def _joined(arguments: Sequence[str]) -> list[str]:
    """`run stream` as one word: it has options of its own."""
    place = next((i for i, word in enumerate(arguments) if not word.startswith("-")), 0)
    if list(arguments[place : place + 2]) == STREAM.split():
        return [*arguments[:place], STREAM, *arguments[place + 2 :]]
    return list(arguments)


def configs(arguments: Sequence[str]) -> list[RunConfig]:
    """What the command line ``sparsekd run ...`` would run, one after the other."""
    from . import runs

    return runs.several(_config(_parser(arguments).parse_args(arguments), arguments))


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Of the commands that may be meant: the options of `run` follow from its tasks, and those import torch."""
    parser = argparse.ArgumentParser(prog="sparsekd", description="Prune and distil PyTorch models that run sparse.")
    parser.add_argument("--version", action="version", version=f"sparsekd {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands, with_options="run" in arguments)
    _add_stream(commands, with_options="run" in arguments)
    bench = commands.add_parser("bench", help="time your own networks: dense, dense frozen, block-sparse frozen")
    bench.add_argument("models", nargs="+", metavar="MODEL", help="package.module:factory, called without arguments")
    bench.add_argument(
        "--input-shape",
        action="append",
        required=True,
        metavar="C,H,W",
        help="without the batch, which --batch says; once for each input",
    )
    bench.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N", help="batch sizes (1)")
    bench.add_argument("--threads", nargs="+", type=int, default=[], metavar="N", help="numbers of threads (torch's)")
    bench.add_argument(
        "--density",
        nargs="+",
        type=float,
        metavar="D",
        help="shares of the weights of every layer to keep (0.5 0.3 0.1, if no budget is given)",
    )
    bench.add_argument(
        "--budget",
        nargs="+",
        default=[],
        metavar="UNIT=N",
        help="what the whole network keeps: macs=0.3, latency_us=900, bytes=2e6, weights=0.2; up to 1 a share",
    )
    bench.add_argument(
        "--scope",
        choices=["cost", "global", "layer"],
        default="cost",
        help="how a budget chooses: worth for cost (default), the largest weights, or every layer alike",
    )
    bench.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    bench.add_argument("--exclude", nargs="+", metavar="NAME", help="layers that stay dense, as in 'stem.*'")
    bench.add_argument("--seconds", type=float, default=2.0, help="to measure one batch size for (2)")
    bench.add_argument("--json", metavar="FILE", help="write the rows too")
    export = commands.add_parser("export", help="write one file of a student that runs without torch")
    export.add_argument("model", metavar="MODEL", help="package.module:factory, called without arguments")
    export.add_argument("--out", required=True, metavar="FILE", help="what is written, as in student.skd")
    export.add_argument("--frozen", metavar="FILE", help="a file of FrozenModel.save; or")
    export.add_argument("--checkpoint", metavar="FILE", help="a file of checkpoint.save, which is frozen here")
    export.add_argument(
        "--input-shape",
        action="append",
        default=[],
        metavar="C,H,W",
        help="without the batch, which --batch says; once for each input",
    )
    export.add_argument("--batch", type=int, default=1, metavar="N", help="that the network is measured with (1)")
    export.add_argument("--threads", type=int, metavar="N", help="that it is measured with (torch's)")
    export.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    show = commands.add_parser("report", help="one page (HTML, Markdown, JSON) of one or several finished runs")
    show.add_argument("folders", nargs="+", metavar="DIR", help="folders of runs, or their results.json")
    show.add_argument("--out", metavar="DIR", help="where to write (the folder of a single run; report)")
    best = commands.add_parser("recommend", help="the best items for a user, from the file of a recommender")
    best.add_argument("--model", required=True, metavar="FILE", help="recommender*.safetensors of a run of sparserec")
    best.add_argument("--user", required=True, metavar="ID", help="as the data has it")
    best.add_argument("--top", type=int, default=20, metavar="N", help="how many items (20)")
    doctor = commands.add_parser("doctor", help="what this machine offers sparsekd, and why not more")
    doctor.add_argument("--measure", action="store_true", help="measure the peak of multiply-adds, and their width")
    return parser


def _add_run(commands: Any, with_options: bool) -> None:
    """The arguments of `run`, under the names of the fields of RunConfig, which has the defaults."""
    run = commands.add_parser(
        "run",
        help="train a teacher, distil and prune students, freeze and measure them",
        argument_default=argparse.SUPPRESS,
    )
    if not with_options:
        return
    from .pruning import SCOPES, UNITS
    from .runs import TASKS, RunConfig, own_options
    from .runs.plans.network import AT_ONCE, KNOWN_METHODS, RANKING_METHODS_ALL

    usual = RunConfig()
    run.add_argument("task", nargs="?", help=f"{', '.join(TASKS)} ({usual.task})")
    run.add_argument(
        "--data",
        dest="data_dir",
        metavar="DIR",
        help="folder of the data, or one file (embedded data)",
    )
    run.add_argument(
        "--method",
        dest="methods",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(KNOWN_METHODS)}; of sparserec {', '.join(RANKING_METHODS_ALL)}; all: those that the task is "
        "usually run with (all)",
    )
    run.add_argument(
        "--density",
        dest="densities",
        nargs="+",
        type=float,
        metavar="D",
        help="shares to keep of what --unit counts (those that the task is usually run with)",
    )
    run.add_argument(
        "--unit",
        choices=list(UNITS),
        help="what the densities count: multiply-adds (the default; of --recipe paper weights), weights, bytes, or "
        "microseconds of the frozen network",
    )
    run.add_argument(
        "--budget",
        dest="budgets",
        nargs="+",
        metavar="UNIT=N",
        help="both in one: macs=0.3, latency_us=80, bytes=2e6, weights=0.2; up to 1 a share",
    )
    run.add_argument("--scope", choices=SCOPES, help="how methods choose blocks (cost; of weights as in the paper)")
    run.add_argument(
        "--at-once",
        nargs="?",
        const="magnitude",
        choices=AT_ONCE,
        help="prune before the first step, by the first weights (magnitude, the default) or by a saliency of some "
        "batches, which SS-SAD has no gradient for. Before the task write the choice out, as in --at-once=snip",
    )
    run.add_argument(
        "--costs", metavar="FILE", help="times of the student's layers, for --unit latency_us (measured now)"
    )
    run.add_argument("--pattern", metavar="RxC", help=f"blocks to prune, outputs x inputs ({usual.pattern})")
    run.add_argument("--seeds", type=int, metavar="N", help=f"how many seeds ({usual.seeds})")
    run.add_argument("--quick", action="store_true", help="less data and fewer epochs: to see it work, not to quote")
    run.add_argument("--out", metavar="DIR", help="folder for everything that is written (runs/NAME)")
    run.add_argument("--threads", type=int, metavar="N", help="threads of torch and of the kernels")
    run.add_argument(
        "--jobs", type=int, metavar="N", help="networks to train at once, with a share of the threads each"
    )
    run.add_argument("--device", help="cpu or cuda for training (images: cuda where there is one)")
    run.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, help="autocast, for CPUs with bf16, too (images on cuda: on)"
    )
    run.add_argument(
        "--compile", dest="compiled", action="store_true", help="torch.compile the training steps (no gain on a CPU)"
    )
    run.add_argument(
        "--no-measure", dest="measure", action="store_false", help="train only: --remeasure freezes and times later"
    )
    run.add_argument(
        "--stop-after",
        type=float,
        metavar="MIN",
        help=f"stop after so many minutes; exit code {TRY_AGAIN} (that of torchrun is 1)",
    )
    run.add_argument("--fresh", action="store_true", help="begin anew instead of going on with what --out holds")
    run.add_argument(
        "--remeasure",
        action="store_true",
        help="score and time the finished networks again, without training; with --no-measure the test scores alone",
    )
    for tasks, options in own_options().items():
        group = run.add_argument_group(f"options of {', '.join(tasks)}")
        for name, (metavar, explained) in options.items():
            group.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=explained)


def _add_stream(commands: Any, with_options: bool) -> None:
    """The arguments of `run stream`: the fields of StreamConfig and Columns, which have the defaults."""
    run = commands.add_parser(
        STREAM, help="learn a stream of clicks, and what serves it sparse", argument_default=argparse.SUPPRESS
    )
    if not with_options:
        return
    from .data.streams import STREAMS, Columns
    from .pruning import UNITS
    from .runs.streaming import ARMS, MODELS, StreamConfig

    usual, columns = StreamConfig(), Columns()
    run.add_argument("--data", nargs="+", metavar="FILE", help="CSV or Parquet files and directories, in time order")
    run.add_argument("--stream", choices=STREAMS, help=f"a known stream instead ({usual.stream})")
    run.add_argument("--data-dir", metavar="DIR", help="folder of its files, where none are embedded")
    for name in ("user", "item", "timestamp", "label"):
        run.add_argument(f"--{name}", metavar="COLUMN", help=f"its column ({getattr(columns, name)})")
    run.add_argument("--no-label", dest="label", action="store_const", const=None, help="every row is a click")
    run.add_argument("--click-at", type=float, metavar="N", help="labels from this number on are a click")
    run.add_argument("--numeric", nargs="*", metavar="COLUMN", help="features that are numbers (all further ones)")
    run.add_argument("--categorical", nargs="*", metavar="COLUMN", help="features that are ids (all further ones)")
    run.add_argument("--of-item", nargs="+", metavar="COLUMN", help="features that belong to the item")
    run.add_argument("--missing", type=float, metavar="N", help="what stands for an empty number (an error)")
    run.add_argument("--window", type=float, metavar="SECONDS", help="length of a window of files, or with --rows ...")
    run.add_argument("--rows", type=int, metavar="N", help="events of a window (10 000 of files)")
    run.add_argument("--negatives", type=int, metavar="N", help=f"rows for each click without ({usual.negatives})")
    run.add_argument("--follow", type=float, metavar="SECONDS", help="wait for further files in the last directory")
    run.add_argument("--limit", type=int, metavar="N", help="stop after so many windows")
    run.add_argument("--model", choices=MODELS, help=f"({usual.model})")
    run.add_argument("--widths", nargs="+", type=int, metavar="N", help="hidden layers of its network (512 512)")
    run.add_argument("--table", choices=("dense", "sparse"), help=f"tables of ids ({usual.table})")
    run.add_argument("--ids", choices=("hashed", "listed"), help=f"rows of ids ({usual.ids})")
    run.add_argument("--table-rows", type=int, metavar="N", help=f"rows of each table ({usual.table_rows})")
    run.add_argument(
        "--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"{', '.join(ARMS)} ({' '.join(usual.arms)})"
    )
    run.add_argument("--remove", nargs="+", type=float, metavar="SHARE", help="shares to be gone (0.9)")
    run.add_argument("--unit", choices=list(UNITS), help=f"what they count ({usual.unit})")
    run.add_argument("--start", type=int, metavar="N", help=f"window after which is pruned ({usual.start})")
    run.add_argument("--batch-size", type=int, metavar="N", help=f"({usual.batch_size})")
    run.add_argument("--lr", type=float, help=f"learning rate ({usual.lr:g})")
    run.add_argument("--seed", type=int, metavar="N")
    run.add_argument("--pattern", metavar="RxC", help=f"blocks to prune, outputs x inputs ({usual.pattern})")
    run.add_argument("--out", metavar="DIR", help="folder for everything that is written (runs/stream-<name>)")
    run.add_argument("--threads", type=int, metavar="N", help="threads of torch and of the kernels")
    run.add_argument("--fresh", action="store_true", help="begin anew instead of going on with what --out holds")


def _stream(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from . import report
    from .data.streams import Columns
    from .runs import streaming

    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(options).items()
    }
    fields: dict[type, dict[str, Any]] = {
        kind: {field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given}
        for kind in (streaming.StreamConfig, Columns)
    }
    of_run = {name: value for name, value in fields[streaming.StreamConfig].items() if name != "command"}
    command = shlex.join(["sparsekd", *(a for a in arguments if a != "--fresh")])
    config = streaming.StreamConfig(**of_run, columns=Columns(**fields[Columns]), command=command)
    results, folder = streaming.run(config)
    if results["windows"]:
        print(f"\n{report.for_terminal([results])}\n\nresults.json, report.md and report.html: {folder}")
    return 0


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from . import report, runs

    for one in runs.several(_config(options, arguments)):
        try:
            results, folder = runs.run(one)
        except runs.OutOfTime as stopped:
            if runs.rank() == 0:
                print(f"sparsekd: time is up ({stopped}); the same command goes on from there.", file=sys.stderr)
            return TRY_AGAIN
        if runs.rank():  # rank 0 of torchrun prints
            continue
        print(f"\n{report.for_terminal([results])}\n\nresults.json, report.md and report.html: {folder}")
    return 0


def _config(options: argparse.Namespace, arguments: Sequence[str]) -> RunConfig:
    """What was given, by the fields of RunConfig and the options of the task."""
    from .runs import RunConfig, own_options

    given = vars(options)
    known = {field.name for field in dataclasses.fields(RunConfig)} - {"command"}
    fields = {name: value for name, value in given.items() if name in known}
    if "all" in fields.get("methods", ()):
        del fields["methods"]
    own = {name: given[name] for options in own_options().values() for name in options if name in given}
    command = shlex.join(["sparsekd", *(a for a in arguments if a != "--fresh")])
    return RunConfig(**fields, options=own, command=command)


def _bench(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from . import bench, report
    from .pruning import Budget

    shapes = _shapes("bench", options.input_shape)
    rows = []
    densities = options.density or ([] if options.budget else [0.5, 0.3, 0.1])
    for name in options.models:
        timed = bench.bench(
            name,
            shapes,
            batches=options.batch,
            threads=options.threads,
            densities=densities,
            budgets=[Budget.parse("sparsekd bench", text) for text in options.budget],
            scope=options.scope,
            dtype=options.dtype,
            exclude=options.exclude,
            seconds=options.seconds,
        )
        print(f"== {name} {options.dtype}\n\n{bench.table(timed, report.drawn_for_terminal())}\n")
        rows += timed
    if options.json:
        command = shlex.join(["sparsekd", *arguments])
        Path(options.json).write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    return 0


def _export(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from . import exporting

    said = exporting.export(
        options.model,
        options.out,
        frozen=options.frozen,
        weights=options.checkpoint,
        shapes=_shapes("export", options.input_shape),
        batch=options.batch,
        threads=options.threads,
        dtype="bf16" if options.dtype == "bf16" else None,
    )
    print(said)
    return 0


def _shapes(command: str, given: Sequence[str]) -> list[tuple[int, ...]]:
    sys.path.insert(0, "")  # as `python -m` does: the user's modules lie in the current folder
    try:
        return [tuple(int(size) for size in shape.split(",")) for shape in given]
    except ValueError:
        raise ValueError(
            f"sparsekd {command}: --input-shape takes integers, as in 3,224,224, got {list(given)}"
        ) from None


def _report(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from . import report

    runs = [report.read(folder) for folder in options.folders]
    if len(runs) == 1 and Path(options.folders[0]).is_dir() and not options.out:
        paths = report.write(runs[0], options.folders[0])
    else:
        paths = report.merge(options.folders, options.out or "report")
    named = [{**run, "source": Path(folder).name} for run, folder in zip(runs, options.folders, strict=True)]
    print(f"{report.for_terminal(named)}\n\nwritten: {', '.join(map(str, paths))}")
    return 0


def _recommend(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from . import recommend

    answer = recommend.Served(options.model).best(options.user, options.top)
    print(f"user {options.user}: {answer.rule}")
    for item, score in zip(answer.items, answer.scores, strict=True):
        print(f"{item}\t{score:.6g}")
    return 0


def _doctor(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from . import doctor

    print(doctor.report(doctor.collect(measure=options.measure)))
    return 0

"""The short table of an acceptance run: speed-ups by density and direction, predicted too; networks, losses, tables.

python -m benchmarks.gpu.table benchmarks/results/gpu
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import targets
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.targets import geometric
from sparsekd import report
from sparsekd.goals import Classification

STAGES = ("layers", "infer", "train", "energy", "embedding")  # how the names of their files begin
KINDS = ("layers", "networks", "losses", "embeddings", "images")
PREDICTED = Path(__file__).parents[1] / "results" / "gpu_model.json"


def layer_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Geometric means over the layers, beside the prediction."""
    predicted = {}
    if PREDICTED.exists():
        names = ("layer", "batch", "density", "mask", "direction")
        for row in json.loads(PREDICTED.read_text())["rows"]:
            predicted[tuple(row[name] for name in names)] = row["predicted_speedup"]
    lines = [
        "| batch | density | mask | direction | layers | ours | auto | worst auto | predicted |",
        "|" + "---|" * 9,
    ]
    keys = sorted({(r["batch"], -r["density"], r["mask"], r["direction"]) for r in rows})
    for batch, minus, mask, direction in keys:
        some = [
            r for r in rows if (r["batch"], r["density"], r["mask"], r["direction"]) == (batch, -minus, mask, direction)
        ]
        guesses = [predicted.get((r["layer"], batch, -minus, mask, direction)) for r in some]
        guess = f"{geometric([g for g in guesses if g]):.2f}" if any(guesses) else "-"
        ours, auto = (geometric([r[name] for r in some]) for name in ("speedup", "auto"))
        worst = f"{min(r['auto'] for r in some):.2f}"
        cells = (batch, -minus, mask, direction, len(some), f"{ours:.2f}", f"{auto:.2f}", worst, guess)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def target_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Each target beside what was measured, and what the cost model had said."""
    said = {}
    if PREDICTED.exists():
        for row in json.loads(PREDICTED.read_text())["targets"]:
            said[row["direction"], row["mask"], row["density"]] = row["predicted"]
    lines = ["| direction | mask | density | layers | ours | target | predicted |", "|" + "---|" * 7]
    for target in targets.TARGETS:
        ours, layers = targets.of(target, rows, "speedup")
        if layers:
            guess = _known(said.get(target[:3]), ".2f")
            cells = (*target[:3], layers, f"{ours:.2f}", target.speedup, guess)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines if len(lines) > 2 else []


def network_lines(records: list[dict[str, Any]]) -> list[str]:
    lines = ["| stage | model | us | speed-up | joules | joules / dense | source |", "|" + "---|" * 7]
    for record in records:
        for row in record["rows"]:
            ratio = row.get("joules_ratio")
            speedup = row.get("speedup") or round(1 / row["seconds_ratio"], 3)
            spread = f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})" if ratio else "-"
            joules = row.get("joules")
            measured = "-" if "joules" not in row else "not measured" if joules is None else f"{joules:.4g}"
            cells = (record["stage"], row["model"], row["us"], speedup, measured, spread, row.get("source", "-"))
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def loss_lines(records: list[dict[str, Any]]) -> list[str]:
    """Our microseconds, how many times as long torch takes, and the share of the memory's bandwidth."""
    lines = ["| loss | us | eager x | compiled x | bandwidth |", "|" + "---|" * 5]
    for row in (row for record in records for row in record["rows"]):
        cells = [row["case"], f"{row['ours_us']:.0f}"]
        cells += [_known(row.get(f"speedup_{who}"), ".2f") for who in ("eager", "compiled")]
        lines.append(f"| {' | '.join([*cells, _known(row.get('share'), '.0%')])} |")
    return lines


def embedding_lines(records: list[dict[str, Any]]) -> list[str]:
    lines = ["| packed tables | dimensions | type | us | dense x | GB/s |", "|" + "---|" * 6]
    for row in (row for record in records for row in record["rows"]):
        figures = f"{row['us']:.1f}", f"{row['speedup']:.2f}", f"{row['gigabytes_per_second']:.0f}"
        lines.append(f"| {' | '.join(map(str, (row['op'], row['dim'], row['dtype'], *figures)))} |")
    return lines


def image_lines(records: list[dict[str, Any]]) -> list[str]:
    lines = ["| CIFAR-100 | accuracy | sd | seeds |", "|" + "---|" * 4]
    for entry in (entry for record in records for entry in report.summarise(record["rows"], Classification().judge)):
        cells = [_known(entry[what]["accuracy"], ".2%") for what in ("mean", "sd")]
        lines.append(f"| {' | '.join([report.label(entry), *cells, str(len(entry['seeds']))])} |")
    return lines


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _is_about_images(record: dict[str, Any]) -> bool:
    if not {"schema", "task"} <= set(record):
        return False
    return report.metrics_of(report.with_goal(record))[0] == Classification().judge


def kind_of(record: Any) -> str:
    """Which section of the table the contents of a JSON file belong to: "" for those of a file of other origin."""
    record = record if isinstance(record, dict) else {}
    if "stage" in record:
        return {"layers": "layers", "embedding": "embeddings"}.get(record["stage"].split("-")[0], "networks")
    if "benchmarks.attention" in record.get("command", ""):
        return "losses"
    return "images" if _is_about_images(record) else ""


def read(folder: Path) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The results of a folder by `kind_of`, and the names of its JSON files that are none."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    others = []
    for path in sorted(folder.glob("*.json")):
        if path.name == "plan.json":  # what the kernels chose, no figures
            continue
        try:
            record = json.loads(path.read_text())
        except ValueError:
            record = None
        if kind := kind_of(record):
            found[kind].append(record)
        else:
            others.append(path.name)
    for record in cut_off(folder):
        found[kind_of(record)].append(record)
    return found, others


def cut_off(folder: Path) -> list[dict[str, Any]]:
    """What stages measured that have not come to their end, which is when they write their JSON."""
    paths = [path for path in sorted((folder / "rows").glob("*.jsonl")) if path.stem.split("-")[0] in STAGES]
    paths = [path for path in paths if not (folder / f"{path.stem}.json").exists()]
    return [{"stage": path.stem, "cut_off": True, "rows": Rows(path).rows} for path in paths]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where gpu.run keeps its results")
    folder = parser.parse_args(argv).folder
    found, others = read(folder)
    records = [record for some in found.values() for record in some]
    if not records:
        sys.exit(f"gpu.table: {folder} holds no results; run python -m benchmarks.gpu.run first")
    layers = [row for record in found["layers"] for row in record["rows"]]
    states = [record["after"] for record in records if "after" in record]
    state = states[-1] if states else next((record["machine"] for record in found["losses"]), {})
    unfinished = [record["stage"] for record in records if record.get("cut_off")]
    left = sum(len(record.get("left", ())) for record in records)
    rehearsed = any("--quick" in record.get("command", "") for record in records) or state.get("rehearsal")
    sections = [
        ["REHEARSAL, interpreted on a CPU: no figure below means anything"] if rehearsed else [],
        ["; ".join(f"{name}: {value}" for name, value in state.items())],
        layer_lines(layers) if layers else [],
        target_lines(layers),
        network_lines(found["networks"]) if found["networks"] else [],
        loss_lines(found["losses"]) if found["losses"] else [],
        embedding_lines(found["embeddings"]) if found["embeddings"] else [],
        image_lines(found["images"]) if found["images"] else [],
        [f"cut off before their end: {', '.join(unfinished)}"] if unfinished else [],
        [f"{left} layer rows were left out for time"] if left else [],
        [f"not read, for they are no results of these benchmarks: {', '.join(others)}"] if others else [],
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines)
    print(text)
    (folder / "table.md").write_text(text + "\n")


if __name__ == "__main__":
    main()

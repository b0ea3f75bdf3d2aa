"""How the package hangs together: imports point down the floors, nothing goes round in a circle, no file is a novel."""

import ast
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A room may import what is on a floor below its own, wherever in a function the import stands and
# for types alone too; rooms on one floor do not know each other. A room is a folder or a file of sparsekd/.
FLOORS = [
    [
        "_C",
        "blocks",
        "broken_pipe",
        "kernels",
        "modes",
        "pairs",
        "processor",
        "ranks",
        "timing",
        "version",
    ],  # these import no other room
    ["ops", "energy", "runtime"],  # what an op means; joules; exported networks without torch
    ["backends", "features", "outputs", "taps"],  # what runs an op here; what a student can look at
    ["losses", "nn"],  # what it can learn; layers
    # which layers are converted; what a network learns and by which steps; a network as distillation calls it
    ["conversion", "goals", "optim", "tapped"],
    ["convert", "data", "distill", "distributed", "models"],
    ["checkpoint"],
    ["freeze", "teacher_cache"],  # networks for inference; what a teacher says and sees, kept
    ["serving"],  # swaps what answers
    ["pruning"],  # measures what layers cost when they are frozen
    ["methods"],
    ["sparsekd"],  # the door: sparsekd/__init__.py
    ["bench", "doctor", "recommend", "report"],
    ["exporting", "runs"],
    ["cli"],
    ["__main__"],
]
# Inside runs/ a plan says what is trained and how; what takes steps, keeps states and scores a model works for any.
PLANS = "sparsekd.runs.plans"
DO_NOT_KNOW_PLANS = ("steps", "stream", "state", "evaluate", "baselines", "memory")

LIMIT = 450  # lines of a file; what is longer is several subjects, but for these:
LONGER: dict[str, str] = {}


def modules():
    """Dotted name -> path of every module that is installed."""
    found = {}
    for folder, package in (("sparsekd", "sparsekd"), ("kernels", "sparsekd.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(name, path, known):
    """(module of the package, line, whether for types alone) for every import in a file."""
    tree = ast.parse(path.read_text())
    stub = path.with_suffix(".pyi")  # of a module that loads its names when they are asked for
    of_stub = ast.parse(stub.read_text()) if stub.exists() else ast.Module([], [])
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    for_types = {id(inside) for guard in guards for statement in guard.body for inside in ast.walk(statement)}
    for_types |= set(map(id, ast.walk(of_stub)))
    for node in (*ast.walk(tree), *ast.walk(of_stub)):
        if isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.split(".")[0] == "sparsekd"]
            yield from ((module, node.lineno, id(node) in for_types) for module in ours)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: None if path.name == "__init__.py" else -1]
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            if module.split(".")[0] != "sparsekd":
                continue
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                target = inner if inner in known or inner == "sparsekd._C" else module
                yield target, node.lineno, id(node) in for_types


MODULES = modules()
FOUND = [(name, *found) for name, path in sorted(MODULES.items()) for found in imports(name, path, MODULES)]
ARROWS = [(name, target, line) for name, target, line, _ in FOUND if target != name]
AT_RUN_TIME = [(name, target) for name, target, _, for_types in FOUND if target != name and not for_types]


def room(module):
    return "sparsekd" if module == "sparsekd" else module.split(".")[1]


def test_every_room_is_on_one_floor():
    placed = [one for floor in FLOORS for one in floor]
    assert sorted(placed) == sorted({"_C", *map(room, MODULES)})


def test_imports_point_down():
    floor_of = {one: number for number, floor in enumerate(FLOORS) for one in floor}
    upwards = [
        f"{name}, line {line}, imports {target}"
        for name, target, line in ARROWS
        if room(name) != room(target) and floor_of[room(name)] <= floor_of[room(target)]
    ]
    assert not upwards, "an import that does not point to a lower floor of FLOORS:\n" + "\n".join(upwards)


def test_no_module_imports_itself_in_a_circle():
    """Inside a room, too, and inside a function; types alone may point back, since nothing is loaded for them."""
    graph = {name: {target for source, target in AT_RUN_TIME if source == name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


def test_what_trains_does_not_know_the_plans():
    wrong = [
        f"{name}, line {line}"
        for name, target, line in ARROWS
        if name.removeprefix("sparsekd.runs.") in DO_NOT_KNOW_PLANS and target.startswith(PLANS)
    ]
    assert not wrong, f"these import {PLANS}: {wrong}"


def test_the_table_of_arrows_sees_what_is_there():
    """The tests above pass on an empty table, too."""
    pairs = {(name, target) for name, target, _ in ARROWS}
    assert {("sparsekd", "sparsekd.blocks"), ("sparsekd.cli", "sparsekd.runs")} <= pairs
    assert any(target == "sparsekd._C" for _, target in pairs)
    assert any(
        name.startswith("sparsekd.backends.cuda") and target.startswith("sparsekd.kernels") for name, target in pairs
    )


def test_no_file_is_longer_than_a_reader_can_hold():
    folders = ("sparsekd", "kernels", "csrc", "tests", "benchmarks")
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: which files are ours is asked of git")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    sources = [name for name in listed if name.endswith((".py", ".pyi", ".cpp", ".h", ".cu", ".sh", ".md"))]
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in sources if (ROOT / name).is_file()}
    long = {name for name, lines in lengths.items() if lines > LIMIT}
    assert len(lengths) > 200
    assert long <= set(LONGER), f"longer than {LIMIT} lines: {sorted(long - set(LONGER))}"
    assert set(LONGER) <= long, f"short enough by now, so no exception any more: {sorted(set(LONGER) - long)}"

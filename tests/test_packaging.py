"""The package where parts of it are missing, and whose threads the kernels use."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparsekd
from sparsekd import backends

HIDE = "import sys; sys.modules[{name!r}] = None\n"  # as if it were not installed

USE = """
import torch, sparsekd
layer = sparsekd.nn.SparseConv2d(8, 32, 3, density=0.3)
x = torch.randn(2, 8, 6, 6)
torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-5, atol=1e-5)
layer(x).sum().backward()
assert layer.values.grad is not None
"""


def python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_compiled_module_everything_runs_on_the_reference():
    said = python(HIDE.format(name="sparsekd._C") + USE + "print(sparsekd.backends.describe()['conv2d']['cpu'])\n")
    assert "pure-torch reference" in said
    assert "sparsekd._C is not importable" in said


def test_without_the_compiled_module_the_first_op_says_so_once():
    twice = """
import warnings, torch, sparsekd
layer, x = sparsekd.nn.SparseLinear(16, 16, density=0.5), torch.randn(2, 16)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    layer(x), layer(x)
for one in said:
    print(one.message)
"""
    (line,) = python(HIDE.format(name="sparsekd._C") + twice).splitlines()
    assert line.startswith("sparsekd.linear runs on its reference") and "pip install -e . in the clone" in line


@pytest.mark.parametrize("room", ["ops", "nn", "losses", "optim", "methods", "ops.linear"])
def test_whichever_room_is_imported_its_ops_have_their_kernels(room):
    python(
        f"import sparsekd.{room}, sys, torch\nassert 'sparsekd.backends.cpu' in sys.modules\n"
        "assert torch._C._dispatch_has_kernel_for_dispatch_key('sparsekd::linear', 'CPU')\n"
    )


NO_TORCH = "import sys; assert 'torch' not in sys.modules, 'torch was imported'\n"


def test_the_door_opens_without_torch():
    python("import sparsekd\n" + NO_TORCH + "print(sparsekd.__version__, dir(sparsekd))")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["bench", "--help"]])
def test_the_command_says_what_it_can_without_torch(arguments):
    said = python(
        f"import sys; sys.argv[1:] = {arguments}\nfrom sparsekd.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n" + NO_TORCH
    )
    assert "sparsekd" in said


def test_every_name_of_the_door_is_there():
    python(
        "import sparsekd\nfor name in sparsekd.__all__:\n    assert getattr(sparsekd, name) is not None\n"
        "assert not hasattr(sparsekd, 'nothing') and {'nn', 'freeze'} < set(dir(sparsekd))\n"
    )


def test_all_names_leave_those_of_torch_alone():
    python("from torch import nn, optim\nfrom sparsekd import *\nassert nn.Linear and optim.SGD and sparsify\n")


def test_type_checkers_read_the_names_that_are_loaded():
    stub = ast.parse(Path(sparsekd.__file__).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom) and node.module not in (None, "version")]
    said = {node.module: tuple(alias.name for alias in node.names) for node in imports}
    assert said == sparsekd._HOMES


def test_freeze_stays_the_function_when_its_room_is_loaded():
    code = "import sparsekd, sparsekd.freeze.plan\nassert callable(sparsekd.freeze), sparsekd.freeze\n"
    python(code + "sparsekd.freeze = 3\nassert sparsekd.freeze == 3  # as a test may patch it")


def test_without_triton_the_package_imports():
    python(HIDE.format(name="triton") + USE)


needs_native = pytest.mark.skipif(backends.cpu.native is None, reason=backends.cpu.missing)


@needs_native
def test_the_kernels_share_the_thread_pool_of_torch():
    """Two OpenMP run times in one process stall each other for milliseconds."""
    said = python(
        USE + "maps = {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'omp5' in line}\n"
        "print(len(maps), *maps)\n"
    )
    assert said.split()[0] == "1", f"more than one OpenMP run time is loaded: {said}"


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_torch_set_num_threads_governs_the_kernels(threads):
    said = python(f"import torch; torch.set_num_threads({threads})\n" + USE + "print(sparsekd._C.openmp())\n")
    assert f"max threads {threads})" in said, said


def test_kernels_ship_inside_the_package():
    assert python("import sparsekd.kernels; print(sparsekd.kernels.__name__)").strip() == "sparsekd.kernels"

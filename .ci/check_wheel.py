"""Build sdist and wheel, look inside, and use the wheel from a folder where the repository is not to be seen.

Run in an environment that has the dependencies and ``build``; the installed package is replaced by the wheel.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOKE = """
import torch, sparsekd, sparsekd.kernels
from importlib.util import find_spec
assert find_spec("kernels") is None, "the wheel installs a top-level 'kernels'"
conv = torch.nn.Conv2d(8, 32, 3, padding=1)
sparse = sparsekd.nn.SparseConv2d.from_dense(conv, density=0.5)
x = torch.randn(2, 8, 9, 9)
torch.testing.assert_close(sparse(x), sparse.to_dense()(x))
assert "sparsekd._C" in sparsekd.backends.describe()["conv2d"]["cpu"], sparsekd.backends.describe()
print(sparsekd.__file__)
"""


MOST_BYTES = 5_000_000  # of a wheel
NO_TORCH = """
import sys, numpy as np
from importlib.util import find_spec
assert find_spec("torch") is None and find_spec("safetensors") is None, "this environment has what it must not need"
from sparsekd.runtime import Session
golden = sys.argv[1]
images = np.fromfile(golden + "/images.f32", np.float32).reshape(-1, 3, 16, 16)
scores = Session(golden + "/network.skd")(images)
wanted = [int(line.split()[0]) for line in open(golden + "/answers.txt")]
assert scores.argmax(1).tolist() == wanted
try:
    import sparsekd
    sparsekd.freeze
except ModuleNotFoundError as error:
    assert "pip install 'sparsekd[train]'" in str(error)
else:
    raise AssertionError("freeze works without torch")
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "build", "--outdir", folder, str(ROOT)], check=True)
        wheel, sdist = next(Path(folder).glob("*.whl")), next(Path(folder).glob("*.tar.gz"))
        check_wheel(zipfile.ZipFile(wheel).namelist())
        assert wheel.stat().st_size <= MOST_BYTES, f"the wheel has {wheel.stat().st_size} bytes, more than {MOST_BYTES}"
        check_without_torch(wheel, Path(folder))
        with tarfile.open(sdist) as archive:
            check_sdist(archive.getnames())
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall"]
        subprocess.run([*pip, str(wheel)], check=True)
        subprocess.run([sys.executable, "-c", SMOKE], check=True, cwd=folder)
        subprocess.run(["sparsekd", "doctor"], check=True, cwd=folder)
    print("wheel check passed")


def check_without_torch(wheel: Path, folder: Path) -> None:
    """In an environment that has numpy alone."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = str(folder / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    golden = str(ROOT / "tests" / "runtime" / "golden")
    subprocess.run([python, "-c", NO_TORCH, golden], check=True, cwd=folder)
    for command, code in ((["--version"], 0), (["--help"], 0), (["run"], 2)):
        done = subprocess.run([str(folder / "venv" / "bin" / "sparsekd"), *command], cwd=folder)
        assert done.returncode == code, f"sparsekd {command} ended with {done.returncode}"


def check_wheel(names: list[str]) -> None:
    top_level = {name.split("/")[0] for name in names}
    unexpected = {name for name in top_level if name != "sparsekd" and ".dist-info" not in name}
    assert not unexpected, f"the wheel installs {unexpected} beside sparsekd"
    sources = [path.relative_to(ROOT).as_posix() for path in (ROOT / "sparsekd").rglob("*.py")]
    sources += [path.relative_to(ROOT).as_posix() for path in (ROOT / "sparsekd/report/templates").iterdir()]
    kernels = [f"sparsekd/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")]
    missing = {*sources, *kernels, "sparsekd/_C.pyi", "sparsekd/py.typed"} - set(names)
    assert not missing, f"the wheel lacks {sorted(missing)}"
    assert any(name.startswith("sparsekd/_C.") and name.endswith(".so") for name in names), "the wheel lacks _C"
    assert any(name.startswith("sparsekd/data/movietweetings/") and "LICENSE" in name for name in names)


def check_sdist(names: list[str]) -> None:
    inside = {name.partition("/")[2] for name in names}
    for part in ("csrc/CMakeLists.txt", "kernels/__init__.py", "tests/cases.py", "README.md", "LICENSE"):
        assert part in inside, f"the sdist lacks {part}"


main()

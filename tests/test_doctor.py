"""`doctor` on machines that lack this or that: it must answer, say why, and name the way out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsekd import doctor
from sparsekd.energy import LABELS, Machine

NATIVE = SimpleNamespace(
    isas=lambda: ("scalar", "avx2", "avx512"),
    isa=lambda: "avx512",
    l1_data_cache=lambda: (48 * 1024, "cpuid"),
    openmp=lambda: "libgomp (OpenMP 4.5)",
)
GPU = SimpleNamespace(name="H200", major=9, minor=0, total_memory=140 * 2**30)
CPU_TORCH = SimpleNamespace(
    __version__="2.13.0+cpu", get_num_threads=lambda: 7, version=SimpleNamespace(cuda=None, hip=None)
)
OPS = {
    "linear": {"cpu": "sparsekd._C avx512", "cuda": "sparsekd.kernels"},
    "kd": {"cpu": "pure-torch reference", "cuda": "sparsekd.kernels"},
    "conv2d": {"cpu": "sparsekd._C avx512", "cuda": "pure-torch reference"},
}
ALL_THERE = {
    "torch": CPU_TORCH,
    "sparsekd._C": NATIVE,
    "triton": SimpleNamespace(__version__="3.7.1"),
    "sparsekd.backends": SimpleNamespace(describe=lambda: OPS),
}


def cuda_torch(**options: object) -> SimpleNamespace:
    cuda = {"is_available": lambda: True, "device_count": lambda: 2, "get_device_properties": lambda i: GPU} | options
    version = SimpleNamespace(cuda="13.0", hip=None)
    return SimpleNamespace(
        __version__="2.13.0+cu130", get_num_threads=lambda: 7, version=version, cuda=SimpleNamespace(**cuda)
    )


def importer(modules: dict[str, object]):
    """An import statement that finds these modules; a module that is an exception is one whose import raises it."""

    def import_module(name: str):
        found = modules.get(name, ModuleNotFoundError(f"No module named {name!r}"))
        if isinstance(found, BaseException):
            raise found
        return found

    return import_module


@pytest.fixture
def bare(tmp_path: Path) -> Machine:
    """A machine without any counter, whose NVML does not start."""

    class NVMLError(Exception):
        value = 12

    def fail() -> None:
        raise NVMLError("Shared Library Not Found")

    nvml = SimpleNamespace(NVMLError=NVMLError, nvmlInit=fail)
    paths = {name: tmp_path / name for name in ("powercap", "hwmon", "events", "cpuinfo")}
    return Machine(**paths, container_marks=(), nvml=nvml)


@pytest.fixture(autouse=True)
def no_forced_isa(monkeypatch):
    monkeypatch.delenv("SPARSEKD_CPU_ISA", raising=False)


def lines_of(text: str, name: str) -> str:
    """The line of one part and the indented reasons below it."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(name + " "))
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
    return "\n".join(lines[start:end])


def test_a_machine_that_has_everything(bare):
    bare.cpuinfo.write_text("processor\t: 0\nmodel name\t: Test CPU 9000 \nmodel\t\t: 17\n")
    facts = doctor.collect(importer(ALL_THERE), bare)
    text = doctor.report(facts)
    assert facts["cpu"] | {"cores": 0} == {
        "name": "Test CPU 9000",
        "cores": 0,
        "isas": ["scalar", "avx2", "avx512"],
        "isa": "avx512",
        "forced": None,
        "l1_data": {"bytes": 48 * 1024, "source": "cpuid"},
        "reason": None,
    }
    assert lines_of(text, "cpu cache").endswith("L1 data 48 KiB, by cpuid")
    assert "avx512 chosen of scalar, avx2, avx512" in lines_of(text, "cpu kernels")
    assert "7, OpenMP: libgomp (OpenMP 4.5)" in lines_of(text, "threads")
    assert "2.13.0+cpu" in lines_of(text, "torch") and "3.7.1" in lines_of(text, "triton")
    on_cpu = ["ops on cpu", "  sparsekd._C avx512", "      linear, conv2d", "  pure-torch reference", "      kd"]
    on_cuda = ["ops on cuda", "  sparsekd.kernels", "      linear, kd", "  pure-torch reference", "      conv2d"]
    assert text.splitlines()[-10:] == on_cpu + on_cuda  # every kernel once
    assert json.loads(json.dumps(facts)) == facts


def test_a_machine_that_has_nothing(bare):
    facts = doctor.collect(importer({}), bare)
    text = doctor.report(facts)
    for name in ("torch", "triton", "gpu", "threads"):
        assert "No module named" in lines_of(text, name), name
    kernels = lines_of(text, "cpu kernels")
    assert "pure-torch reference" in kernels and "No module named 'sparsekd._C'" in kernels
    assert "pip install sparsekd" in kernels
    assert facts["cpu"]["name"]  # from the system
    assert "sparsekd.backends" in lines_of(text, "ops")
    assert json.loads(json.dumps(facts)) == facts


def test_a_cache_that_had_to_be_assumed(bare):
    assumed = SimpleNamespace(**(vars(NATIVE) | {"l1_data_cache": lambda: (32 * 1024, "assumed")}))
    text = doctor.report(doctor.collect(importer(ALL_THERE | {"sparsekd._C": assumed}), bare))
    assert "L1 data 32 KiB, assumed, since this machine does not say" in lines_of(text, "cpu cache")
    assert lines_of(doctor.report(doctor.collect(importer({}), bare)), "cpu cache").endswith("unknown")


def test_every_energy_source_has_its_reason_and_fix(bare):
    facts = doctor.collect(importer(ALL_THERE), bare)
    text = doctor.report(facts)
    assert [status["source"] for status in facts["energy"]["sources"]] == list(LABELS[:-1])
    for status in facts["energy"]["sources"]:
        assert not status["readable"] and status["reason"] in lines_of(text, f"energy {status['source']}")
    assert "install the NVIDIA driver" in lines_of(text, "energy nvml-counter")
    assert "intel_rapl_msr" in lines_of(text, "energy rapl")


def test_a_readable_counter(bare, tmp_path):
    zone = bare.powercap / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    moment = [0.0]

    def sleep(seconds: float) -> None:
        moment[0] += seconds
        (zone / "energy_uj").write_text(str(int(moment[0] / 0.004) * 400_000))  # 100 W, every 4 ms

    sleep(0.0)
    machine = Machine(**{**vars(bare), "clock": lambda: moment[0], "sleep": sleep})
    text = doctor.report(doctor.collect(importer(ALL_THERE), machine))
    assert "readable: package-0, updated every 4 ms" in lines_of(text, "energy rapl")
    assert "not readable" in lines_of(text, "energy perf")


def test_a_counter_that_breaks_in_an_unknown_way(bare, monkeypatch):
    def broken(machine):
        raise AttributeError("pynvml has no nvmlInit")

    monkeypatch.setattr(doctor, "available_sources", broken)
    text = doctor.report(doctor.collect(importer(ALL_THERE), bare))
    assert "AttributeError: pynvml has no nvmlInit" in lines_of(text, "energy")


def test_a_library_is_named_once(bare, monkeypatch):
    monkeypatch.setattr(doctor, "openmp_libraries", lambda: ["/opt/libgomp.so.1"])
    native = SimpleNamespace(**{**vars(NATIVE), "openmp": lambda: "/opt/libgomp.so.1 (max threads 2)"})
    facts = doctor.collect(importer(ALL_THERE | {"sparsekd._C": native}), bare)
    assert facts["threads"]["openmp"] == "/opt/libgomp.so.1 (max threads 2)"


def test_a_forced_isa_that_the_cpu_lacks(bare, monkeypatch):
    monkeypatch.setenv("SPARSEKD_CPU_ISA", "avx512")

    def isa() -> str:
        raise RuntimeError("SPARSEKD_CPU_ISA=avx512: this CPU has scalar, avx2")

    native = SimpleNamespace(**{**vars(NATIVE), "isa": isa, "isas": lambda: ["scalar", "avx2"]})
    text = doctor.report(doctor.collect(importer(ALL_THERE | {"sparsekd._C": native}), bare))
    kernels = lines_of(text, "cpu kernels")
    assert "SPARSEKD_CPU_ISA=avx512" in kernels and "this CPU has scalar, avx2" in kernels


def test_a_compiled_module_of_another_version(bare):
    facts = doctor.collect(importer(ALL_THERE | {"sparsekd._C": SimpleNamespace()}), bare)
    assert "isas" in facts["cpu"]["reason"] and facts["cpu"]["isa"] is None and facts["cpu"]["name"]
    assert "openmp" in facts["threads"]["reason"] and facts["threads"]["torch"] == 7
    doctor.report(facts)


@pytest.mark.parametrize(
    "error", [OSError("libtorch_cpu.so: cannot open"), RuntimeError("boom"), ImportError("undefined")]
)
@pytest.mark.parametrize("name", sorted(ALL_THERE))
def test_parts_that_break_while_importing(bare, name, error):
    facts = doctor.collect(importer(ALL_THERE | {name: error}), bare)
    assert f"{type(error).__name__}: {error}" in doctor.report(facts)


def test_torch_is_imported_before_the_kernels(bare):
    order = []
    inner = importer(ALL_THERE)

    def import_module(name: str):
        order.append(name)
        return inner(name)

    doctor.collect(import_module, bare)
    assert order.index("torch") < order.index("sparsekd._C")


def test_gpus(bare):
    facts = doctor.collect(importer(ALL_THERE | {"torch": cuda_torch()}), bare)
    assert facts["gpu"] == {
        "devices": ["cuda:0 H200, compute 9.0, 140 GiB", "cuda:1 H200, compute 9.0, 140 GiB"],
        "reason": None,
    }


def test_no_gpu_says_whether_torch_or_the_machine_is_why(bare):
    built_without = doctor.collect(importer(ALL_THERE), bare)["gpu"]
    assert built_without["devices"] == [] and "built without CUDA" in built_without["reason"]
    unseen = doctor.collect(importer(ALL_THERE | {"torch": cuda_torch(is_available=lambda: False)}), bare)["gpu"]
    assert unseen["devices"] == [] and "CUDA_VISIBLE_DEVICES" in unseen["reason"]

    def broken(index: int):
        raise RuntimeError("CUDA error: unknown")

    lost = doctor.collect(importer(ALL_THERE | {"torch": cuda_torch(get_device_properties=broken)}), bare)["gpu"]
    assert lost == {"devices": [], "reason": "RuntimeError: CUDA error: unknown"}


def test_two_openmp_run_times_are_said(bare, tmp_path, monkeypatch):
    maps = tmp_path / "maps"
    row = "7f00-7f01 r-xp 00000000 fe:00 1234   "
    both = ["/opt/torch/lib/libgomp.so.1", "/usr/lib/libiomp5.so"]
    maps.write_text(
        "\n".join([row + both[0], row + both[0], row + both[1], row + "/usr/lib/libm.so.6", "7f02 rw-p [heap]"])
    )
    assert doctor.openmp_libraries(maps) == both
    assert doctor.openmp_libraries(tmp_path / "missing") == []
    for libraries, warned in ((both, True), (both[:1], False)):
        monkeypatch.setattr(doctor, "openmp_libraries", lambda libraries=libraries: libraries)
        facts = doctor.collect(importer(ALL_THERE), bare)
        assert ("several OpenMP run times" in (facts["threads"]["reason"] or "")) == warned
        assert all(library in doctor.report(facts) for library in libraries)


def test_this_machine_as_it_is(capsys):
    pytest.importorskip("torch")
    text = doctor.report()
    for name in (
        "python",
        "cpu",
        "cpu kernels",
        "cpu cache",
        "threads",
        "torch",
        "triton",
        "gpu",
        "energy rapl",
        "energy nvml-counter",
    ):
        assert lines_of(text, name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("wide, said", [(200.0, "full width"), (104.0, "half width")])
def test_the_peak_is_measured_when_asked(bare, wide, said):
    used = []
    native = SimpleNamespace(
        **vars(NATIVE),
        use_isa=used.append,
        peak_gflops=lambda threads, seconds: threads * (wide if used[-1] == "avx512" else 100.0),
    )
    facts = doctor.collect(importer(ALL_THERE | {"sparsekd._C": native}), bare, measure=True)
    assert facts["peak"]["gflops"] == {"avx2": [100.0, 700.0], "avx512": [wide, 7 * wide]}
    assert used[-1] == "avx512"  # the one that was in use
    line = lines_of(doctor.report(facts), "cpu peak")
    assert "avx2 100 GFLOP/s on one thread, 700 on 7" in line and f"times the work of 256-bit ones: {said}" in line
    assert json.loads(json.dumps(facts)) == facts
    without = doctor.collect(importer(ALL_THERE | {"sparsekd._C": ImportError("no")}), bare, measure=True)
    assert "import sparsekd._C failed" in lines_of(doctor.report(without), "cpu peak")
    assert "cpu peak" not in doctor.report(doctor.collect(importer(ALL_THERE), bare))

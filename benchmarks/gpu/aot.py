"""Compile every configuration the dispatcher can choose, for GPUs that need not be here, and look at the machine code.

    python -m benchmarks.gpu.aot                    # all of them; keeps benchmarks/results/gpu_aot.{json,md}
    python -m benchmarks.gpu.aot --sm 90 --only 'forward bf16'  # these alone; the other rows stay as they were
    python -m benchmarks.gpu.aot --quick --out ''   # the widest of each family; what the tests run

Asserted of each: tensor-core instructions (wgmma on sm_90, tcgen05 on sm_100, mma on sm_80, mfma on gfx942; none for
float32 without tf32), 16-byte asynchronous copies (CUDA), no bytes of stack (so no spilled register), shared memory
within the device's limit. Occupancy is what registers, warps and shared memory allow, not a measurement. Rows of tiles
that were considered and not taken (``CONSIDERED``) are kept beside those, and nothing is asserted of them.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu import pipeline
from sparsekd.backends.cuda.cost import shared_bytes, sums
from sparsekd.kernels.block_products import block_products_kernel
from sparsekd.kernels.gather_gemm import gather_gemm_kernel, sum_parts_kernel
from sparsekd.kernels.tiles import FAMILIES, Tile

RESULTS = Path(__file__).parents[1] / "results"
GFX942 = 942  # AMD MI300, among the compute capabilities of NVIDIA
# Shared memory a program may have, that of a processor, registers and warps of a processor.
LIMITS = {
    80: (166912, 167936, 65536, 64),
    90: (232448, 233472, 65536, 64),
    100: (232448, 233472, 65536, 64),
    GFX942: (65536, 65536 + 1024, 131072, 32),
}
TENSOR_CORES = {80: r"\bmma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma", GFX942: r"v_mfma"}
DTYPES = {"half": ("bf16", "fp16"), "tf32": ("fp32",), "ieee": ("fp32",)}
# On sm_90, and why each was not taken is in docs/gpu-kernels.md. 128x128 with at most so many registers that two fit.
CONSIDERED = (
    (Tile(128, 128, 64, 8, 3), 128),
    (Tile(128, 256, 64, 8, 4), None),
    (Tile(64, 256, 64, 4, 3), None),
    (Tile(64, 256, 64, 8, 3), None),
)
BLOCKS = ((64, 64), (64, 32), (16, 16))  # where the width of a block shapes the code: one slot, half a slot, the least


class Config(NamedTuple):
    """One kernel as the dispatcher would launch it."""

    direction: str
    family: str
    dtype: str
    tile: Tile
    block: tuple[int, int]
    pointwise: bool = False
    fused: bool = False
    whole: bool = True
    parts: bool = False
    most_registers: int | None = None  # that the assembler may use

    def __str__(self) -> str:
        marks = [name for name in ("pointwise", "fused", "parts") if getattr(self, name)]
        marks += [] if self.whole else ["ragged"]
        return " ".join(
            (self.direction, self.dtype, self.family, str(self.tile), "x".join(map(str, self.block)), *marks)
        ) + _limit(self)


def _limit(config: Config) -> str:
    return "" if config.most_registers is None else f" maxnreg={config.most_registers}"


def configurations(quick: bool, capability: int) -> Iterator[Config]:
    """Every tile of every family and direction, each with the variants that change its code; quick: the widest tile."""
    for (kind, family), tiles in FAMILIES.items():
        for direction in ("grad_values",) if kind == "products" else ("forward", "grad_input"):
            size = 2 if family == "half" else 4
            fitting = [t for t in tiles if t.since <= capability]
            fitting = [t for t in fitting if shared_bytes(direction, t, size) <= LIMITS[capability][0]]
            for tile in fitting[:1] if quick else fitting:
                yield from _variants(direction, family, tile, quick)


def considered() -> Iterator[Config]:
    for tile, most in CONSIDERED:
        for direction, fused in (("forward", False), ("forward", True), ("grad_input", False)):
            yield Config(direction, "half", "bf16", tile, BLOCKS[0], fused=fused, most_registers=most)


def _variants(direction: str, family: str, tile: Tile, quick: bool) -> Iterator[Config]:
    dtypes = DTYPES[family]
    plain = Config(direction, family, dtypes[0], tile, BLOCKS[0])
    yield plain
    if direction == "forward":
        yield plain._replace(fused=True)
    if quick:
        return
    yield from (plain._replace(block=block) for block in BLOCKS[1:])
    yield from (plain._replace(dtype=dtype) for dtype in dtypes[1:])
    yield plain._replace(pointwise=True)
    yield plain._replace(whole=False)
    yield plain._replace(parts=True)


def compiled(config: Config, capability: int) -> Any:
    kernel = block_products_kernel if config.direction == "grad_values" else gather_gemm_kernel
    return _compile(kernel, constants(config), config, capability)


def compile_config(config: Config, capability: int) -> dict[str, Any]:
    """Compile one configuration and read its machine code."""
    code, wgmma = compiled(config, capability), _is_wgmma(config, capability)
    registers, stack = resources(code)
    assembly, shared = code.asm.get("ptx") or code.asm["amdgcn"], code.metadata.shared
    return {
        "config": str(config),
        "source": source_of(config),
        "kernel": f"{config.direction} {config.family} {config.tile}{_limit(config)}",
        "sm": capability,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": shared,
        "programs_per_processor": occupancy(config.tile.warps, registers, shared, capability),
        "tensor_core_instructions": len(re.findall(TENSOR_CORES[capability], assembly)),
        "other_mma_instructions": len(re.findall(r"\bmma\.sync", assembly)) if capability > 80 else 0,
        "async_copies_16_bytes": len(re.findall(r"cp\.async\.cg", assembly)),
        "async_copies_narrow": len(re.findall(r"cp\.async\.ca", assembly)),
        "instructions_a_trip": pipeline.trip_instructions(pipeline.machine_code(code)) if wgmma else None,
        "pipeline_faults": pipeline.faults(code, _stages(config)) if wgmma else [],
    }


def complaints(row: dict[str, Any], config: Config) -> list[str]:
    """What is wrong with the machine code of a configuration; empty when nothing is."""
    found = list(row["pipeline_faults"])
    left = sums(config.direction, config.tile)[0]
    if config.family != "ieee":
        # A wgmma needs 64 rows on the left and 4 warps; smaller products take mma.sync.
        wide = row["sm"] in (80, GFX942) or left >= 64
        count = row["tensor_core_instructions"] + (0 if wide else row["other_mma_instructions"])
        if not count:
            found.append("no tensor-core instruction")
    cuda = row["sm"] != GFX942
    if cuda and not row["async_copies_16_bytes"] + row["async_copies_narrow"]:
        found.append("no asynchronous copy")
    # Where a trip's operands hold 16 bytes for each thread; below that a thread copies what there is.
    a_piece = min(sums(config.direction, config.tile)[:2]) * _depth(config) * 2 // (32 * config.tile.warps)
    if cuda and config.family == "half" and a_piece >= 16 and not row["async_copies_16_bytes"]:
        found.append("no 16-byte asynchronous copy")
    if row["stack_bytes"]:
        found.append(f"{row['stack_bytes']} bytes of stack")
    if row["shared_bytes"] > LIMITS[row["sm"]][0]:
        found.append(f"{row['shared_bytes']} bytes of shared memory")
    return found


def _is_wgmma(config: Config, capability: int) -> bool:
    """Whether the products of a configuration are wgmma: 64 rows on the left, on sm_90."""
    return capability == 90 and config.family == "half" and sums(config.direction, config.tile)[0] >= 64


def _stages(config: Config) -> int:
    gathers = config.direction in ("forward", "grad_input")
    return config.tile.stages_at(_depth(config)) if gathers else config.tile.stages


def _depth(config: Config) -> int:
    """Reduced channels of a trip."""
    if config.direction == "grad_values":
        return config.tile.bm
    return min(config.tile.bk, config.block[0 if config.direction == "grad_input" else 1])


def source_of(config: Config) -> str:
    """The first digits of a hash of what is compiled: the text of the kernel, its constants and its options."""
    text = source_text(config.direction), sorted(constants(config).items(), key=str), sorted(options(config).items())
    return hashlib.sha256(repr(text).encode()).hexdigest()[:12]


@lru_cache
def source_text(direction: str) -> str:
    """The functions that a kernel is compiled from."""
    module = sys.modules[(block_products_kernel if direction == "grad_values" else gather_gemm_kernel).__module__]
    return "".join(inspect.getsource(one.fn) for one in vars(module).values() if hasattr(one, "fn"))


def compile_sum(capability: int, activation: str | None) -> dict[str, Any]:
    """The kernel that adds the parts of a cut walk."""
    constants = {"ACTIVATION": activation, "BLOCK": 1024}
    if activation is None:
        constants |= {"bias_ptr": None, "residual_ptr": None}
    config = Config("sum_parts", "half", "bf16", Tile(0, 0, 0, 4, 3), (64, 64))
    registers, stack = resources(_compile(sum_parts_kernel, constants, config, capability))
    return {"config": f"sum_parts {activation}", "sm": capability, "registers": registers, "stack_bytes": stack}


def constants(config: Config) -> dict[str, Any]:
    tile, (bh, bw) = config.tile, config.block
    constants: dict[str, Any] = {"BM": tile.bm, "BN": tile.bn, "BW": bw}
    constants |= {"POINTWISE": config.pointwise, "WHOLE": config.whole}
    constants["PRECISION"] = "tf32" if config.family == "tf32" else "ieee"
    if config.direction == "grad_values":
        return constants | {"BK": tile.bk, "LANE": min(bh, tile.bn), "SLOT": min(bw, tile.bk)}
    transposed = config.direction == "grad_input"
    lane, slot = (bw, bh) if transposed else (bh, bw)
    constants |= {"BK": min(slot, tile.bk), "LANE": min(lane, tile.bn), "TRANSPOSED": transposed}
    constants |= {"SWAPPED": tile.swapped, "PARTED": config.parts, "HALVED": tile.halved}
    constants["ACTIVATION"] = "silu" if config.fused else None
    constants |= {} if config.fused else {"residual_ptr": None}
    return constants | ({"bias_ptr": None} if transposed or config.parts else {})


def _compile(kernel: Any, constants: dict[str, Any], config: Config, capability: int) -> Any:
    signature, divisible = {}, {}
    typed = {"x_ptr", "values_ptr", "bias_ptr", "residual_ptr", "grad_ptr", "out_ptr"}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{config.dtype}" if name in typed else "*i32" if name.endswith("_ptr") else "i32"
        if name == "parts_ptr" or (name == "out_ptr" and config.parts):
            signature[name] = "*fp32"
        if name.endswith("_ptr"):
            divisible[(index,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=divisible)
    target = GPUTarget("hip", "gfx942", 64) if capability == GFX942 else GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options(config))


def options(config: Config) -> dict[str, int]:
    most = {} if config.most_registers is None else {"maxnreg": config.most_registers}
    return {"num_warps": config.tile.warps, "num_stages": _stages(config), **most}


def resources(compiled: Any) -> tuple[int, int]:
    """(registers, bytes of stack) of a compiled kernel."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        names = ("vgpr_count", "agpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        vector, matrix, stack, spills = (int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in names)  # type: ignore[index]
        return vector + matrix, stack + 4 * spills
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    if found is None:
        raise RuntimeError(f"gpu.aot: cuobjdump -res-usage names no registers: {out!r}")
    return int(found[1]), int(found[2])


def occupancy(warps: int, registers: int, shared: int, capability: int) -> int:
    _, total, register_file, most_warps = LIMITS[capability]
    per_warp = -(-registers // 8) * 8 * (64 if capability == GFX942 else 32)
    return min(most_warps // warps, register_file // (per_warp * warps), total // (shared + 1024))


def device_name(capability: int) -> str:
    return "gfx942" if capability == GFX942 else f"sm_{capability}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown with a line for each tile and device: the worst of its variants."""
    header = (
        "kernel and tile",
        "device",
        "variants",
        "registers",
        "stack",
        "shared",
        "programs/SM",
        "tensor-core",
        "async",
        "a trip",
    )
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    keys = [(row["kernel"], row["sm"], row.get("current", True)) for row in rows]
    for kernel, capability, current in dict.fromkeys(keys):
        some = [row for row, key in zip(rows, keys, strict=True) if key == (kernel, capability, current)]
        worst = [max(row[key] for row in some) for key in ("registers", "stack_bytes", "shared_bytes")]
        fewest = min(row["programs_per_processor"] for row in some)
        cores = min(row["tensor_core_instructions"] or row["other_mma_instructions"] for row in some)
        copies = min(row["async_copies_16_bytes"] + row["async_copies_narrow"] for row in some)
        trips = [row["instructions_a_trip"] for row in some if row.get("instructions_a_trip")]
        kernel += "" if current else " (before a change)"
        cells = (kernel, device_name(capability), len(some), *worst, fewest, cores, copies, max(trips, default="-"))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def missing(rows: Sequence[dict[str, Any]], capabilities: Sequence[int]) -> list[str]:
    """Configurations of these devices of which there is no row, or one of a kernel that has changed since."""
    known = {(row["sm"], row["config"], row.get("source")) for row in rows}
    wanted = [(sm, config) for sm in capabilities for config in configurations(False, sm)]
    return [f"{device_name(sm)} {one}" for sm, one in wanted if (sm, str(one), source_of(one)) not in known]


def keep(rows: list[dict[str, Any]], stem: Path) -> None:
    """Write rows and table, beside the rows kept earlier; those of kernels that have changed since are marked."""
    path = stem.with_suffix(".json")
    earlier = json.loads(path.read_text()) if path.exists() else {"triton": triton.__version__, "rows": []}
    before = earlier["rows"] + earlier.get("considered", []) if earlier["triton"] == triton.__version__ else []
    found = {(row["sm"], row["config"]): row for row in (*before, *rows)}

    def those(sm: int, configs: Iterator[Config]) -> list[dict[str, Any]]:
        kept = [(found[sm, str(config)], config) for config in configs if (sm, str(config)) in found]
        return [row | {"current": row.get("source") == source_of(config)} for row, config in kept]

    kept = [row for sm in sorted(LIMITS) for row in those(sm, configurations(False, sm))]
    others = those(90, considered())
    record = {"triton": triton.__version__, "rows": kept, "considered": others}
    path.write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text(
        f"# Machine code of the Triton kernels\n\nCompiled by Triton {triton.__version__} with "
        f"`python -m benchmarks.gpu.aot`; nothing here was run. A line is the worst of a tile's variants (blocks, "
        f"dtypes, fused, pointwise, ragged, parts), each in `{path.name}`. Before a change: of kernels that compiled "
        f"otherwise, and not compiled again since. A trip: the most instructions of a warp in "
        f"one, where the products are wgmma.\n\n{table(kept)}\n"
        + (f"\n## Considered, and not taken\n\n{table(others)}\n" if others else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="*", default=sorted(LIMITS), choices=sorted(LIMITS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="configurations whose name holds this text")
    parser.add_argument("--out", default=str(RESULTS / "gpu_aot"), help="path without ending; '' keeps nothing")
    options = parser.parse_args()
    rows, wrong = [], []
    for capability in options.sm:
        for config in configurations(options.quick, capability):
            if options.only not in str(config):
                continue
            row = compile_config(config, capability)
            rows.append(row)
            if options.out and len(rows) % 20 == 0:  # a sweep takes most of an hour
                keep(rows, Path(options.out))
            found = complaints(row, config)
            wrong += [f"{device_name(capability)} {config}: {complaint}" for complaint in found]
            verdict = "; ".join(found) or "good"
            print(f"{device_name(capability)} {config}: {row['registers']} registers, {verdict}", flush=True)
        sums_rows = [compile_sum(capability, activation) for activation in (None, "silu")]
        wrong += [f"{device_name(capability)} {row['config']}: stack" for row in sums_rows if row["stack_bytes"]]
    if options.out and 90 in options.sm:
        rows += [compile_config(config, 90) for config in considered() if options.only in str(config)]
    print(table(rows))
    if options.out:
        keep(rows, Path(options.out))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()

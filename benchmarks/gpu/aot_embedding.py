"""The machine code of the kernels of packed embedding tables (kernels/embedding*.py), for GPUs that need not be there.

    python -m benchmarks.gpu.aot_embedding                 # all; keeps benchmarks/results/gpu_aot_embedding.json
    python -m benchmarks.gpu.aot_embedding --sm 90 --quick --out ''   # one of each kernel; what the tests run

Fails where a kernel spills registers, counts bits by more than one instruction, expands rows into narrow stores, or
multiplies half types without tensor cores.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton

from benchmarks.gpu.aot import GFX942, LIMITS, RESULTS, TENSOR_CORES, device_name, occupancy, resources
from benchmarks.gpu.aot_losses import Config, compile_config
from sparsekd.kernels import embedding, embedding_grad, embedding_top_k

ONE = {"dim": 1}  # Triton compiles a 1 as the constant that it is
COUNT_BITS = {True: r"v_bcnt_u32", False: r"popc\.b32"}  # by whether the target is AMD
WIDE_STORE = {True: r"global_store_dwordx[24]", False: r"st\.global\S*\.v[24]\.b32"}
HALF = ("bf16", "fp16")
KEPT = RESULTS / "gpu_aot_embedding.json"


def configurations(quick: bool, capability: int) -> Iterator[Config]:
    kinds = ("fp32", "bf16", "i8") if quick else ("fp32", "bf16", "fp16", "i8")
    for kind in kinds:
        for dim in (64,) if quick or kind == "fp16" else (64, 300):
            if quick and kind == "bf16":
                continue
            yield _rows("lookup", embedding.lookup_kernel, kind, dim, R=embedding.TILE // embedding.width_of(dim))
            weight = "*fp32" if kind != "fp16" else None
            yield _rows("bag", embedding.bag_kernel, kind, dim, R=embedding.IDS_OF_BAG, weight_ptr=weight)
    for kind in ("fp32",) if quick else ("fp32", "bf16"):
        for dim in (64,) if quick or kind == "bf16" else (64, 300):
            yield from _gradients(kind, dim, source=kind == "fp32")
            constants = {"ABSOLUTE": True, "R": embedding.TILE // embedding.width_of(dim), **_tile(dim)}
            tensors = {"total_ptr": f"*{kind}", "grad_ptr": f"*{kind}"}
            yield Config(f"absent {kind} {dim}", embedding.absent_kernel, {**_INDEX, **tensors, **constants}, 4)
    for kernel, high in ((embedding.lookup_kernel, 128), (embedding.bag_kernel, embedding.IDS_OF_BAG)):
        yield _rows(f"{kernel.fn.__name__} of one dimension", kernel, "fp32", 1, R=high, **ONE)
    yield Config("bag scale", embedding.bag_scale_kernel, {**_INDEX, "R": 32, "scale_ptr": "*fp32"}, 1)
    for kind in kinds:
        for k in (20,) if quick or kind == "fp16" else (20, 128):
            tiles = {embedding_top_k.queries_of_tile(n, k, kind == "i8", capability == GFX942) for n in (1, 256)}
            for high in sorted(tiles)[-1:] if quick else sorted(tiles):
                yield _top_k(kind, k, high, excluded=True)
    if not quick:
        yield _top_k("fp32", 20, 16, excluded=False)


_INDEX = {
    "ids_ptr": "*i64", "offsets_ptr": "*i64", "kept_ptr": "*i32", "base_ptr": "*i64", "counts_ptr": "*u8",
    "ok_ptr": "*i32",
}  # fmt: skip


def _tile(dim: int) -> dict[str, Any]:
    return {"D": embedding.width_of(dim)}


def _values(kind: str) -> dict[str, Any]:
    return {"values_ptr": f"*{kind}", "scale_ptr": "*fp32" if kind == "i8" else None}


def _rows(name: str, kernel: Any, kind: str, size: int, **more: Any) -> Config:
    out = {"out_ptr": "*fp32" if kind == "i8" else f"*{kind}"}
    arguments = {**_INDEX, **_values(kind), **out, **_tile(size), "MANY": size >= embedding.MANY_KEPT.value, **more}
    return Config(f"{name} {kind} {size}", kernel, arguments, 4, multiples=_multiples(size))


def _gradients(kind: str, dim: int, source: bool) -> Iterator[Config]:
    which = {"source_ptr": "*i64" if source else None, "weight_ptr": "*fp32" if source else None}
    shared = {
        **_INDEX, **_tile(dim), **which, "grad_ptr": f"*{kind}", "order_ptr": "*i64", "R": embedding_grad.TERMS,
        "CHUNK": embedding_grad.CHUNK,
    }  # fmt: skip
    name = f"{kind} {dim}{' of bags' if source else ''}"
    multiples = _multiples(dim)
    yield Config(f"pieces {name}", embedding_grad.pieces_kernel, {**shared, "group_ptr": "*i64"}, 4, False, multiples)
    rows = {**shared, "row_ptr": "*i64", "bounds_ptr": "*i64", "out_ptr": f"*{kind}", "places_ptr": "*i64"}
    for by_id in (True, False):
        packed = {"SORTED": by_id, "MANY": dim >= embedding.MANY_KEPT.value, "begin_ptr": None if by_id else "*i64"}
        if by_id:
            packed["places_ptr"] = None
        kernel = embedding_grad.grad_kernel
        yield Config(f"gradient {name}{'' if by_id else ' of rows'}", kernel, {**rows, **packed}, 4, False, multiples)


def _top_k(kind: str, k: int, high: int, excluded: bool) -> Config:
    out = "*i64" if excluded else None
    arguments = {
        **_INDEX, **_values(kind), "queries_ptr": f"*{kind if kind in HALF else 'fp32'}", "begin_ptr": out,
        "excluded_ptr": out, "best_ptr": "*i64", "K": embedding_top_k.slots(k), "Q": high,
        "GROUP": embedding_top_k.group_of(kind in HALF), "MANY": False,
    }  # fmt: skip
    name = f"top {k} {kind} {high} queries{' excluding' if excluded else ''}"
    return Config(name, embedding_top_k.top_k_kernel, arguments, embedding_top_k.WARPS, multiples=("dim",))


def _multiples(dim: int) -> tuple[str, ...]:
    return ("dim",) if dim % 16 == 0 else ()


def complaints(config: Config, capability: int, compiled: Any, stack: int) -> list[str]:
    amd = capability == GFX942
    text = compiled.asm["amdgcn" if amd else "ptx"]
    found = [f"{stack} bytes of stack"] if stack else []
    if config.kernel not in (embedding.bag_scale_kernel, embedding.absent_kernel, embedding_grad.pieces_kernel):
        found += [] if re.search(COUNT_BITS[amd], text) else ["bits are counted one step after the other"]
    if config.name.startswith("lookup") and config.multiples and not re.search(WIDE_STORE[amd], text):
        found.append("rows are written in narrow pieces")
    half = any(f" {kind} " in config.name for kind in HALF)
    if config.name.startswith("top") and half and not re.search(rf"{TENSOR_CORES[capability]}|\bmma\.sync", text):
        found.append("no tensor-core instruction")
    return found


@lru_cache
def source_of(kernel: Any) -> str:
    """The first digits of a hash of the functions that a kernel is compiled from."""
    modules = embedding, sys.modules[kernel.fn.__module__]
    text = [inspect.getsource(one.fn) for module in modules for one in vars(module).values() if hasattr(one, "fn")]
    return hashlib.sha256("".join(text).encode()).hexdigest()[:12]


def kept(path: Path = KEPT) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


def missing(rows: list[dict[str, Any]], capability: int) -> list[str]:
    """Configurations of a device of which there is no row, or one of a kernel that has changed since."""
    known = {(row["config"], row["source"]) for row in rows if row["sm"] == capability}
    return [one.name for one in configurations(False, capability) if (one.name, source_of(one.kernel)) not in known]


def row_of(config: Config, capability: int) -> dict[str, Any]:
    compiled = compile_config(config, capability)
    registers, stack = resources(compiled)
    return {
        "config": config.name,
        "source": source_of(config.kernel),
        "sm": capability,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "programs_per_processor": occupancy(config.warps, registers, compiled.metadata.shared, capability),
        "faults": complaints(config, capability, compiled, stack),
    }


def keep(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows, beside those of other devices that were kept earlier."""
    earlier = kept(path) if path.exists() else []
    wanted = {(sm, one.name) for sm in LIMITS for one in configurations(False, sm)}
    found = {(row["sm"], row["config"]): row for row in (*earlier, *rows) if (row["sm"], row["config"]) in wanted}
    record = {"triton": triton.__version__, "rows": [found[key] for key in sorted(found)]}
    path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="*", default=sorted(LIMITS), choices=sorted(LIMITS))
    parser.add_argument("--quick", action="store_true", help="one of each kernel")
    parser.add_argument("--out", default=str(KEPT), help="'' keeps nothing")
    options = parser.parse_args()
    rows = []
    for capability in options.sm:
        for config in configurations(options.quick, capability):
            rows.append(row := row_of(config, capability))
            said = f"{row['registers']} registers, {'; '.join(row['faults']) or 'good'}"
            print(f"{device_name(capability)} {config.name}: {said}", flush=True)
    if options.out:
        keep(rows, Path(options.out))
    if wrong := [
        f"{device_name(row['sm'])} {row['config']}: {'; '.join(row['faults'])}" for row in rows if row["faults"]
    ]:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()

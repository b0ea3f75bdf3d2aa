"""The machine code of the distillation kernels (kernels/attention*.py), compiled for GPUs that need not be there.

    python -m benchmarks.gpu.aot_losses [--sm 80 90 100 942] [--quick]

Fails where a kernel spills registers, or where maps whose rows are multiples of 16 bytes are not read 16 at a time.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu.aot import GFX942, LIMITS, device_name, resources
from sparsekd.kernels import attention, attention_kd, attention_match

WIDE_LOAD = {True: r"global_load_dwordx[24]", False: r"ld\.global\S*\.v[24]\.b32"}  # by whether the target is AMD


class Config(NamedTuple):
    """One kernel with the types of its arguments: a name, or names, of Triton's types; other values are constants."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    warps: int
    aligned: bool = False
    multiples: tuple[str, ...] = ()  # numbers that are multiples of 16


def configurations(quick: bool) -> Iterator[Config]:
    dtypes = ("bf16",) if quick else ("bf16", "fp16", "fp32")
    for layers in (6,) if quick else (1, 6, 18):
        for dtype in dtypes:
            for last in (False, True):
                for aligned in (True, False):
                    yield from _stats(layers, dtype, last, aligned)
    yield Config("means", attention.means_kernel, {**_tuples(6, "channels_of", "pixels_of", "means_at", "partial_at"),
                 "COUNT": 6, "BLOCK": 128}, 4)  # fmt: skip
    for block in (1024,) if quick else (64, 1024, 4096, attention_match.LARGEST_MAP):
        constants = {"BLOCK": block, "EPS": 1e-12, "per_image": "fp32"}
        warps = min(max(block // 256, 1), 16)
        yield Config(f"pairs {block}", attention_match.pairs_kernel, constants, warps)
        yield Config(f"pairs {block} alone", attention_match.pairs_kernel, {**constants, "attention_ptr": None}, warps)
    yield Config("unpool", attention_match.unpool_kernel, {"BLOCK": 1024}, 4)
    for block in (128,) if quick else (128, 1024, attention_kd.LARGEST_ROW):
        arguments = {"BLOCK": block, "temperature": "fp32", "per_image": "fp32"}
        yield Config(f"kd {block}", attention_kd.kd_kernel, arguments, min(max(block // 256, 1), 16))


def _tuples(count: int, *names: str) -> dict[str, Any]:
    return {name: ("i32",) * count for name in names}


def _stats(layers: int, dtype: str, last: bool, aligned: bool) -> Iterator[Config]:
    places = _tuples(layers, "first", "inner", "outer", "means_at", "energy_at")
    constants = {"tensors": (f"*{dtype}",) * layers, "COUNT": layers, "LAST": last, "ALIGNED": aligned}
    name = f"{dtype} {layers} layers {'nhwc' if last else 'nchw'}{'' if aligned else ' ragged'}"
    warps = 4 if aligned else 8  # as Layers.warps
    forward = {**places, **constants, **_tuples(layers, "partial_at")}
    yield Config(f"stats {name}", attention.stats_kernel, forward, warps, aligned)
    backward = {**places, **constants, "grads": (f"*{dtype}",) * layers}
    yield Config(f"stats_grad {name}", attention.stats_grad_kernel, backward, warps, aligned)


def compile_config(config: Config, capability: int) -> Any:
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    divisible: dict[tuple[int, ...], list[list[Any]]] = {}
    tables = {"teacher_of", "student_of", "size_of"}
    for index, name in enumerate(config.kernel.arg_names):
        default = "*i32" if name in tables else "*fp32" if name.endswith("_ptr") else "i32"
        kind = config.arguments.get(name, default)
        if not isinstance(kind, (str, tuple)):
            signature[name], constants[(index,)] = "constexpr", kind
            continue
        signature[name] = kind
        if name in config.multiples:
            divisible[(index,)] = [["tt.divisibility", 16]]
        if isinstance(kind, tuple) and kind[0].startswith("*"):
            divisible |= {(index, i): [["tt.divisibility", 16]] for i in range(len(kind))}
        elif kind[0] == "*":
            divisible[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=config.kernel, signature=signature, constexprs=constants, attrs=divisible)
    target = GPUTarget("hip", "gfx942", 64) if capability == GFX942 else GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": config.warps})


def complaints(config: Config, capability: int, compiled: Any) -> list[str]:
    registers, stack = resources(compiled)
    found = [f"{stack} bytes of stack"] if stack else []
    amd = capability == GFX942
    if config.aligned and not re.search(WIDE_LOAD[amd], compiled.asm["amdgcn" if amd else "ptx"]):
        found.append("maps are read in narrow pieces")
    print(f"{device_name(capability)} {config.name}: {registers} registers, {'; '.join(found) or 'good'}", flush=True)
    return [f"{device_name(capability)} {config.name}: {complaint}" for complaint in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="*", default=sorted(LIMITS), choices=sorted(LIMITS))
    parser.add_argument("--quick", action="store_true", help="one of each kernel")
    options = parser.parse_args()
    wrong = []
    for capability in options.sm:
        for config in configurations(options.quick):
            wrong += complaints(config, capability, compile_config(config, capability))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()

"""Whether the loop of a compiled kernel is the pipeline it was written as: read off intermediate and machine code.

A trip copies the operands of a later one while the tensor cores work on those that have arrived. What breaks this is
silent: a wait for everything, an operand that goes through registers on its way, wgmma instructions that the assembler
puts one behind the other.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def faults(compiled: Any, stages: int) -> list[str]:
    """What is wrong with the main loop of a kernel for sm_90 whose products are wgmma; empty when nothing is."""
    code = compiled.asm["ttgir"]
    loop = main_loop(code)
    found = []
    pending = [int(number) for number in re.findall(r"warp_group_dot_wait [^\n]*pendings = (\d+)", loop)]
    if pending != [1]:
        found.append(f"the loop waits for wgmma down to {pending} pending, not [1]")
    copies = [int(number) for number in re.findall(r"async_wait [^\n]*num = (\d+)", loop)]
    if copies != [2 * (stages - 2)]:
        found.append(f"the loop waits for copies down to {copies} groups, not {[2 * (stages - 2)]}")
    buffers = [int(number) for number in re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", code)]
    if buffers != [stages] * 2:
        found.append(f"{buffers} buffers of the operands, not {[stages] * 2}")
    through = re.findall(r"convert_layout [^\n]*tensor<\d+x\d+x(?:bf16|f16|f32),[^\n]*", loop)
    through += re.findall(r"local_load[^\n]*", loop)
    if through:
        found.append(f"operands go through registers in the loop: {through[0].strip()[:100]}")
    if "HGMMA" not in machine_code(compiled):
        found.append("no HGMMA in the machine code")
    if warning := serialized(compiled):
        found.append(warning)
    return found


def main_loop(code: str) -> str:
    """The text of the loop that holds the products."""
    for match in re.finditer(r"^( *)(?:%\S+(?:, %\S+)* = )?scf\.for[^\n]*\n(.*?)^\1\}", code, re.MULTILINE | re.DOTALL):
        if "warp_group_dot " in match[2]:
            return match[2]
    raise ValueError("pipeline: no loop with wgmma products in the intermediate code")


def machine_code(compiled: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run(
            [TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout


def _output(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def serialized(compiled: Any) -> str:
    """What the assembler says of wgmma that it had to serialise, or ""."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        said = _output([str(TOOLS / "ptxas"), "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]).stderr
    warned = re.search(r"[^\n]*wgmma[^\n]*serializ[^\n]*", said)
    return warned[0].strip() if warned else ""

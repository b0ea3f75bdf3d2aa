"""Whether the loop of a compiled kernel is the pipeline it was written as: read off intermediate and machine code.

A trip copies the operands of a later one while the tensor cores work on those that have arrived. What breaks this is
silent: a wait for everything, an operand that goes through registers on its way, wgmma instructions that the assembler
puts one behind the other.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import lru_cache
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


def buffers(code: str) -> list[int]:
    """Stages of each operand: how often it has room in shared memory."""
    return [
        int(number) for number in re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\S*(?:bf16|f16|f32),", code)
    ]


def through_registers(loop: str) -> list[str]:
    """What takes an operand through registers on its way to the products."""
    found = re.findall(r"convert_layout [^\n]*tensor<\d+x\d+x(?:bf16|f16|f32),[^\n]*", loop)
    return found + re.findall(r"local_load[^\n]*memdesc<(?:\d+x)*\d+x(?:bf16|f16|f32),[^\n]*", loop)


def trip_instructions(code: str) -> int:
    """Instructions of a warp in one trip of the loop with the products: the shortest way back to its beginning."""
    lines = [(int(found[1], 16), found[2]) for found in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)]
    loops = []
    for end, text in lines:
        back = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < end:
            loops.append([line for place, line in lines if int(back[1], 16) <= place <= end])
    return min((len(loop) for loop in loops if any("HGMMA" in line for line in loop)), default=0)


def main_loop(code: str) -> str:
    """The text of the loop that holds the products."""
    for match in re.finditer(r"^( *)(?:%\S+(?:, %\S+)* = )?scf\.for[^\n]*\n(.*?)^\1\}", code, re.MULTILINE | re.DOTALL):
        if "warp_group_dot " in match[2]:
            return match[2]
    raise ValueError("pipeline: no loop with wgmma products in the intermediate code")


def machine_code(compiled: Any) -> str:
    return _disassembled(compiled.asm["cubin"])


@lru_cache(maxsize=1)  # two questions are asked of each kernel, and the disassembler is slow
def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _output([str(TOOLS / "cuobjdump"), "-sass", file.name]).stdout


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

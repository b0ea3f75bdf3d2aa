"""The processor's name and generation, out of what Linux says of it, and without that file."""

import platform

from sparsekd import processor

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9R14 96-Core Processor
flags\t\t: fpu avx2

processor\t: 1
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9R14 96-Core Processor
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


def file_of(folder, text):
    path = folder / "cpuinfo"
    path.write_text(text)
    return path


def test_an_x86_is_named_by_its_maker_and_told_apart_by_family_and_model(tmp_path):
    cpuinfo = file_of(tmp_path, X86)
    assert processor.name(cpuinfo) == "AMD EPYC 9R14 96-Core Processor"
    assert processor.generation(cpuinfo) == "family 25, model 17"


def test_an_arm_has_no_model_name_but_a_part(tmp_path):
    cpuinfo = file_of(tmp_path, ARM)
    assert processor.name(cpuinfo) in (platform.processor(), platform.machine())
    assert processor.generation(cpuinfo) == "implementer 0x41, part 0xd40"


def test_without_the_file_the_operating_system_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert processor.name(tmp_path / "none") == processor.generation(tmp_path / "none") == "riscv64"


def test_this_machine_has_a_name():
    assert processor.name() and processor.generation()

"""csrc/cuda built for a CPU by tests/ladder/cuda/on_host.h, sound or with planted faults, and run there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent / "cuda"
SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "delta_linear_decode.cu"
FLAGS = (
    "-std=c++17",
    "-pthread",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    f"-I{FOLDER}",
)
# a fuzzer that numbers alone, the address or the thread sanitizer watches
WATCHES = {
    "numbers": ("-O1",),
    # checks as calls: in line they take three times as long to compile
    "address": ("-O1", "-g1", "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment",
                "--param=asan-instrumentation-with-call-threshold=0"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}  # fmt: skip
WHY_NOT = "" if shutil.which("g++") else "no g++ builds the kernels for a CPU on this machine"
# a planted fault has the room of one number type less: it is built beside many others
FEWER_TYPES = ("return launch_as<fp16>(step, call.processors, stream);", "return cudaErrorInvalidValue;")


class NotBuilt(RuntimeError):
    """The compiler's own words."""


def build(out: Path, *words) -> Path:
    """Runs g++; raises NotBuilt where it finds a fault, or anything to warn of."""
    command = ["g++", *FLAGS, *map(str, words), "-o", str(out)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if made.returncode or made.stderr:
        raise NotBuilt(made.stderr[-3000:])
    return out


def library(folder: Path) -> Path:
    """The kernels as a shared library with the symbols of the CUDA build."""
    return build(folder / "emulated.so", "-O2", "-fPIC", "-shared", "-x", "c++", SOURCE)


def fuzzer(folder: Path, watch: str) -> Path:
    """A program that runs decoding steps over random shapes."""
    return build(folder / f"fuzz_{watch}", *WATCHES[watch], FOLDER / "fuzz.cpp", "-x", "c++", SOURCE)


def fuzzer_of_faults(folder: Path, watch: str, faults: list[tuple[str, str]]) -> Path:
    """The same with a copy of the kernels for each fault: a line of it, and what stands in its place."""
    text = SOURCE.read_text(encoding="utf-8")
    copies = []
    for number, changes in enumerate(faults):
        copies.append(renamed(planted(text, changes, FEWER_TYPES), f"fault_{number}"))
    names = ", ".join(f"pefast::fault_{i}::start" for i in range(len(faults)))
    chooser = "using Kernel = int(const pefast::DecodeCall*, const pefast::DecodeDelta*, void*);\n"
    chooser += f"Kernel* kernel(int fault) {{ static Kernel* all[] = {{{names}}}; return all[fault]; }}\n"
    path = folder / f"faults_{watch}.cpp"
    heads = (
        f'#include <type_traits>\n#include "{SOURCE.parent}/delta_linear_decode.h"\n#include "on_host.h"\n'
    )
    path.write_text(heads + "".join(copies) + chooser, encoding="utf-8")
    return build(folder / path.stem, *WATCHES[watch], "-w", "-DFAULTS", FOLDER / "fuzz.cpp", path)


def planted(text: str, *changes: tuple[str, str]) -> str:
    """The source with these lines changed."""
    for line, fault in changes:
        assert line in text, f"no line {line!r} in {SOURCE.name}"
        text = text.replace(line, fault, 1)
    return text


def renamed(text: str, name: str) -> str:
    """The source as a namespace of its own, without the doors to other languages."""
    text = re.sub(r"^#include.*\n", "", text, flags=re.M)
    text = text[: text.index('extern "C"')].replace("namespace {", f"namespace {name} {{", 1)
    end = "}  // namespace\n}  // namespace pefast"
    assert text.rstrip().endswith(end)
    door = "int start(const DecodeCall* call, const DecodeDelta* deltas, void* stream) {"
    door += " return run(*call, deltas, stream); }\n"
    return text.rstrip()[: -len(end)] + door + end + "\n"


def run(program: Path, cases: int, fault: int = 0, **environment) -> subprocess.CompletedProcess:
    """What the fuzzer says, in a process whose addresses the thread sanitizer can watch."""
    quiet = {"TSAN_OPTIONS": f"suppressions={FOLDER / 'emulator.supp'} exitcode=66", **environment}
    command = ["setarch", "-R", str(program), str(cases), str(fault)]
    return subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=120)

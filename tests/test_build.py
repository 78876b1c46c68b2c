"""The extension: what setup.py does with every compiler, and how the built one behaves in a process."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pefast.native import WHY_NOT, C

ROOT = Path(__file__).parents[1]
needs_extension = pytest.mark.skipif(C is None, reason=WHY_NOT)
# what a compiler without AMX says; all else goes to the real one
OLD_COMPILER = """#!/bin/sh
for word in "$@"; do
  case "$word" in -mamx*) echo "g++: error: unrecognized command-line option '$word'" >&2; exit 1;; esac
done
exec g++ "$@"
"""
BROKEN_COMPILER = """#!/bin/sh
echo "isa.cpp:1:1: error: the disk is full" >&2
exit 1
"""


@pytest.fixture
def setup_py():
    pytest.importorskip("setuptools")
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def compiler_script(tmp_path):
    def write(text):
        script = tmp_path / "a compiler"
        script.write_text(text)
        script.chmod(0o755)
        return f"'{script}'"

    return write


def python(code, **environment):
    """What a new process prints, or the last line of what it died of."""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return ran.stdout.strip() if ran.returncode == 0 else ran.stderr.strip().splitlines()[-1]


def setup(folder, cxx, *command):
    """Copies what a build reads to folder and runs setup.py there."""
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for room in ("csrc", "pefast", "kernels"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    ran = subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        env={**os.environ, "CXX": cxx},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr


def note_of_a_build(folder, cxx):
    setup(folder, cxx, "build_ext", "--inplace")
    assert not list(folder.glob("pefast/_C*"))
    return (folder / "pefast/native/why_not.txt").read_text(encoding="utf-8").strip()


def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path):
    note = note_of_a_build(tmp_path, "no-such-compiler")
    assert note == "the extension was not built: no C++ compiler: 'no-such-compiler' was not found"


def test_where_compiling_fails_the_compilers_own_error_is_kept(tmp_path, compiler_script):
    note = note_of_a_build(tmp_path, compiler_script(BROKEN_COMPILER))
    assert note == "the extension was not built: isa.cpp:1:1: error: the disk is full"


def test_each_file_gets_the_flags_of_its_name(setup_py, tmp_path, monkeypatch, compiler_script):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    pytest.importorskip("pybind11")
    sources = [f"csrc/cpu/any_{word}.cpp" for word in ("scalar", "avx2", "avx512", "amx")] + ["csrc/any.cpp"]

    def levels(cxx):
        monkeypatch.setenv("CXX", cxx)
        text = setup_py["build_file"](sources, tmp_path / "_C.so", tmp_path, setup_py["compiler"]())
        lines = text.splitlines()
        compiled = {
            Path(line.split()[-1]).stem: lines[i + 1] for i, line in enumerate(lines) if ": compile" in line
        }
        return compiled, text

    compiled, text = levels("g++")
    if not any(processor in os.uname().machine for processor in ("x86_64", "amd64")):
        assert set(compiled) == {"any_scalar", "any"}
        return
    assert "-m" not in compiled["any"] and "-m" not in compiled["any_scalar"]
    assert "-mavx2" in compiled["any_avx2"] and "avx512" not in compiled["any_avx2"]
    assert "-mavx512bw" in compiled["any_avx512"] and "amx" not in compiled["any_avx512"]
    without_amx, text = levels(compiler_script(OLD_COMPILER))
    assert "any_amx" not in without_amx and "-DPEFAST_HAVE_AMX" not in text
    assert "any_avx512" in without_amx and "-DPEFAST_HAVE_AVX512" in text


def test_the_wheel_holds_the_kernels_room_as_pefast_kernels(tmp_path):
    setup(tmp_path, "no-such-compiler", "bdist_wheel", "-d", "wheel")
    names = set(zipfile.ZipFile(next(tmp_path.glob("wheel/*.whl"))).namelist())
    for room, inside in (("pefast", "pefast"), ("kernels", "pefast/kernels")):
        files = (file.relative_to(ROOT / room) for file in (ROOT / room).rglob("*.py"))
        assert {f"{inside}/{file}" for file in files} <= names
    assert "pefast/native/why_not.txt" in names
    assert not [name for name in names if name.startswith("kernels")]


def test_what_was_not_built_is_told_in_words(tmp_path):
    missing = "import sys; sys.modules['pefast._C'] = None"
    missing += "; from pefast import native; print(native.C, native.WHY_NOT)"
    said = python(missing)
    assert said.startswith("None the extension was not built: ")
    works = "import pefast, torch; print(pefast.ops.dropout(torch.ones(2, 2), 0.5, seed=1).shape)"
    assert python(missing + "; " + works).endswith("torch.Size([2, 2])")


@needs_extension
def test_the_environment_chooses_the_instruction_set():
    for level in C.isas():
        assert python("from pefast.native import C; print(C.isa())", PEFAST_ISA=level) == level
    said = python("import pefast.native", PEFAST_ISA="mmx")
    assert said == f"ValueError: PEFAST_ISA: 'mmx' does not run here; {', '.join(C.isas())} would"


@needs_extension
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps")
def test_one_pool_of_threads_with_pytorchs_own_library():
    pools = """
import torch, pefast
x = torch.randn(2048, 512)
torch.set_num_threads(2)
pefast.ops.dropout(x, 0.5), x @ x.t()
paths = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(*sorted(path for path in paths if "gomp" in path or "iomp" in path or "libomp" in path))
"""
    loaded = python(pools).split()
    assert len(loaded) == 1 and "torch" in loaded[0], loaded


@needs_extension
def test_a_process_asks_torch_for_nothing_until_it_is_used():
    assert (
        python("import sys, pefast; print('torch' in sys.modules, 'pefast._C' in sys.modules)")
        == "False False"
    )

"""Two things only: the native extension pefast._C, and that kernels/ is pefast.kernels.

Every csrc/*.cpp and csrc/cpu/*.cpp is compiled. The last word of a file's name says which instructions it
may use (dropout_avx2.cpp); files without such a word run on any machine. A level that the compiler does not
know is left out, and PEFAST_HAVE_<LEVEL> is defined for the others. Where nothing can be built the install
still succeeds, and pefast/native/why_not.txt says the reason.

PEFAST_CUDA=1 builds csrc/cuda with nvcc as well: pefast._cuda, a shared library that knows neither Python nor
torch and holds machine code for several GPUs. why_no_cuda.txt beside the other note says why there is none.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

AVX512 = "-mavx2 -mbmi2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq"
LEVELS = {
    "scalar": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "amx": AVX512 + " -mavx512bf16 -mamx-tile -mamx-bf16",
}
# contraction off: a * b + c must round the same way in every instruction set
# no trapping math: without it gcc makes no vectors of a loop that keeps some products and drops others
# gcc 12 warns about its own intrinsics as uninitialized
BASE = (
    "-std=c++17 -O3 -fopenmp -fPIC -ffp-contract=off -fno-trapping-math -fvisibility=hidden"
    " -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"
)
# what csrc/cuda is compiled for, where this nvcc knows it; the last one as PTX too, for what comes after it
GPUS = ("80", "90", "100", "120")
CUDA = "pefast._cuda"
RULES = """
rule compile
  command = {cxx} {flags} $level -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} -shared -fopenmp $in -o $out
"""


class CannotBuild(OSError):
    """Why the extension was not built, in words."""


def compiler() -> list[str]:
    """The command that compiles C++, as words."""
    if sys.platform != "linux":
        raise CannotBuild(f"csrc is built on Linux only, this is {sys.platform}")
    # g++ first: clang would bring its own OpenMP, a second pool of threads beside torch's
    words = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not shutil.which(words[0]):
        raise CannotBuild(f"no C++ compiler: {words[0]!r} was not found")
    return words


def nvcc() -> str:
    """Where CUDA's compiler is."""
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    places = [str(Path(home) / "bin") for home in homes if home] + [os.environ.get("PATH", "")]
    found = shutil.which("nvcc", path=os.pathsep.join([*places, "/usr/local/cuda/bin"]))
    if not found:
        raise CannotBuild("no program 'nvcc' was found; CUDA_HOME says where CUDA is")
    return found


def nvcc_command(compiler: str, sources: list[str], target: Path, gpus=GPUS) -> list[str]:
    """The command that makes one library of csrc/cuda for these GPUs, as far as the compiler knows them."""
    known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    # 90a is 90 with instructions of its own
    gpus = [gpu for gpu in gpus if f"sm_{gpu.rstrip('a')}" in known.split()]
    if not gpus:
        raise CannotBuild(f"{compiler} knows none of the GPUs {', '.join(GPUS)}")
    codes = [f"arch=compute_{gpu},code=sm_{gpu}" for gpu in gpus]
    codes.append(f"arch=compute_{gpus[-1]},code=compute_{gpus[-1]}")
    # the CUDA runtime comes inside, and stays there: torch brings one of its own
    words = [
        "-std=c++17",
        "-O3",
        "-shared",
        "-cudart=static",
        "-Xcompiler=-fPIC",
        "-Xlinker=--exclude-libs=ALL",
    ]
    return [compiler, *words, *(f"-gencode={code}" for code in codes), *sources, "-o", str(target)]


def ninja() -> str:
    """Where the program ninja is."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = None
    found = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if not found:
        raise CannotBuild("no program 'ninja' was found")
    return found


def known_levels(cxx: list[str]) -> dict[str, str]:
    """The levels whose flags this compiler takes for this machine's family of processors."""

    def takes(flags):
        trial = [*cxx, *flags.split(), "-x", "c++", "-fsyntax-only", os.devnull]
        return subprocess.run(trial, capture_output=True).returncode == 0

    return {level: flags for level, flags in LEVELS.items() if takes(flags)}


def build_file(sources: list[str], target: Path, objects: Path, cxx: list[str]) -> str:
    """The text of build.ninja."""
    try:
        import pybind11
    except ImportError as error:
        raise CannotBuild("the package 'pybind11' is not installed") from error
    levels = known_levels(cxx)
    have = [f"-DPEFAST_HAVE_{level.upper()}" for level in levels]
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = " ".join([BASE, *have, shlex.join(include)]).replace("$", "$$")
    text, outs = RULES.format(cxx=shlex.join(cxx).replace("$", "$$"), flags=flags), []
    for source in sources:
        suffix = Path(source).stem.rpartition("_")[2]
        if suffix in LEVELS and suffix not in levels:
            continue
        # csrc/cpu/isa.cpp -> csrc_cpu_isa.o: two folders may hold files of one name
        outs.append(escaped(objects / ("_".join(Path(source).with_suffix(".o").parts))))
        text += f"build {outs[-1]}: compile {escaped(Path(source).absolute())}\n"
        text += f"  level = {levels.get(suffix, '')}\n"
    return text + f"build {escaped(target.absolute())}: link {' '.join(outs)}\n"


def escaped(path: Path) -> str:
    """A path as build.ninja wants it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class BuildNative(build_ext):
    """Compiles csrc in parallel; a failure leaves a note instead of stopping the install."""

    # setuptools' own run() copies the extension from build/ and would not carry the note
    def run(self):
        for ext in self.extensions:
            self.build_extension(ext)

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        of_cuda = ext.name == CUDA
        what, name = ("CUDA kernels were", "why_no_cuda") if of_cuda else ("extension was", "why_not")
        note = target.parent / "native" / f"{name}.txt"
        note.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        try:
            (self.compile_cuda if of_cuda else self.compile)(ext.sources, target)
        except (CannotBuild, subprocess.CalledProcessError) as error:
            reason = str(error) if isinstance(error, CannotBuild) else first_error(error.stdout)
            note.write_text(f"the {what} not built: {reason}\n", encoding="utf-8")
            print(f"pefast: {note.read_text(encoding='utf-8')}", file=sys.stderr)

    def compile_cuda(self, sources, target):
        command = nvcc_command(nvcc(), sources, target)
        subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)

    def compile(self, sources, target):
        objects = Path(self.build_temp).absolute()
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(build_file(sources, target, objects, compiler()))
        done = subprocess.run([ninja(), "-C", str(objects)], stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout)


def first_error(output: str) -> str:
    """The line of a compiler's output that says what went wrong."""
    lines = output.strip().splitlines() or ["ninja said nothing"]
    return next((line for line in lines if "error:" in line), lines[-1])


# the tests read this file without running it
if __name__ == "__main__":
    folders = (Path("csrc"), Path("csrc/cpu"))
    sources = sorted(str(path) for folder in folders for path in folder.glob("*.cpp"))
    headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))
    extensions = [Extension("pefast._C", sources, depends=headers, optional=True)]
    if os.environ.get("PEFAST_CUDA", "0") not in ("", "0"):
        kernels = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
        extensions.append(Extension(CUDA, kernels, depends=headers, optional=True))
    setup(
        packages=[*find_packages(include=["pefast", "pefast.*"]), "pefast.kernels"],
        package_dir={"pefast": "pefast", "pefast.kernels": "kernels"},
        ext_modules=extensions,
        cmdclass={"build_ext": BuildNative},
    )

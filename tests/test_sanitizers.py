"""csrc under the address and undefined-behaviour sanitizers: fuzzers over random shapes, csrc/tests/*.cpp.

More cases by hand: PEFAST_FUZZ=100000 python -m pytest tests/test_sanitizers.py; PEFAST_SEED=2 draws others
"""

import os
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pefast.native import WHY_NOT, C

ROOT = Path(__file__).parents[1]
CASES = os.environ.get("PEFAST_FUZZ", "200")
FLAGS = "-std=c++17 -O1 -g -fopenmp -fsanitize=address,undefined".split()
FUZZERS = sorted(path.stem for path in (ROOT / "csrc/tests").glob("*.cpp"))


def compiled(command: list[str]) -> None:
    """Runs a compiler; skips the test where it has no sanitizers."""
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "asan" in made.stderr and "cannot find" in made.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert made.returncode == 0, made.stderr[-2000:]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Every kernel with the flags that setup.py gives its file, and sanitizers."""
    if C is None:
        pytest.skip(WHY_NOT)
    if not shutil.which("g++"):
        pytest.skip("no g++ on this machine")
    pytest.importorskip("setuptools")
    levels = runpy.run_path(str(ROOT / "setup.py"))["known_levels"](["g++"])
    have = [f"-DPEFAST_HAVE_{level.upper()}" for level in levels]
    folder, commands = tmp_path_factory.mktemp("fuzz"), []
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        level = source.stem.rpartition("_")[2]
        known = level in levels or level not in ("scalar", "avx2", "avx512", "amx")
        if known:
            out = folder / f"{source.stem}.o"
            commands.append(
                ["g++", *FLAGS, *have, *levels.get(level, "").split(), "-c", str(source), "-o", str(out)]
            )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, commands))
    return [command[-1] for command in commands], have


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_no_byte_outside_and_no_undefined_behaviour(objects, name, tmp_path):
    kernels, have = objects
    program = tmp_path / name
    compiled(["g++", *FLAGS, *have, f"csrc/tests/{name}.cpp", *kernels, "-o", str(program)])
    # threads that spin while they wait take six times as long on a busy machine
    quiet = os.environ | {"OMP_WAIT_POLICY": "passive"}
    ran = subprocess.run([str(program), CASES], capture_output=True, text=True, env=quiet)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]

"""Faults planted in csrc/cuda: numbers, the address or the thread sanitizer must find each."""

import subprocess

import cuda_builds
import pytest
from cuda_builds import NotBuilt, fuzzer_of_faults, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(cuda_builds.WHY_NOT), reason=cuda_builds.WHY_NOT)]

# name: (what finds it, the line, the line with its fault)
FAULTS = {
    "forgotten scale": ("numbers", "task.scale * whole<WIDTH>(parts, e)", "whole<WIDTH>(parts, e)"),
    "scale 2 % wrong": ("numbers", "? task.scale *", "? 1.02f * task.scale *"),
    "rows of another adapter": ("numbers", "delta.adapter == id", "delta.adapter >= id"),
    "the first row's adapter": ("numbers", "f.ids[m]", "f.ids[0]"),
    "the first row's waist": ("numbers", "f.h + m * f.slots", "f.h + 0 * f.slots"),
    "the first delta's waist": ("numbers", "h += padded<WIDTH>(delta.R);", ""),
    "wrong stride of x": ("numbers", "f.M - 1) * f.x.ld", "f.M - 1) * f.K"),
    "wrong stride of b": ("numbers", "n * b.ld, delta.R, b.wide)\n", "n * delta.R, delta.R, b.wide)\n"),
    "gain added": ("numbers", "y *= number<T>(f.gain", "y += number<T>(f.gain"),
    "forgotten bias": ("numbers", "if (f.bias) y +=", "if (f.bias && false) y +="),
    "a warp forgotten": ("numbers", "warp < WARPS; ++warp", "warp < WARPS - 1; ++warp"),
    "every warp from the start": ("numbers", "int64_t k = warp * STRIDE", "int64_t k = 0 * warp"),
    "halves of x exchanged": ("numbers", "{x[0].z, x[1].z,", "{x[1].z, x[0].z,"),
    "one lane stores for four": ("numbers", "if (m % 4 == t)", "if (t == 0 && m % 4 == 0)"),
    "the last columns forgotten": ("numbers", "padded<WIDTH>(step.N) / WIDTH", "step.N / WIDTH"),
    "counts left behind": ("numbers", "== gridDim.x - 1", "== gridDim.x"),
    "blocks numbered by the GPU": ("numbers", "block = *drawn;", "block = blockIdx.x;"),
    "inner mask dropped": ("address", "narrow(i < left ?", "narrow(i <= left ?"),
    "one step too many": ("address", "HOP + STRIDE <= f.K;", "HOP + STRIDE <= f.K + STRIDE;"),
    "one row of x too many": (
        "address",
        "smaller(int64_t(g + 8 * i), f.M - 1)",
        "smaller(int64_t(g + 8 * i), f.M)",
    ),
    "one row of w too many": ("address", "task.end - 1) *", "task.end) *"),
    "outer mask dropped": ("address", "if (n >= f.N) continue;", ""),
    "unaligned 16 bytes": ("address", " && ld * bytes % 16 == 0", ""),
    "shared memory too small": (
        "address",
        "SHARED(float, parts, [WARPS * ",
        "SHARED(float, parts, [(WARPS - 1) * ",
    ),
    "no barrier behind the sums": ("thread", "    __syncthreads();\n    if (task.slot", "    if (task.slot"),
    "no barrier behind the number": (
        "thread",
        "        __syncthreads();\n        block =",
        "        block =",
    ),
    "no barrier behind the waist": (
        "thread",
        "    __syncthreads();\n    if (threadIdx.x == 0) add_one",
        "    if (threadIdx.x == 0) add_one",
    ),
    "nobody waits for the waist": ("thread", "await(f.counts + MADE, f.waists);", "{}"),
}


# cases of the fuzzer; what the program ends with, or says, where that watch has found something
CASES = {"numbers": 12, "address": 6, "thread": 1}
SAYS = {
    "numbers": ("is wrong", "emulated block"),
    "address": ("AddressSanitizer", "misaligned"),
    "thread": ("data race",),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """By watch: the program with a copy of the kernels for each fault, the first without one."""
    folder, built = tmp_path_factory.mktemp("faults"), {}

    def program(watch):
        if watch not in built:
            of_this = [changes for found_by, *changes in FAULTS.values() if found_by == watch]
            built[watch] = fuzzer_of_faults(folder, watch, [("WARPS", "WARPS"), *of_this])
        return built[watch]

    return program


def ended(program, watch: str, number: int) -> subprocess.CompletedProcess:
    # the blocks in the order that suits the kernel least; for races all of them at once
    blocks = "12" if watch == "thread" else "2"
    return run(program, CASES[watch], number, EMULATED_ORDER="1", EMULATED_BLOCKS=blocks)


@pytest.mark.parametrize("watch", CASES)
def test_no_alarm_where_there_is_no_fault(programs, watch):
    done = ended(programs(watch), watch, 0)
    assert done.returncode == 0 and f"{CASES[watch]} cases" in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(programs, name):
    watch = FAULTS[name][0]
    number = 1 + [other for other in FAULTS if FAULTS[other][0] == watch].index(name)
    done = ended(programs(watch), watch, number)
    assert done.returncode != 0
    assert any(words in done.stdout + done.stderr for words in SAYS[watch])


def test_a_compilers_own_words_come_back(tmp_path):
    with pytest.raises(NotBuilt, match="no_such_name"):
        fuzzer_of_faults(tmp_path, "numbers", [("if (call.M == 0", "if (no_such_name == 0")])

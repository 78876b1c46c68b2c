"""The decoding step of csrc/cuda as nvcc compiles it for sm_80: its PTX executed on the CPU.

What a launch would bring the kernel is the launcher's own, recorded by a build of it for the CPU.
"""

import ctypes
import re
import subprocess

import cuda_builds
import pytest
import torch
from cuda_builds import SOURCE
from cuda_steps import NARROW, WIDE, check, make
from ptx import PtxError, run_ptx
from ptx.launch import Checks

from pefast.native import delta_linear_cuda as hand

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(cuda_builds.WHY_NOT), reason=cuda_builds.WHY_NOT)]

TORCH = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16}
NAMES = {torch.float32: "f", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}

# a sound step takes a tenth of it: then a block waits for one that never comes
MOST_STEPS = 30_000


class Recorded(ctypes.Structure):
    """A launch that on_host.h wrote down instead of running it."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("wanted", "blocks", "threads", "bytes")),
        ("step", ctypes.c_char * 4096),
    )


class OnPtx:
    """Stands for the library of the kernels: the launcher says what to launch, and PTX runs."""

    def __init__(self, emulated: ctypes.CDLL, text: str, tiles: int):
        self.emulated, self.text, self.tiles = emulated, text, tiles

    def pefast_delta_linear_decode(self, call: bytes, deltas: bytes, stream: int) -> int:
        """Runs one step; 0, or the error of the launcher."""
        launch = Recorded.in_dll(self.emulated, "emulated_launch")
        launch.wanted, launch.blocks = 1, 0
        error = self.emulated.pefast_delta_linear_decode(call, deltas, stream)
        launch.wanted = 0
        if error or not launch.blocks:
            return error
        tensors, dtype = arguments(call, deltas)
        step = ctypes.string_at(ctypes.addressof(launch) + Recorded.step.offset, launch.bytes)
        name, blocks = f"decodeI{NAMES[dtype]}Li{self.tiles}E", launch.blocks
        checks = Checks(most_steps=MOST_STEPS)
        given = [(step, tensors)]
        run_ptx(self.text, name, (blocks,), (launch.threads,), given, checks=checks, blocks_at_once=blocks)
        return 0


def arguments(call: bytes, deltas: bytes) -> tuple[list[torch.Tensor], torch.dtype]:
    """Every tensor that a call has the address of, and the dtype of x."""
    x, w, bias, gain, ids, y, h, counts, m, n, k, ldx, ldw, type_, fp32_bias, fp32_gain, *_ = (
        hand._CALL.unpack(call)
    )
    dtype, slots = TORCH[type_], 0
    found = [matrix(x, m, k, ldx, dtype), matrix(w, n, k, ldw, dtype), matrix(y, m, n, n, dtype)]
    for a, b, lda, ldb, rank, fp32_a, fp32_b, *_ in hand._DELTA.iter_unpack(deltas):
        found += [
            matrix(a, rank, k, lda, torch.float32 if fp32_a else dtype),
            matrix(b, n, rank, ldb, torch.float32 if fp32_b else dtype),
        ]
        slots += -(-rank // 32) * 32
    for vector, length, wide in ((bias, n, fp32_bias), (gain, n, fp32_gain)):
        found.append(matrix(vector, 1, length, length, torch.float32 if wide else dtype))
    found.append(matrix(ids, 1, m, m, torch.int64))
    found += [matrix(h, m, slots, slots, torch.float32), matrix(counts, 1, 3, 3, torch.int32)]
    return [t for t in found if t is not None], dtype


def matrix(address: int, rows: int, columns: int, ld: int, dtype: torch.dtype) -> torch.Tensor | None:
    """The tensor at an address."""
    if not address or not rows * columns:
        return None
    many = (rows - 1) * ld + columns
    bytes_ = (ctypes.c_ubyte * (many * dtype.itemsize)).from_address(address)
    return torch.frombuffer(bytes_, dtype=dtype).as_strided((rows, columns), (ld, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory, nvcc):
    """The launcher for the CPU, and the kernels' PTX."""
    folder = tmp_path_factory.mktemp("ptx")
    words = ("-std=c++17", "-O3", "-ptx", "-arch=sm_80", str(SOURCE), "-o", str(folder / "decode.ptx"))
    subprocess.run([nvcc, *words], check=True, timeout=300)
    return ctypes.CDLL(str(cuda_builds.library(folder))), (folder / "decode.ptx").read_text()


@pytest.fixture
def step(made, monkeypatch):
    """One decoding step by the launcher of the hand, its kernel by PTX; `change` plants a fault."""
    monkeypatch.setattr(hand, "_device", "cpu")
    emulated, text = made

    def run(call, processors=NARROW, change=None):
        tiles = 4 if processors == WIDE and call.x.dtype is not torch.float32 else 2
        library = OnPtx(emulated, change(text) if change else text, tiles)
        monkeypatch.setattr(hand, "library", lambda: (library, ""))
        monkeypatch.setattr(hand, "_processors", lambda device: processors)
        with torch.no_grad():
            y, _ = hand.forward(call)
        assert not any(counts.any() for counts in hand._counts.values())
        return y

    return run


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("name", ["each its own", "ragged", "no rows"])
def test_a_step_as_the_formula_says(step, name, dtype):
    check(step, make(name, dtype))


def test_wide_blocks_and_long_rows(step):
    # K takes the loop that looks ahead, and both that follow it
    for masters in (None, torch.float32):
        call = make("long", torch.bfloat16, masters)
        assert torch.equal(check(step, call, WIDE), check(step, call, NARROW))
    check(step, make("long", torch.float32))


def kernel_alone(text: str) -> tuple[int, int]:
    """Where the kernel for narrow blocks in bf16 stands in the module."""
    begin = re.search(r"\.entry \w*decodeI13__nv_bfloat16Li2E", text).start()
    return begin, text.index("\n}", begin)


# what a careless compiler or hand might do: the instruction, what stands there, at which place or at all
PLANTED = {
    "no barrier behind the number": (r"bar\.sync\s+0;", "", 0),
    "no barrier behind the sums": (r"bar\.sync\s+0;", "", 1),
    "a barrier for a warp alone": (r"bar\.sync\s+0;", "bar.warp.sync 0xffffffff;", 1),
    "16 bytes too far": (r"(ld\.global\.nc\.v4\.u32\s+\{.*?\}, \[%rd\d+)\]", r"\1+16]", None),
    "rows of x exchanged": (r"(mma\.\S+ \{.*?\}, \{)(%r\d+), (%r\d+)", r"\1\3, \2", None),
    "halves of w exchanged": (r"(mma\.\S+ \{.*?\}, \{.*?\}, \{)(%r\d+), (%r\d+)", r"\1\3, \2", None),
    "a number not stored": (r"st\.global\.u16\s+[^;]*;", "", 0),
    "warps subtracted": (r"add\.f32", "sub.f32", None),
    "blocks not counted": (r"(atom\.add\.\S+ %r\d+, \[%rd\d+\]), 1;", r"\1, 0;", 1),
}


def plant(text: str, pattern: str, instead: str, number: int | None) -> str:
    """The module with that kernel changed."""
    begin, end = kernel_alone(text)
    kernel = text[begin:end]
    found = list(re.finditer(pattern, kernel))
    for match in reversed(found if number is None else found[number : number + 1]):
        kernel = kernel[: match.start()] + match.expand(instead) + kernel[match.end() :]
    assert kernel != text[begin:end]
    return text[:begin] + kernel + text[end:]


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_in_the_ptx_is_found(step, name):
    call = make("long" if "16 bytes" in name else "ragged", torch.bfloat16)

    def faulty(call, processors):
        return step(call, processors, lambda text: plant(text, *PLANTED[name]))

    with pytest.raises((PtxError, AssertionError), match=r"race|bounds|error|not finite|no end in sight"):
        check(faulty, call)

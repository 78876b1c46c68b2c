"""How long a kernel takes with one setting: a model, not a measurement, to choose among those that compile.

    blocks = how many fit on a multiprocessor by registers, shared memory and warps
    waves  = programs / (multiprocessors · blocks), rounded up
    time   = max(waves · blocks · max(FLOP / peak, bytes / cache's rate) of a program, bytes / memory's rate)

FLOPs count whole tiles, also the rows beyond M, for tensor cores compute those too. Bytes of a program are
those that its tiles ask the second cache for.

Sources. Multiprocessors, clocks and memory on a chip: NVIDIA's data sheets. Second cache: 5120 bytes a clock
by the A100's white paper; an H100's is taken to be as wide.
"""

from typing import NamedTuple

from .forms import Rates
from .tuning import Kind

REGISTERS, WARPS = 65536, 64


class Chip(NamedTuple):
    """What a wave is made of."""

    multiprocessors: int
    shared: int  # bytes of one multiprocessor
    cache: float  # bytes a second from the second cache


CHIPS = {
    "H100": Chip(132, 228 << 10, 5120 * 1.755e9),
    "H200": Chip(132, 228 << 10, 5120 * 1.755e9),
    "A100": Chip(108, 164 << 10, 5120 * 1.41e9),
}


class Work(NamedTuple):
    """Of one launch."""

    programs: int
    flops: float  # of a program
    asked: float  # bytes that a program asks the cache for
    moved: float  # bytes between the chip and memory


def work(kind: Kind, setting: dict, m: int, n: int, k: int) -> Work:
    """What a kernel does at these sizes; a walk along k for tiles of m x n, a strip of m for those of n."""
    size, slots, rows = kind.bits // 8, kind.slots, setting["BLOCK_M"]
    there = min(rows, m)
    if kind.kernel == "waist":
        asked = (there * size + slots * 4) * k
        return Work(-(-m // rows), 2 * rows * slots * k, asked, m * k * size)
    if kind.kernel in ("narrow", "down"):
        columns = setting["BLOCK_N" if kind.kernel == "narrow" else "BLOCK_K"]
        across = -(-n // columns)
        strips = max(1, min((128 if kind.kernel == "narrow" else 256) // across, -(-m // rows)))
        high = -(-m // (strips * rows)) * rows
        return Work(across * strips, 4 * high * columns * slots, high * columns * size, m * n * size)
    columns = setting["BLOCK_K" if kind.kernel == "back" else "BLOCK_N"]
    beside = 0 if kind.kernel == "product" else slots
    programs = -(-m // rows) * -(-n // columns)
    flops = 2 * rows * k * (columns + beside) + 2 * rows * columns * slots
    return Work(programs, flops, ((there + columns) * size + beside * 4) * k, (m * (n + k) + n * k) * size)


def blocks(chip: Chip, registers: int, shared: int, warps: int) -> int:
    """How many fit on a multiprocessor at once."""
    return max(1, min(REGISTERS // (registers * 32 * warps), chip.shared // max(1, shared), WARPS // warps))


def seconds(chip: Chip, rates: Rates, at_once: int, done: Work) -> float:
    """By the formula at the head of this file; `at_once` of blocks()."""
    each = max(
        done.flops / (rates.flops / chip.multiprocessors), done.asked / (chip.cache / chip.multiprocessors)
    )
    waves = -(-done.programs // (chip.multiprocessors * at_once))
    # the last wave may be thinner than the others
    full = min(at_once, -(-done.programs // chip.multiprocessors))
    return max(waves * full * each, done.moved / rates.bytes)

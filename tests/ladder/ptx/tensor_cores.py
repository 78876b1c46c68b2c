"""mma.sync: products of one warp's registers, summed in fp32."""

import numpy as np

from .bits import PtxError, as_tf32, from_half, split

_SHAPES = {("bf16", 16), ("bf16", 8), ("f16", 16), ("f16", 8), ("tf32", 8), ("tf32", 4)}
_GROUP, _IN_GROUP = np.arange(32) >> 2, np.arange(32) & 3


def scatter(words, kind, tile, upper):
    """Fill tile [warps, rows, K] with the fragments of `words`, a register after the other.

    16-bit numbers lie in pairs. `upper`: registers alternate between the upper and lower 8 rows before they
    move on along K, as those of the left factor do.
    """
    for number, word in enumerate(words):
        below, along = (number & 1, number >> 1) if upper else (0, number)
        row = _GROUP + 8 * below
        if kind == "tf32":
            tile[:, row, _IN_GROUP + 4 * along] = as_tf32(word)
        else:
            for half, bits in enumerate(split(word)):
                tile[:, row, 2 * _IN_GROUP + half + 8 * along] = from_half(kind)(bits)
    return tile


def _mma(m, i):
    """mma.sync m16n8k…: D [16, 8] = A [16, K] B [K, 8] + C."""
    k = int(next(part for part in i.parts if part.startswith("m16n8k")).removeprefix("m16n8k"))
    into, *kinds = i.parts[-4:]
    if into != "f32" or kinds[2] != "f32" or kinds[0] != kinds[1] or (kinds[0], k) not in _SHAPES:
        raise PtxError("only sums in f32 of bf16, f16 or tf32")
    kind = kinds[0]
    a, b, c = (m.sources(names, "b32") for names in i.operands[1:4])
    outs, warps = [m.sink(name, "b32") for name in i.operands[0]], m.lanes // 32

    def step():
        m.warps("mma.sync")
        left, right = np.zeros((warps, 16, k), np.float32), np.zeros((warps, 8, k), np.float32)
        scatter([read().reshape(-1, 32) for read in a], kind, left, True)
        scatter([read().reshape(-1, 32) for read in b], kind, right, False)
        sums = np.matmul(left, right.swapaxes(1, 2))
        for number, (read, out) in enumerate(zip(c, outs, strict=True)):
            part = sums[:, _GROUP + 8 * (number >> 1), 2 * _IN_GROUP + (number & 1)]
            out((part + read().view(np.float32).reshape(-1, 32)).ravel().view(np.uint32))

    return step


OPERATIONS = {"mma": _mma}

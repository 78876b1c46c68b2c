"""The sizes of tiles that each kernel is launched with.

fp32 products run without tensor cores and hold a tile's whole inner dimension in registers: shorter tiles,
more warps. Every choice passes the ladder's gate (tests/ladder/gate.json): no spills on any target.
"""

import torch

from . import triton

# the widest tile of slots that fits beside a tile of y
MOST_SLOTS = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}


def waist(m: int, dtype, slots: int, dropout: bool) -> dict:
    """Of h: BLOCK_M rows and all slots of a tile."""
    rows = 16 if m <= 16 else 32
    if dtype == torch.float32:
        return _sizes(8, 2, BLOCK_M=rows, BLOCK_K=128 if dropout else 32)
    if slots > 64:
        return _sizes(8, 2, BLOCK_M=rows, BLOCK_K=128)
    return _sizes(4, 3, BLOCK_M=rows, BLOCK_K=128)


def product(m: int, dtype, slots: int, several: bool) -> dict:
    """Of y or dx, beside tiles of `slots` slots."""
    rows = 16 if m <= 16 else 64
    if dtype == torch.float32:
        return _sizes(8, 2, BLOCK_M=rows, BLOCK_N=128, BLOCK_K=32, GROUP_M=8)
    if several or slots > 32:
        return _sizes(8, 3, BLOCK_M=rows, BLOCK_N=128, BLOCK_K=64, GROUP_M=8)
    if m <= 64:
        return _sizes(4, 3, BLOCK_M=rows, BLOCK_N=128, BLOCK_K=64, GROUP_M=8)
    return _sizes(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8)


def whole(m: int, dtype, slots: int) -> dict:
    """Of y with the waist beside it."""
    rows = 16 if m <= 16 else 64
    if dtype == torch.float32:
        return _sizes(8, 2, BLOCK_M=min(rows, 32), BLOCK_N=128, BLOCK_K=32, GROUP_M=8)
    if m <= 64:
        return _sizes(4, 3, BLOCK_M=rows, BLOCK_N=128, BLOCK_K=64, GROUP_M=8)
    return _sizes(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8)


def decode(dtype) -> dict:
    """Of w, for a few rows: three tiles of it on their way to each program."""
    if dtype == torch.float32:
        return _sizes(8, 3, BLOCK_N=128, BLOCK_K=32)
    return _sizes(4, 3, BLOCK_N=128, BLOCK_K=64)


def decode_strips(n: int, k: int, dtype) -> tuple[int, int]:
    """Strips of K so that about 256 programs read w, each no less than 256 wide, and the width of each."""
    block = decode(dtype)
    columns = triton.cdiv(n, block["BLOCK_N"])
    count = max(1, min(256 // max(1, columns), k // 256))
    width = triton.cdiv(triton.cdiv(k, count), block["BLOCK_K"]) * block["BLOCK_K"]
    return triton.cdiv(k, width), width


def back(m: int, dtype, slots: int) -> dict:
    """Of dx with dz beside it, and BLOCK_U columns of db behind."""
    if dtype == torch.float32:
        return _sizes(8, 2, BLOCK_M=16 if m <= 16 else 32, BLOCK_K=128, BLOCK_N=32, BLOCK_U=32, GROUP_M=8)
    rows = 64 if slots <= 16 else 16 if slots <= 32 else 32
    return _sizes(8, 3, BLOCK_M=rows, BLOCK_K=128, BLOCK_N=32, BLOCK_U=64, GROUP_M=8)


def narrow(dtype, slots: int) -> dict:
    """Of dy, for dh and db."""
    if dtype == torch.float32:
        return _sizes(8, 2, BLOCK_M=16, BLOCK_N=128 if slots <= 32 else 64)
    return _sizes(8, 2, BLOCK_M=64 if slots <= 64 else 32, BLOCK_N=256 if slots <= 16 else 128)


def down(dtype, slots: int) -> dict:
    """Of x̂, for da."""
    if dtype == torch.float32:
        return _sizes(8, 2, BLOCK_M=16, BLOCK_K=128)
    return _sizes(4 if slots <= 32 else 8, 2, BLOCK_M=64, BLOCK_K=128)


def chosen(dtype, height: int, width: int) -> dict:
    """Of the chosen entries of dyᵀ x: blocks no larger than a tile of them asks for."""
    blocks = {
        name: min(128 if dtype != torch.float32 else 64, max(16, triton.next_power_of_2(size)))
        for name, size in (("BLOCK_N", height), ("BLOCK_K", width))
    }
    rows = 32 if dtype == torch.float32 else 64
    return _sizes(8 if blocks["BLOCK_N"] * blocks["BLOCK_K"] >= 4096 else 4, 2, BLOCK_M=rows, **blocks)


def sampled(dtype) -> dict:
    """Of dyᵀ x, of which chosen elements are taken: one tile of it lies in shared memory once."""
    return _sizes(8, 2, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64 if dtype == torch.float32 else 128)


def attention(dtype, d: int, dropout: bool, stages: int = 2) -> dict:
    """Of o or dq: BLOCK_L queries and BLOCK_C keys; a mask wants 128 keys."""
    wide = max(16, triton.next_power_of_2(d))
    if dtype == torch.float32:
        return _sizes(8, 1, BLOCK_L=16, BLOCK_C=128 if dropout else 32, BLOCK_D=wide)
    if dropout:
        return _sizes(4, 1, BLOCK_L=16, BLOCK_C=128, BLOCK_D=wide)
    return _sizes(8 if wide > 64 else 4, stages, BLOCK_L=64, BLOCK_C=64, BLOCK_D=wide)


def attention_keys(dtype, d: int, dropout: bool) -> dict:
    """Of dk and dv."""
    wide = max(16, triton.next_power_of_2(d))
    if dtype == torch.float32:
        return _sizes(8, 1, BLOCK_L=16, BLOCK_C=128 if dropout else 32, BLOCK_D=wide)
    rows = 16 if dropout else 32 if wide > 64 else 64
    return _sizes(8, 1, BLOCK_L=rows, BLOCK_C=128 if dropout or wide <= 64 else 64, BLOCK_D=wide)


def strips(m: int, columns: int, block_m: int, programs: int) -> tuple[int, int]:
    """Strips of rows so that columns * strips is about `programs`, and the rows of each, whole tiles.

    The cut depends on the sizes alone: the same bits on every GPU.
    """
    count = max(1, min(programs // max(1, columns), triton.cdiv(m, block_m)))
    rows = max(1, triton.cdiv(triton.cdiv(m, count), block_m)) * block_m
    return triton.cdiv(m, rows), rows


def _sizes(warps: int, stages: int, **blocks: int) -> dict:
    return {**blocks, "num_warps": warps, "num_stages": stages}

"""The sizes of tiles that each kernel is launched with: delta_linear's from tuning.py, the others here.

fp32 products run without tensor cores and hold a tile's whole inner dimension in registers: shorter tiles,
more warps. Every choice passes the ladder's gate (tests/ladder/gate.json): no spills on any target.
"""

import functools

import torch
from torch import Tensor

from . import triton, tuning

# the widest tile of slots that fits beside a tile of y
MOST_SLOTS = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}


def waist(x: Tensor, slots: int, dropout: bool) -> dict:
    """Of h: BLOCK_M rows and all slots of a tile."""
    return _tuned("waist", x, x.shape[1], slots, dropout)


def product(x: Tensor, n: int, slots: int, several: bool) -> dict:
    """Of y or dx, beside tiles of `slots` slots."""
    return _tuned("product", x, n, max(64, slots) if several else slots)


def whole(x: Tensor, n: int, slots: int) -> dict:
    """Of y with the waist beside it."""
    return _tuned("whole", x, n, slots)


def back(dy: Tensor, k: int, slots: int, dropout: bool) -> dict:
    """Of dx with dz beside it, and BLOCK_U columns of db behind."""
    return _tuned("back", dy, k, slots, dropout)


def narrow(dy: Tensor, slots: int) -> dict:
    """Of dy, for dh and db."""
    return _tuned("narrow", dy, dy.shape[1], slots)


def down(x: Tensor, slots: int) -> dict:
    """Of x̂, for da."""
    return _tuned("down", x, x.shape[1], slots)


def _tuned(kernel: str, x: Tensor, n: int, slots: int, dropout: bool = False) -> dict:
    device = _name(x.device.index) if x.is_cuda else ""
    return tuning.settings(kernel, device, x.shape[0], n, x.shape[1], 8 * x.element_size(), slots, dropout)


@functools.lru_cache(maxsize=64)
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def decode(dtype) -> dict:
    """Of w, for a few rows: three tiles of it on their way to each program."""
    return _sizes(8, 3, BLOCK_N=128, BLOCK_K=16 if dtype == torch.float32 else 64)


def decode_strips(n: int, k: int, dtype) -> tuple[int, int]:
    """Strips of K so that about 256 programs read w, each no less than 256 wide, and the width of each."""
    block = decode(dtype)
    columns = triton.cdiv(n, block["BLOCK_N"])
    count = max(1, min(256 // max(1, columns), k // 256))
    width = triton.cdiv(triton.cdiv(k, count), block["BLOCK_K"]) * block["BLOCK_K"]
    return triton.cdiv(k, width), width


def chosen(dtype, height: int, width: int) -> dict:
    """Of the chosen entries of dyᵀ x: blocks no larger than a tile of them asks for."""
    blocks = {
        name: min(128 if dtype != torch.float32 else 64, max(16, triton.next_power_of_2(size)))
        for name, size in (("BLOCK_N", height), ("BLOCK_K", width))
    }
    rows = 16 if dtype == torch.float32 else 64
    return _sizes(8 if blocks["BLOCK_N"] * blocks["BLOCK_K"] >= 4096 else 4, 2, BLOCK_M=rows, **blocks)


def sampled(dtype) -> dict:
    """Of dyᵀ x, of which chosen elements are taken: one tile of it lies in shared memory once."""
    return _sizes(8, 2, BLOCK_M=32, BLOCK_N=64, BLOCK_K=64 if dtype == torch.float32 else 128)


def attention(dtype, d: int, dropout: bool, stages: int = 2) -> dict:
    """Of o or dq: BLOCK_L queries and BLOCK_C keys; in bf16 and fp16 a mask wants 128 keys."""
    wide = max(16, triton.next_power_of_2(d))
    if dtype == torch.float32:
        return _attention_fp32(wide)
    if dropout:
        return _sizes(4, 1, BLOCK_L=16, BLOCK_C=128, BLOCK_D=wide)
    # on the way back 64 keys of 128 numbers spill on gfx942
    keys = 32 if wide > 64 and stages == 1 else 64
    return _sizes(8 if wide > 64 else 4, stages, BLOCK_L=64, BLOCK_C=keys, BLOCK_D=wide)


def _attention_fp32(wide: int) -> dict:
    """Of all three: 16 keys of 128 numbers, for 32 spill 66 to 190 values on the way back.

    Without a limit ptxas spills 2 to 6 of them so that more blocks fit; AMD's compiler knows no limit.
    """
    limit = {} if torch.version.hip else {"maxnreg": 255}
    return _sizes(8, 1, BLOCK_L=16, BLOCK_C=32 if wide <= 64 else 16, BLOCK_D=wide) | limit


def attention_keys(dtype, d: int, dropout: bool) -> dict:
    """Of dk and dv."""
    wide = max(16, triton.next_power_of_2(d))
    if dtype == torch.float32:
        return _attention_fp32(wide)
    if dropout and wide > 64:
        # 128 keys spill; of 64, half of the numbers for a mask are made for nothing
        return _sizes(8, 1, BLOCK_L=32, BLOCK_C=64, BLOCK_D=wide)
    rows = 16 if dropout else 32 if wide > 64 else 64
    return _sizes(8, 1, BLOCK_L=rows, BLOCK_C=128 if dropout or wide <= 64 else 64, BLOCK_D=wide)


def strips(m: int, columns: int, block_m: int, programs: int) -> tuple[int, int]:
    """Strips of rows so that columns * strips is about `programs`, and the rows of each, whole tiles.

    The cut depends on the sizes and the tile alone, not on the GPU's multiprocessors.
    """
    count = max(1, min(programs // max(1, columns), triton.cdiv(m, block_m)))
    rows = max(1, triton.cdiv(triton.cdiv(m, count), block_m)) * block_m
    return triton.cdiv(m, rows), rows


def _sizes(warps: int, stages: int, **blocks: int) -> dict:
    return {**blocks, "num_warps": warps, "num_stages": stages}

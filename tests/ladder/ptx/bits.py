"""PTX's types as numpy's, and the roundings that numpy lacks."""

import numpy as np

TYPES = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "tf32": np.uint32,
    "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
SIZES = {kind: np.dtype(type_).itemsize for kind, type_ in TYPES.items()}
# what a register or a place in memory of so many bytes is kept as
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
HALVES = ("f16", "bf16", "f16x2", "bf16x2")


class PtxError(RuntimeError):
    """What the machine cannot run, or must not."""


def from_bf16(bits):
    """bfloat16 as uint16 to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values):
    """float32 to bfloat16 as uint16, to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_half(kind):
    """The function from 16 bits of f16 or bf16 to float32."""
    return from_bf16 if kind.startswith("b") else lambda bits: bits.view(np.float16).astype(np.float32)


def to_half(kind):
    """The function from float32 to 16 bits of f16 or bf16."""
    return to_bf16 if kind.startswith("b") else lambda values: values.astype(np.float16).view(np.uint16)


def split(words):
    """The low and the high 16 bits of 32."""
    return (words & np.uint32(0xFFFF)).astype(np.uint16), (words >> np.uint32(16)).astype(np.uint16)


def join(low, high):
    """32 bits of two times 16."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def as_tf32(words):
    """What a tensor core sees of a float32: the upper 19 bits."""
    return (words & np.uint32(0xFFFFE000)).view(np.float32)

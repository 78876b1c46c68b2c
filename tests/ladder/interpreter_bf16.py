"""Makes triton's interpreter right in bf16. install() before the first kernel runs; for tests only.

The interpreter of triton 3.6 to 3.9 keeps a bf16 as its bits in a uint16 and lets numpy add and multiply
those as integers, and a cast from fp32 cuts the lower bits off; nothing complains. Here every operation
decodes to fp32, computes, and rounds to nearest even, as sm_80 and later do; a dot has exact terms and an
fp32 sum. Reductions and scans of bf16 raise: a kernel should sum in fp32.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)


def decode(bits):
    """fp32 of bf16 bits."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << 16
    return wide.view(np.float32).reshape(np.shape(bits))


def encode(values, cut=False):
    """bf16 bits of fp32, rounded to nearest even, or cut off."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = bits >> 16 if cut else (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    # rounding could carry a NaN's bits into infinity
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _values(handle):
    return decode(handle.data) if _is_bf16(handle) else handle.data


def _bf16(values):
    return interpreter.TensorHandle(encode(values), tl.bfloat16)


def _cast_impl(original, self, source, target_type):
    kind, target = source.dtype.scalar, target_type.scalar
    if target == tl.bfloat16 and kind != tl.bfloat16:
        return _bf16(source.data.astype(np.float32))
    if kind == tl.bfloat16 and target != tl.bfloat16:
        wide = interpreter.TensorHandle(decode(source.data), tl.float32)
        return wide if target == tl.float32 else original(self, wide, target_type)
    return original(self, source, target_type)


def _create_fp_to_fp(original, self, source, target_type, rounding):
    kind, target = source.dtype.scalar, target_type.scalar
    cut = rounding == interpreter._ir.ROUNDING_MODE.RTZ
    if kind == tl.bfloat16 and target == tl.float32:
        return interpreter.TensorHandle(decode(source.data), tl.float32)
    if target == tl.bfloat16 and kind in (tl.float32, tl.float16, tl.float64):
        return interpreter.TensorHandle(encode(source.data.astype(np.float32), cut), tl.bfloat16)
    if kind == tl.float32 and target == tl.float16 and not cut:
        return interpreter.TensorHandle(source.data.astype(np.float16), tl.float16)
    return original(self, source, target_type, rounding)


def _binary_op(original, self, left, right, op):
    if not _is_bf16(left) or op in BITWISE:
        return original(self, left, right, op)
    out = op(decode(left.data), _values(right))
    return interpreter.TensorHandle(out, left.dtype.scalar) if out.dtype == bool else _bf16(out)


def _unary_op(original, self, arg, op):
    return _bf16(op(decode(arg.data))) if _is_bf16(arg) else original(self, arg, op)


def _ternary_op(original, self, a, b, c, op):
    if op is np.where or not _is_bf16(c):
        return original(self, a, b, c, op)
    return _bf16(op(_values(a), _values(b), _values(c)))


def _create_fma(original, self, a, b, c):
    if not _is_bf16(c):
        return original(self, a, b, c)
    return _bf16(_values(a).astype(np.float64) * _values(b) + _values(c))


def _create_dot(original, self, a, b, total, *rest):
    if a.dtype.scalar not in (tl.bfloat16, tl.float16):
        return original(self, a, b, total, *rest)
    if total.data.dtype != np.float32:
        raise NotImplementedError("tl.dot of 16-bit inputs without an fp32 sum")
    product = np.matmul(_values(a).astype(np.float32), _values(b).astype(np.float32))
    return interpreter.TensorHandle(product + total.data, total.dtype.scalar)


def _no_bf16(original, self, arg, *rest, **settings):
    for part in arg if isinstance(arg, tuple) else (arg,):
        if _is_bf16(part.handle):
            raise NotImplementedError("a reduction or scan of bf16; fp32 would be right")
    return original(self, arg, *rest, **settings)


BUILDER = (_cast_impl, _create_fp_to_fp, _binary_op, _unary_op, _ternary_op, _create_fma, _create_dot)


def install() -> None:
    """Patch the interpreter of this process, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "knows_bf16", False):
        return
    builder.knows_bf16 = True
    builder.get_bf16 = lambda self, value: _bf16(np.array([value]))
    for patch in BUILDER:
        _wrap(builder, patch.__name__[1:], patch)
    for cls, name in ((interpreter.ReduceOps, "sum"), (interpreter.ReduceOps, "min_max")):
        _wrap(cls, name, _no_bf16)
    for name in ("cumsum", "cumprod"):
        _wrap(interpreter.ScanOps, name, _no_bf16)


def _wrap(cls, name, patch):
    original = getattr(cls, name)

    @functools.wraps(original)
    def patched(*args, **settings):
        return patch(original, *args, **settings)

    setattr(cls, name, patched)

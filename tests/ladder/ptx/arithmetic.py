"""Numbers in registers: sums, products, comparisons. Each builder gives the step that one instruction is."""

import functools

import numpy as np

from .bits import HALVES, SIZES, TYPES, PtxError, from_bf16, from_half, join, split, to_half

_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def plain(count, compute):
    """Builder of an instruction whose `count` sources and result have the instruction's type."""

    def build(m, i):
        kind = i.kind
        if kind in HALVES:
            return _of_halves(m, i, kind, count, compute)
        sources, out = m.sources(i.operands[1 : 1 + count], kind), m.sink(i.operands[0], kind)
        type_ = TYPES[kind]

        def step():
            value = compute(*(read() for read in sources))
            out(value if value.dtype == type_ else value.astype(type_))

        return step

    return build


def _of_halves(m, i, kind, count, compute):
    """Two or one 16-bit numbers a register: computed in float64, so that a product and a sum round once."""
    decode, encode = from_half(kind), to_half(kind)
    two = kind.endswith("x2")
    sources, out = (
        m.sources(i.operands[1 : 1 + count], "b32" if two else "b16"),
        m.sink(i.operands[0], "b32" if two else "b16"),
    )

    def one(*words):
        return encode(compute(*(decode(word).astype(np.float64) for word in words)).astype(np.float32))

    def step():
        words = [read() for read in sources]
        if two:
            pairs = [split(word) for word in words]
            out(join(one(*(pair[0] for pair in pairs)), one(*(pair[1] for pair in pairs))))
        else:
            out(one(*words))

    return step


def _mul(m, i):
    if "wide" in i.parts:
        return _wide(m, i, None)
    if "hi" in i.parts:
        return plain(2, functools.partial(_high, i.kind))(m, i)
    return plain(2, lambda x, y: x * y)(m, i)


def _high(kind, x, y):
    """The upper half of a product of integers."""
    if kind in _WIDER:
        wide = TYPES[_WIDER[kind]]
        return (x.astype(wide) * y.astype(wide)) >> wide(8 * SIZES[kind])
    products = [(int(one) * int(other)) >> 64 for one, other in zip(x, y, strict=True)]
    return np.array([product & (2**64 - 1) for product in products], np.uint64).view(TYPES[kind])


def _mad(m, i):
    if "cc" in i.parts:
        raise PtxError("carries are not kept")
    if "wide" in i.parts:
        return _wide(m, i, i.operands[3])
    if "hi" in i.parts:
        return plain(3, lambda x, y, z: _high(i.kind, x, y).astype(z.dtype) + z)(m, i)
    return plain(3, lambda x, y, z: x * y + z)(m, i)


def _wide(m, i, addend):
    """A product, or product and sum, twice as wide as its factors."""
    wide = _WIDER[i.kind]
    type_ = TYPES[wide]
    x, y, out = m.source(i.operands[1], i.kind), m.source(i.operands[2], i.kind), m.sink(i.operands[0], wide)
    z = m.source(addend, wide) if addend else lambda: type_(0)
    return lambda: out(x().astype(type_) * y().astype(type_) + z())


def _add(m, i):
    if "cc" in i.parts:
        raise PtxError("carries are not kept")
    return plain(2, np.add)(m, i)


def _fma(x, y, z):
    # in float64 the product is exact, so that the sum rounds once
    return x.astype(np.float64) * y + z


def _divide(x, y):
    if x.dtype.kind == "f":
        return x / y
    y = np.where(y == 0, 1, y).astype(x.dtype)
    return (x - np.fmod(x, y)) // y


def _remainder(x, y):
    return np.fmod(x, np.where(y == 0, 1, y).astype(x.dtype))


def _extreme(of_numbers, with_nan, of_integers):
    def build(m, i):
        if i.kind[0] in "fb" and i.kind not in ("b16", "b32", "b64"):
            return plain(2, with_nan if "NaN" in i.parts else of_numbers)(m, i)
        return plain(2, of_integers)(m, i)

    return build


def _select(m, i):
    kind = f"b{8 * SIZES[i.kind]}"
    (x, y), which = m.sources(i.operands[1:3], kind), m.source(i.operands[3], "pred")
    out = m.sink(i.operands[0], kind)
    return lambda: out(np.where(which(), x(), y()))


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_COMBINE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _set_predicate(m, i):
    """setp: a comparison, perhaps joined with another predicate; perhaps its opposite too."""
    kind, compare = i.kind, _comparison(i.parts[1], i.kind)
    if kind in ("f16x2", "bf16x2"):
        raise PtxError("no comparison of pairs")
    join_with = next((part for part in i.parts[2:-1] if part in _COMBINE), None)
    x, y = m.sources(i.operands[1:3], kind)
    other = m.predicate(i.operands[3]) if join_with else None
    outs = [m.sink(name, "pred") for name in i.operands[0].split("|")]

    def step():
        one, two = (x(), y()) if kind != "bf16" else (from_bf16(x()), from_bf16(y()))
        found = compare(one, two)
        for out, value in zip(outs, (found, ~found), strict=False):
            out(_COMBINE[join_with](value, other()) if join_with else value)

    return step


def _comparison(name, kind):
    def unordered(x, y):
        return np.isnan(x) | np.isnan(y)

    if name in ("nan", "num"):
        return unordered if name == "nan" else lambda x, y: ~unordered(x, y)
    floating = kind[0] == "f" or kind == "bf16"
    if name in _COMPARE:
        plain = _COMPARE[name]
        return (lambda x, y: plain(x, y) & ~unordered(x, y)) if name == "ne" and floating else plain
    plain = _COMPARE[name.removesuffix("u")]
    return lambda x, y: plain(x, y) | unordered(x, y)


def _negate(m, i):
    if i.kind in HALVES:
        kind = "b32" if i.kind.endswith("x2") else "b16"
        sign = TYPES[kind](0x80008000 if kind == "b32" else 0x8000)
        read, out = m.source(i.operands[1], kind), m.sink(i.operands[0], kind)
        return lambda: out(read() ^ sign)
    return plain(1, np.negative)(m, i)


def _copysign(m, i):
    sign, size = m.sources(i.operands[1:3], i.kind)
    out = m.sink(i.operands[0], i.kind)
    return lambda: out(np.copysign(size(), sign()))


OPERATIONS = {
    "add": _add, "sub": plain(2, np.subtract), "mul": _mul, "mad": _mad, "fma": plain(3, _fma),
    "div": plain(2, _divide), "rem": plain(2, _remainder), "neg": _negate, "abs": plain(1, np.abs),
    "min": _extreme(np.fmin, np.minimum, np.minimum), "max": _extreme(np.fmax, np.maximum, np.maximum),
    "selp": _select, "setp": _set_predicate, "copysign": _copysign,
    "ex2": plain(1, np.exp2), "lg2": plain(1, np.log2), "rcp": plain(1, np.reciprocal),
    "sqrt": plain(1, np.sqrt), "rsqrt": plain(1, lambda x: 1 / np.sqrt(x)), "tanh": plain(1, np.tanh),
    "sin": plain(1, np.sin), "cos": plain(1, np.cos),
}  # fmt: skip

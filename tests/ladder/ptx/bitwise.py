"""Bits in registers: shifts, permutations, moves, and conversions between types."""

import numpy as np

from .arithmetic import plain
from .bits import SIZES, TYPES, WORDS, PtxError, as_tf32, from_bf16, join, to_bf16, to_half


def _shift(m, i):
    """shl and shr: counts from the width on leave nothing, or the sign."""
    kind, width, left = i.kind, 8 * SIZES[i.kind], i.parts[0] == "shl"
    x, count, out = m.source(i.operands[1], kind), m.source(i.operands[2], "u32"), m.sink(i.operands[0], kind)
    type_ = TYPES[kind]

    def step():
        value, by = x(), count()
        few = np.minimum(by, width - 1).astype(type_)
        moved = value << few if left else value >> few
        out(moved if kind[0] == "s" and not left else np.where(by < width, moved, type_(0)))

    return step


def _funnel(m, i):
    """shf: 32 bits out of 64."""
    low, high, count = m.sources(i.operands[1:4], "u32")
    out, left, wraps = m.sink(i.operands[0], "u32"), i.parts[1] == "l", "wrap" in i.parts

    def step():
        both = low().astype(np.uint64) | (high().astype(np.uint64) << np.uint64(32))
        by = (count() & np.uint32(31) if wraps else np.minimum(count(), 32)).astype(np.uint64)
        out((((both << by) >> np.uint64(32)) if left else both >> by).astype(np.uint32))

    return step


def _extract(m, i):
    """bfe: a run of bits, with its sign where the type has one."""
    kind = i.kind
    wide = np.int64 if kind[0] == "s" else np.uint64
    x, (first, length), out = (
        m.source(i.operands[1], kind),
        m.sources(i.operands[2:4], "u32"),
        m.sink(i.operands[0], kind),
    )

    def step():
        value, count = x().astype(wide) >> np.minimum(first(), 63).astype(wide), length().astype(wide)
        if kind[0] == "u":
            value = value & ((wide(1) << count) - wide(1))
        else:
            value = np.where(count == 0, 0, (value << (wide(64) - count)) >> (wide(64) - count))
        out(value.astype(TYPES[kind]))

    return step


def _insert(m, i):
    """bfi: a run of bits put into another number."""
    type_ = TYPES[i.kind]
    (x, y), (first, length) = m.sources(i.operands[1:3], i.kind), m.sources(i.operands[3:5], "u32")
    out = m.sink(i.operands[0], i.kind)

    def step():
        at = first().astype(np.uint64)
        mask = (((np.uint64(1) << length().astype(np.uint64)) - np.uint64(1)) << at).astype(type_)
        out((y() & ~mask) | ((x().astype(np.uint64) << at).astype(type_) & mask))

    return step


def _permute(m, i):
    """prmt: four bytes chosen among eight."""
    if i.kind != "b32":
        raise PtxError(f"no permutation of the kind {i.kind}")
    low, high, choice = m.sources(i.operands[1:4], "u32")
    out = m.sink(i.operands[0], "b32")

    def step():
        both, chosen = low().astype(np.uint64) | (high().astype(np.uint64) << np.uint64(32)), choice()
        found = np.zeros_like(chosen)
        for place in range(4):
            which = (chosen >> np.uint32(4 * place)) & np.uint32(15)
            byte = (
                (both >> ((which & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)
            ).astype(np.uint32)
            # the fourth bit of a choice asks for the sign of the byte
            byte = np.where(which & np.uint32(8), np.where(byte & np.uint32(128), 255, 0), byte).astype(
                np.uint32
            )
            found = found | (byte << np.uint32(8 * place))
        out(found)

    return step


def _lookup(m, i):
    """lop3: any function of three bits."""
    table = int(i.operands[4], 0)
    sources, out = m.sources(i.operands[1:4], "b32"), m.sink(i.operands[0], "b32")

    def step():
        x, y, z = (read() for read in sources)
        found = np.zeros_like(x)
        for row in range(8):
            if table >> row & 1:
                found = found | ((x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z))
        out(found)

    return step


def _bits(compute):
    """Builder of an instruction that counts bits of a number into 32."""

    def build(m, i):
        x, out = m.source(i.operands[1], i.kind), m.sink(i.operands[0], "u32")
        width = 8 * SIZES[i.kind]
        return lambda: out(np.array([compute(int(value), width) for value in x()], np.uint32))

    return build


def _reverse(m, i):
    x, out, width = m.source(i.operands[1], i.kind), m.sink(i.operands[0], i.kind), 8 * SIZES[i.kind]
    return lambda: out(np.array([int(f"{int(v):0{width}b}"[::-1], 2) for v in x()], TYPES[i.kind]))


def _move(m, i):
    """mov: also of several registers into one wide one, and back."""
    into, given = i.operands
    if isinstance(given, tuple):
        return _pack(m, into, given, i.kind)
    if isinstance(into, tuple):
        return _unpack(m, into, given, i.kind)
    read, out = m.source(given, i.kind), m.sink(into, i.kind)
    return lambda: out(read())


def _pack(m, into, given, kind):
    word, each = WORDS[SIZES[kind]], 8 * SIZES[kind] // len(given)
    reads, out = m.sources(given, f"b{each}"), m.sink(into, kind)

    def step():
        found = reads[0]().astype(word)
        for place, read in enumerate(reads[1:], 1):
            found = found | (read().astype(word) << word(each * place))
        out(found)

    return step


def _unpack(m, into, given, kind):
    word, each = WORDS[SIZES[kind]], 8 * SIZES[kind] // len(into)
    read, outs = m.source(given, f"b{8 * SIZES[kind]}"), [m.sink(name, f"b{each}") for name in into]

    def step():
        value = read()
        for place, out in enumerate(outs):
            out((value >> word(each * place)).astype(WORDS[each // 8]))

    return step


_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(m, i):
    wanted, given = i.parts[-2:]
    mode = next((part for part in i.parts[1:-2] if part[0] == "r" and part != "relu"), "rn")
    if mode not in ("rn", "rz", "rna", *_TO_INTEGER):
        raise PtxError(f"no rounding {mode}")
    if wanted in ("bf16x2", "f16x2"):
        return _convert_pair(m, i, wanted, mode)
    read, out = m.source(i.operands[1], given), m.sink(i.operands[0], "b32" if wanted == "tf32" else wanted)
    if wanted == "tf32":
        return lambda: out(_to_tf32(read().view(np.uint32), mode))
    saturates = "sat" in i.parts and wanted[0] == "f"

    def step():
        value = from_bf16(read()) if given == "bf16" else read()
        if wanted == "bf16":
            out(_truncated(value) if mode == "rz" else to_bf16(value.astype(np.float32)))
            return
        if value.dtype.kind == "f" and mode in _TO_INTEGER:
            value = _TO_INTEGER[mode](value)
        if value.dtype.kind == "f" and wanted[0] in "su":
            value = _clipped(value, TYPES[wanted])
        value = value.astype(TYPES[wanted])
        out(np.clip(value, 0, 1) if saturates else value)

    return step


def _clipped(value, type_):
    """A rounded float as an integer: nearest where it does not fit, 0 where it is no number."""
    most = np.iinfo(type_)
    inside = (value > most.min) & (value < most.max)
    found = np.where(inside, value, 0).astype(type_)
    found = np.where(value >= most.max, type_(most.max), found)
    return np.where(value <= most.min, type_(most.min), found)


def _convert_pair(m, i, wanted, mode):
    if mode == "rz" and wanted == "f16x2":
        raise PtxError("no truncation to f16")
    encode = _truncated if mode == "rz" else to_half(wanted)
    (high, low), out = m.sources(i.operands[1:3], "f32"), m.sink(i.operands[0], "b32")
    relu = (lambda x: np.maximum(x, np.float32(0))) if "relu" in i.parts else (lambda x: x)
    return lambda: out(join(encode(relu(low())), encode(relu(high()))))


def _truncated(value):
    return (np.ascontiguousarray(value, np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _to_tf32(bits, mode):
    step = np.uint32(0x1000) if mode == "rna" else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return as_tf32(bits + step).view(np.uint32)


OPERATIONS = {
    "and": plain(2, np.bitwise_and), "or": plain(2, np.bitwise_or), "xor": plain(2, np.bitwise_xor),
    "not": plain(1, np.invert), "shl": _shift, "shr": _shift, "shf": _funnel, "bfe": _extract,
    "bfi": _insert, "prmt": _permute, "lop3": _lookup, "brev": _reverse,
    "popc": _bits(lambda value, width: value.bit_count()),
    "clz": _bits(lambda value, width: width - value.bit_length()),
    "cvt": _convert, "mov": _move,
}  # fmt: skip

"""Instructions that move between registers and memory: ld, st, atom, red, cp.async, ldmatrix, stmatrix."""

import operator
import re

import numpy as np

from .bits import HALVES, SIZES, TYPES, WORDS, PtxError, from_half, join, split, to_half
from .memory import SHARED_WINDOW

_MATRICES = {"x1": 1, "x2": 2, "x4": 4}
_SPACES = ("global", "shared", "param", "const", "local")
# 8 by 8 matrices are read and written 16 bytes a lane
_ROW = 16


def _space(i) -> str:
    """The memory that an instruction names, or "" for a generic address."""
    for part in i.parts[1:]:
        for space in _SPACES:
            if part == space or part.startswith(f"{space}::"):
                return space
    return ""


def _count(i) -> int:
    """Registers of a vector."""
    return next((int(part[1]) for part in i.parts if re.fullmatch(r"v[248]", part)), 1)


def touches_shared(i) -> bool:
    """Whether an instruction may read or write shared memory."""
    if i.parts[0] in ("ld", "st", "atom", "red"):
        return _space(i) in ("shared", "")
    return i.parts[0] in ("ldmatrix", "stmatrix") or (i.parts[0] == "cp" and len(i.operands) > 2)


def access_bytes(i) -> int:
    """Bytes that one lane touches at once."""
    if i.parts[0] == "cp":
        return int(i.operands[2], 0)
    return _ROW if "matrix" in i.parts[0] else min(16, SIZES[i.kind] * _count(i))


def _route(m, addresses, space):
    """Whether the active lanes' addresses are shared ones; those addresses; those lanes."""
    lanes = m.lane if m.everyone else m.lane[m.active]
    addresses = addresses if m.everyone else addresses[m.active]
    if space:
        return space == "shared", addresses, lanes
    shared = addresses >= SHARED_WINDOW
    if shared.any() and not shared.all():
        raise PtxError("one instruction reaches both global and shared memory")
    return bool(shared.any()), addresses - (SHARED_WINDOW if shared.any() else 0), lanes


def _convert_address(m, i):
    """cvta: between an address of shared memory and a generic one."""
    read, out = m.source(i.operands[1], "u64"), m.sink(i.operands[0], "u64")
    # parameters lie in global memory here
    if not any(part.startswith("shared") for part in i.parts):
        return lambda: out(read())
    window = np.uint64(SHARED_WINDOW)
    return (lambda: out(read() - window)) if "to" in i.parts else (lambda: out(read() + window))


def _load(m, i):
    space, count, kind = _space(i), _count(i), i.kind
    names = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
    outs, size = [m.sink(name, kind) for name in names], SIZES[kind]
    if space == "param" and i.operands[1].base in m.parameters:
        return _load_parameter(m, i, outs, size)
    if space in ("const", "local"):
        raise PtxError(f"no {space} memory")
    address, type_ = m.address(i.operands[1]), TYPES[kind]

    def step():
        shared, addresses, lanes = _route(m, address(), space)
        if shared:
            words = m.shared.load(addresses, lanes, size, count)
        else:
            words = m.memory.load(addresses, size, count)
        for column, out in enumerate(outs):
            value = words[:, column]
            if not m.everyone:
                value, part = np.zeros(m.lanes, WORDS[size]), value
                value[m.active] = part
            out(np.ascontiguousarray(value).view(type_))

    return step


def _load_parameter(m, i, outs, size):
    address = i.operands[1]
    bytes_ = m.parameters[address.base][0][address.offset :]
    values = np.frombuffer(bytes_[: size * len(outs)], WORDS[size]).view(TYPES[i.kind])
    columns = [m.constant(value, values.dtype) for value in values]

    def step():
        for out, column in zip(outs, columns, strict=True):
            out(column)

    return step


def _store(m, i):
    space, size = _space(i), SIZES[i.kind]
    if space in ("param", "local"):
        raise PtxError(f"no stores to {space} memory")
    names = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)
    reads, address = m.sources(names, f"b{8 * size}"), m.address(i.operands[0])

    def step():
        shared, addresses, lanes = _route(m, address(), space)
        values = [read() for read in reads]
        words = np.stack([value if m.everyone else value[m.active] for value in values], 1)
        if shared:
            m.shared.store(addresses, lanes, words)
        else:
            m.memory.store(addresses, words)

    return step


_ATOMIC = {
    "add": operator.add, "max": max, "min": min, "exch": lambda old, new: new, "and": operator.and_,
    "or": operator.or_, "xor": operator.xor, "inc": lambda old, new: 0 if old >= new else old + 1,
}  # fmt: skip


def _atomic(m, i):
    """atom and red, lane after lane."""
    returns = i.parts[0] == "atom"
    place, given = i.operands[returns], i.operands[returns + 1]
    kind = i.kind
    name = next(part for part in i.parts[1:] if part in _ATOMIC or part == "cas")
    if kind in HALVES or isinstance(given, tuple):
        if name != "add" or returns:
            raise PtxError("an atomic on halves or vectors only adds, and returns nothing")
        return _add_in_order(m, i, place, given, kind)
    read, address, space = m.source(given, kind), m.address(place), _space(i)
    swapped = m.source(i.operands[returns + 2], kind) if name == "cas" else None
    out = m.sink(i.operands[0], kind) if returns else None

    def step():
        memory, index, lanes = _places(m, address(), space, TYPES[kind])
        found, value = np.zeros(m.lanes, TYPES[kind]), read()
        for at, lane in zip(index, lanes, strict=True):
            old = found[lane] = memory[at]
            if swapped:
                memory[at] = swapped()[lane] if old == value[lane] else old
            else:
                memory[at] = _ATOMIC[name](old, value[lane])
        if out:
            out(found)

    return step


def _places(m, addresses, space, type_):
    """Memory as an array of numbers, the indices that the active lanes mean, and those lanes."""
    shared, addresses, lanes = _route(m, addresses, space)
    memory, index = m.shared.words(addresses, lanes, type_) if shared else m.memory.words(addresses, type_)
    return memory, index, lanes


def _add_in_order(m, i, place, given, kind):
    """red.add of halves, pairs of halves or a vector of numbers."""
    names = given if isinstance(given, tuple) else (given,)
    size, space, address = SIZES[kind], _space(i), m.address(place)
    reads, halves = m.sources(names, kind if kind not in HALVES else f"b{8 * size}"), kind in HALVES
    decode, encode = from_half(kind), to_half(kind)

    def add(old, new):
        if not halves:
            return old + new
        if size == 2:
            return encode(decode(old) + decode(new))
        pairs = zip(split(old), split(new), strict=True)
        return join(*(encode(decode(one) + decode(other)) for one, other in pairs))

    def step():
        for column, read in enumerate(reads):
            value, type_ = read(), WORDS[size] if halves else TYPES[kind]
            memory, index, lanes = _places(m, address() + column * size, space, type_)
            for at, lane in zip(index, lanes, strict=True):
                memory[at : at + 1] = add(memory[at : at + 1], value[lane : lane + 1])

    return step


def _copy(m, i):
    """cp.async: taken at once, there at the wait. What it promises counts for each lane by itself."""
    if i.parts[1] != "async" or {"bulk", "mbarrier"} & set(i.parts):
        raise PtxError("copies by the tensor memory accelerator, and mbarrier, are not built")
    if "commit_group" in i.parts:
        return lambda: _commit(m)
    if "wait_all" in i.parts:
        return lambda: (_commit(m), _wait(m, 0))[0]
    if "wait_group" in i.parts:
        return lambda: _wait(m, int(i.operands[0], 0))
    total, into, given = int(i.operands[2], 0), m.address(i.operands[0]), m.address(i.operands[1])
    # a fourth operand says how many bytes to take, the rest is zero; a cache policy may stand there too
    sized = len(i.operands) > 3 and "cache_hint" not in i.parts[-1] and "L2::cache_hint" not in i.parts
    bytes_ = m.source(i.operands[3], "u32") if sized or len(i.operands) > 4 else None

    def step():
        addresses, lanes = given()[m.active], m.lane[m.active]
        offsets = m.shared.begin_copy(into()[m.active], lanes, total)
        data = np.zeros((lanes.size, total), np.uint8)
        taken = bytes_()[m.active] if bytes_ else np.full(lanes.size, total)
        for size in np.unique(taken[taken > 0]):
            these = taken == size
            if size & (size - 1):
                words = [m.memory.load(addresses[these] + at, 1, 1, "cp.async")[:, 0] for at in range(size)]
                data[these, :size] = np.stack(words, 1)
            else:
                data[these, :size] = m.memory.load(addresses[these], 1, int(size), "cp.async")
        m.copies.append((lanes, offsets, data, m.committed[lanes]))

    return step


def _commit(m):
    m.committed[m.active] += 1


def _wait(m, left):
    """Land what the active lanes committed, but for their last `left` groups."""
    limits, kept = np.where(m.active, m.committed - left, -1), []
    for lanes, offsets, data, numbers in m.copies:
        ready = numbers < limits[lanes]
        if ready.any():
            m.shared.land(offsets[ready], lanes[ready], data[ready])
        if not ready.all():
            kept.append((lanes[~ready], offsets[~ready], data[~ready], numbers[~ready]))
    m.copies = kept


def _load_matrices(m, i):
    """ldmatrix: 8 by 8 matrices of 16 bits; lane l names row l, and gets two neighbours of row l // 4."""
    count, transposed = _MATRICES[next(part for part in i.parts if part in _MATRICES)], "trans" in i.parts
    if i.kind != "b16" or "m8n8" not in i.parts:
        raise PtxError("only matrices of 8 by 8 16-bit numbers")
    outs, address = [m.sink(name, "b32") for name in i.operands[0]], m.address(i.operands[1])

    def step():
        whole = m.warps("ldmatrix")
        lanes = m.lane.reshape(-1, 32)[whole, : 8 * count].ravel()
        words = m.shared.load(address()[lanes], lanes, 2, 8, "ldmatrix")
        rows = np.zeros((whole.size, count, 8, 8), np.uint16)
        rows[whole] = words.reshape(-1, count, 8, 8)
        rows = rows.swapaxes(2, 3) if transposed else rows
        pairs = np.ascontiguousarray(rows).reshape(-1, count, 32, 2).view(np.uint32)[..., 0]
        for number, out in enumerate(outs):
            out(np.ascontiguousarray(pairs[:, number]).ravel())

    return step


def _store_matrices(m, i):
    """stmatrix: the way back of ldmatrix."""
    count, transposed = _MATRICES[next(part for part in i.parts if part in _MATRICES)], "trans" in i.parts
    if i.kind != "b16" or "m8n8" not in i.parts:
        raise PtxError("only matrices of 8 by 8 16-bit numbers")
    reads, address = m.sources(i.operands[1], "b32"), m.address(i.operands[0])

    def step():
        whole = m.warps("stmatrix")
        words = np.stack([read().reshape(-1, 32) for read in reads], 1)[whole]
        rows = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        rows = np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows)
        lanes = m.lane.reshape(-1, 32)[whole, : 8 * count].ravel()
        m.shared.store(address()[lanes], lanes, rows.reshape(-1, 8), "stmatrix")

    return step


OPERATIONS = {
    "cvta": _convert_address, "ld": _load, "ldu": _load, "st": _store, "atom": _atomic, "red": _atomic,
    "cp": _copy, "ldmatrix": _load_matrices, "stmatrix": _store_matrices,
}  # fmt: skip

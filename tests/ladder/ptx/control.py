"""Branches, barriers, votes, and what passes between the lanes of a warp.

A step that ends a lane's straight walk returns where to go, BARRIER or EXIT; all others return None.
"""

import numpy as np

from .bits import PtxError

BARRIER, EXIT = -1, -2


def _branch(m, i):
    if i.parts[1:] not in ((), ("uni",)):
        raise PtxError("only plain branches")
    target = m.kernel.labels[i.operands[0]]
    return lambda: target


def _exit(m, i):
    return lambda: EXIT


def _trap(m, i):
    def step():
        raise PtxError("trap: the kernel stopped itself")

    return step


def _barrier(m, i):
    if "warp" in i.parts:
        return _nothing(m, i)
    if {"arrive", "red", "cluster"} & set(i.parts):
        raise PtxError("only a barrier at which all wait")
    if len(i.operands) > 1 and int(i.operands[1], 0) != m.threads:
        raise PtxError(f"a barrier of {i.operands[1]} threads in a block of {m.threads}")
    return lambda: BARRIER


def _nothing(m, i):
    return lambda: None


def _fence(m, i):
    if not ("proxy" in i.parts and any(part.startswith("async") for part in i.parts)):
        return _nothing(m, i)
    return lambda: m.shared.fence(m.lane[m.active])


def _zero(m, i):
    out = m.sink(i.operands[0], i.kind)
    zero = m.constant(0, np.uint64)
    return lambda: out(zero)


def _active_mask(m, i):
    out, powers = m.sink(i.operands[0], "u32"), 1 << np.arange(32, dtype=np.uint64)

    def step():
        masks = (m.active.reshape(-1, 32) * powers).sum(1).astype(np.uint32)
        out(np.repeat(masks, 32))

    return step


def _vote(m, i):
    read, ballot, powers = (
        m.predicate(i.operands[1]),
        "ballot" in i.parts,
        1 << np.arange(32, dtype=np.uint64),
    )
    if "uni" in i.parts:
        raise PtxError("no vote for being of one mind")
    out = m.sink(i.operands[0], "b32" if ballot else "pred")

    def step():
        said, here = read().reshape(-1, 32), m.active.reshape(-1, 32)
        if ballot:
            out(np.repeat(((said & here) * powers).sum(1).astype(np.uint32), 32))
        elif "all" in i.parts:
            out(np.repeat((said | ~here).all(1), 32))
        else:
            out(np.repeat((said & here).any(1), 32))

    return step


def _shuffle(m, i):
    """shfl.sync: a register of another lane; lanes that would look outside their segment keep their own."""
    outs = i.operands[0].split("|")
    mode, lane, warp = i.parts[2], m.lane % 32, m.lane // 32 * 32
    value, by, bounds = m.sources(i.operands[1:4], "b32")
    out = m.sink(outs[0], "b32")
    found = m.sink(outs[1], "pred") if len(outs) > 1 else None

    def step():
        m.warps("shfl.sync")
        step_, limits = by().astype(np.int64) & 31, bounds().astype(np.int64)
        clamp, segment = limits & 31, (limits >> 8) & 31
        last = (lane & segment) | (clamp & ~segment)
        at = {
            "up": lane - step_,
            "down": lane + step_,
            "bfly": lane ^ step_,
            "idx": (lane & segment) | (step_ & ~segment),
        }[mode]
        inside = at >= last if mode == "up" else at <= last
        out(value()[warp + np.where(inside, at, lane)])
        if found:
            found(inside)

    return step


def _warp_reduce(m, i):
    """redux.sync: one number of all lanes of a warp."""
    reduce = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[i.parts[2]]  # fmt: skip
    read, out = m.source(i.operands[1], i.kind), m.sink(i.operands[0], i.kind)

    def step():
        m.warps("redux.sync")
        value = read()
        out(np.repeat(reduce.reduce(value.reshape(-1, 32), 1, dtype=value.dtype), 32))

    return step


def _elect(m, i):
    """elect.sync: the first lane of each warp."""
    outs = i.operands[0].split("|")
    lane, chosen = m.sink(outs[0], "b32"), m.sink(outs[1], "pred")

    def step():
        m.warps("elect.sync")
        lane(m.constant(0, np.uint32))
        chosen(m.lane % 32 == 0)

    return step


OPERATIONS = {
    "bra": _branch, "ret": _exit, "exit": _exit, "trap": _trap, "bar": _barrier, "barrier": _barrier,
    "membar": _nothing, "fence": _fence, "prefetch": _nothing, "griddepcontrol": _nothing,
    "nanosleep": _nothing, "createpolicy": _zero, "activemask": _active_mask, "vote": _vote,
    "shfl": _shuffle, "redux": _warp_reduce, "elect": _elect,
}  # fmt: skip

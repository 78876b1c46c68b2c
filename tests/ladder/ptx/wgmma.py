"""wgmma of sm_90a: products of four warps, read from shared memory by descriptors, there at their wait.

A descriptor names a tile's first byte, two strides and a swizzle. Rows along K ("K-major") lie in groups of
eight, of 16, 32, 64 or 128 bytes each; the swizzle exchanges 16-byte pieces of what those groups cover.
"""

import re
from typing import NamedTuple

import numpy as np

from .bits import PtxError, as_tf32, from_half
from .memory import SEVERAL
from .tensor_cores import scatter

# bytes of a swizzled row by the descriptor's two upper bits
_SWIZZLED = {0: 16, 1: 128, 2: 64, 3: 32}
_GROUP, _IN_GROUP = np.arange(32) >> 2, np.arange(32) & 3


class _Pending(NamedTuple):
    """Products that some lanes have begun and not waited for."""

    values: dict  # accumulator: its bits on every lane
    lanes: np.ndarray  # bool
    numbers: np.ndarray  # of each lane's group
    reads: list  # (warp group, cells) of shared memory


class Products:
    """What is under way, and the registers that must not be touched meanwhile."""

    def __init__(self, machine):
        self.machine, self.pending = machine, []
        self.committed = np.zeros(machine.lanes, np.int64)
        instructions = [i for i in machine.kernel.instructions if i.opcode.startswith("wgmma.mma_async")]
        accumulators = {name for i in instructions for name in i.operands[0]}
        factors = {name for i in instructions if isinstance(i.operands[1], tuple) for name in i.operands[1]}
        self.names = accumulators | factors
        self.newest, self.busy, self.unfenced = {}, {}, set()

    def checked(self, name):
        """A function that reads a register, and fails where its value is not there yet."""
        registers = self.machine.registers

        def read():
            self._refuse(name, "reads")
            return registers[name]

        return read

    def note_write(self, name):
        """An ordinary instruction writes a register that products use."""
        self._refuse(name, "writes")
        self.unfenced.add(name)

    def _refuse(self, name, does):
        if name in self.busy and (self.busy[name] & self.machine.active).any():
            raise PtxError(f"waits: an instruction {does} {name}, on which a wgmma is under way")

    def current(self, name):
        """The bits of an accumulator, as the next product of the chain sees it."""
        return self.newest[name] if name in self.newest else self.machine.registers[name]

    def fence(self):
        """wgmma.fence: registers written so far may be used."""
        self.unfenced.clear()

    def begin(self, values, factors, reads):
        """Products of the active lanes are under way."""
        m = self.machine
        late = self.unfenced & (values.keys() | factors)
        if late and m.checks.fences:
            raise PtxError(f"async proxy: {min(late)} was written and no wgmma.fence came before the wgmma")
        self.newest.update(values)
        self.pending.append(_Pending(values, m.active.copy(), self.committed.copy(), reads))
        self._count()

    def commit(self):
        """wgmma.commit_group."""
        self.committed[self.machine.active] += 1

    def wait(self, left):
        """wgmma.wait_group: all but the last `left` groups of the active lanes are there."""
        m, kept = self.machine, []
        for one in self.pending:
            ready = one.lanes & m.active & (one.numbers < self.committed - left)
            for name, value in one.values.items() if ready.any() else ():
                m.registers[name] = np.where(ready, value, m.registers[name])
            reads = []
            for group, cells in one.reads:
                if ready[128 * group]:
                    self._read(group, cells)
                else:
                    reads.append((group, cells))
            if (one.lanes & ~ready).any():
                kept.append(one._replace(lanes=one.lanes & ~ready, reads=reads))
        self.pending = kept
        self._count()

    def _read(self, group, cells):
        """The products of a warp group have read these cells by now."""
        books, lane = self.machine.shared, 128 * group
        books.async_readers[cells] -= 1
        # four warps read together: whoever writes needs a barrier
        books.note_read(cells, SEVERAL, books.epoch[lane], "wgmma reads")

    def _count(self):
        self.busy = {}
        for one in self.pending:
            for name in one.values:
                self.busy[name] = self.busy[name] | one.lanes if name in self.busy else one.lanes
        self.newest = {name: value for name, value in self.newest.items() if name in self.busy}


def _addresses(descriptor, rows, columns, size, along_k):
    """Bytes at which the elements [rows, columns] of a tile begin; columns run along K."""
    start, leading, stride = (((descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
    swizzle = descriptor >> 62
    width = _SWIZZLED[swizzle]
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    if along_k:
        piece = 16 // size
        inside = column * size if swizzle else column % piece * size + column // piece * leading
        places = row // 8 * stride + row % 8 * width + inside
    else:
        each = width // size
        far, near = (leading, stride) if swizzle else (stride, leading)
        places = row % each * size + row // each * far + column % 8 * width + column // 8 * near
    places = start + places
    return places ^ (((places >> 7) & (width // 16 - 1)) << 4) if swizzle else places


def _wgmma(m, i):
    what = i.parts[1]
    if what == "fence":
        return m.products.fence
    if what == "commit_group":
        return m.products.commit
    if what == "wait_group":
        return lambda: m.products.wait(int(i.operands[0], 0))
    return _Product(m, i).step


class _Product:
    """wgmma.mma_async: D [64, N] = ±A ±B (+ D)."""

    def __init__(self, m, i):
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4])
        self.m, self.kind = m, i.parts[-1]
        self.size = 4 if self.kind == "tf32" else 2
        if not shape or i.parts[5] != "f32" or self.kind not in ("bf16", "f16", "tf32"):
            raise PtxError("only sums in f32 of bf16, f16 or tf32")
        self.n, self.k = int(shape[1]), int(shape[2])
        self.into, left, right, added, *flags = i.operands
        self.from_registers = isinstance(left, tuple)
        self.factors = set(left) if self.from_registers else set()
        self.left = [m.source(name, "b32") for name in left] if self.from_registers else m.source(left, "u64")
        self.right, self.added = m.source(right, "u64"), m.source(added, "pred")
        numbers = [int(flag, 0) for flag in flags]
        self.signs = np.float32(numbers[0]), np.float32(numbers[1])
        # 1 where a factor's rows lie along its other side; a factor in registers has no such flag
        turned = numbers[2:] if not self.from_registers else [0, *numbers[2:]]
        self.along_k = [not flag for flag in [*turned, 0, 0][:2]]
        for name in self.into:
            m.source(name, "b32")

    def step(self):
        m = self.m
        m.warps("wgmma")
        groups = m.active.reshape(-1, 128)
        if (groups.any(1) != groups.all(1)).any():
            raise PtxError("divergence: wgmma in a part of a warp group")
        old = np.stack([m.products.current(name) for name in self.into]).view(np.float32)
        new, added, reads = old.copy(), self.added(), []
        descriptors = self.right(), None if self.from_registers else self.left()
        for group in np.nonzero(groups.all(1))[0]:
            lanes = slice(128 * group, 128 * group + 128)
            right = self._tile(int(descriptors[0][lanes][0]), self.n, self.along_k[1], group, reads)
            if self.from_registers:
                words = [read()[lanes].reshape(4, 32) for read in self.left]
                left = scatter(words, self.kind, np.zeros((4, 16, self.k), np.float32), True).reshape(
                    64, self.k
                )
            else:
                left = self._tile(int(descriptors[1][lanes][0]), 64, self.along_k[0], group, reads)
            sums = (self.signs[0] * left) @ (self.signs[1] * right).T
            # number j of lane 4g + t of warp w: row 16w + g + 8(j // 2 % 2), column 8(j // 4) + 2t + j % 2
            parts = sums.reshape(4, 2, 8, self.n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(-1, 128)
            new[:, lanes] = np.where(added[lanes], old[:, lanes], np.float32(0)) + parts
        values = dict(zip(self.into, new.view(np.uint32), strict=True))
        m.products.begin(values, self.factors, reads)

    def _tile(self, descriptor, rows, along_k, group, reads):
        """A factor [rows, K] from shared memory, and the note that it is being read."""
        books, lane = self.m.shared, 128 * group
        places = _addresses(descriptor, rows, self.k, self.size, along_k)
        if (places < 0).any() or (places + self.size > books.size).any():
            raise PtxError(f"bounds: wgmma reads shared memory at byte {int(places.max())} of {books.size}")
        places = places + books.base[lane]
        cells = np.unique(places // books.grain)
        if books.unfenced[cells].any() and self.m.checks.fences:
            raise PtxError("async proxy: wgmma reads what threads wrote, with no fence.proxy.async between")
        books.note_read(cells, SEVERAL, books.epoch[lane], "wgmma reads")
        books.async_readers[cells] += 1
        reads.append((int(group), cells))
        if self.kind == "tf32":
            return as_tf32(books.bytes.view(np.uint32)[places // 4])
        return from_half(self.kind)(books.bytes.view(np.uint16)[places // 2])


OPERATIONS = {"wgmma": _wgmma}

"""Global and shared memory, with the books that say who may touch what."""

import numpy as np

from .bits import WORDS, PtxError

# where shared memory begins among generic addresses, far above what a process has
SHARED_WINDOW = 1 << 60
# bytes between two buffers that belong to nobody
GAP = 256
NOBODY, SEVERAL = -1, -2


class GlobalMemory:
    """Copies of storages under their own addresses, so that pointers in tables and structures stay right.

    Between the copies lie gaps that belong to nobody.
    """

    def __init__(self):
        self.end = GAP
        self.places = {}  # address of a storage: (where its copy begins, its bytes)
        self.owned = {}  # address of a storage: which bytes belong to elements

    def place(self, storage: np.ndarray, elements: np.ndarray) -> int:
        """The address of a storage; `storage` are its bytes, `elements` says which may be touched."""
        key = storage.__array_interface__["data"][0]
        if key not in self.places:
            # as far from a round place as the original is, for wide accesses
            begin = -(-self.end // GAP) * GAP + key % GAP
            self.places[key], self.owned[key] = (begin, storage), np.zeros(storage.size, bool)
            self.end = begin + storage.size + GAP
        self.owned[key] |= elements
        return key

    def open(self) -> None:
        """Take copies of every storage."""
        size = -(-self.end // GAP) * GAP
        self.bytes, self.valid = np.zeros(size, np.uint8), np.zeros(size, bool)
        for key, (begin, storage) in self.places.items():
            self.bytes[begin : begin + storage.size] = storage
            self.valid[begin : begin + storage.size] = self.owned[key]
        self.starts = np.array(sorted(self.places), np.int64)
        found = [self.places[key] for key in sorted(self.places)]
        self.begins = np.array([begin for begin, _ in found], np.int64)
        self.sizes = np.array([storage.size for _, storage in found], np.int64)

    def close(self) -> None:
        """Give every storage back what its copy holds."""
        for begin, storage in self.places.values():
            storage[:] = self.bytes[begin : begin + storage.size]

    def load(self, addresses: np.ndarray, size: int, count: int, what: str = "load") -> np.ndarray:
        """`count` words of `size` bytes at each address [lanes, count]."""
        rows = self._rows(addresses, size * count, what)
        return self.bytes.reshape(-1, size * count)[rows].view(WORDS[size])

    def store(self, addresses: np.ndarray, words: np.ndarray) -> None:
        """Words [lanes, count] to each address."""
        total = words.shape[1] * words.itemsize
        rows, kept = self._rows(addresses, total, "store"), self.bytes.reshape(-1, total)
        data = np.ascontiguousarray(words).view(np.uint8)
        kept[rows] = data
        if (kept[rows] != data).any():
            raise PtxError("race: lanes store different values to one global address")

    def words(self, addresses: np.ndarray, kind: type) -> tuple[np.ndarray, np.ndarray]:
        """Memory as an array of `kind`, and the indices of the addresses in it: for atomics."""
        size = np.dtype(kind).itemsize
        return self.bytes.view(kind), self._rows(addresses, size, "atomic")

    def _rows(self, addresses, total, what):
        if (addresses % total).any():
            raise PtxError(f"alignment: a global {what} of {total} bytes at {hex(int(addresses[0]))}")
        owner = np.maximum(np.searchsorted(self.starts, addresses, side="right") - 1, 0)
        offsets = addresses - self.starts[owner]
        outside = (offsets < 0) | (offsets + total > self.sizes[owner])
        rows = np.where(outside, 0, offsets + self.begins[owner]) // total
        outside |= ~self.valid.reshape(-1, total)[rows].all(1)
        if outside.any():
            count = int(outside.sum())
            raise PtxError(f"bounds: a global {what} of {count} lanes outside every tensor's elements")
        return rows


class SharedMemory:
    """What the blocks of a batch keep on chip, one after the other.

    The books count cells of `grain` bytes, the smallest access of the kernel: for each who wrote and who read
    it last and in which epoch. A barrier ends its block's epoch.
    """

    def __init__(self, size: int, blocks: int, threads: int, grain: int):
        self.size, self.grain, self.threads = size, grain, threads
        # whole rows of the widest access
        self.pitch = -(-max(size, 1) // 128) * 128
        self.bytes = np.zeros(self.pitch * blocks, np.uint8)
        cells = self.bytes.size // grain
        lanes = np.arange(blocks * threads)
        self.base, self.warp = lanes // threads * self.pitch, (lanes // 32).astype(np.int32)
        self.epoch = np.zeros(lanes.size, np.int32)
        self.written_at, self.read_at = (np.full(cells, NOBODY, np.int32) for _ in range(2))
        self.writer, self.reader = (np.full(cells, NOBODY, np.int32) for _ in range(2))
        self.known = np.zeros(cells, bool)
        # copies under way into a cell, and wgmma that may be reading it
        self.landing, self.async_readers = (np.zeros(cells, np.int16) for _ in range(2))
        # written by threads and not yet fenced for wgmma
        self.unfenced = np.zeros(cells, bool)

    def barrier(self, lanes) -> None:
        """The blocks of these lanes have met."""
        self.epoch[lanes] += 1

    def fence(self, lanes) -> None:
        """What these lanes' blocks wrote may be read through descriptors."""
        for block in np.unique(self.base[lanes]) // self.grain:
            self.unfenced[block : block + self.pitch // self.grain] = False

    def offsets(self, addresses, lanes, total, what) -> np.ndarray:
        """Where the lanes' addresses are in `bytes`."""
        if (addresses % total).any():
            raise PtxError(f"alignment: a shared {what} of {total} bytes at byte {int(addresses[0])}")
        if (addresses < 0).any() or (addresses + total > self.size).any():
            raise PtxError(f"bounds: a shared {what} at byte {int(addresses.max())} of {self.size}")
        return addresses + self.base[lanes]

    def load(self, addresses, lanes, size, count, what="load") -> np.ndarray:
        """`count` words of `size` bytes at each address [lanes, count]."""
        total = size * count
        offsets = self.offsets(addresses, lanes, total, what)
        self.note_read(*self._cells(offsets, lanes, total))
        return self.bytes.reshape(-1, total)[offsets // total].view(WORDS[size])

    def store(self, addresses, lanes, words, what="store") -> None:
        """Words [lanes, count] to each address."""
        total = words.shape[1] * words.itemsize
        offsets = self.offsets(addresses, lanes, total, what)
        cells, warps, epochs = self._cells(offsets, lanes, total)
        self._refuse_write(cells, warps, epochs)
        self._note_written(cells, warps, epochs)
        rows, kept, data = offsets // total, self.bytes.reshape(-1, total), words.view(np.uint8)
        kept[rows] = data
        if (kept[rows] != data).any():
            raise PtxError("race: lanes store different values to one shared address")

    def words(self, addresses, lanes, kind) -> tuple[np.ndarray, np.ndarray]:
        """Memory as an array of `kind`, and the indices of the addresses in it: for atomics."""
        size = np.dtype(kind).itemsize
        offsets = self.offsets(addresses, lanes, size, "atomic")
        cells, _, _ = self._cells(offsets, lanes, size)
        if not self.known[cells].all():
            raise PtxError("unwritten: an atomic on shared memory that nothing wrote")
        return self.bytes.view(kind), offsets // size

    def begin_copy(self, addresses, lanes, total) -> np.ndarray:
        """A copy may land from now on; where it will."""
        offsets = self.offsets(addresses, lanes, total, "cp.async")
        cells, warps, epochs = self._cells(offsets, lanes, total)
        self._refuse_write(cells, warps, epochs)
        self.landing[cells] += 1
        self.unfenced[cells] = True
        return offsets

    def land(self, offsets, lanes, data) -> None:
        """A copy is there, and its own lanes may read it."""
        cells, warps, epochs = self._cells(offsets, lanes, data.shape[1])
        self.landing[cells] -= 1
        self._note_written(cells, warps, epochs)
        self.bytes.reshape(-1, data.shape[1])[offsets // data.shape[1]] = data

    def note_read(self, cells, warps, epochs, what="a load reads") -> None:
        """A read by these warps."""
        self._refuse(~self.known[cells], cells, f"unwritten: {what}", "that nothing wrote")
        self._refuse(self.landing[cells] > 0, cells, f"waits: {what}", "where a cp.async is under way")
        bad = (self.written_at[cells] == epochs) & (self.writer[cells] != warps)
        self._refuse(bad, cells, f"race: {what}", "that another warp wrote, no barrier between")
        others = (self.read_at[cells] == epochs) & (self.reader[cells] != warps)
        self.read_at[cells] = epochs
        self.reader[cells] = np.where(others, SEVERAL, warps)

    def _refuse_write(self, cells, warps, epochs):
        for at, who, did in ((self.written_at, self.writer, "wrote"), (self.read_at, self.reader, "read")):
            bad = (at[cells] == epochs) & (who[cells] != warps)
            self._refuse(bad, cells, "race: a write to", f"that another warp {did}, no barrier between")
        self._refuse(self.landing[cells] > 0, cells, "waits: a write to", "where a cp.async is under way")
        reading = self.async_readers[cells] > 0
        self._refuse(reading, cells, "waits: a write to", "which a wgmma may still be reading")

    def _refuse(self, bad, cells, does, why):
        if bad.any():
            byte = int(cells[np.argmax(bad)]) * self.grain % self.pitch
            raise PtxError(f"{does} shared memory at byte {byte}, {why}")

    def _note_written(self, cells, warps, epochs):
        self.written_at[cells], self.writer[cells] = epochs, warps
        self.known[cells] = self.unfenced[cells] = True

    def _cells(self, offsets, lanes, total):
        """Cells, warps and epochs of the lanes' accesses."""
        each = total // self.grain
        if each == 1:
            return offsets // self.grain, self.warp[lanes], self.epoch[lanes]
        cells = ((offsets // self.grain)[:, None] + np.arange(each)).ravel()
        return cells, np.repeat(self.warp[lanes], each), np.repeat(self.epoch[lanes], each)

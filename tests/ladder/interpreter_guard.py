"""A check of bounds and races for triton's interpreter, which makes neither. install() once; for tests only.

Every load and store of a kernel is checked, element by element:

    bounds    a lane that is not masked off touches bytes outside the elements of every tensor argument
    race      in one launch two programs touch the same byte, one of them by a store. The interpreter runs
              programs one after another, so such code works there and not on a GPU
"""

import contextlib

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2


class GuardError(RuntimeError):
    """A kernel touched what is not its own."""


class _Storage:
    """One tensor argument's memory: which bytes belong to elements, and which program touched them last."""

    def __init__(self, storage):
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.element = np.zeros(self.size, bool)
        self.writer = np.full(self.size, NOBODY, np.int32)
        self.reader = np.full(self.size, NOBODY, np.int32)

    def add(self, tensor):
        if not tensor.numel():
            return
        index = np.full((), tensor.storage_offset(), np.int64)
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            index = index[..., None] + np.arange(length) * stride
        for byte in range(tensor.element_size()):
            self.element[index.ravel() * tensor.element_size() + byte] = True

    def touch(self, offsets, me, stores):
        """Programs other than `me` whose access to these bytes collides; notes the access."""
        strangers = [self.writer[offsets]] + ([self.reader[offsets]] if stores else [])
        found = [who[(who != NOBODY) & (who != me)] for who in strangers]
        if stores:
            self.writer[offsets] = me
        else:
            before = self.reader[offsets]
            self.reader[offsets] = np.where((before == NOBODY) | (before == me), me, SEVERAL)
        return np.concatenate(found)


_storages: list[_Storage] = []
_paused = False


@contextlib.contextmanager
def paused():
    """Inside, nothing is checked: the books are as large as the tensors."""
    global _paused
    _paused = True
    try:
        yield
    finally:
        _paused = False


def _register(values) -> None:
    """Open the books of one launch for every tensor among its arguments, and those that a table holds."""
    found = {}
    for value in values:
        for tensor in (value, *getattr(value, "holds", ())) if isinstance(value, torch.Tensor) else ():
            storage = tensor.untyped_storage()
            found.setdefault(storage.data_ptr(), _Storage(storage)).add(tensor)
    _storages[:] = sorted(found.values(), key=lambda storage: storage.start)


def _check(builder, pointers, mask, stores) -> None:
    if _paused or not _storages:
        return
    places, mask = np.broadcast_arrays(pointers.data, mask)
    places = places[mask]
    if not places.size:
        return
    width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    (x, y, z), (nx, ny, _) = builder.grid_idx, builder.grid_dim
    me = np.int32((z * ny + y) * nx + x)
    what = "store" if stores else "load"

    starts = np.array([storage.start for storage in _storages], np.uint64)
    owner = np.searchsorted(starts, places, side="right") - 1
    for number in np.unique(owner):
        storage = _storages[max(number, 0)]
        offsets = places[owner == number].astype(np.int64) - storage.start
        inside = (offsets >= 0) & (offsets <= storage.size - width)
        inside &= storage.element[np.where(inside, offsets, 0)]
        if not inside.all():
            raise GuardError(f"bounds: {what} of {(~inside).sum()} elements outside, program {(x, y, z)}")
        if stores and np.unique(offsets).size != offsets.size:
            raise GuardError(f"race: two lanes of program {(x, y, z)} store to one address")
        others = storage.touch(offsets, me, stores)
        if others.size:
            raise GuardError(f"race: {what} of program {(x, y, z)} collides with program number {others[0]}")


def install() -> None:
    """Patch the interpreter of this process, once."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    if getattr(builder, "is_guarded", False):
        return
    builder.is_guarded = True
    load, store = builder.create_masked_load, builder.create_masked_store
    begin = executor._init_args_hst

    def checked_begin(self, args, settings):
        # before the interpreter puts tensors of its own in their place, on the same memory
        if not _paused:
            _register([*args, *settings.values()])
        return begin(self, args, settings)

    def checked_load(self, pointers, mask, *rest):
        _check(self, pointers, mask.data, stores=False)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        _check(self, pointers, mask.data, stores=True)
        return store(self, pointers, value, mask, *rest)

    executor._init_args_hst = checked_begin
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
